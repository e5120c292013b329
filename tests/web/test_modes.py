"""What the banner says in every other situation than ACTIVE and KILLED."""

import pytest

from tests.web.stage import drawdown_rule

pytestmark = pytest.mark.e2e


def test_shadow_mode_says_that_it_blocks_nothing_and_what_it_would_block(switch, visit, word, report):
    sidecar = switch(switch={"mode": "shadow"})
    page = visit(sidecar)
    word(page, "SHADOW")
    assert "No rule blocks in shadow mode" in page.text_content("#line")
    report(-0.2)
    page.wait_for_selector("#line:text('It would block now: killed by rule portfolio_drawdown')")
    assert page.text_content("#word") == "SHADOW"
    assert sidecar.gate().status == 200
    sidecar.kill_switch("this one blocks")
    word(page, "BLOCKED")


def test_disabled_says_that_every_order_passes_and_offers_no_stop(switch, visit, word):
    sidecar = switch(switch={"mode": "disabled"})
    page = visit(sidecar)
    word(page, "DISABLED")
    assert "Every order passes" in page.text_content("#line")
    assert not page.is_visible("#stop")
    assert "nothing is blocked" in page.text_content("#problems")


def test_a_rule_that_has_seen_nothing_yet_is_not_ready(switch, visit, word):
    rule = drawdown_rule(query="min(never_exported)", on_no_data={"hold_for": "60s"})
    page = visit(switch(rule, wait=False))
    word(page, "NOT READY")
    assert "portfolio_drawdown" in page.text_content("#because")
    row = page.locator("[data-trigger=portfolio_drawdown]")
    row.get_by_text("not armed").wait_for()


def test_a_rule_that_lifts_by_itself_is_told_from_a_kill(switch, visit, word, report):
    def rule(trigger, threshold, **more):
        return drawdown_rule(trigger=trigger, threshold=threshold, clear=None, **more)

    sidecar = switch(
        rule("throttling", -0.1, action="throttle", factor=0.25),
        rule("reducing", -0.2, action="reduce_only"),
        rule("halting", -0.3, action="halt"),
    )
    page = visit(sidecar)
    report(-0.15)
    word(page, "REDUCED 25 %")
    assert page.text_content("#line") == "Orders pass up to 25\u00a0% of the position limits."
    assert "rule throttling asks to throttle to 25\u00a0%" in page.text_content("#because")
    report(-0.25)
    word(page, "REDUCE ONLY")
    assert page.text_content("#line").startswith("New positions are blocked by a rule. Exits that shrink")
    report(-0.35)
    word(page, "BLOCKED")
    assert page.text_content("#line").startswith("Halted by a rule that lifts by itself.")
    assert "lifts by itself when rule halting clears" in page.text_content("#because")
    assert not page.is_visible("#recover")
    report(-0.02)
    word(page, "ALLOWED")


def test_what_fires_comes_first_and_many_calm_rules_wait_behind_a_button(switch, visit, word, report):
    calm = [drawdown_rule(trigger=f"calm_{number:02}", threshold=-0.9, clear=None) for number in range(25)]
    page = visit(switch(*calm, drawdown_rule(action="halt", clear=None)))
    word(page, "ALLOWED")
    report(-0.2)
    word(page, "BLOCKED")
    page.locator("#triggers tr:first-child[data-trigger=portfolio_drawdown]").wait_for()
    assert page.locator("#triggers tr").count() == 21
    assert page.text_content("#triggers-summary") == "26 rules: 1 firing"
    page.click("#all-triggers:text('Show all 26 rules')")
    assert page.locator("#triggers tr").count() == 26
