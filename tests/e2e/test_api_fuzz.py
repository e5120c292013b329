"""What OpenAPI says is what is answered: schemathesis asks the real sidecar, with each credential, at both listeners.

Deterministic and bounded. No defect (5xx but a documented 503), no status that is not described, and every answer in
the shape that is described.
"""

from __future__ import annotations

import hashlib
import http.client
import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import schemathesis
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi import checks as openapi

from sidecar.adapters.gate_http.openapi import FILE
from tests.cast import ROOT, Metric, Sidecar

if TYPE_CHECKING:
    from collections.abc import Callable

    from schemathesis.schemas import APIOperation

pytestmark = pytest.mark.e2e

TOKENS = {role: f"{role}-token-3fa8" for role in ("viewer", "webhook", "operator", "risk")}
EXAMPLES = 4
STREAM = "/api/v1/events"
EXPECTED: dict[str | None, set[int]] = {
    None: {200, 401},
    "viewer": {200, 400, 403},
    "webhook": {200, 400, 403},
    "operator": {200, 400, 403},
    "risk": {200, 400},
}
BRAKE = {"trigger": "runaway", "type": "order_rate", "max_orders": 1_000_000, "per": "1s"}
ALERT = {"trigger": "external", "type": "alertmanager", "match": ['severity="critical"']}


def conforms(ctx: Any, response: Any, case: Any) -> None:
    """No defect, and what is described."""
    assert response.status_code != 500, response.text
    for check in (
        openapi.status_code_conformance,
        openapi.content_type_conformance,
        openapi.response_headers_conformance,
        openapi.response_schema_conformance,
    ):
        check(ctx, response, case)


def operations(document: dict[str, Any]) -> list[APIOperation[Any, Any, Any, Any]]:
    found = schemathesis.openapi.from_dict(document).get_all_operations()
    return [result.ok() for result in found]


def fuzz(
    operation: APIOperation[Any, Any, Any, Any], base_url: str, headers: dict[str, str], seen: Counter[tuple[str, int]]
) -> None:
    """Ask one operation with bodies and parameters that fit, and with those that do not."""
    # Any text fits a header or a path that is text, so nothing that does not fit can be made of those.
    modes = GenerationMode if operation.body or operation.query else (GenerationMode.POSITIVE,)
    for mode in modes:

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=EXAMPLES,
            derandomize=True,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def ask(case: Any) -> None:
            case.headers = {**(case.headers or {}), **headers}
            response = case.call(base_url=base_url, timeout=20)
            seen[operation.label, response.status_code] += 1
            case.validate_response(response, checks=[conforms])

        ask()


@pytest.fixture
def serving(make_sidecar: Callable[..., Sidecar]) -> Sidecar:
    sidecar = make_sidecar([BRAKE, ALERT], [])
    tokens = sidecar.folder / "tokens.yaml"
    entries = [
        {"name": role, "roles": [role], "sha256": hashlib.sha256(token.encode()).hexdigest()}
        for role, token in TOKENS.items()
    ]
    tokens.write_text(yaml.safe_dump(entries))
    sidecar.write_config(operations={"tokens_file": str(tokens)})
    sidecar.start()
    sidecar.wait_status("it to be ready", lambda status: status["ready"])
    return sidecar


def described(sidecar: Sidecar) -> dict[str, Any]:
    return dict(sidecar.operations("/openapi.json").document)


def test_the_operations_listener_answers_as_it_is_described_whoever_asks(serving: Sidecar) -> None:
    base = f"http://127.0.0.1:{serving.operations_port}"
    found = operations(described(serving))
    for credential, expected in EXPECTED.items():
        seen: Counter[tuple[str, int]] = Counter()
        headers = {} if credential is None else {"Authorization": f"Bearer {TOKENS[credential]}"}
        for operation in found:
            if operation.path != STREAM or credential in (None, "webhook"):
                fuzz(operation, base, headers, seen)
        statuses = {status for _, status in seen}
        assert expected <= statuses, seen
        assert statuses <= {200, 400, 401, 403, 409, 413, 415, 417, 429, 503}, seen
    assert serving.gate(intent="cancel").status == 200
    assert not serving.logged("operations.request_failed")
    check_the_stream(serving)


def check_the_stream(serving: Sidecar) -> None:
    """The stream of events would never end under the fuzzer."""
    connection = http.client.HTTPConnection("127.0.0.1", serving.operations_port, timeout=20)
    connection.request("GET", STREAM, headers={"Authorization": f"Bearer {TOKENS['viewer']}"})
    answer = connection.getresponse()
    assert answer.status == 200
    (media_type,) = described(serving)["paths"][STREAM]["get"]["responses"]["200"]["content"]
    assert answer.headers["Content-Type"].partition(";")[0] == media_type
    assert answer.readline() == b"event: status\n"
    connection.close()


def test_the_gate_answers_as_it_is_described(serving: Sidecar) -> None:
    document = json.loads((ROOT / FILE).read_text())
    base = f"http://127.0.0.1:{serving.gate_port}"
    for killed in (False, True):
        if killed:
            serving.kill_switch()
        seen: Counter[tuple[str, int]] = Counter()
        for operation in operations(document):
            fuzz(operation, base, {}, seen)
        assert {status for label, status in seen if "/gate" in label} == {403 if killed else 200}
        assert {status for label, status in seen if "orders" in label} == {200, 400}
    assert not serving.logged("gate.answer_failed")
    assert not serving.logged("gate.check_failed")


def test_the_fuzzer_finds_an_answer_that_is_not_described(serving: Sidecar) -> None:
    # The checks are asked too: with a status and a member taken out of the description, they must fail.
    document = described(serving)
    del document["paths"]["/api/v1/status"]["get"]["responses"]["401"]
    base = f"http://127.0.0.1:{serving.operations_port}"
    (status,) = [each for each in operations(document) if each.path == "/api/v1/status"]
    with pytest.raises(BaseException, match=r"[Uu]ndocumented"):
        fuzz(status, base, {}, Counter())
    document = described(serving)
    document["components"]["schemas"]["Status"]["properties"]["epoch"] = {"type": "string"}
    (status,) = [each for each in operations(document) if each.path == "/api/v1/status"]
    with pytest.raises(BaseException, match=r"schema"):
        fuzz(status, base, {"Authorization": f"Bearer {TOKENS['viewer']}"}, Counter())


def test_every_member_that_is_answered_is_described(
    make_sidecar: Callable[..., Sidecar], shared_prometheus: Any, drawdown: Metric
) -> None:
    sidecar = make_sidecar(
        [drawdown.rule(steps=[{"at": "50%", "action": "throttle", "factor": 0.5}])], [shared_prometheus.url]
    )
    sidecar.start()
    sidecar.wait_status("it to be ready", lambda status: status["ready"])
    schemas = described(sidecar)["components"]["schemas"]
    drawdown.set(-0.1)
    sidecar.wait_status("a throttle", lambda status: status["demands"])
    check(sidecar, schemas)
    drawdown.set(-0.01)
    sidecar.kill_switch()
    refused = sidecar.recover(code="wrong")
    assert not strangers(refused.document, schemas["Problem"], schemas)
    sidecar.wait_status("the throttle to lift", lambda status: not status["demands"])
    assert sidecar.recover().status == 200
    check(sidecar, schemas)
    sidecar.wait_status("a restart step", lambda status: status["stage"] == "GRADUAL_RESTART")
    check(sidecar, schemas)


def check(sidecar: Sidecar, schemas: dict[str, Any]) -> None:
    for path, name in (
        ("status", "Status"),
        ("triggers", "Triggers"),
        ("recovery", "Recovery"),
        ("health", "Health"),
        ("audit", "Audit"),
    ):
        document = sidecar.control("GET", f"/api/v1/{path}").document
        assert strangers(document, schemas[name], schemas) == []


def strangers(value: Any, schema: dict[str, Any], schemas: dict[str, Any], at: str = "") -> list[str]:
    """Members that no schema names."""
    if "$ref" in schema:
        return strangers(value, schemas[schema["$ref"].rpartition("/")[2]], schemas, at)
    if "anyOf" in schema:
        return [] if value is None else strangers(value, schema["anyOf"][0], schemas, at)
    if isinstance(value, list):
        return [found for each in value for found in strangers(each, schema["items"], schemas, f"{at}[]")]
    if not isinstance(value, dict) or "properties" not in schema:
        return []
    found = [f"{at}.{name}" for name in value if name not in schema["properties"]]
    for name in value.keys() & schema["properties"].keys():
        found += strangers(value[name], schema["properties"][name], schemas, f"{at}.{name}")
    return found
