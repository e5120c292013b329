"""A browser, and pages whose console and policy violations are watched."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from playwright.sync_api import sync_playwright

from tests.cast import exporter  # noqa: F401 - a fixture is used by its name
from tests.web.stage import TOKENS, Exporter, Sidecar, drawdown_rule, launch, make_switch, ready

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from playwright.sync_api import Browser, ConsoleMessage, Page

WORD = "#word"
REFUSED = "Failed to load resource: the server responded with a status of "
CUT_OFF = "Failed to load resource: net::ERR_"


# For a module and no longer: Playwright keeps an event loop running in the thread of the tests, and no other can run
# beside it.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = launch(playwright)
        yield browser
        browser.close()


@pytest.fixture
def switch(
    tmp_path_factory: pytest.TempPathFactory,
    exporter: Exporter,  # noqa: F811 - the fixture
) -> Iterator[Callable[..., Sidecar]]:
    """Starts a sidecar whose gate is open, on a drawdown that is well."""
    made: list[Sidecar] = []

    def start(*rules: dict[str, Any], wait: bool = True, **more: Any) -> Sidecar:
        show(exporter, -0.02)
        switch = make_switch(tmp_path_factory.mktemp("ks"), exporter, rules or [drawdown_rule()], **more)
        made.append(switch)
        return ready(switch) if wait else switch.start()

    yield start
    for one in made:
        one.close()
    exporter.reset()


def show(exporter: Exporter, drawdown: float) -> None:  # noqa: F811 - not the fixture
    """Let the trading process report this drawdown."""
    exporter.set("portfolio_drawdown_ratio", "", drawdown)


@pytest.fixture
def report(exporter: Exporter) -> Callable[[float], None]:  # noqa: F811 - the fixture
    return lambda drawdown: show(exporter, drawdown)


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens the page of a sidecar, gives a role's token, and at the end finds the console clean.

    A refusal that the test provokes is a line of Chromium's own in the console; nothing else may stand there.
    """
    contexts, faults = [], []

    def note(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning") and not message.text.startswith((REFUSED, CUT_OFF)):
            faults.append(f"{message.type}: {message.text}")

    def open_page(switch: Sidecar, role: str | None = "risk", *, width: int = 1280, scheme: Any = "light") -> Page:
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion="reduce"
        )
        context.set_default_timeout(20_000)
        contexts.append(context)
        page = context.new_page()
        page.on("console", note)
        page.on("pageerror", lambda error: faults.append(f"uncaught: {error}"))
        page.on("request", lambda request: _own(request.url, switch, faults))
        page.add_init_script(
            "document.addEventListener('securitypolicyviolation', e => console.error('CSP', e.violatedDirective))"
        )
        page.goto(f"http://127.0.0.1:{switch.operations_port}/")
        if role:
            sign_in(page, TOKENS[role])
            page.wait_for_selector("#link[data-live=true]")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert faults == []


def _own(url: str, switch: Sidecar, faults: list[str]) -> None:
    if not url.startswith((f"http://127.0.0.1:{switch.operations_port}/", "data:")):
        faults.append(f"asked for something elsewhere: {url}")


def sign_in(page: Page, token: str) -> None:
    page.wait_for_selector("#signin:not([hidden])")
    page.fill("#token", token)
    page.click("#signin-form button")


@pytest.fixture(name="sign_in")
def _sign_in() -> Callable[[Page, str], None]:
    return sign_in


@pytest.fixture
def word() -> Callable[..., None]:
    """Waits until the banner says this word."""

    def wait(page: Page, text: str) -> None:
        page.wait_for_function(
            "text => document.querySelector('#word').textContent.replace(/\\u00a0/g, ' ') === text", arg=text
        )

    return wait
