"""The configuration as the program gets it: defaults, environment, paths, and what only shows at the end."""

from decimal import Decimal
from pathlib import Path

import pytest

from sidecar.core.policy import DEFAULT_STEPS, GatePolicy, RecoveryPolicy
from sidecar.core.states import Mode, Restriction
from sidecar.settings.config import Listen, Settings, Switch, load_settings
from sidecar.settings.problems import SettingsProblems

POD = {"POD_NAMESPACE": "trading", "POD_NAME": "bot-1"}
DATA = Path(__file__).parent / "settings_data"


def load(tmp_path: Path, text: str, **environ: str) -> Settings:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    return load_settings(file, {**POD, **environ})


def problems(tmp_path: Path, text: str, **environ: str) -> list[str]:
    with pytest.raises(SettingsProblems) as caught:
        load(tmp_path, text, **environ)
    return [f"{one.line}: {one.key}: {one.reason}" for one in caught.value.problems]


def test_an_empty_file_has_exactly_the_defaults_of_the_types() -> None:
    settings = load_settings(DATA / "config_empty.good.yaml", POD)
    assert settings == Settings(
        switch=Switch(name="trading/bot-1"), path=settings.path, content_hash=settings.content_hash
    )


def test_the_policies_default_to_those_of_the_core() -> None:
    settings = load_settings(DATA / "config_empty.good.yaml", POD)
    assert settings.recovery.policy == RecoveryPolicy(steps=DEFAULT_STEPS)
    assert settings.gate.policy == GatePolicy()


def test_writing_every_default_out_changes_nothing_but_the_names_in_it() -> None:
    empty = load_settings(DATA / "config_empty.good.yaml", POD)
    full = load_settings(DATA / "config_full.good.yaml", POD)
    for section in ("prometheus", "rules", "operations", "control", "recovery", "storage", "logging"):
        assert getattr(full, section) == getattr(empty, section)
    assert full.gate.policy.position_limits == {"AAPL": Decimal(1000), "*": Decimal(500)}
    assert full.scrape_names == {"trader"}
    assert full.alertmanager.webhook.match == ('killswitch="kill"',)


def test_what_yaml_would_misread_is_read_as_meant() -> None:
    settings = load_settings(DATA / "config_corners.good.yaml", POD)
    assert (settings.switch.name, settings.switch.mode) == ("1:30", Mode.SHADOW)
    assert settings.switch.labels == {"on": "yes", "n": "010", "date": "2026-11-22"}
    assert settings.storage.restore_from_prometheus is None
    assert settings.gate.policy.trust_reduce_claim is True
    assert settings.gate.policy.killed_policy is Restriction.REDUCE_ONLY
    assert settings.gate.policy.blind_orders is False
    assert settings.gate.policy.lease_ms == 60_000
    assert settings.gate.policy.position_limits["DOGE"] == 0
    assert settings.gate.listen == Listen(host="::1", port=0)
    assert str(settings.gate.listen) == "[::1]:0"
    assert settings.prometheus.urls == ("https://user:secret@prom.example/prefix",)
    assert [query.operator for query in settings.recovery.health.queries] == ["eq", "lt"]
    assert [query.max_age for query in settings.recovery.health.queries] == [60.0, 300.0]
    assert [gate.max_age for step in settings.recovery.policy.steps for gate in step.gates] == [120.0]
    assert settings.recovery.health.min_memory_available == 512 * 2**20


def test_a_scrape_never_waits_longer_than_its_interval_by_default() -> None:
    fast = load_settings(DATA / "config_corners.good.yaml", POD).scrape[0]
    assert (fast.interval, fast.timeout) == (0.1, 0.1)


def test_relative_paths_count_from_the_folder_of_the_file() -> None:
    settings = load_settings(DATA / "config_corners.good.yaml", POD)
    assert settings.rules.files == (str(DATA / "rules/*.yaml"), "/abs/r.yaml")
    assert settings.control.socket == str(DATA / "c.sock")
    assert settings.recovery.approvers_file == str(DATA / "approvers.yaml")
    assert settings.prometheus.http is not None
    assert settings.prometheus.http.basic_auth is not None
    assert settings.prometheus.http.basic_auth.password_file == str(DATA / "secrets/pw")


def test_secrets_stand_in_no_repr(tmp_path: Path) -> None:
    settings = load(
        tmp_path,
        "prometheus:\n  urls: ['http://u:hunter2@p']\n  headers: {X-Key: hunter2}\n"
        "  http_config: {authorization: {credentials: hunter2}}\n",
    )
    assert "hunter2" not in repr(settings)


def test_secrets_stand_in_no_problem(tmp_path: Path) -> None:
    found = problems(
        tmp_path,
        "prometheus:\n  urls: ['ftp://u:hunter2@p', 'http://u:hunter2@p?q', 'http://u:hunter2@[']\n"
        '  headers: {X-Key: "hunter2\\n"}\n'
        "alertmanager: {notify: {urls: ['http://u:hunter2@p']}}\n",
    )
    assert len(found) == 5
    assert "hunter2" not in str(found)


def test_the_environment_names_the_file_and_the_control_socket(tmp_path: Path) -> None:
    file = tmp_path / "other.yaml"
    file.write_text("")
    settings = load_settings(None, {**POD, "KILLSWITCH_CONFIG": str(file), "KILLSWITCH_SOCKET": "/x/c.sock"})
    assert (settings.path, settings.control.socket) == (str(file), "/x/c.sock")


@pytest.mark.parametrize("environ", [{}, {"POD_NAME": "a"}, {"POD_NAME": "a", "POD_NAMESPACE": ""}])
def test_a_switch_without_a_name_is_refused(environ: dict[str, str]) -> None:
    with pytest.raises(SettingsProblems, match=r"switch\.name: is required"):
        load_settings(DATA / "config_empty.good.yaml", environ)


def test_a_missing_file_says_how_to_name_one(tmp_path: Path) -> None:
    with pytest.raises(SettingsProblems, match="--config or KILLSWITCH_CONFIG"):
        load_settings(tmp_path / "gone.yaml", POD)


def test_the_gate_and_the_control_socket_must_differ(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, "gate: {socket: /run/x}\n", KILLSWITCH_SOCKET="/run/x")
    assert found.startswith("1: control.socket: is also the gate's socket")


@pytest.mark.parametrize(("length", "fits"), [(107, True), (108, False)])
def test_a_socket_path_fits_into_the_kernels_field(tmp_path: Path, length: int, fits: bool) -> None:
    text = f"\ngate:\n  socket: /{'s' * (length - 1)}\n"
    if fits:
        assert len(load(tmp_path, text).gate.socket) == length
    else:
        assert problems(tmp_path, text)[0].startswith("3: gate.socket: ")


def test_the_hash_changes_with_the_content(tmp_path: Path) -> None:
    hashes = {load(tmp_path, text).content_hash for text in ("", "logging: {level: debug}", "logging: {level: debug} ")}
    assert len(hashes) == 3


def test_settings_cannot_be_changed(tmp_path: Path) -> None:
    settings = load(tmp_path, "gate: {position_limits: {A: 1}}")
    with pytest.raises(TypeError):
        settings.gate.policy.position_limits["A"] = Decimal(2)  # type: ignore[index]
    with pytest.raises(AttributeError):
        settings.path = "x"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "urls"),
    [
        ("scrape: [{name: bot, url: 'http://127.0.0.1:8000/metrics'}]", ()),
        ("prometheus: {timeout: 1s}\nscrape: [{name: bot, url: 'http://127.0.0.1:8000/metrics'}]", ()),
        (
            "prometheus: {urls: ['http://p:9090']}\nscrape: [{name: bot, url: 'http://127.0.0.1:8000/metrics'}]",
            ("http://p:9090",),
        ),
        ("rules: {interval: 1s}", ("http://prometheus:9090",)),
    ],
)
def test_who_scrapes_directly_and_names_no_prometheus_has_none(
    tmp_path: Path, text: str, urls: tuple[str, ...]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"switch: {{name: s}}\n{text}\n")
    assert load_settings(file, {}).prometheus.urls == urls


@pytest.mark.parametrize("word", ["off", "'off'", "false", "no"])
def test_a_gate_may_have_no_address(word: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"switch: {{name: desk}}\ngate: {{listen: {word}}}\n")
    assert load_settings(file, {}).gate.listen is None
