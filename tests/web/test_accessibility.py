"""Everybody can use the page: axe-core in each state, narrow and wide, light and dark; keyboard and zoom."""

import signal

import pytest
from axe_playwright_python.base import AXE_SCRIPT

from tests.web.stage import APPROVER, CODE, SECOND_APPROVER, SECOND_CODE

pytestmark = pytest.mark.e2e

WIDTHS = (360, 1280)
SCHEMES = ("light", "dark")
ZOOMED_WIDTHS = (640, 320)
"""CSS pixels of a window 1280 wide at 200 % and at 400 %."""


AXE = """async (only) => {
  const options = {resultTypes: ['violations'], ...(only && {runOnly: [only]})};
  return (await axe.run(document, options)).violations;
}"""
"""All of axe's rules, or the one that a colour scheme can make a difference to."""


class Auditor:
    """Looks at a page as it is now, in both sizes and schemes, and collects what is wrong."""

    def __init__(self):
        self.found = []
        self.looks = 0

    def look(self, page, state):
        if page.evaluate("typeof axe") == "undefined":
            page.evaluate(AXE_SCRIPT)
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": 900})
            for scheme in SCHEMES:
                page.emulate_media(color_scheme=scheme)
                self.looks += 1
                for violation in page.evaluate(AXE, "color-contrast" if scheme == "dark" else None):
                    if violation["impact"] in ("serious", "critical"):
                        nodes = [node["html"][:200] for node in violation["nodes"]]
                        self.found.append((state, width, scheme, violation["id"], nodes))
        for width in (*ZOOMED_WIDTHS, *WIDTHS):
            page.set_viewport_size({"width": width, "height": 900})
            wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            if wide > 0:
                self.found.append((state, width, "any", "scrolls sideways", wide))


@pytest.fixture
def auditor():
    return Auditor()


@pytest.mark.timeout(300)  # 32 looks, on a machine that may be busy
def test_axe_finds_nothing_serious_from_stop_to_full_trading(switch, visit, word, auditor, sign_in):
    sidecar = switch(
        recovery={
            "approvals": 2,
            "cooldown": "10m",
            "steps": [{"factor": 0.5}, {"factor": 1.0, "after": "1h"}],
        }
    )
    page = visit(sidecar, None)
    word(page, "NOT SIGNED IN")
    auditor.look(page, "not signed in")
    sign_in(page, "risk-token-5b1e0d")
    word(page, "ALLOWED")
    page.wait_for_selector("#checks li")
    auditor.look(page, "ACTIVE")

    page.click("#stop")
    auditor.look(page, "stop dialog")
    page.keyboard.press("Enter")
    word(page, "BLOCKED")
    auditor.look(page, "KILLED")

    page.click("#recover")
    page.fill("#recover-reason", "positions reconciled")
    page.fill("#recover-by", APPROVER)
    page.fill("#recover-code", "wrong")
    page.keyboard.press("Enter")
    page.wait_for_selector("#recover-dialog .refusal-detail")
    auditor.look(page, "recover dialog with a refusal")
    page.fill("#recover-code", CODE)
    page.keyboard.press("Enter")
    page.wait_for_selector("#approve:not([hidden])")
    auditor.look(page, "PENDING")
    assert (
        sidecar.control("POST", "/api/v1/recovery/approvals", {"by": SECOND_APPROVER, "code": SECOND_CODE}).status
        == 200
    )
    page.wait_for_function("() => /Recovering/.test(document.querySelector('#line').textContent)")
    auditor.look(page, "RECOVERING")

    sidecar.signal(signal.SIGSTOP)
    word(page, "DISCONNECTED")
    auditor.look(page, "disconnected")
    assert auditor.looks == 8 * len(WIDTHS) * len(SCHEMES)
    assert auditor.found == []


def test_axe_finds_nothing_serious_in_the_gradual_restart_and_with_a_rule_to_waive(
    switch, visit, word, auditor, report
):
    sidecar = switch(recovery={"cooldown": "0s", "steps": [{"factor": 0.5}, {"factor": 1.0, "after": "1h"}]})
    sidecar.kill_switch("drill")
    assert sidecar.recover().status == 200
    page = visit(sidecar)
    word(page, "REDUCED 50 %")
    auditor.look(page, "gradual restart")
    report(-0.2)
    word(page, "BLOCKED")
    page.locator("#triggers").get_by_text("firing: kill").wait_for()
    auditor.look(page, "a rule fires")
    page.click("#recover")
    page.wait_for_selector("[data-waive]")
    auditor.look(page, "recover dialog with a rule to waive")
    assert auditor.found == []


@pytest.mark.parametrize("mode", ["shadow", "disabled"])
def test_axe_finds_nothing_serious_in_modes_that_do_not_block(switch, visit, word, auditor, mode):
    page = visit(switch(with_tokens=False, switch={"mode": mode}), None)
    word(page, mode.upper())
    auditor.look(page, mode)
    assert auditor.found == []


def test_the_keyboard_reaches_and_leaves_everything(switch, visit, word):
    page = visit(switch())
    word(page, "ALLOWED")
    page.reload()
    page.wait_for_selector("#signin:not([hidden])")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "verdict"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "token"
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.keyboard.type("risk-token-5b1e0d")
    page.keyboard.press("Enter")
    word(page, "ALLOWED")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "stop"
    page.keyboard.press("Space")
    assert page.evaluate("document.activeElement.id") == "stop-reason"
    page.keyboard.press("Escape")
    assert not page.is_visible("#stop-dialog")
    assert page.evaluate("document.activeElement.id") == "stop"
    landmarks = [page.locator(tag).count() for tag in ("header", "main", "footer", "h1")]
    assert landmarks == [1, 1, 1, 1]
    moving = "getComputedStyle(document.querySelector('.skip')).transitionDuration"
    assert page.evaluate(moving) == "0s"  # reduced motion is asked for
