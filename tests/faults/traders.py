"""Sixty-four traders in a process of their own: each asks again as soon as it is answered, and keeps every answer.

Run as a program: `traders.py PORT CONNECTIONS RESULT`, until SIGTERM; writes one JSON list a line to RESULT: asked and
told (monotonic seconds), decision id, decision, reason, state, factor, epoch (None at /gate, which does not tell it).
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

ORDER = b'{"intent":"new","symbol":"AAPL","side":"buy","quantity":1,"position":0}'
CHECK = (
    b"POST /v1/orders/check HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n%b" % (len(ORDER), ORDER)
)
GATE = b"GET /gate HTTP/1.1\r\nHost: localhost\r\n\r\n"


async def trade(port: int, over: asyncio.Event, question: bytes, answers: list[list[Any]]) -> None:
    """Ask over one connection until it is over."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while not over.is_set():
        asked = time.monotonic()
        writer.write(question)
        head = await reader.readuntil(b"\r\n\r\n")
        fields = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
        names = {name.lower(): value.decode() for name, value in fields.items()}
        body = await reader.readexactly(int(names[b"content-length"]))
        told = time.monotonic()
        found = json.loads(body)
        answers.append(
            [
                asked,
                told,
                found.get("decision_id") or names[b"x-killswitch-decision-id"],
                found["decision"],
                found["reason"]["code"],
                found["state"],
                found["position_limit_factor"],
                found.get("epoch"),
            ]
        )
    writer.close()


async def keep(answers: list[list[Any]], result: Path, over: asyncio.Event) -> None:
    """Write the answers out now and then, so that ten minutes of them need no memory."""
    with result.open("w") as file:
        while answers or not over.is_set():
            await asyncio.sleep(0.2)
            kept, answers[:] = answers[:], []
            file.writelines(json.dumps(answer) + "\n" for answer in kept)
            file.flush()


async def main(port: int, connections: int, result: Path) -> None:
    over = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, over.set)
    answers: list[list[Any]] = []
    trading = [trade(port, over, CHECK if number % 2 else GATE, answers) for number in range(connections)]
    await asyncio.gather(*trading, keep(answers, result, over))


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])))
