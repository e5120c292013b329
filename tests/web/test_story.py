"""The page through the main job: a rule kills, wrong codes are refused, and trading comes back in steps."""

import pytest

from tests.web.stage import APPROVER, CODE, SECOND_APPROVER, SECOND_CODE, drawdown_rule

pytestmark = pytest.mark.e2e


def ask_to_recover(page, *, code=CODE, by=APPROVER, reason="positions reconciled"):
    page.click("#recover")
    page.fill("#recover-reason", reason)
    page.fill("#recover-by", by)
    page.fill("#recover-code", code)
    page.click("#recover-dialog button[type=submit]")


def rung(page, title):
    return page.locator("#ladder li", has=page.locator(".rung-title", has_text=title))


def test_a_breach_blocks_wrong_codes_are_refused_and_trading_comes_back_in_steps(switch, visit, word, report):
    sidecar = switch(
        recovery={
            "cooldown": "3s",
            "steps": [{"factor": 0.5}, {"factor": 0.75, "after": "3s"}, {"factor": 1.0, "after": "6s"}],
        }
    )
    page = visit(sidecar)
    word(page, "ALLOWED")
    assert page.title() == "ALLOWED · trading/bot-0 · killswitch"
    assert page.text_content("h1") == "trading/bot-0"
    assert not page.is_visible("#recover")
    icon = page.get_attribute("#favicon", "href")

    report(-0.2)
    word(page, "BLOCKED")
    assert page.title() == "BLOCKED · trading/bot-0 · killswitch"
    assert page.get_attribute("#favicon", "href") != icon
    assert "Killed. Only cancels pass." in page.text_content("#line")
    assert page.text_content("#urgent").startswith("BLOCKED. Killed.")
    because = page.text_content("#because")
    assert "Drawdown -0.2 is beyond -0.15" in because
    assert "breach" in because
    assert "portfolio_drawdown" in because
    assert "killswitch recover --reason TEXT --by NAME" in because
    assert page.text_content("#since").startswith("since 20")
    row = page.locator("[data-trigger=portfolio_drawdown]")
    row.get_by_text("firing: kill").wait_for()
    assert "133\u00a0%" in row.text_content()

    with page.expect_response("**/api/v1/recovery") as answered:
        ask_to_recover(page, code=f"{CODE}-not")
    refusal = page.locator("#recover-dialog .refusal")
    refusal.locator(".refusal-detail").wait_for()
    said = answered.value.json()
    assert said["detail"].startswith("the approval code is not that of this approver")
    assert refusal.locator(".refusal-title").text_content() == f"Refused (403): {said['title']}"
    assert refusal.locator(".refusal-detail").text_content() == said["detail"]
    assert page.input_value("#recover-code") == ""
    assert page.evaluate("document.activeElement.id") == "recover-code"

    page.fill("#recover-code", CODE)
    page.keyboard.press("Enter")
    refusal.locator(".refusal-title", has_text="409").wait_for()
    assert "rule portfolio_drawdown is firing" in refusal.text_content()
    page.click("#recover-dialog [data-close]")
    assert page.input_value("#recover-code") == ""
    assert page.evaluate("document.activeElement.id") == "recover"

    report(-0.02)
    page.wait_for_function("() => /inactive/.test(document.querySelector('#triggers').textContent)")
    ask_to_recover(page)
    page.wait_for_selector("#answer:text('RECOVERING')")
    assert "cooldown" in page.text_content("#answer")
    page.wait_for_function("() => /left of/.test(document.querySelector('#ladder').textContent)")
    assert page.text_content(WORD) == "BLOCKED"
    assert "Recovering" in page.text_content("#line")
    assert rung(page, "Cooldown").get_attribute("aria-current") == "step"
    assert "bob (verified)" in rung(page, "1 approval").text_content()

    word(page, "REDUCED 50 %")
    assert "(next)in " in rung(page, "75").text_content()
    word(page, "REDUCED 75 %")
    word(page, "ALLOWED")
    page.wait_for_function("() => /restart.step/.test(document.querySelector('#audit li').textContent)")
    assert "KILLED → RECOVERING" in page.text_content("#audit")
    assert CODE not in page.content()


WORD = "#word"


def test_a_stop_takes_two_actions_on_the_keyboard_and_names_the_switch(switch, visit, word):
    sidecar = switch()
    page = visit(sidecar, "operator")
    page.focus("#stop")
    page.keyboard.press("Enter")
    dialog = page.locator("#stop-dialog")
    assert dialog.locator("h2").text_content() == "Stop trading/bot-0?"
    assert dialog.locator("button[type=submit]").text_content() == "Stop trading/bot-0 now"
    assert "(halt)" in dialog.text_content()
    assert not page.is_visible("#stop-by")
    page.keyboard.press("Enter")
    word(page, "BLOCKED")
    page.wait_for_selector("#answer:text('Stopped. The sidecar says: KILLED, on disk.')")
    status = sidecar.status()
    cause = status["causes"][0]
    assert (status["state"], status["restriction"]) == ("KILLED", "halt")
    assert (cause["reason"], cause["by"], cause["by_verified"]) == ("Emergency stop", "oscar", True)
    assert "verified" in page.text_content("#because")
    assert sidecar.gate().decided == (403, "killed")


def test_a_stop_wants_a_reason_and_takes_a_restriction(switch, visit, word):
    sidecar = switch()
    page = visit(sidecar, "operator", width=360)
    page.click("#stop")
    page.fill("#stop-reason", "")
    page.click("#stop-dialog button[type=submit]")
    assert page.is_visible("#stop-dialog")
    assert sidecar.status()["state"] == "ACTIVE"
    page.fill("#stop-reason", "venue rejects")
    page.check("#stop-dialog [value=reduce_only]")
    page.click("#stop-dialog button[type=submit]")
    word(page, "BLOCKED")
    assert "Exits that shrink a position pass" in page.text_content("#line")
    assert sidecar.status()["restriction"] == "reduce_only"


def test_two_approvers_release_and_the_first_may_not_be_both(switch, visit, word):
    sidecar = switch(recovery={"approvals": 2, "cooldown": "5m"})
    sidecar.kill_switch("drill")
    page = visit(sidecar)
    word(page, "BLOCKED")
    ask_to_recover(page)
    page.wait_for_selector("#approve:not([hidden])")
    waits = rung(page, "2 approvals")
    assert "1 of 2: bob (verified). Waits for 1 more, by another person. Lapses in" in waits.text_content()
    assert waits.get_attribute("aria-current") == "step"

    page.click("#approve")
    assert "Asked for by bob: positions reconciled" in page.text_content("#approve-what")
    page.fill("#approve-by", APPROVER)
    page.fill("#approve-code", CODE)
    page.click("#approve-dialog button[type=submit]")
    page.wait_for_selector("#approve-dialog .refusal-detail")
    said = page.text_content("#approve-dialog .refusal-detail")
    assert said == "'bob' has approved this recovery already; another person is needed"
    page.fill("#approve-by", SECOND_APPROVER)
    page.fill("#approve-code", SECOND_CODE)
    page.keyboard.press("Enter")
    page.wait_for_selector("#answer:text('Approved. The sidecar says: RECOVERING, cooldown')")
    assert page.evaluate("document.activeElement.id") == "verdict"

    page.click("#cancel")
    page.fill("#cancel-reason", "the feed dropped again")
    page.click("#cancel-dialog button[type=submit]")
    page.wait_for_selector("#answer:text('Recovery cancelled. The sidecar says: KILLED')")
    assert sidecar.audit("recovery.cancelled")[-1]["reason"] == "the feed dropped again"


def test_a_firing_rule_is_waived_at_a_new_threshold(switch, visit, word, report):
    sidecar = switch(drawdown_rule(clear=None), recovery={"cooldown": "0s", "steps": [{"factor": 1.0}]})
    page = visit(sidecar)
    report(-0.2)
    word(page, "BLOCKED")
    page.wait_for_function("() => /firing: kill/.test(document.querySelector('#triggers').textContent)")
    page.click("#recover")
    place = page.locator("[data-waive=portfolio_drawdown]")
    assert "-0.2 against -0.15" in place.text_content()
    place.locator("[data-part=chosen]").check()
    place.locator("[data-part=threshold]").fill("-0.3")
    place.locator("[data-part=until]").fill("2h")
    page.fill("#recover-reason", "limit raised by risk")
    page.fill("#recover-by", APPROVER)
    page.fill("#recover-code", CODE)
    page.click("#recover-dialog button[type=submit]")
    word(page, "ALLOWED")
    assert "portfolio_drawdown: holds at -0.3 until" in page.text_content("#waivers")
    page.locator("[data-trigger=portfolio_drawdown]").get_by_text("waived").wait_for()
    assert sidecar.status()["waivers"][0]["threshold"] == -0.3


def test_the_second_approver_sees_what_would_be_waived(switch, visit, word, report):
    sidecar = switch(drawdown_rule(clear=None), recovery={"approvals": 2})
    page = visit(sidecar)
    report(-0.2)
    word(page, "BLOCKED")
    waived = [{"trigger": "portfolio_drawdown", "threshold": -0.3, "until": "2099-01-01T00:00:00Z"}]
    assert sidecar.recover(waive=waived).status == 200
    page.wait_for_selector("#waivers h3:text('Rules that this recovery would waive')")
    assert "portfolio_drawdown: holds at -0.3 until" in page.text_content("#waivers")
    page.click("#approve")
    assert "It would waive portfolio_drawdown at -0.3 until 2099-01-01" in page.text_content("#approve-what")


def test_text_from_outside_is_text_and_nothing_else(switch, visit, word):
    sidecar = switch()
    page = visit(sidecar)
    evil = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    sidecar.kill_switch(evil, by="<b>mallory</b>")
    word(page, "BLOCKED")
    page.wait_for_function("() => /mallory/.test(document.querySelector('#audit').textContent)")
    assert evil in page.text_content("#because")
    assert "claimed" in page.text_content("#because")
    assert evil in page.text_content("#audit")
    assert page.locator("main script, main img").count() == 0
    assert page.title() == "BLOCKED · trading/bot-0 · killswitch"


def test_a_stop_that_is_in_force_and_not_on_disk_is_told_as_both(switch, visit):
    page = visit(switch())
    detail = "in force, but NOT durable: the volume does not answer"
    problem = {"title": "Service Unavailable", "status": 503, "detail": detail, "state": "KILLED", "durable": False}
    page.route("**/api/v1/trigger", lambda route: route.fulfill(status=503, json=problem))
    page.click("#stop")
    page.keyboard.press("Enter")
    page.wait_for_selector("#stop-dialog .refusal-title:text('Stopped, NOT durable')")
    assert page.text_content("#stop-dialog .refusal-detail") == detail
