import json
from decimal import Decimal

import pytest

from sidecar.adapters.gate_http.desk import DURATION_BOUNDS, Desk, gate_key
from sidecar.core.policy import GatePolicy
from sidecar.core.snapshot import ALL_CLEAR, Reason, ReasonCode, Snapshot
from sidecar.core.states import Mode, Restriction, Stage, State

KILLED = Reason(
    code=ReasonCode.KILLED,
    message="killed by rule drawdown",
    trigger="drawdown",
    value=-0.2,
    limit=-0.15,
    since=1_700_000_000.25,
    release="an approved recovery",
)
BRAKE = Reason(code=ReasonCode.HALTED, message="too many orders", trigger="runaway", value=101.0, limit=100.0)
LIMITS = GatePolicy(position_limits={"*": Decimal(1000)}, lease_ms=250)
NEW, REDUCE, CANCEL = range(3)


def snapshot(restriction=Restriction.NONE, factor=1.0, reason=ALL_CLEAR, state=State.ACTIVE, switch="fx/trader-0"):
    return Snapshot(
        switch=switch,
        mode=Mode.ACTIVE,
        state=state,
        stage=Stage.NONE,
        restriction=restriction,
        factor=factor,
        epoch=17,
        since=0.0,
        gate_restriction=restriction,
        gate_factor=factor,
        reason=reason,
    )


ACTIVE = snapshot()
HALTED = snapshot(Restriction.HALT, 0.0, KILLED, State.KILLED)


def desk_at(at=ACTIVE, policy=LIMITS, admit=None) -> Desk:
    desk = Desk("fx/trader-0", admit)
    desk.update(at, policy)
    return desk


def parse(response: bytes) -> tuple[int, dict[str, str], bytes]:
    head, _, body = response.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    return int(status.split()[1]), dict(line.split(": ", 1) for line in lines), body


def ask(desk, intent=NEW, *, head=False, close=False):
    return parse(desk.answer(gate_key(intent, head=head, close=close)))


def check(desk, document, between=lambda: None):
    job = desk.check(document if isinstance(document, bytes) else json.dumps(document).encode())
    steps = 0
    while True:
        try:
            next(job)
        except StopIteration as done:
            status, body = done.value
            return status, json.loads(body, parse_float=Decimal), steps
        steps += 1
        between()


def order(quantity=100, **more):
    return {"side": "buy", "quantity": quantity, "position": 0, **more}


def test_before_the_first_snapshot_only_cancels_pass():
    desk = Desk("fx/trader-0")
    assert ask(desk)[0] == 403
    assert ask(desk)[1]["X-Killswitch-Reason"] == "not_ready"
    assert ask(desk, REDUCE)[0] == 403
    assert ask(desk, CANCEL)[0] == 200
    assert check(desk, order())[1]["reason"]["code"] == "not_ready"
    assert check(desk, {"intent": "cancel"})[1]["decision"] == "allow"


def test_an_answer_carries_the_decision_in_headers_and_body():
    status, headers, body = ask(desk_at(HALTED))
    document = json.loads(body)
    assert status == 403
    assert headers == {
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Cache-Control": "no-store",
        "Connection": "keep-alive",
        "X-Killswitch-Switch": "fx/trader-0",
        "X-Killswitch-State": "KILLED",
        "X-Killswitch-Restriction": "halt",
        "X-Killswitch-Factor": "0.0",
        "X-Killswitch-Reason": "killed",
        "X-Killswitch-Decision-Id": document["decision_id"],
    }
    assert document == {
        "decision": "deny",
        "decision_id": document["decision_id"],
        "switch": "fx/trader-0",
        "state": "KILLED",
        "restriction": "halt",
        "position_limit_factor": 0.0,
        "max_quantity": None,
        "reason": {
            "code": "killed",
            "message": "killed by rule drawdown",
            "trigger": "drawdown",
            "value": -0.2,
            "limit": -0.15,
            "since": "2023-11-14T22:13:20.250Z",
            "release": "an approved recovery",
        },
        "epoch": 17,
        "valid_for_ms": 250,
    }


def test_head_has_the_headers_and_no_body():
    desk = desk_at()
    status, headers, body = ask(desk, head=True)
    assert (status, body) == (200, b"")
    assert headers["Content-Length"] == str(len(ask(desk)[2]))


def test_every_answer_has_its_own_id():
    desk, other = desk_at(), desk_at()
    ids = [ask(desk)[1]["X-Killswitch-Decision-Id"] for _ in range(50)]
    ids += [check(desk, order())[1]["decision_id"] for _ in range(50)]
    ids.append(ask(other)[1]["X-Killswitch-Decision-Id"])
    assert len(set(ids)) == 101


def test_a_name_cannot_add_a_header():
    _, headers, _ = ask(desk_at(snapshot(switch="a\r\nX-Evil: 1\x00ü€")))
    assert headers["X-Killswitch-Switch"] == "a??X-Evil: 1?ü?"
    assert "X-Evil" not in headers


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
def test_a_value_that_json_cannot_say_is_null(value):
    reason = Reason(code=ReasonCode.HALTED, message="m", value=value)
    assert json.loads(ask(desk_at(snapshot(Restriction.HALT, 1.0, reason)))[2])["reason"]["value"] is None


@pytest.mark.parametrize("broken", [snapshot(factor=float("nan")), None, snapshot(state="nonsense")])
def test_a_snapshot_that_cannot_be_used_denies_all_but_cancels(broken, caplog):
    desk = desk_at(ACTIVE)
    desk.update(broken, LIMITS)
    assert ask(desk)[0] == 403
    assert ask(desk)[1]["X-Killswitch-Reason"] == "internal_error"
    assert ask(desk, CANCEL)[0] == 200
    _, (denied, passed), _ = check(desk, [order(), {"intent": "cancel"}])
    assert (denied["decision"], denied["reason"]["code"], passed["decision"]) == ("deny", "internal_error", "allow")
    desk.update(ACTIVE, LIMITS)
    assert ask(desk)[0] == 200
    assert "gate.snapshot_unusable" in caplog.text


def test_an_order_that_cannot_be_decided_is_denied_and_the_others_answered(caplog):
    desk = desk_at(policy=GatePolicy(position_limits={"X": Decimal("1e-320")}))
    _, answers, _ = check(desk, [order(symbol="X", position=1), {"intent": "cancel"}, order(symbol="Y")])
    assert [answer["reason"]["code"] for answer in answers] == ["internal_error", "cancel", "active"]
    assert answers[0]["decision"] == "deny"
    assert "gate.decision_failed" in caplog.text


def test_one_order_is_answered_with_an_object_and_a_list_with_a_list():
    desk = desk_at(snapshot(factor=0.5))
    status, answer, _ = check(desk, order(500.5))
    assert (status, answer["decision"], answer["max_quantity"], answer["reason"]["limit"]) == (200, "deny", 500, 500)
    status, answers, _ = check(desk, [order(300), order(300), order("200"), {"intent": "cancel"}])
    assert status == 200
    assert [one["decision"] for one in answers] == ["allow", "deny", "allow", "allow"]
    assert [one["max_quantity"] for one in answers] == [500, 200, 200, None]


def test_max_quantity_is_written_exactly():
    desk = desk_at(policy=GatePolicy(position_limits={"*": Decimal("0.3")}))
    assert check(desk, order("0.1", position="0.2"))[1]["max_quantity"] == Decimal("0.1")


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b"[{}]", b"nonsense"])
def test_a_malformed_question_is_a_problem_that_denies(body):
    status, problem, _ = check(desk_at(), body)
    assert (status, problem["status"], problem["decision"], problem["reason"]["code"]) == (
        400,
        400,
        "deny",
        "bad_order",
    )
    assert problem["detail"] == problem["reason"]["message"]


def test_a_long_list_is_decided_in_steps():
    status, answers, steps = check(desk_at(policy=GatePolicy()), [order()] * 1000)
    assert (status, len(answers)) == (200, 1000)
    assert steps > 50


def test_a_short_list_is_decided_at_once():
    assert check(desk_at(), [order()] * 31)[2] == 0


def test_nothing_of_a_list_is_allowed_after_the_gate_has_closed():
    desk = desk_at(policy=GatePolicy())
    calls = []

    def close_in_the_middle():
        calls.append(None)
        if len(calls) == 40:
            desk.update(HALTED, GatePolicy())

    _, answers, _ = check(desk, [order()] * 1000, close_in_the_middle)
    assert {answer["reason"]["code"] for answer in answers} == {"killed"}
    decisions = desk.statistics(0, 0).decisions
    assert decisions["deny", "killed"] == 1000
    assert decisions["allow", "active"] == 0


def test_a_list_is_answered_though_snapshots_never_rest():
    desk = desk_at(policy=GatePolicy())
    _, answers, _ = check(desk, [order()] * 1000, lambda: desk.update(ACTIVE, GatePolicy()))
    assert len(answers) == 1000


def test_the_brake_is_asked_about_new_and_replace_only():
    asked = []
    desk = desk_at(admit=asked.append)
    for intent in (NEW, REDUCE, CANCEL):
        ask(desk, intent)
        ask(desk, intent, head=True, close=True)
    check(desk, [order(), order(intent="replace"), {"intent": "cancel"}])
    assert asked == ["new", "new", "new", "replace"]


def test_the_brake_denies_the_very_question_that_trips_it():
    reasons = iter([None, BRAKE, BRAKE])
    desk = desk_at(admit=lambda intent: next(reasons))
    assert ask(desk)[0] == 200
    status, headers, body = ask(desk)
    assert (status, headers["X-Killswitch-Reason"]) == (403, "halted")
    assert json.loads(body)["reason"]["trigger"] == "runaway"
    assert int(headers["Content-Length"]) == len(body)
    assert check(desk, order())[1]["reason"]["code"] == "halted"
    assert desk.statistics(0, 0).decisions["deny", "halted"] == 2


def test_a_brake_that_kills_denies_the_whole_list_that_trips_it():
    desk = desk_at(policy=GatePolicy())
    count = []

    def admit(intent):
        count.append(intent)
        if len(count) < 3:
            return None
        desk.update(HALTED, GatePolicy())
        return BRAKE

    desk.admit = admit
    _, answers, _ = check(desk, [order()] * 4)
    assert [answer["reason"]["code"] for answer in answers] == ["killed"] * 4


def test_a_denial_of_the_snapshot_is_told_before_that_of_the_brake():
    desk = desk_at(HALTED, admit=lambda intent: BRAKE)
    assert ask(desk)[1]["X-Killswitch-Reason"] == "killed"
    assert check(desk, order())[1]["reason"]["code"] == "killed"


@pytest.mark.parametrize("answer", [ZeroDivisionError, "no reason at all"])
def test_a_brake_that_fails_denies(answer, caplog):
    def admit(intent):
        if isinstance(answer, str):
            return answer
        raise answer

    desk = desk_at(admit=admit)
    assert ask(desk)[1]["X-Killswitch-Reason"] == "internal_error"
    assert check(desk, order())[1]["decision"] == "deny"
    assert ask(desk, CANCEL)[0] == 200
    assert "gate." in caplog.text


def test_every_pair_that_can_be_counted_is_there_from_the_start():
    statistics = Desk("s").statistics(3, 4)
    assert {code for _, code in statistics.decisions} == {code.value for code in ReasonCode}
    assert set(statistics.decisions.values()) == {0}
    assert (statistics.connections, statistics.connections_refused) == (3, 4)


def test_durations_are_counted_into_their_buckets():
    desk = Desk("s")
    for seconds in (0.0, 25e-6, 26e-6, 0.1, 5.0):
        desk.observe(seconds)
    statistics = desk.statistics(0, 0)
    assert statistics.duration_bounds == DURATION_BOUNDS
    assert statistics.duration_counts == (2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1)
    assert statistics.duration_sum == pytest.approx(5.100051)
