"""The command line against a small real server on a Unix socket, which answers as the sidecar does."""

import http.server
import json
import os
import pty
import re
import select
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner

from sidecar import __version__
from sidecar.cli.audit import event_line, parse_moment
from sidecar.cli.main import killswitch
from sidecar.cli.status import banner, exit_code
from sidecar.cli.words import duration_text, moment_text, number_text, one_line, percent_text

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)


def status(**changes):
    document = {
        "switch": "trading/bot-0", "mode": "active", "version": "0.1.0", "ready": True, "not_ready_reason": None,
        "state": "ACTIVE", "restriction": "none", "position_limit_factor": 1.0, "stage": "NONE",
        "since": "2026-03-01T11:55:00.000Z", "causes": [],
        "gate": {"decision": "allow", "reason": {"code": "active", "message": "trading is allowed", "release": None}},
        "recovery": {"stage": "NONE", "by": None, "reason": None, "requested": None, "approvals": [],
                     "approvals_needed": 1, "cooldown_seconds": None, "cooldown_remaining_seconds": 0.0,
                     "steps": [], "next_step": None},
        "waivers": [], "demands": [], "sources": [{"name": "prometheus", "up": True, "error": None}], "problems": [],
        "config": {}, "durable": True, "epoch": 4, "started": "2026-03-01T00:00:00.000Z",
    }  # fmt: skip
    return {**document, **changes}


def denied(code, message="no", release="an approved recovery"):
    return {"decision": "deny", "reason": {"code": code, "message": message, "release": release}}


KILLED = status(
    state="KILLED", restriction="halt", position_limit_factor=0.0, gate=denied("killed"),
    causes=[{"code": "breach", "trigger": "portfolio_drawdown", "reason": "Drawdown -0.16 is beyond -0.15",
             "by": "rule portfolio_drawdown", "by_verified": True, "time": "2026-03-01T11:55:00.000Z", "value": -0.16,
             "limit": -0.15, "count": 3}],
)  # fmt: skip
TRIGGERS = {
    "triggers": [
        {"trigger": "daily_loss", "enabled": True, "shadow": False, "action": "kill", "status": "inactive",
         "health": "ok", "armed": True, "ready": True, "waived": False, "step": None, "value": -0.01,
         "threshold": -0.05, "operator": "<", "limit_used_ratio": 0.2},
        {"trigger": "portfolio_drawdown", "enabled": True, "shadow": False, "action": "kill", "status": "firing",
         "health": "ok", "armed": True, "ready": True, "waived": False, "step": "kill", "value": -0.16,
         "threshold": -0.15, "operator": "<", "limit_used_ratio": 1.0667},
    ]
}  # fmt: skip


class Sidecar:
    """Plays canned answers and remembers what it was asked."""

    def __init__(self, path):
        self.path = str(path)
        self.answers = {}
        self.asked = []
        self.answer("GET", "/api/v1/status", status())
        self.answer("GET", "/api/v1/triggers", TRIGGERS)
        fake = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def address_string(self):
                return "unix"

            def answer(self):
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length)
                fake.asked.append((self.command, self.path, json.loads(body) if body else None, dict(self.headers)))
                code, payload, headers = fake.answers.get(
                    (self.command, self.path.split("?")[0]), (404, {"title": "Not found"}, {})
                )
                raw = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
                self.send_response(code)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            do_GET = do_POST = do_DELETE = answer  # noqa: N815 - the names that http.server looks for

        class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
            daemon_threads = True

            def get_request(self):
                request, _ = super().get_request()
                return request, ("unix", 0)

        self.server = Server(self.path, Handler)
        self.thread = threading.Thread(target=lambda: self.server.serve_forever(poll_interval=0.02), daemon=True)
        self.thread.start()

    def answer(self, method, path, payload, code=200, **headers):
        self.answers[(method, path)] = (code, payload, {k.replace("_", "-"): v for k, v in headers.items()})

    def problem(self, method, path, code, title, detail="", headers=None, **extra):
        document = {"type": "about:blank", "title": title, "status": code, "detail": detail, **extra}
        self.answer(method, path, document, code, **(headers or {}))

    def asked_for(self, method, path):
        return [body for one, where, body, _ in self.asked if (one, where.split("?")[0]) == (method, path)]

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ks")  # short: a socket's path has at most 107 bytes


@pytest.fixture
def sidecar(folder):
    fake = Sidecar(folder / "c.sock")
    yield fake
    fake.close()


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in ("KILLSWITCH_SOCKET", "KILLSWITCH_CONFIG", "KILL_SWITCH_APPROVAL_CODE", "XDG_RUNTIME_DIR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)


def run(*arguments, stdin=""):
    return CliRunner().invoke(killswitch, list(arguments), input=stdin)


def spawn(*arguments, stdin=b"", environ=None):
    return subprocess.run(
        [sys.executable, "-m", "sidecar", *arguments],
        cwd=ROOT, input=stdin, capture_output=True, timeout=60, check=False, env={**os.environ, **(environ or {})},
    )  # fmt: skip


def on_a_terminal(*arguments, typed):
    """Run on a pseudo-terminal; type each line when its text is shown. Return the output and the exit code."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "-m", "sidecar", *arguments])
    seen, start, waiting = b"", 0, list(typed)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if not select.select([terminal], [], [], 0.1)[0]:
            continue
        try:
            chunk = os.read(terminal, 4096)
        except OSError:
            break
        if not chunk:
            break
        seen += chunk
        while waiting and waiting[0][0].encode() in seen[start:]:
            start = len(seen)
            os.write(terminal, waiting.pop(0)[1].encode())
    os.close(terminal)
    return seen.decode(), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# --- status ---


@pytest.mark.parametrize(
    ("changes", "line", "code"),
    [
        ({}, "TRADING ALLOWED", 0),
        (KILLED, "BLOCKED – KILLED", 3),
        ({"state": "RECOVERING", "gate": denied("recovering")}, "BLOCKED – RECOVERING", 3),
        ({"ready": False, "gate": denied("not_ready")}, "BLOCKED – NOT READY", 3),
        ({"gate": denied("stale")}, "BLOCKED – STALE", 3),
        ({"gate": denied("internal_error")}, "BLOCKED – INTERNAL ERROR", 3),
        ({"position_limit_factor": 0.5}, "REDUCED – 50 % of limits", 0),
        ({"restriction": "reduce_only", "gate": denied("reduce_only")}, "REDUCED – REDUCE ONLY", 0),
        ({"restriction": "halt", "gate": denied("halted")}, "BLOCKED – HALTED", 0),
        ({"position_limit_factor": 0.5, "gate": denied("blind_order")}, "REDUCED – 50 % of limits, blind", 0),
        ({"state": "DISABLED", "mode": "disabled"}, "TRADING ALLOWED – SWITCH DISABLED", 0),
        ({"mode": "shadow"}, "TRADING ALLOWED – SHADOW MODE", 0),
        (
            {"mode": "shadow", "state": "KILLED"},
            "TRADING ALLOWED – SHADOW MODE, RULES DO NOT BLOCK, WOULD BE KILLED",
            3,
        ),
        ({"state": "PAUSED", "gate": denied("new")}, "BLOCKED – UNKNOWN STATE PAUSED", 3),
        ({"gate": None}, "BLOCKED – THE GATE DOES NOT SAY WHY", 0),
    ],
)
def test_the_first_line_and_the_exit_code_say_what_holds(sidecar, changes, line, code):
    sidecar.answer("GET", "/api/v1/status", status(**changes))
    result = run("status", "--socket", sidecar.path)
    assert result.stdout.splitlines()[0].startswith(line)
    assert result.exit_code == code


@pytest.mark.parametrize("output", ["table", "json"])
@pytest.mark.parametrize(
    ("command", "path", "answer"),
    [("status", "/api/v1/status", KILLED), ("health", "/api/v1/health", {"healthy": False, "checks": []})],
)
def test_a_reader_that_leaves_early_does_not_change_the_exit_code(sidecar, command, path, answer, output):
    sidecar.answer("GET", path, answer)
    assert _without_a_reader(command, "--output", output, "--socket", sidecar.path) == (3, b"")


def test_a_check_that_nobody_reads_ends_with_the_gates_answer(sidecar):
    sidecar.answer("GET", "/gate", {**denied("killed"), "switch": "trading/bot-0"}, code=403)
    assert _without_a_reader("check", "--gate-socket", sidecar.path) == (3, b"")


def _without_a_reader(*arguments):
    """Run with a standard output whose other end is closed; return the exit code and what is on standard error."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "sidecar", *arguments],
            cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, timeout=60, check=False,
        )  # fmt: skip
    finally:
        os.close(writing)
    return done.returncode, done.stderr


def test_trading_is_never_called_allowed_where_the_gate_does_not_allow_it():
    for changes in ({"gate": {}}, {"gate": denied("whatever")}, {"ready": False, "gate": {}}):
        assert not banner(status(**changes))[0].startswith("TRADING ALLOWED")


def test_a_source_that_no_rule_asks_is_not_called_down(sidecar):
    sidecar.answer("GET", "/api/v1/status", status(sources=[{"name": "prometheus", "up": None, "error": None}]))
    assert "prometheus" not in run("status", "--socket", sidecar.path).stdout


def test_the_screen_tells_why_since_when_and_the_next_command_in_eighty_columns(sidecar):
    sidecar.answer(
        "GET", "/api/v1/status",
        {**KILLED, "problems": ["audit is not written: No space left on device, since 2 minutes"], "durable": False,
         "sources": [{"name": "prometheus", "up": False, "error": "connection refused"}]},
    )  # fmt: skip
    out = run("status", "--socket", sidecar.path).stdout
    assert "portfolio_drawdown: Drawdown -0.16 is beyond -0.15, 3 times" in re.sub(r"\s+", " ", out)
    assert "2026-03-01 11:55:00 UTC" in out
    assert f"killswitch --socket {sidecar.path} recover" in re.sub(r"\n\s*", " ", out)
    assert "No space left" in out
    assert "NOT durable" in out
    assert "prometheus is DOWN: connection refused" in out
    assert max(map(len, out.splitlines())) <= 80
    rows = [line.split() for line in out.splitlines() if line.startswith(("portfolio_drawdown ", "daily_loss "))]
    assert rows == [
        ["portfolio_drawdown", "-0.16", "<", "-0.15", "107", "%", "FIRING", "(kill)", "ok"],
        ["daily_loss", "-0.01", "<", "-0.05", "20", "%", "inactive", "ok"],
    ]


def test_a_recovery_is_shown_with_approvals_and_remaining_times(sidecar):
    recovery = {
        "stage": "COOLDOWN", "by": "bob", "reason": "feed is back", "requested": "2026-03-01T11:58:00.000Z",
        "approvals": [{"by": "bob", "by_verified": True, "time": "2026-03-01T11:58:00.000Z"}], "approvals_needed": 1,
        "cooldown_seconds": 300.0, "cooldown_remaining_seconds": 192.4, "steps": [],
        "next_step": {"factor": 0.5, "in_seconds": 192.4, "waits_for": None},
    }  # fmt: skip
    changes = {"state": "RECOVERING", "stage": "COOLDOWN", "recovery": recovery, "gate": denied("recovering")}
    sidecar.answer("GET", "/api/v1/status", status(**changes))
    out = run("status", "--socket", sidecar.path).stdout
    assert "COOLDOWN, asked for by bob: feed is back" in out
    assert "approvals: 1 of 1 (bob)" in out
    assert "cooldown: 3 min 13 s left" in out
    assert "next step: 50 % in 3 min 13 s" in out
    assert "cancel-recovery" in out


def test_a_pending_recovery_asks_for_the_next_approval(sidecar):
    changes = {**KILLED, "stage": "PENDING", "recovery": {"stage": "PENDING", "approvals": [], "approvals_needed": 2}}
    sidecar.answer("GET", "/api/v1/status", changes)
    assert "approve --by APPROVER" in " ".join(run("status", "--socket", sidecar.path).stdout.split())


def test_text_from_outside_cannot_play_with_the_terminal(sidecar):
    evil = {**KILLED["causes"][0], "reason": "\x1b[2J\x1b[1;1HTRADING ALLOWED\r[bold]x[/bold]\u202e"}
    sidecar.answer("GET", "/api/v1/status", {**KILLED, "causes": [evil]})
    sidecar.answer("GET", "/api/v1/triggers", {"triggers": [{**TRIGGERS["triggers"][0], "trigger": "a\x1b[31m[red]b"}]})
    out = run("status", "--socket", sidecar.path).stdout
    assert "\x1b" not in out
    assert "\u202e" not in out
    assert "[bold]x[/bold]" in out
    assert "[red]b" in out


def test_json_is_the_answer_of_the_api_word_for_word(sidecar):
    raw = b'{"state": "KILLED",  "restriction":"halt", "ready":true, "new_key":1}'
    sidecar.answer("GET", "/api/v1/status", raw)
    result = run("status", "--output", "json", "--socket", sidecar.path)
    assert result.stdout == raw.decode() + "\n"
    assert result.exit_code == 3


def test_common_options_stand_before_or_after_the_command(sidecar):
    for arguments in (
        ["--socket", sidecar.path, "--output", "json", "status"],
        ["status", "--socket", sidecar.path, "-o", "json"],
        ["--socket", "/nowhere", "--output", "table", "status", "--output", "json", "--socket", sidecar.path],
    ):
        assert json.loads(run(*arguments).stdout)["state"] == "ACTIVE"
    sidecar.answer("GET", "/api/v1/triggers", TRIGGERS)
    for arguments in (["rules", "--socket", sidecar.path, "list"], ["--socket", sidecar.path, "rules", "list"]):
        assert "daily_loss" in run(*arguments).stdout


def test_status_fails_where_nobody_or_something_else_answers(sidecar, folder):
    result = run("status", "--socket", str(folder / "none.sock"))
    assert result.exit_code == 1
    assert str(folder / "none.sock") in result.stderr
    assert result.stdout == ""
    sidecar.answer("GET", "/api/v1/status", b"<html>")
    assert run("status", "--socket", sidecar.path).exit_code == 1
    sidecar.answer("GET", "/api/v1/status", {"status": "success"})
    assert run("status", "--socket", sidecar.path).exit_code == 1
    sidecar.problem("GET", "/api/v1/status", 500, "Broken", "the evaluator stopped")
    result = run("status", "--socket", sidecar.path)
    assert (result.exit_code, "the evaluator stopped" in result.stderr) == (1, True)


def test_status_survives_triggers_that_cannot_be_read(sidecar):
    sidecar.problem("GET", "/api/v1/triggers", 503, "not ready")
    result = run("status", "--socket", sidecar.path)
    assert "Triggers are not known: HTTP 503" in result.stdout
    assert result.exit_code == 0


def test_disabled_is_done_and_everything_unknown_is_blocked():
    assert exit_code({"state": "DISABLED"}) == 0
    assert exit_code({"state": "ACTIVE"}) == 3
    assert exit_code({"state": None, "ready": True}) == 3


# --- where the sidecar is found ---


def test_the_socket_comes_from_the_environment_and_before_that_from_the_option(sidecar, monkeypatch):
    monkeypatch.setenv("KILLSWITCH_SOCKET", sidecar.path)
    assert run("status").exit_code == 0
    assert run("status", "--socket", "/nowhere").exit_code == 1


def test_the_socket_comes_from_the_configuration_relative_to_its_folder(sidecar, folder, monkeypatch):
    config = folder / "config.yaml"
    config.write_text("switch: {name: x}\ncontrol: {socket: ${WHERE}}\n".replace("${WHERE}", '"${WHERE}"'))
    monkeypatch.setenv("WHERE", "c.sock")
    assert run("status", "--config", str(config)).exit_code == 0
    monkeypatch.setenv("KILLSWITCH_CONFIG", str(config))
    assert run("status").exit_code == 0


def test_a_broken_configuration_that_was_named_stops_before_another_sidecar_is_asked(folder, monkeypatch):
    (folder / "config.yaml").write_text("control: [")
    for name in ("config.yaml", "none.yaml"):
        result = run("trigger", "--reason", "x", "--confirm", "--config", str(folder / name))
        assert result.exit_code == 1
        assert "Nothing was done" in result.stderr


def test_a_broken_configuration_of_the_environment_does_not_keep_anybody_from_the_default_socket(folder, monkeypatch):
    (folder / "config.yaml").write_text("control: [")
    monkeypatch.setenv("KILLSWITCH_CONFIG", str(folder / "config.yaml"))
    result = run("status")
    assert "Warning" in result.stderr
    assert "/run/killswitch-control/control.sock" in result.stderr


def test_the_private_run_folder_of_the_user_is_tried_where_the_default_does_not_exist(folder, monkeypatch):
    (folder / "killswitch-control").mkdir()
    fake = Sidecar(folder / "killswitch-control" / "control.sock")
    try:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
        assert run("status").exit_code == 0
    finally:
        fake.close()


def test_a_configuration_without_a_socket_means_the_default_one(folder):
    (folder / "config.yaml").write_text("switch: {name: x}\n")
    result = run("status", "--config", str(folder / "config.yaml"))
    assert "/run/killswitch-control/control.sock" in result.stderr


# --- trigger ---


def test_trigger_with_confirm_sends_the_reason_and_prints_the_state(sidecar):
    sidecar.answer("POST", "/api/v1/trigger", KILLED)
    result = run("trigger", "--reason", "fat finger", "--by", "alice", "--restriction", "halt", "--confirm",
                 "--socket", sidecar.path)  # fmt: skip
    assert result.exit_code == 0
    assert result.stdout.startswith("BLOCKED – KILLED")
    assert sidecar.asked_for("POST", "/api/v1/trigger") == [
        {"reason": "fat finger", "by": "alice", "restriction": "halt"}
    ]


def test_trigger_without_terminal_and_confirm_is_a_usage_error_and_sends_nothing(sidecar):
    result = spawn("trigger", "--reason", "x", "--socket", sidecar.path, stdin=b"y\n")
    assert result.returncode == 2
    assert b"--confirm" in result.stderr
    assert b"NOTHING was blocked" in result.stderr
    assert sidecar.asked == []


def test_trigger_on_a_terminal_asks_by_the_name_of_the_switch(sidecar):
    sidecar.answer("POST", "/api/v1/trigger", KILLED)
    out, code = on_a_terminal(
        "trigger", "--reason", "x", "--socket", sidecar.path, typed=[("trading/bot-0 now?", "y\n")]
    )
    assert code == 0, out
    assert "BLOCKED – KILLED" in out
    out, code = on_a_terminal("trigger", "--reason", "x", "--socket", sidecar.path, typed=[("now?", "n\n")])
    assert code == 1
    assert "NOTHING was blocked" in out
    assert len(sidecar.asked_for("POST", "/api/v1/trigger")) == 1


def test_trigger_without_a_sidecar_says_that_nothing_was_blocked(folder):
    path = str(folder / "none.sock")
    result = spawn("trigger", "--reason", "x", "--confirm", "--socket", path)
    assert result.returncode == 1
    assert result.stdout == b""
    assert b"NOTHING was blocked" in result.stderr
    assert path.encode() in result.stderr
    assert b"stop the trading process" in result.stderr


def test_trigger_that_is_not_durable_says_so_and_fails(sidecar):
    sidecar.problem("POST", "/api/v1/trigger", 503, "Not durable", "disk is full", state="KILLED", durable=False)
    result = run("trigger", "--reason", "x", "--confirm", "--socket", sidecar.path)
    assert result.exit_code == 1
    assert result.stdout.startswith("blocked, NOT durable")
    assert "disk is full" in result.stderr
    result = run("trigger", "--reason", "x", "--confirm", "--socket", sidecar.path, "--output", "json")
    assert json.loads(result.stdout)["durable"] is False
    assert "blocked, NOT durable" in result.stderr


def test_trigger_never_claims_a_block_that_the_sidecar_does_not_report(sidecar):
    sidecar.answer("POST", "/api/v1/trigger", status())
    result = run("trigger", "--reason", "x", "--confirm", "--socket", sidecar.path)
    assert result.exit_code == 1
    assert "NOT KNOWN" in result.stderr
    sidecar.answer("POST", "/api/v1/trigger", {**KILLED, "durable": False})
    result = run("trigger", "--reason", "x", "--confirm", "--socket", sidecar.path)
    assert (result.exit_code, "NOT durable" in result.stderr) == (1, True)


def test_trigger_that_got_no_answer_does_not_say_that_nothing_happened(folder):
    path = str(folder / "deaf.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def hang_up():
            connection, _ = listener.accept()
            connection.recv(65536)
            connection.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        result = run("trigger", "--reason", "x", "--confirm", "--socket", path)
        thread.join()
    assert result.exit_code == 1
    assert "NOT KNOWN whether trading is blocked" in result.stderr
    assert "NOTHING" not in result.stderr


def test_a_refusal_is_printed_word_for_word_with_exit_code_4(sidecar):
    sidecar.problem("POST", "/api/v1/trigger", 409, "Not possible", "the switch is DISABLED")
    result = run("trigger", "--reason", "x", "--confirm", "--socket", sidecar.path)
    assert result.exit_code == 4
    assert "Not possible" in result.stderr
    assert "the switch is DISABLED" in result.stderr
    assert "NOTHING was blocked" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [["trigger", "--confirm"], ["trigger", "--reason", " ", "--confirm"], ["recover", "--reason", "x"],
     ["recover", "--by", "bob"], ["approve"], ["trigger", "--reason", "x", "--restriction", "some", "--confirm"],
     ["no-such-command"], ["status", "--output", "xml"], ["check", "--quantity", "many"],
     ["recover", "--reason", "x", "--by", "b", "--waive", "dd"],
     ["recover", "--reason", "x", "--by", "b", "--waive", "dd=x:24h"], ["audit", "--since", "yesterday"]],
)  # fmt: skip
def test_wrong_usage_ends_with_2(arguments, sidecar):
    assert run("--socket", sidecar.path, *arguments).exit_code == 2
    assert sidecar.asked == []


# --- recover, approve, cancel ---


@pytest.mark.parametrize("flag", [[], ["--code-stdin"]])
def test_recover_reads_one_line_of_standard_input_as_the_code(sidecar, flag):
    sidecar.answer("POST", "/api/v1/recovery", status(state="RECOVERING", gate=denied("recovering")))
    waivers = ["--waive", "dd=-0.2:24h", "--waive", "a:b:2026-03-02T00:00:00Z"]
    typed = " c\u00f6de \r\nsecond line\n".encode()
    result = spawn("recover", "--reason", "ok", "--by", "bob", *waivers, "--socket", sidecar.path, *flag, stdin=typed)
    assert result.returncode == 0, result.stderr
    assert sidecar.asked_for("POST", "/api/v1/recovery") == [
        {"reason": "ok", "by": "bob", "code": " cöde ",
         "waive": [{"trigger": "dd", "until": "24h", "threshold": -0.2},
                   {"trigger": "a:b", "until": "2026-03-02T00:00:00Z"}]}
    ]  # fmt: skip
    assert b"BLOCKED \xe2\x80\x93 RECOVERING" in result.stdout


@pytest.mark.parametrize("stdin", [b"", b"\n", b"\xff\xfe\n", b"x" * 2000 + b"\n"])
def test_a_code_that_cannot_be_one_is_a_usage_error_and_sends_nothing(sidecar, stdin):
    environ = {"KILL_SWITCH_APPROVAL_CODE": "swordfish"}
    for arguments in (["recover", "--reason", "x", "--by", "bob"], ["approve", "--by", "bob"]):
        result = spawn(*arguments, "--socket", sidecar.path, stdin=stdin, environ=environ)
        assert result.returncode == 2
    assert sidecar.asked == []


def test_recover_on_a_terminal_shows_the_switch_and_hides_the_code(sidecar):
    sidecar.answer("GET", "/api/v1/status", KILLED)
    sidecar.answer("POST", "/api/v1/recovery", KILLED)
    out, code = on_a_terminal("recover", "--reason", "ok", "--by", "bob", "--socket", sidecar.path,
                              typed=[("Approval code of bob for trading/bot-0:", "s3cret\n")])  # fmt: skip
    assert code == 0, out
    assert "trading/bot-0: BLOCKED – KILLED" in out
    assert "s3cret" not in out
    assert sidecar.asked_for("POST", "/api/v1/recovery")[0]["code"] == "s3cret"


@pytest.mark.parametrize("code", [401, 403, 409, 429])
def test_a_refused_recovery_names_what_stands_in_the_way(sidecar, code):
    blockers = ["portfolio_drawdown is firing", "prometheus is down"]
    headers = {"Retry_After": "90"}
    sidecar.problem("POST", "/api/v1/recovery", code, "No", "see the blockers", headers, blockers=blockers)
    result = run("recover", "--reason", "x", "--by", "bob", "--socket", sidecar.path, stdin="code\n")
    assert result.exit_code == 4
    assert "see the blockers" in result.stderr
    assert "  - portfolio_drawdown is firing\n  - prometheus is down" in result.stderr
    assert "1 min 30 s" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("code", [400, 404, 500, 503])
def test_other_failures_end_with_1(sidecar, code):
    sidecar.problem("POST", "/api/v1/recovery/approvals", code, "Failed", "why")
    assert run("approve", "--by", "bob", "--socket", sidecar.path, stdin="code\n").exit_code == 1


def test_approve_and_cancel_go_to_their_places(sidecar):
    sidecar.answer("POST", "/api/v1/recovery/approvals", KILLED)
    sidecar.answer("DELETE", "/api/v1/recovery", KILLED)
    assert run("approve", "--by", "carol", "--socket", sidecar.path, stdin="code\n").exit_code == 0
    assert sidecar.asked_for("POST", "/api/v1/recovery/approvals") == [{"by": "carol", "code": "code"}]
    assert run("cancel-recovery", "--socket", sidecar.path).exit_code == 0
    assert run("cancel-recovery", "--by", "al", "--reason", "no", "--socket", sidecar.path).exit_code == 0
    assert sidecar.asked_for("DELETE", "/api/v1/recovery") == [None, {"by": "al", "reason": "no"}]


def test_nothing_changed_is_said_where_no_sidecar_answers(folder):
    result = run("cancel-recovery", "--socket", str(folder / "none.sock"))
    assert (result.exit_code, "Nothing changed." in result.stderr) == (1, True)


# --- health, check, audit, version ---


def test_health_tells_each_check(sidecar):
    checks = [{"name": "sources_up", "ok": False, "seen": "prometheus down", "wanted": "all up"}]
    sidecar.answer("GET", "/api/v1/health", {"healthy": False, "checks": checks})
    result = run("health", "--socket", sidecar.path)
    assert result.exit_code == 3
    assert result.stdout.startswith("UNHEALTHY")
    assert "prometheus down" in result.stdout
    sidecar.answer("GET", "/api/v1/health", {"healthy": True, "checks": []})
    assert run("health", "--socket", sidecar.path).exit_code == 0
    sidecar.answer("GET", "/api/v1/health", {"hello": 1})
    assert run("health", "--socket", sidecar.path).exit_code == 1
    assert run("health", "--socket", "/nowhere").exit_code == 1


def test_live_says_whether_the_process_lives_and_nothing_of_trading(sidecar):
    sidecar.answer("GET", "/livez", {"ok": True})
    assert run("live", "--socket", sidecar.path).exit_code == 0
    sidecar.answer("GET", "/livez", {"status": 503, "detail": "task keeper ended"}, code=503)
    result = run("live", "--socket", sidecar.path)
    assert (result.exit_code, "task keeper ended" in result.output) == (1, True)
    assert run("live", "--socket", "/nowhere").exit_code == 1


HEADERS = {
    "X_Killswitch_Switch": "trading/bot-0", "X_Killswitch_State": "KILLED", "X_Killswitch_Restriction": "halt",
    "X_Killswitch_Factor": "0.0", "X_Killswitch_Reason": "killed",
}  # fmt: skip


def test_check_asks_as_a_new_order_does(sidecar):
    sidecar.answer("GET", "/gate", b"", 403, **HEADERS)
    for more in ([], ["--intent", "new"]):
        result = run("check", "--gate-socket", sidecar.path, *more)
        assert result.exit_code == 3
        assert result.stdout.startswith("deny (killed)")
    assert all(headers["X-Order-Intent"] == "new" for *_, headers in sidecar.asked)
    sidecar.answer("GET", "/gate", b"", 200, **{**HEADERS, "X_Killswitch_Reason": "active"})
    assert run("check", "--gate-socket", sidecar.path).exit_code == 0


def test_a_socket_alone_is_enough_to_ask_the_gate_of_that_very_sidecar(sidecar, folder, monkeypatch):
    monkeypatch.setattr("sidecar.cli.context.DEFAULT_CONFIG", str(folder / "none.yaml"))
    config = folder / "its-own.yaml"
    config.write_text(f"gate: {{socket: {sidecar.path}}}\n")
    sidecar.answer("GET", "/api/v1/status", status(config={"path": str(config)}))
    sidecar.answer("GET", "/gate", denied("killed"), code=403)

    assert run("check", "--socket", sidecar.path).exit_code == 3
    monkeypatch.setenv("KILLSWITCH_SOCKET", sidecar.path)
    assert run("check").exit_code == 3


def test_a_configuration_that_was_named_is_not_overruled_by_the_sidecars_own(sidecar, folder):
    named = folder / "named.yaml"
    named.write_text(f"gate: {{socket: {folder / 'another.sock'}}}\n")
    result = run("check", "--socket", sidecar.path, "--config", str(named))
    assert result.exit_code == 1
    assert "another.sock" in result.stderr
    assert sidecar.asked == []


def test_check_with_an_order_asks_for_that_order(sidecar):
    decision = {"decision": "deny", "state": "ACTIVE", "max_quantity": 40, "position_limit_factor": 0.5,
                "reason": {"code": "over_limit", "message": "140 is over 100", "release": "the next step"}}  # fmt: skip
    sidecar.answer("POST", "/v1/orders/check", decision)
    result = run("check", "--gate-socket", sidecar.path, "--symbol", "AAPL", "--side", "buy", "--quantity", "100",
                 "--position", "-40.5", "--reduce-only")  # fmt: skip
    assert result.exit_code == 3
    assert "over_limit" in result.stdout
    assert "At most 40" in result.stdout
    assert sidecar.asked_for("POST", "/v1/orders/check") == [
        {"intent": "new", "symbol": "AAPL", "side": "buy", "quantity": "100", "position": "-40.5", "reduce_only": True}
    ]


def test_check_of_a_malformed_order_is_a_denial(sidecar):
    sidecar.problem("POST", "/v1/orders/check", 400, "Malformed", "side is missing", decision="deny")
    result = run("check", "--gate-socket", sidecar.path, "--symbol", "AAPL")
    assert (result.exit_code, "side is missing" in result.stdout) == (3, True)


@pytest.mark.parametrize(
    ("code", "body"),
    [(200, b"ok"), (404, b"{}"), (500, b'{"decision":"allow"}'), (403, b'{"decision":"allow"}'), (200, b"{}")],
)
def test_check_takes_nothing_but_a_gates_own_yes_for_a_yes(sidecar, code, body):
    sidecar.answer("GET", "/gate", body, code)
    assert run("check", "--gate-socket", sidecar.path).exit_code == 1


def test_a_silent_gate_fails_the_check_but_never_a_cancel(folder):
    gate = str(folder / "none.sock")
    assert run("check", "--gate-socket", gate).exit_code == 1
    assert run("check", "--gate", "http://127.0.0.1:1").exit_code == 1
    assert run("check", "--gate", "https://127.0.0.1:1").exit_code == 1
    result = run("check", "--intent", "cancel", "--gate-socket", gate)
    assert (result.exit_code, "cancels always pass" in result.stdout) == (0, True)


EVENTS = [
    {"seq": 7, "time": "2026-03-01T11:55:00.000Z", "type": "switch.killed", "from": "ACTIVE", "to": "KILLED",
     "by": "alice", "reason": "fat\nfinger", "data": {}, "prev": "", "hash": ""},
    {"seq": 8, "time": "2026-03-01T11:56:00.000Z", "type": "recovery.requested", "from": None, "to": None, "by": "bob",
     "reason": "", "data": {}, "prev": "", "hash": ""},
]  # fmt: skip


def test_audit_asks_the_sidecar_and_prints_one_line_an_event(sidecar):
    sidecar.answer("GET", "/api/v1/audit", {"events": EVENTS})
    result = run("audit", "--since", "2026-03-01", "--until", "2026-03-01", "--type", "x", "--limit", "5",
                 "--socket", sidecar.path)  # fmt: skip
    assert result.stdout.splitlines() == [
        "2026-03-01T11:55:00.000Z  #7  switch.killed  ACTIVE -> KILLED  by alice  - fat finger",
        "2026-03-01T11:56:00.000Z  #8  recovery.requested  by bob",
    ]
    assert sidecar.asked[0][1] == (
        "/api/v1/audit?limit=5&since=2026-03-01T00%3A00%3A00.000Z&until=2026-03-01T23%3A59%3A59.999Z&type=x"
    )
    result = run("audit", "--output", "json", "--socket", sidecar.path)
    assert json.loads(result.stdout) == {"events": EVENTS}
    run("audit", "--type", "switch.killed", "--type", "x,y", "--socket", sidecar.path)
    assert sidecar.asked[-1][1] == "/api/v1/audit?limit=20&type=switch.killed%2Cx%2Cy"


def test_audit_follows_new_events_once_each(sidecar):
    sidecar.answer("GET", "/api/v1/audit", {"events": EVENTS[:1]})
    command = [sys.executable, "-u", "-m", "sidecar", "audit", "--follow", "-o", "json", "--socket", sidecar.path]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert json.loads(process.stdout.readline())["seq"] == 7
            sidecar.answer("GET", "/api/v1/audit", {"events": EVENTS})
            assert json.loads(process.stdout.readline())["seq"] == 8
        finally:
            process.kill()
            process.wait()


def test_ctrl_c_ends_following_quietly(sidecar):
    sidecar.answer("GET", "/api/v1/audit", {"events": EVENTS[:1]})
    command = [sys.executable, "-u", "-m", "sidecar", "audit", "--follow", "--socket", sidecar.path]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert b"#7" in process.stdout.readline()
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=10.0) == (b"", b"")
            assert process.returncode == 0
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("24h", NOW - timedelta(hours=24)),
        ("7d", NOW - timedelta(days=7)),
        ("2026-02-01", datetime(2026, 2, 1, tzinfo=UTC)),
        ("2026-02-01T08:00", datetime(2026, 2, 1, 8, tzinfo=UTC)),
        ("2026-02-01T08:00:00+02:00", datetime(2026, 2, 1, 6, tzinfo=UTC)),
        ("2026-02-01T08:00:00Z", datetime(2026, 2, 1, 8, tzinfo=UTC)),
    ],
)
def test_times_are_read_as_ago_or_as_dates_in_utc(text, moment):
    assert parse_moment(text, now=NOW) == moment


def test_a_bare_until_date_includes_its_day_and_nonsense_is_refused():
    assert parse_moment("2026-02-01", now=NOW, end_of_day=True) == datetime(2026, 2, 1, 23, 59, 59, 999000, tzinfo=UTC)
    with pytest.raises(ValueError, match="24h or 7d"):
        parse_moment("last week", now=NOW)


def test_an_event_with_nothing_in_it_is_still_a_line():
    assert event_line({}) == "?  #?  ?"


def write_audit(folder, now):
    from sidecar.adapters.audit_log import AuditLog

    log = AuditLog.open(folder, max_bytes=10_000_000, retention_seconds=None, now=now)
    log.append([{"type": "switch.killed", "reason": f"r{n}"} for n in range(3)], now)
    log.close()


def test_without_a_sidecar_the_audit_is_read_from_the_state_folder_and_said_so(folder):
    write_audit(folder / "state" / "audit", NOW)
    config = folder / "config.yaml"
    config.write_text("storage: {dir: state}\ncontrol: {socket: none.sock}\n")
    result = run("audit", "--limit", "2", "--config", str(config))
    assert result.exit_code == 0, result.stderr
    assert [line[-2:] for line in result.stdout.splitlines()] == ["r1", "r2"]
    assert "Reading the files in" in result.stderr
    assert len(json.loads(run("audit", "-o", "json", "--config", str(config)).stdout)["events"]) == 3
    config.write_text("storage: {dir: elsewhere}\ncontrol: {socket: none.sock}\n")
    assert run("audit", "--config", str(config)).exit_code == 1


def test_verify_finds_a_whole_audit_whole_and_a_changed_line_damaged(folder):
    write_audit(folder / "audit", NOW)
    result = run("audit", "verify", "--dir", str(folder))
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("WHOLE: 3 lines checked")
    assert run("audit", "verify", "--dir", str(folder / "audit")).exit_code == 0
    file = next((folder / "audit").glob("*.jsonl"))
    file.write_text(file.read_text().replace('"r1"', '"rX"'))
    result = run("audit", "verify", "--dir", str(folder))
    assert result.exit_code == 1
    assert result.stdout.startswith("DAMAGED")
    assert f"{file.name}:2" in result.stdout
    assert json.loads(run("audit", "verify", "--dir", str(folder), "-o", "json").stdout)["ok"] is False
    assert run("audit", "verify", "--dir", str(folder / "none")).exit_code == 1


def test_version_is_printed(sidecar):
    assert run("version").stdout == f"killswitch-sidecar {__version__}\n"
    assert json.loads(run("version", "--output", "json").stdout) == {"version": __version__}


# --- hash-code ---


def test_hash_code_prints_a_hash_that_verifies_on_its_last_line():
    from sidecar.adapters.approvers import verify_code

    result = spawn("hash-code", stdin=b"s3cret\n")
    assert result.returncode == 0
    assert verify_code("s3cret", result.stdout.decode().splitlines()[-1])
    assert b"s3cret" not in result.stdout + result.stderr


def test_hash_code_on_a_terminal_asks_twice():
    out, code = on_a_terminal("hash-code", typed=[("Approval code:", "one\n"), ("again:", "one\n")])
    assert code == 0
    assert out.splitlines()[-1].startswith("scrypt$ln=14,r=8,p=1$")
    out, code = on_a_terminal("hash-code", typed=[("Approval code:", "one\n"), ("again:", "two\n")])
    assert code == 2
    assert "scrypt$" not in out


def test_hash_code_refuses_an_empty_code():
    assert spawn("hash-code", stdin=b"\n").returncode == 2


def test_hash_code_makes_a_token_and_its_sha256():
    import hashlib

    lines = run("hash-code", "--token").stdout.splitlines()
    assert lines[-1] == hashlib.sha256(lines[1].encode()).hexdigest()
    assert len(lines[1]) >= 43
    document = json.loads(run("hash-code", "--token", "-o", "json").stdout)
    assert document["sha256"] == hashlib.sha256(document["token"].encode()).hexdigest()


# --- the program ---


def test_status_starts_without_the_servers_libraries(sidecar):
    program = (
        "import sys\nfrom sidecar.cli.main import main\n"
        f"try: main(['status', '--socket', {sidecar.path!r}])\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "heavy = {'aiohttp', 'pydantic', 'prometheus_api_client', 'requests', 'uvloop', 'asyncio', 'promql_parser'}\n"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(
    "path",
    [[], ["serve"], ["demo"], ["status"], ["trigger"], ["recover"], ["approve"], ["cancel-recovery"], ["audit"],
     ["audit", "verify"], ["health"], ["live"], ["check"], ["rules"], ["rules", "check"], ["rules", "list"],
     ["hash-code"], ["version"]],
)  # fmt: skip
def test_every_command_has_help_and_the_common_options(path):
    result = run(*path, "--help")
    assert result.exit_code == 0
    for option in ("--output", "--socket", "--config"):
        assert option in result.stdout


def test_a_terminal_that_cannot_show_a_character_still_shows_the_rest(sidecar):
    sidecar.answer("GET", "/api/v1/status", KILLED)
    done = spawn("status", "--socket", sidecar.path, environ={"PYTHONIOENCODING": "latin-1"})
    assert done.stdout.startswith(b"BLOCKED ? KILLED")


# --- words ---


def test_words_are_short_and_exact():
    assert [duration_text(s) for s in (0, 0.2, 45, 61, 3600, 7500, 90_000, -5)] == [
        "0 s", "1 s", "45 s", "1 min 1 s", "1 h", "2 h 5 min", "1 d 1 h", "0 s",
    ]  # fmt: skip
    assert [percent_text(r) for r in (0.5, 0.999, 1, 1.5, None, float("nan"), True)] == [
        "50 %", "99 %", "100 %", "150 %", "-", "-", "-",
    ]  # fmt: skip
    assert [number_text(n) for n in (1, -0.16, None, "x", 1e9)] == ["1", "-0.16", "-", "-", "1e+09"]
    assert one_line(" a\nb\x00\u2028 ") == "a b\\x00\\u2028"
    assert moment_text("2026-03-01T11:59:00Z", NOW) == "2026-03-01 11:59:00 UTC (1 min ago)"
    assert moment_text("2026-03-01T12:00:30Z", NOW) == "2026-03-01 12:00:30 UTC (in 30 s)"
    assert moment_text("soon", NOW) == "soon"


@pytest.mark.parametrize("value", ["soon", "-1s", "2h"])
def test_a_lingering_that_cannot_be_meant_is_wrong_usage(value: str) -> None:
    done = CliRunner().invoke(killswitch, ["serve", "--linger", value])
    assert done.exit_code == 2
    assert "--linger" in done.output
