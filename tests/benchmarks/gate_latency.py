"""How long the gate takes to answer, beside the least that any server in Python could take.

    python tests/benchmarks/gate_latency.py [--json] [--requests 3000] [--rounds 5]

Starts two servers under uvloop in child processes: one that answers every chunk with fixed bytes, unparsed, and the
gate with a snapshot. Then asks both in turn over one keep-alive connection, TCP and Unix socket, each question after
the answer to the last (closed loop), and prints p50 and p99 with their ratios: for a question in the same bytes each
time, as a bot asks, and for varied ones. Last comes the time that a list of 1,000 orders takes, and the longest that
another question waited meanwhile.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that it runs from a checkout, uninstalled

QUESTION = (
    b"GET /gate HTTP/1.1\r\nHost: 127.0.0.1:9780\r\nUser-Agent: bench\r\nAccept: */*\r\nX-Order-Intent: new\r\n\r\n"
)

# The gate knows a question again that came in the same bytes; two in turn make it parse each.
VARIED = (QUESTION, QUESTION.replace(b"bench", b"other"))


class Echo(asyncio.Protocol):
    """Answers whatever comes with the same bytes."""

    def __init__(self, answer: bytes) -> None:
        self.answer = answer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(self.answer)


def make_gate():
    from sidecar.adapters.gate_http import GateServer
    from sidecar.core.policy import GatePolicy
    from sidecar.core.snapshot import ALL_CLEAR, Snapshot
    from sidecar.core.states import Mode, Restriction, Stage, State

    gate = GateServer(switch="fx/trader-0")
    snapshot = Snapshot(
        switch="fx/trader-0",
        mode=Mode.ACTIVE,
        state=State.ACTIVE,
        stage=Stage.NONE,
        restriction=Restriction.NONE,
        factor=1.0,
        epoch=17,
        since=1.0,
        gate_restriction=Restriction.NONE,
        gate_factor=1.0,
        reason=ALL_CLEAR,
    )
    gate.update(snapshot, GatePolicy())
    return gate


def sample_answer() -> bytes:
    return make_gate()._desk.answer(0)


def serve(kind: str, path: str, pipe: Connection) -> None:
    import uvloop

    async def run() -> None:
        loop = asyncio.get_running_loop()
        if kind == "gate":
            gate = make_gate()
            _, port = await gate.start_tcp("127.0.0.1", 0)
            await gate.start_unix(path)
        else:
            answer = sample_answer()
            tcp = await loop.create_server(lambda: Echo(answer), "127.0.0.1", 0)
            unix = await loop.create_unix_server(lambda: Echo(answer), path)
            port = tcp.sockets[0].getsockname()[1]
        pipe.send(port)
        await loop.run_in_executor(None, pipe.recv)
        if kind == "gate":
            await gate.stop(1.0)
        else:
            tcp.close()
            unix.close()

    uvloop.run(run())


def connect(address: tuple[str, int] | str) -> socket.socket:
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.connect(address)
    if family == socket.AF_INET:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def measure(sock: socket.socket, size: int, requests: int, questions: tuple[bytes, ...] = (QUESTION,)) -> list[float]:
    """Seconds from sending a question to having its whole answer."""
    clock = time.perf_counter
    times = []
    for number in range(requests):
        question = questions[number % len(questions)]
        start = clock()
        sock.sendall(question)
        got = len(sock.recv(65536))
        while got < size:
            got += len(sock.recv(65536))
        times.append(clock() - start)
    return times


def percentile(times: list[float], share: float) -> float:
    return sorted(times)[min(len(times) - 1, int(len(times) * share))]


def measure_list(address: tuple[str, int], size: int) -> dict[str, object]:
    """How long a list of 1,000 orders takes, and how long other questions wait meanwhile."""
    order = {"side": "buy", "quantity": "1.5", "position": -40, "position_limit": 800}
    body = json.dumps([{"symbol": f"S{n % 50}", **order} for n in range(1000)]).encode()
    head = f"POST /v1/orders/check HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    took = []

    def ask() -> None:
        for _ in range(5):
            with connect(address) as sock:
                start = time.perf_counter()
                sock.sendall(head.encode() + body)
                while sock.recv(1 << 20):
                    pass
                took.append(time.perf_counter() - start)

    with connect(address) as sock:
        measure(sock, size, 200)
        asker = threading.Thread(target=ask)
        asker.start()
        waits = []
        while asker.is_alive():
            waits += measure(sock, size, 1)
            time.sleep(0.0005)
        asker.join()
    return {
        "list_of_1000_ms": round(statistics.median(took) * 1e3, 2),
        "question_meanwhile_p50_ms": round(percentile(waits, 0.5) * 1e3, 3),
        "question_meanwhile_max_ms": round(max(waits) * 1e3, 3),
    }


def compare(size: int, requests: int, rounds: int) -> dict[str, object]:
    """Start both servers, ask them in turn, and end them."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        children = {}
        for kind in ("echo", "gate"):
            ours, theirs = context.Pipe()
            path = str(Path(folder) / f"{kind}.sock")
            process = context.Process(target=serve, args=(kind, path, theirs))
            process.start()
            children[kind] = (process, ours, path, ours.recv())
        sockets = {}
        for kind, (_, _, path, port) in children.items():
            sockets["tcp", kind] = connect(("127.0.0.1", port))
            sockets["unix", kind] = connect(path)
        times: dict[tuple[str, str], list[float]] = {pair: [] for pair in sockets}
        for sock in sockets.values():
            measure(sock, size, 500)
        for _ in range(rounds):
            for (way, kind), sock in sockets.items():
                times[way, kind] += measure(sock, size, requests)
                if kind == "gate":
                    times.setdefault((way, "varied"), []).extend(measure(sock, size, requests, VARIED))
        report: dict[str, object] = measure_list(("127.0.0.1", children["gate"][3]), size)
        for sock in sockets.values():
            sock.close()
        for process, pipe, _, _ in children.values():
            pipe.send("stop")
            process.join(5)
    return report | rows(times)


def rows(times: dict[tuple[str, str], list[float]]) -> dict[str, object]:
    """The figures of each way, in microseconds."""
    report: dict[str, object] = {}
    for way in ("tcp", "unix"):
        for share, name in ((0.5, "p50"), (0.99, "p99")):
            echo, gate, varied = (percentile(times[way, kind], share) * 1e6 for kind in ("echo", "gate", "varied"))
            report[f"{way}_{name}"] = {
                "echo_us": round(echo, 1),
                "gate_us": round(gate, 1),
                "ratio": round(gate / echo, 2),
                "varied_us": round(varied, 1),
                "varied_ratio": round(varied / echo, 2),
            }
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    size = len(sample_answer())
    report = compare(size, options.requests, options.rounds)
    report |= {"cpus": os.cpu_count(), "requests": options.requests * options.rounds, "answer_bytes": size}
    if options.json:
        print(json.dumps(report, indent=1))
        return
    print(f"{'':10}{'echo µs':>10}{'gate µs':>10}{'ratio':>8}{'varied µs':>12}{'ratio':>8}")
    for name in ("tcp_p50", "tcp_p99", "unix_p50", "unix_p99"):
        row = report[name]
        print(
            f"{name:10}{row['echo_us']:>10}{row['gate_us']:>10}{row['ratio']:>8}"
            f"{row['varied_us']:>12}{row['varied_ratio']:>8}"
        )
    print({key: value for key, value in report.items() if not isinstance(value, dict)})


if __name__ == "__main__":
    main()
