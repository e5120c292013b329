"""The parts of the demo behind the story: its stage, its processes, its timeline."""

import io
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from sidecar.demo import backstage as backstage_module
from sidecar.demo import child as child_module
from sidecar.demo import prometheus_process
from sidecar.demo.backstage import Backstage
from sidecar.demo.child import Child
from sidecar.demo.stage import APPROVER, Stage, scraped
from sidecar.demo.timeline import WIDTH, Timeline
from sidecar.settings.config import load_settings
from sidecar.settings.rule_files import load_rules

SHIPPED = Path(__file__).resolve().parents[2] / "rules" / "default.yaml"


@pytest.mark.parametrize("with_prometheus", [True, False])
def test_what_the_stage_writes_is_a_good_configuration(tmp_path: Path, *, with_prometheus: bool) -> None:
    stage = Stage.build(tmp_path)
    stage.write(metrics_port=4711, with_prometheus=with_prometheus, code_hash="a hash")
    settings = load_settings(str(stage.config), {})
    rules = load_rules(settings.rules.files, settings.rules.interval, {}, settings.scrape_names)
    sources = {rule.source for rule in rules.rules if rule.query is not None}
    assert len(rules.rules) == 6
    if with_prometheus:
        assert (list(settings.prometheus.urls), settings.scrape) == ([f"http://127.0.0.1:{stage.prometheus}"], ())
        assert sources == {"prometheus"}
    else:
        assert (settings.prometheus.urls, settings.scrape[0].url) == ((), "http://127.0.0.1:4711/metrics")
        assert sources == {"scrape:trader"}


def test_the_rules_are_the_shipped_ones_word_for_word(tmp_path: Path) -> None:
    Stage.build(tmp_path).write(metrics_port=1, with_prometheus=True, code_hash="a hash")
    assert (tmp_path / "rules" / "rules.yaml").read_text() == SHIPPED.read_text()


def test_rules_for_a_scrape_differ_in_their_source_alone() -> None:
    changed, shipped = yaml.safe_load(scraped(SHIPPED.read_text())), yaml.safe_load(SHIPPED.read_text())
    for group in changed["groups"]:
        for rule in group["rules"]:
            assert (rule.pop("source", None) == "scrape:trader") == ("query" in rule)
    assert changed == shipped


def test_all_that_listens_is_on_loopback_and_in_the_folder(tmp_path: Path) -> None:
    stage = Stage.build(tmp_path)
    stage.write(metrics_port=1, with_prometheus=True, code_hash="a hash")
    settings = load_settings(str(stage.config), {})
    assert {settings.gate.listen.host, settings.operations.listen.host} == {"127.0.0.1"}
    assert len({stage.gate, stage.operations, stage.prometheus}) == 3
    places = [settings.gate.socket, settings.gate.page, settings.control.socket, settings.storage.dir]
    assert all(Path(place).is_relative_to(tmp_path) for place in places)


def test_only_the_approver_file_holds_the_hash_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    Stage.build(tmp_path).write(metrics_port=1, with_prometheus=True, code_hash="a hash")
    file = tmp_path / "approvers.yaml"
    assert yaml.safe_load(file.read_text()) == [{"name": APPROVER, "code_hash": "a hash"}]
    assert file.stat().st_mode & 0o077 == 0


def test_children_get_nothing_of_another_sidecar(tmp_path: Path) -> None:
    real = {"KILLSWITCH_SOCKET": "/x", "KILLSWITCH_SELECTOR": "x", "KILL_SWITCH_APPROVAL_CODE": "x", "HOME": "/h"}
    stage = Stage.build(tmp_path)
    assert stage.environment(real) == {"HOME": "/h", "KILLSWITCH_CONFIG": str(tmp_path / "config.yaml")}


def test_a_prometheus_that_is_not_on_the_path_is_not_found(tmp_path: Path) -> None:
    assert prometheus_process.find({"PATH": str(tmp_path)}) is None
    assert prometheus_process.find({}) is None


@pytest.mark.parametrize(
    ("prints", "version"),
    [("prometheus, version 2.42.0+ds (branch: x)", "2.42.0"), ("something else", "unknown"), ("", "unknown")],
)
def test_the_version_is_what_the_program_says(tmp_path: Path, prints: str, version: str) -> None:
    program = tmp_path / "prometheus"
    program.write_text(f"#!/bin/sh\necho '{prints}'\n")
    program.chmod(0o755)
    found = prometheus_process.find({"PATH": str(tmp_path)})
    assert found == str(program)
    assert prometheus_process.version(found, os.environ) == version


def test_nobody_answering_has_seen_nothing(tmp_path: Path) -> None:
    assert not prometheus_process.has_seen(Stage.build(tmp_path).prometheus, "up")


def test_the_scrape_configuration_names_every_target_and_promtool_takes_it(tmp_path: Path) -> None:
    text = prometheus_process.config({"bot": "127.0.0.1:1", "killswitch": "127.0.0.1:2"})
    jobs = yaml.safe_load(text)["scrape_configs"]
    assert [(job["job_name"], job["static_configs"][0]["targets"]) for job in jobs] == [
        ("bot", ["127.0.0.1:1"]),
        ("killswitch", ["127.0.0.1:2"]),
    ]
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed")
    file = tmp_path / "prometheus.yaml"
    file.write_text(text)
    checked = subprocess.run([promtool, "check", "config", str(file)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


def _child(tmp_path: Path, program: str, *, talks: bool = False) -> Child:
    argv = [sys.executable, "-c", program]
    return Child("child", argv, env=os.environ, log=tmp_path / "log", talks=talks)


def _wait_for_log(child: Child, text: str) -> None:
    deadline = time.monotonic() + 20
    while text not in child.tail(5):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_child_that_ignores_the_polite_way_is_ended_by_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_module, "STOP_SECONDS", 0.05)
    stubborn = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    )
    child = _child(tmp_path, stubborn)
    _wait_for_log(child, "up")
    child.stop()
    assert child.exit_code == -9
    child.stop()  # again does nothing


def test_a_child_that_talks_is_heard_and_told(tmp_path: Path) -> None:
    child = _child(tmp_path, "print('no json'); print('[1]'); print('{\"event\": \"' + input() + '\"}')", talks=True)
    child.tell("hello")
    deadline = time.monotonic() + 20
    while not child.events:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert list(child.events) == [{"event": "hello"}]
    child.stop()
    child.tell("nobody listens")


def test_a_ctrl_c_while_a_process_starts_leaves_no_process_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Child] = []

    def start(*args: object, **kw: object) -> Child:
        started.append(_child(tmp_path, "import time; time.sleep(60)"))
        signal.raise_signal(signal.SIGINT)
        return started[0]

    monkeypatch.setattr(backstage_module, "Child", start)
    backstage = Backstage(timeline=Timeline(io.StringIO()), stage=Stage.build(tmp_path), environ={})
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever other tests left there
    try:
        with pytest.raises(KeyboardInterrupt):
            backstage.start_sidecar()
        backstage.end()
        assert started[0].exit_code is not None
    finally:
        signal.signal(signal.SIGINT, before)
        started[0].stop()


def test_a_timeline_fits_a_small_terminal_and_is_plain_without_one() -> None:
    out = io.StringIO()
    timeline = Timeline(out)
    timeline.title("Act")
    timeline.moment("measured", "a sentence that is much longer than any line may be on a terminal of 80 columns " * 2)
    timeline.command(
        "killswitch recover --by rita --reason 'prices are back, positions reconciled, and so on'", "word " * 40, 4
    )
    timeline.facts([("killed by", "rule " * 40), ("", "more")])
    text = out.getvalue()
    assert max(len(line) for line in text.splitlines()) <= WIDTH
    assert "\x1b" not in text
    assert "(exit code 4)" in text


def test_a_long_answer_is_cut_and_says_so() -> None:
    out = io.StringIO()
    Timeline(out).command("killswitch status", "\n".join(f"line {n}" for n in range(9)), 0, most_lines=2)
    assert "line 1" in out.getvalue()
    assert "line 2" not in out.getvalue()
    assert "not all of its 9 lines, exit code 0" in out.getvalue()
