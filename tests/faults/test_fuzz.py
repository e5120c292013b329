"""Whatever comes from outside, mutated at random for a few seconds each: it is taken or refused, and nothing else."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING

import pytest

from tests.faults.fuzz_targets import TARGETS, seeds

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.slow

SECONDS = 2.0
INTERESTING = [
    b"",
    b"\0",
    b"\xff",
    b"\r\n",
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b",",
    b":",
    b"0",
    b"-1",
    b"1e999",
    b"NaN",
    b"null",
]
INTERESTING += [
    b"true",
    b"99999999999999999999",
    b"\xf0\x9f\x98\x80",
    b"\\ud800",
    b"&a",
    b"*a",
    b"!!",
    b"${A}",
    b" " * 100,
]
INTERESTING += [
    b"cancel",
    b"Content-Length: 5",
    b"Transfer-Encoding: chunked",
    b"\n- ",
    b"\n  ",
    b"{" * 2000,
    b"[" * 2000,
]


def mutated(examples: list[bytes], chance: random.Random) -> Iterator[bytes]:
    """The examples themselves, then for ever: cut, repeated, joined, overwritten at a few places."""
    yield from examples
    while True:
        data = bytearray(chance.choice(examples))
        for _ in range(chance.choice([1, 1, 1, 2, 4, 8])):
            begin = chance.randrange(len(data) + 1)
            end = min(len(data), begin + chance.choice([0, 0, 1, 1, 2, 8, 64]))
            other = chance.choice(examples)
            at = chance.randrange(len(other) + 1)
            data[begin:end] = chance.choice(
                [
                    chance.choice(INTERESTING),
                    chance.randbytes(chance.choice([1, 2, 4])),
                    bytes(data[begin:end]) * 2,
                    other[at : at + chance.choice([1, 8, 64])],
                    bytes(byte ^ 1 << chance.randrange(8) for byte in data[begin:end]),
                ]
            )
        yield bytes(data)


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_but_a_refusal_comes_of_bytes_that_nobody_meant(name: str, times: int) -> None:
    seed = 7391 if times == 1 else time.time_ns()
    target, over, tried = TARGETS[name], time.monotonic() + SECONDS * times, 0
    for data in mutated(seeds()[name], random.Random(seed)):
        try:
            target(data)
        except Exception as error:
            error.add_note(f"seed {seed}, input {tried}: {data!r}")
            raise
        tried += 1
        if time.monotonic() > over:
            break
    print(f"\n{name}: {tried} inputs")
    assert tried > len(seeds()[name])
