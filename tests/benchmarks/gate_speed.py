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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
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
ARRIVALS_A_SECOND: Final = (1000, 2000)
AIMED_P99_MS: Final = {1000: 2.5, 2000: 5.4}
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
        aim = 2.0 if name == "p50" else None
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
    """The gate at constant rates, with and without rules to evaluate, and as fast as it can."""
    lags: Times = []
    times: dict[tuple[str, int], Times] = {(name, rate): [] for rate in ARRIVALS_A_SECOND for name in _LOADED}
    throughput: dict[str, Times] = {"gate": [], "echo": []}
    for turn in range(rounds):
        lags += _load_all(folder, prometheus_url, seconds, times, throughput, turn)
    gate, echo = (statistics.median(throughput[name]) for name in ("gate", "echo"))
    figures = [figure for rate in ARRIVALS_A_SECOND for figure in _at_rate(rate, times)]
    figures += [
        Figure(
            name=f"saturation: answers a second, {CONNECTIONS} connections",
            value=gate,
            unit="/s",
            note=_range(throughput["gate"]),
        ),
        Figure(name="saturation: echo ÷ gate", value=echo / gate, unit="×", note=f"echo {echo:.0f} a second"),
        Figure(name="lateness of the generator itself, p99", value=percentile(lags, 0.99) * 1e3, unit="ms"),
    ]
    return Section(
        title="2. Gate at a constant rate, and at its limit",
        method=f"Constant arrival rate over {CONNECTIONS} TCP connections from a process of its own, timed from the "
        f"intended moment of sending; {rounds} rounds of {seconds:g} s each in turn; /metrics is scraped each second "
        f"meanwhile. Saturation: a process asks without a pause for {SATURATION_SECONDS:g} s beside {RULES} rules.",
        figures=figures,
    )


_QUIET, _BUSY, _BARE = _LOADED = ("nothing to evaluate", f"{RULES} rules each second", f"echo beside {RULES} rules")
SATURATION_SECONDS: Final = 2.0


def _at_rate(rate: int, times: Mapping[tuple[str, int], Times]) -> list[Figure]:
    aims = {_BUSY: AIMED_P99_MS[rate]}
    p99 = {name: percentile(times[name, rate], 0.99) * 1e3 for name in _LOADED}
    return [
        *(_spread(f"{rate:,}/s, {name}", times[name, rate], aims.get(name)) for name in _LOADED),
        Figure(
            name=f"{rate:,}/s, p99 with {RULES} rules ÷ p99 without",
            value=p99[_BUSY] / p99[_QUIET],
            unit="×",
            note=f"{p99[_BUSY] - p99[_QUIET]:+.2f} ms, what Prometheus takes of the machine included",
        ),
        Figure(
            name=f"{rate:,}/s, p99 with {RULES} rules ÷ p99 of the echo beside them",
            value=p99[_BUSY] / p99[_BARE],
            unit="×",
            note=f"{p99[_BUSY] - p99[_BARE]:+.2f} ms: what evaluating itself adds",
        ),
    ]


def _load_all(
    folder: Path,
    prometheus_url: str,
    seconds: float,
    times: dict[tuple[str, int], Times],
    throughput: dict[str, Times],
    turn: int,
) -> Times:
    lags: Times = []
    # A webhook's rule is never evaluated: the gate is open, and the loop has nothing else to do.
    idle_rule = {"trigger": "webhook", "type": "alertmanager", "match": ['alertname="x"'], "action": "kill"}
    idle = {"groups": [{"name": "idle", "interval": "1s", "rules": [idle_rule]}]}
    with sidecar(folder / f"quiet-{turn}", idle, prometheus_url=prometheus_url) as running:
        answer = _settled(running)
        with _scraped(running):
            for rate in ARRIVALS_A_SECOND:
                lags += _load(running.gate["TCP"], answer, rate, seconds, times[_QUIET, rate])
    with sidecar(folder / f"busy-{turn}", threshold_rules(RULES), prometheus_url=prometheus_url) as running:
        answer = _settled(running)
        with _scraped(running), echo(answer, folder / f"busy-{turn}") as echoes:
            for rate in ARRIVALS_A_SECOND:
                lags += _load(running.gate["TCP"], answer, rate, seconds, times[_BUSY, rate])
                lags += _load(echoes["TCP"], answer, rate, seconds, times[_BARE, rate])
            for name, address in (("gate", running.gate["TCP"]), ("echo", echoes["TCP"])):
                with child(_saturate, address, len(answer), SATURATION_SECONDS) as pipe:
                    throughput[name].append(receive(pipe, seconds=SATURATION_SECONDS + 20.0))
    return lags


@contextmanager
def _scraped(running: Sidecar) -> Iterator[None]:
    """Read the sidecar's /metrics each second, as Prometheus does."""
    over = threading.Event()

    def scrape() -> None:
        while not over.wait(1.0):
            running.evaluations()

    scraper = threading.Thread(target=scrape)
    scraper.start()
    try:
        yield
    finally:
        over.set()
        scraper.join()


def _settled(running: Sidecar) -> bytes:
    """Wait until the sidecar has started up altogether; returns what the gate answers."""
    running.wait_until_allowed()
    time.sleep(1.5)
    for _ in range(2):  # the first scrape of a process writes every series anew, and takes some 50 ms for 200 rules
        running.evaluations()
    with connect(running.gate["TCP"]) as sock:
        return ask(sock, GATE_QUESTION)


def _load(address: Address, answer: bytes, rate: int, seconds: float, times: Times) -> Times:
    with child(_generate, address, len(answer), rate, seconds) as pipe:
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


def _saturate(pipe: Connection, address: Address, size: int, seconds: float) -> None:
    """Ask over all connections at once, each again as soon as it has its answer; sends the answers a second."""
    sockets = {connect(address): 0 for _ in range(CONNECTIONS)}
    for sock in sockets:
        sock.sendall(GATE_QUESTION)
    answers, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        for sock in select.select(list(sockets), [], [], 1.0)[0]:
            sockets[sock] += len(sock.recv(65536))
            if sockets[sock] >= size:
                sockets[sock] = 0
                answers += 1
                sock.sendall(GATE_QUESTION)
    pipe.send(answers / (time.perf_counter() - start))
    pipe.poll(5.0)


def _spread(name: str, times: Times, aim: float | None) -> Figure:
    at = {share: percentile(times, share) * 1e3 for share in (0.5, 0.99, 0.999)}
    beside = f"p50 {at[0.5]:.3f}, p99.9 {at[0.999]:.2f}, max {max(times) * 1e3:.2f} ms of {len(times)} requests"
    return Figure(name=f"{name}: p99", value=at[0.99], unit="ms", aim=aim, note=beside)


def _range(values: Times) -> str:
    return f"{min(values):.0f} to {max(values):.0f}"
