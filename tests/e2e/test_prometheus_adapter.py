"""Against the real Prometheus: ages are true, a batch says what single queries say, one bad query harms no other."""

import asyncio
import contextlib
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from sidecar.adapters.history import History, HistoryError
from sidecar.adapters.prometheus import PrometheusSource, Query
from sidecar.rules.readings import Answer, Failure
from sidecar.settings.promql import parse

pytestmark = pytest.mark.e2e

PROMETHEUS = Path("/usr/bin/prometheus")
OLD_SECONDS = 120.0
GONE_SECONDS = 400.0


@dataclass(frozen=True)
class Server:
    url: str
    started: float


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _backfill(folder: Path, now: float) -> None:
    """Write blocks with samples of the past: nothing ages quickly enough to wait for it."""
    lines = ["# TYPE old_metric gauge"]
    lines += [
        f'old_metric{{pod="a"}} {-0.1 * step:.1f} {now - OLD_SECONDS - 60 * step:.3f}' for step in range(10, -1, -1)
    ]
    lines += ["# TYPE gone_metric gauge"]
    lines += [f"gone_metric 7 {now - GONE_SECONDS - 60 * step:.3f}" for step in range(5, -1, -1)]
    (folder / "old.om").write_text("\n".join([*lines, "# EOF", ""]))
    subprocess.run(
        ["/usr/bin/promtool", "tsdb", "create-blocks-from", "openmetrics", folder / "old.om", folder / "data"],
        check=True,
        capture_output=True,
        timeout=30,
    )


@pytest.fixture(scope="session")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if not PROMETHEUS.exists():
        pytest.skip("Prometheus is not installed")
    folder = tmp_path_factory.mktemp("prometheus")
    started = time.time()
    _backfill(folder, started)
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    (folder / "p.yml").write_text(
        "global: {scrape_interval: 1s}\n"
        f"scrape_configs: [{{job_name: self, static_configs: [{{targets: ['127.0.0.1:{port}']}}]}}]\n"
    )
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [
                PROMETHEUS,
                f"--config.file={folder}/p.yml",
                f"--storage.tsdb.path={folder}/data",
                f"--web.listen-address=127.0.0.1:{port}",
                "--storage.tsdb.retention.time=1d",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        _wait_for_samples(url, process)
        yield Server(url=url, started=started)
    finally:
        process.terminate()
        process.wait(timeout=15)


def _wait_for_samples(url: str, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            answer = urllib.request.urlopen(f"{url}/api/v1/query?query=up==1", timeout=2)
            with answer:
                if b'"__name__":"up"' in answer.read():
                    return
        time.sleep(0.1)
    raise AssertionError("Prometheus did not scrape itself within 30 s")


@pytest.fixture
async def source(prometheus: Server) -> AsyncIterator[PrometheusSource]:
    source = PrometheusSource(urls=[prometheus.url], timeout=5.0)
    yield source
    await source.close()


def ask(*texts: str) -> list[Query]:
    parsed = [parse(text) for text in texts]
    return [Query(key=one.text, text=one.text, kind=one.kind, selectors=one.selectors) for one in parsed]


async def one(source: PrometheusSource, text: str) -> Answer:
    answer = (await source.query(ask(text)))[text]
    assert isinstance(answer, Answer), answer
    return answer


def age(answer: Answer) -> float:
    assert answer.oldest_sample is not None
    return answer.evaluated_at - answer.oldest_sample


async def test_an_aggregate_of_an_old_sample_has_the_age_of_the_sample(source: PrometheusSource, prometheus: Server):
    answer = await one(source, 'min(old_metric{pod="a"})')
    assert answer.series[0].value == 0.0
    assert age(answer) == pytest.approx(OLD_SECONDS + answer.evaluated_at - prometheus.started, abs=0.01)
    assert not answer.warnings


async def test_a_fresh_sample_is_young_and_the_server_is_up(source: PrometheusSource):
    assert source.up is False
    assert -0.1 < age(await one(source, "sum(up)")) < 10
    assert source.up is True


async def test_an_offset_is_taken_off_the_age(source: PrometheusSource, prometheus: Server):
    answer = await one(source, "min(old_metric offset 2m)")
    assert answer.series[0].value == 0.0
    assert age(answer) == pytest.approx(answer.evaluated_at - prometheus.started, abs=0.01)


async def test_the_oldest_of_several_selectors_counts(source: PrometheusSource):
    assert age(await one(source, "sum(up) + sum(old_metric)")) > OLD_SECONDS


async def test_a_range_whose_newest_sample_is_out_of_sight_has_the_age_that_it_cannot_exceed(source: PrometheusSource):
    answer = await one(source, "max_over_time(gone_metric[15m])")
    assert answer.series[0].value == 7
    assert age(answer) == pytest.approx(900, abs=1)
    assert age(await one(source, "max_over_time(old_metric[15m])")) < 200


async def test_a_subquery_over_a_metric_that_is_gone_does_not_look_fresh(source: PrometheusSource):
    answer = await one(source, "max_over_time(max(gone_metric)[15m:1m])")
    assert answer.series[0].value == 7
    assert age(answer) > GONE_SECONDS


async def test_a_missing_metric_is_empty_but_has_an_evaluation_time(source: PrometheusSource):
    answer = await one(source, "min(no_such_metric)")
    assert answer.series == ()
    assert answer.oldest_sample is None
    assert answer.evaluated_at == pytest.approx(time.time(), abs=5)


async def test_a_scalar_is_one_series_without_labels(source: PrometheusSource):
    answer = await one(source, "scalar(old_metric) - 1")
    assert [(dict(series.labels), series.value) for series in answer.series] == [({}, -1.0)]
    assert age(answer) > OLD_SECONDS


async def test_not_a_number_and_infinity_pass_as_they_are(source: PrometheusSource):
    answers = await source.query(ask("vector(0) / 0", "vector(1) / 0", "-vector(1) / 0"))
    assert [str(answer.series[0].value) for answer in answers.values() if isinstance(answer, Answer)] == [
        "nan",
        "inf",
        "-inf",
    ]


async def test_a_comment_at_the_end_of_a_query_does_not_swallow_the_others(source: PrometheusSource):
    answers = await source.query(ask("vector(1) # one", "vector(2)\n# two\n", '{__name__=~"old.*|up"} # "'))
    values = [[s.value for s in a.series] for a in answers.values() if isinstance(a, Answer)]
    assert values[:2] == [[1.0], [2.0]]
    assert len(values[2]) == 2


async def test_labels_come_back_as_they_are(source: PrometheusSource):
    answers = await source.query(ask("old_metric", "old_metric{pod=~`a|\\d`}", "vector(1)"))
    labels = [dict(a.series[0].labels) for a in answers.values() if isinstance(a, Answer)]
    assert labels == [{"__name__": "old_metric", "pod": "a"}, {"__name__": "old_metric", "pod": "a"}, {}]


async def test_a_batch_says_what_single_queries_say(source: PrometheusSource):
    texts = (
        [f"old_metric * {n}" for n in range(60)] + [f"min(old_metric) + {n}" for n in range(60)] + ["up", "absent(x)"]
    )
    together = await source.query(ask(*texts))
    for text in texts:
        alone, batched = await one(source, text), together[text]
        assert isinstance(batched, Answer)
        assert batched.series == alone.series
        assert batched.oldest_sample == alone.oldest_sample


async def test_one_broken_query_fails_alone_and_the_others_keep_their_answers(source: PrometheusSource):
    many_to_many = (
        'label_replace({__name__=~"up|old_metric"}, "__name__", "z", "", "") + on() group_left() {__name__=~".+"}'
    )
    texts = ["sum(up)", many_to_many, "min(old_metric)"]
    for _ in range(2):
        answers = await source.query(ask(*texts))
        broken = answers[many_to_many]
        assert isinstance(broken, Failure)
        assert (broken.reason, broken.unreachable) == ("query_error", False)
        assert "many-to-many" in broken.message or "duplicate" in broken.message
        assert all(isinstance(answers[text], Answer) for text in (texts[0], texts[2]))
    assert list(source._alone) == [many_to_many]


async def test_a_server_that_stops_is_unreachable_and_not_up():
    source = PrometheusSource(urls=[f"http://127.0.0.1:{_free_port()}"], timeout=2.0)
    answer = (await source.query(ask("up")))["up"]
    await source.close()
    assert isinstance(answer, Failure)
    assert (answer.reason, answer.unreachable, source.up) == ("unreachable", True, False)


async def test_history_gives_instants_and_ranges(prometheus: Server):
    history = History(prometheus.url, timeout=5.0)
    at = datetime.fromtimestamp(prometheus.started - OLD_SECONDS + 1, UTC)

    def look() -> tuple[Sequence[float], Sequence[float], Sequence[float]]:
        instants = [sample.value for sample in history.instant("old_metric", at)]
        scalars = [sample.value for sample in history.instant("1 + 1")]
        ranges = history.range("old_metric", at - timedelta(minutes=5), at, 60)
        return instants, scalars, [value for _, value in ranges[0].points]

    instants, scalars, points = await asyncio.to_thread(look)
    assert (instants, scalars) == ([0.0], [2.0])
    assert points == pytest.approx([-0.5, -0.4, -0.3, -0.2, -0.1, 0.0])
    history.close()


def test_history_hands_on_where_prometheus_stumbled(prometheus: Server):
    history = History(prometheus.url, timeout=5.0)
    with pytest.raises(HistoryError, match="1:") as caught:
        history.instant("sum(up")
    history.close()
    assert caught.value.reason == "query_error"
    assert "unclosed left parenthesis" in caught.value.message


def test_history_refuses_a_string(prometheus: Server):
    history = History(prometheus.url, timeout=5.0)
    with pytest.raises(HistoryError) as caught:
        history.instant('"7"')
    history.close()
    assert caught.value.reason == "wrong_type"
