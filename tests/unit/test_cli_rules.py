"""`killswitch rules`: files as the sidecar reads them, and what a server says about their queries."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest
from click.testing import CliRunner

from sidecar.cli.main import killswitch

RULE = """
groups:
  - name: portfolio
    rules:
      - trigger: drawdown
        type: threshold
        query: min(portfolio_drawdown_ratio)
        operator: lt
        threshold: -0.15
        max_age: 60s
        series: 1
"""


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    for name in ("KILLSWITCH_CONFIG", "KILLSWITCH_SOCKET", "POD_NAME", "POD_NAMESPACE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def rule_file(tmp_path):
    path = tmp_path / "rules.yaml"
    path.write_text(RULE)
    return path


def run(*arguments):
    return CliRunner().invoke(killswitch, ["rules", *map(str, arguments)])


class Prometheus:
    """Answers the instant-query API from a table of parts of queries."""

    def __init__(self):
        self.values = {}
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                query = parse_qs(urlsplit(self.path).query)["query"][0]
                code, document = fake.reply(query)
                raw = json.dumps(document).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=lambda: self.server.serve_forever(poll_interval=0.02), daemon=True)
        self.thread.start()

    def reply(self, query):
        for part, values in self.values.items():
            if part in query:
                if isinstance(values, str):
                    return 400, {"status": "error", "errorType": "bad_data", "error": values}
                result = [{"metric": {"n": str(n)}, "value": [1_700_000_000, str(v)]} for n, v in enumerate(values)]
                return 200, {"status": "success", "data": {"resultType": "vector", "result": result}}
        return 200, {"status": "success", "data": {"resultType": "vector", "result": []}}

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def prometheus():
    fake = Prometheus()
    fake.values = {"max_over_time": [15.0], "count(": [1], "min(": [-0.01]}
    yield fake
    fake.close()


def test_a_good_file_can_be_used(rule_file):
    result = run("check", rule_file)
    assert (result.exit_code, result.stdout) == (0, "1 rule in 1 file: can be used.\n")


def test_every_problem_is_printed_at_its_line_and_ends_with_1(rule_file):
    rule_file.write_text(RULE.replace("operator: lt", "operator: under").replace("series: 1", "serie: 1"))
    result = run("check", rule_file)
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert any(line.startswith(f"{rule_file}:8: groups[0].rules[0].operator:") for line in lines)
    assert any(line.startswith(f"{rule_file}:11: groups[0].rules[0].serie:") for line in lines)
    document = json.loads(run("check", rule_file, "-o", "json").stdout)
    assert document["ok"] is False
    assert len(document["problems"]) == 2


def test_a_doubt_is_a_warning_and_no_failure(rule_file):
    rule_file.write_text(RULE.replace("operator: lt", "operator: gt").replace("-0.15", "0.15"))
    result = run("check", rule_file)
    assert result.exit_code == 0
    assert "warning: " in result.stdout
    assert "1 warning." in result.stdout


def test_tests_among_the_files_are_passed_over(rule_file, tmp_path):
    tests = tmp_path / "rules.test.yaml"
    tests.write_text("tests: [${POD_NAME}]")
    result = run("check", rule_file, tests)
    assert (result.exit_code, result.output) == (0, "1 rule in 1 file: can be used.\n")
    result = run("check", tests)
    assert (result.exit_code, "No rule file found in" in result.output) == (1, True)
    assert run("check", rule_file, tmp_path / "gone.test.yaml").exit_code == 1


def test_files_without_a_rule_are_a_failure_where_no_other_has_one(rule_file, tmp_path):
    empty = tmp_path / "empty.yaml"
    empty.write_text("groups: []\n")
    result = run("check", empty)
    assert (result.exit_code, f"No rule stands in {empty}" in result.output) == (1, True)
    result = run("check", rule_file, empty)
    assert (result.exit_code, result.stdout) == (0, "1 rule in 2 files: can be used.\n")


def test_files_that_do_not_exist_are_a_failure(tmp_path):
    assert run("check", tmp_path / "none.yaml").exit_code == 1
    assert run("check", tmp_path / "*.yml").exit_code == 1


def test_variables_of_a_pod_have_stand_ins_and_other_ones_must_be_set(rule_file):
    rule_file.write_text(RULE.replace("ratio", 'ratio{pod="${POD_NAME}"}'))
    result = run("check", rule_file)
    assert result.exit_code == 0
    assert "POD_NAME is not set here" in result.stderr
    rule_file.write_text(RULE.replace("ratio", 'ratio{desk="${DESK}"}'))
    result = run("check", rule_file)
    assert (result.exit_code, "DESK is not set" in result.stdout) == (1, True)


def test_without_files_those_of_the_configuration_are_checked(rule_file, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("switch: {name: bot}\nrules: {files: [rules.yaml]}\n")
    assert run("check", "--config", config).exit_code == 0
    config.write_text("switch: {nam: bot}\n")
    result = run("check", "--config", config)
    assert (result.exit_code, f"{config}:1: switch.nam" in result.stdout) == (1, True)
    assert run("check", "--config", tmp_path / "none.yaml").exit_code == 1


def test_a_live_server_that_agrees_changes_nothing(rule_file, prometheus):
    result = run("check", rule_file, "--prometheus", prometheus.url)
    assert (result.exit_code, result.stdout) == (0, "1 rule in 1 file: can be used.\n")


@pytest.mark.parametrize(
    ("values", "said", "code"),
    [
        ({"min(": "1:5: parse error: unexpected <"}, "does not take it: 1:5: parse error", 1),
        ({"min(": []}, "returns 0 series now, wanted are 1", 1),
        ({"min(": [-0.1, -0.2]}, "returns 2 series now, wanted are 1", 1),
        ({"min(": ["NaN"]}, "returns nan now", 1),
        ({"min(": [0.02]}, "drawdowns are ratios with losses negative", 0),
        ({"min(": [-0.2]}, "would fire now: -0.2 < -0.15", 0),
        ({"max_over_time": [45.0]}, "about 45s apart, max_age is 1m: one late scrape", 0),
        ({"max_over_time": [90.0]}, "about 1m30s apart, max_age is 1m: it would be stale", 1),
        ({"max_over_time": []}, "can be used.", 0),
    ],
)
def test_a_live_server_tells_what_files_cannot(rule_file, prometheus, values, said, code):
    prometheus.values = {**prometheus.values, **values}
    result = run("check", rule_file, "--prometheus", prometheus.url)
    assert said in result.stdout
    assert result.exit_code == code


def test_a_query_without_data_is_a_problem_where_no_count_is_given(rule_file, prometheus):
    rule_file.write_text(RULE.replace("        series: 1\n", ""))
    prometheus.values["min("] = []
    result = run("check", rule_file, "--prometheus", prometheus.url)
    assert (result.exit_code, "returns no data now" in result.stdout) == (1, True)


def test_a_heartbeat_must_return_a_time(rule_file, prometheus):
    heartbeat = "type: heartbeat\n        query: max(last_beat)\n"
    rule_file.write_text(RULE.split("type:", maxsplit=1)[0] + heartbeat)
    prometheus.values = {"max_over_time": [1], "count(": [1], "max(last_beat)": [42]}
    result = run("check", rule_file, "--prometheus", prometheus.url)
    assert (result.exit_code, "not the Unix time" in result.stdout) == (1, True)
    prometheus.values["max(last_beat)"] = [1_699_999_990]
    assert run("check", rule_file, "--prometheus", prometheus.url).exit_code == 0


def test_an_expression_whose_selector_matches_nothing_is_warned_about(rule_file, prometheus):
    rule_file.write_text(RULE.split("type:", maxsplit=1)[0] + "type: expression\n        expr: errors_total > 5\n")
    prometheus.values = {}
    result = run("check", rule_file, "--prometheus", prometheus.url)
    assert (result.exit_code, "matches nothing now" in result.stdout) == (0, True)


def test_a_server_that_does_not_answer_is_an_error(rule_file):
    result = run("check", rule_file, "--prometheus", "http://127.0.0.1:1")
    assert (result.exit_code, "does not answer" in result.stderr) == (1, True)


def test_list_shows_the_rules_of_files_or_of_the_running_sidecar(rule_file, tmp_path):
    out = run("list", rule_file).stdout
    assert ["drawdown", "threshold", "kill", "enforced", "min(portfolio_drawdown_ratio)"] in [
        line.split() for line in out.splitlines()
    ]
    assert json.loads(run("list", rule_file, "-o", "json").stdout)["triggers"][0]["trigger"] == "drawdown"
    assert run("list", tmp_path / "none.yaml").exit_code == 1
    assert run("list", "--socket", tmp_path / "none.sock").exit_code == 1
