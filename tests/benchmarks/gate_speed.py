"""How long the gate takes to answer, beside the least that any server in Python could take, and at a constant rate."""

import json
import os
import random
import select
import socket
import statistics
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

from figures import Figure, Section, percentile
from surroundings import (
    GATE_QUESTION,
    Address,
    CannotMeasure,
    Sidecar,
    ask,
    breach_rule,
    child,
    connect,
    echo,
    receive,
    sidecar,
    threshold_rules,
)

# The gate knows a question again that came in the same bytes; two in turn make it parse each.
VARIED: Final = (GATE_QUESTION, GATE_QUESTION.replace(b"bench", b"other"))
ARRIVALS_A_SECOND: Final = 1000
CONNECTIONS: Final = 16
RULES: Final = 200

Times = list[float]


# One question after another


def measure_questions(folder: Path, prometheus_url: str, *, requests: int, rounds: int) -> Section:
    """The gate against an echo of the same bytes, in turn, both on the same core."""
    rules = breach_rule(interval="1s")
    cores = sorted(os.sched_getaffinity(0))
    with ExitStack() as stack:
        # A wake-up on another core costs several times what an answer does. Left to the scheduler, one server may stand
        # beside the asker and the other not, and the ratio would compare that. Children stay where they are started.
        stack.callback(os.sched_setaffinity, 0, cores)
        os.sched_setaffinity(0, {cores[-1]})
        running = stack.enter_context(sidecar(folder, rules, prometheus_url=prometheus_url))
        running.wait_until_allowed()
        with connect(running.gate["TCP"]) as sock:
            answer = ask(sock, GATE_QUESTION)
        echoes = stack.enter_context(echo(answer, folder))
        figures = []
        for place, core in (("two cores", cores[0]), ("one core", cores[-1])):
            os.sched_setaffinity(0, {core})
            times = _take_turns(running.gate, echoes, len(answer), requests, rounds, stack)
            figures += [figure for way in ("TCP", "Unix") for figure in _compared(way, place, times)]
        os.sched_setaffinity(0, cores)
        figures += _measure_list(running.gate["TCP"], len(answer))
    return Section(
        title="1. Gate decision over loopback HTTP",
        method=f"One keep-alive connection each, one question after the other's answer; a running sidecar and a bare "
        f"uvloop echo of the same {len(answer)} bytes in turn, both on one core, the asker on another (two cores) or "
        f"on it (one core); {rounds} rounds of {requests}. Ratio: gate ÷ echo.",
        figures=figures,
    )


def _take_turns(
    gate: Mapping[str, Address],
    echoes: Mapping[str, Address],
    size: int,
    requests: int,
    rounds: int,
    stack: ExitStack,
) -> dict[tuple[str, str], Times]:
    asked: dict[tuple[str, str], tuple[socket.socket, Sequence[bytes]]] = {}
    for way in ("TCP", "Unix"):
        gate_socket = stack.enter_context(connect(gate[way]))
        asked[way, "echo"] = stack.enter_context(connect(echoes[way])), (GATE_QUESTION,)
        asked[way, "gate"] = gate_socket, (GATE_QUESTION,)
        asked[way, "varied"] = gate_socket, VARIED
    times: dict[tuple[str, str], Times] = {pair: [] for pair in asked}
    for sock, questions in asked.values():
        _ask_in_turn(sock, size, 500, questions)
    for _ in range(rounds):
        for pair, (sock, questions) in asked.items():
            times[pair] += _ask_in_turn(sock, size, requests, questions)
    return times


def _ask_in_turn(sock: socket.socket, size: int, requests: int, questions: Sequence[bytes]) -> Times:
    """Seconds from sending a question to having its whole answer."""
    clock, times = time.perf_counter, []
    for number in range(requests):
        question = questions[number % len(questions)]
        start = clock()
        sock.sendall(question)
        got = len(sock.recv(65536))
        while got < size:
            got += len(sock.recv(65536))
        times.append(clock() - start)
    return times


def _compared(way: str, place: str, times: Mapping[tuple[str, str], Times]) -> list[Figure]:
    figures = []
    for share, name in ((0.5, "p50"), (0.99, "p99")):
        bare, same, varied = (percentile(times[way, kind], share) * 1e6 for kind in ("echo", "gate", "varied"))
        beside = f"gate {same:.1f} µs, echo {bare:.1f} µs"
        aim = 3.0 if name == "p50" else None
        what = f"{way}, {place}, {name}"
        figures.append(Figure(name=what, value=same, unit="µs", note=f"echo {bare:.1f} µs"))
        figures.append(Figure(name=f"{what}: ratio", value=same / bare, unit="×", aim=aim, note=beside))
        figures.append(Figure(name=f"{what}: ratio for varied questions", value=varied / bare, unit="×", aim=aim))
    return figures


def _measure_list(address: Address, size: int) -> list[Figure]:
    """How long a list of 1,000 orders takes, and how long other questions wait meanwhile."""
    order = {"side": "buy", "quantity": "1.5", "position": -40, "position_limit": 800}
    body = json.dumps([{"symbol": f"S{number % 50}", **order} for number in range(1000)]).encode()
    head = f"POST /v1/orders/check HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    took: Times = []

    def ask_lists() -> None:
        with connect(address) as sock:
            for _ in range(5):
                start = time.perf_counter()
                ask(sock, head + body)
                took.append(time.perf_counter() - start)

    waits: Times = []
    with connect(address) as sock:
        asker = threading.Thread(target=ask_lists)
        asker.start()
        while asker.is_alive():
            waits += _ask_in_turn(sock, size, 1, (GATE_QUESTION,))
            time.sleep(0.0005)
        asker.join()
    if len(took) < 5:
        raise CannotMeasure(f"only {len(took)} of 5 lists of orders were answered")
    return [
        Figure(name="list of 1,000 orders, median", value=statistics.median(took) * 1e3, unit="ms"),
        Figure(name="longest wait of another question meanwhile", value=max(waits) * 1e3, unit="ms"),
    ]


# At a constant rate


def measure_arrivals(folder: Path, prometheus_url: str, *, seconds: float, rounds: int) -> Section:
    """The gate at a constant rate, with and without rules to evaluate."""
    names = ("nothing to evaluate", f"{RULES} rules each second", f"bare echo beside {RULES} rules each second")
    times: dict[str, Times] = {name: [] for name in names}
    lags: Times = []
    for turn in range(rounds):
        lags += _load_both(folder, prometheus_url, seconds, times, turn)
    quiet, busy, bare = (percentile(times[name], 0.99) * 1e3 for name in names)
    ratios = [
        Figure(
            name=f"p99 with {RULES} rules ÷ p99 without",
            value=busy / quiet,
            unit="×",
            note=f"{busy - quiet:+.2f} ms, what Prometheus takes of the machine included",
        ),
        Figure(
            name=f"p99 with {RULES} rules ÷ p99 of the echo beside them",
            value=busy / bare,
            unit="×",
            note=f"{busy - bare:+.2f} ms: what evaluating itself adds",
        ),
    ]
    lag = Figure(name="lateness of the generator itself, p99", value=percentile(lags, 0.99) * 1e3, unit="ms")
    return Section(
        title=f"2. Gate at {ARRIVALS_A_SECOND:,} requests a second",
        method=f"Constant arrival rate over {CONNECTIONS} TCP connections from a process of its own, timed from the "
        f"intended moment of sending; {rounds} rounds of {seconds:g} s each in turn.",
        figures=[*(figure for name in names for figure in _spread(name, times[name])), *ratios, lag],
    )


def _load_both(folder: Path, prometheus_url: str, seconds: float, times: dict[str, Times], turn: int) -> Times:
    quiet, busy, bare = times
    lags: Times = []
    # A webhook's rule is never evaluated: the gate is open, and the loop has nothing else to do.
    idle_rule = {"trigger": "webhook", "type": "alertmanager", "match": ['alertname="x"'], "action": "kill"}
    idle = {"groups": [{"name": "idle", "interval": "1s", "rules": [idle_rule]}]}
    with sidecar(folder / f"quiet-{turn}", idle, prometheus_url=prometheus_url) as running:
        lags += _load(running.gate["TCP"], _settled(running), seconds, times[quiet])
    with sidecar(folder / f"busy-{turn}", threshold_rules(RULES), prometheus_url=prometheus_url) as running:
        answer = _settled(running)
        lags += _load(running.gate["TCP"], answer, seconds, times[busy])
        with echo(answer, folder / f"busy-{turn}") as echoes:
            lags += _load(echoes["TCP"], answer, seconds, times[bare])
    return lags


def _settled(running: Sidecar) -> bytes:
    """Wait until the sidecar has started up altogether; returns what the gate answers."""
    running.wait_until_allowed()
    time.sleep(1.5)
    with connect(running.gate["TCP"]) as sock:
        return ask(sock, GATE_QUESTION)


def _load(address: Address, answer: bytes, seconds: float, times: Times) -> Times:
    with child(_generate, address, len(answer), ARRIVALS_A_SECOND, seconds) as pipe:
        taken, late = receive(pipe, seconds=seconds + 20.0)
    times += taken
    return late  # type: ignore[no-any-return]


def _generate(pipe: Connection, address: Address, size: int, rate: int, seconds: float) -> None:
    """Send at exact moments, whatever became of the questions before; `select` waits by the microsecond."""
    sockets = [connect(address) for _ in range(CONNECTIONS)]
    idle, due_of, got = deque(sockets), {}, dict.fromkeys(sockets, 0)
    waiting: deque[float] = deque()
    times, late = [], []
    total, sent = int(rate * seconds), 0
    start = time.perf_counter() + 0.1 + random.random() / rate
    while len(times) < total:
        now = time.perf_counter()
        while sent < total and start + sent / rate <= now:
            waiting.append(start + sent / rate)
            late.append(now - waiting[-1])
            sent += 1
        while waiting and idle:
            sock = idle.popleft()
            due_of[sock] = waiting.popleft()
            sock.sendall(GATE_QUESTION)
        patience = max(start + sent / rate - time.perf_counter(), 0.0) if sent < total else 1.0
        for sock in select.select(list(due_of), [], [], patience)[0]:
            got[sock] += len(sock.recv(65536))
            if got[sock] >= size:
                times.append(time.perf_counter() - due_of.pop(sock))
                got[sock] = 0
                idle.append(sock)
    pipe.send((times, late))
    pipe.poll(5.0)  # the other end closes once it has read all


def _spread(name: str, times: Times) -> list[Figure]:
    at = {share: percentile(times, share) * 1e3 for share in (0.5, 0.99, 0.999)}
    beside = f"p50 {at[0.5]:.3f}, p99.9 {at[0.999]:.2f}, max {max(times) * 1e3:.2f} ms of {len(times)} requests"
    return [Figure(name=f"{name}: p99", value=at[0.99], unit="ms", note=beside)]
