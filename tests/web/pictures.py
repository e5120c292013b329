"""Takes pictures of the web page in each state, narrow and wide, light and dark, from a real sidecar: `make pictures`.

    python -m tests.web.pictures [folder]      # default: build/pictures

Those that the documents show are also put into docs/images, as far as a screen shows them without scrolling. They are
for people to look at. What a picture cannot show is proven by the tests beside this file.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from playwright.sync_api import sync_playwright

from tests.cast import wait_for
from tests.web.stage import (
    APPROVER,
    CODE,
    TOKENS,
    Exporter,
    Sidecar,
    drawdown_rule,
    launch,
    make_switch,
    ready,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from playwright.sync_api import Browser, Page

WIDTHS = {"360": (360, 780), "1280": (1280, 900)}
SCHEMES = ("light", "dark")
DOCUMENTS = Path(__file__).parents[2] / "docs" / "images"
IN_DOCUMENTS = {
    "killed-1280-light": "page-killed.png",
    "gradual-1280-dark": "page-gradual-restart.png",
    "disconnected-360-light": "page-disconnected.png",
}
METRICS = {
    "portfolio_drawdown_ratio": -0.041,
    "daily_loss_ratio": -0.012,
    "volatility_ratio": 0.034,
    "exchange_connected": 1.0,
    "price_feed_age_seconds": 0.4,
}


def rules() -> list[dict[str, Any]]:
    """Rules as a desk has them."""

    def scraped(trigger: str, metric: str, operator: str, threshold: float, **more: Any) -> dict[str, Any]:
        return {
            "trigger": trigger,
            "type": "threshold",
            "source": "scrape:trader",
            "query": f"min({metric})",
            "operator": operator,
            "threshold": threshold,
            "action": "kill",
            "max_age": "10s",
            **more,
        }

    return [
        drawdown_rule(steps=[{"at": "50%", "action": "warn"}, {"at": "75%", "action": "throttle", "factor": 0.5}]),
        scraped("daily_loss", "daily_loss_ratio", "lt", -0.05),
        scraped("price_feed_age", "price_feed_age_seconds", "gt", 5.0, action="halt"),
        scraped("volatility_spike", "volatility_ratio", "gt", 0.1, shadow=True),
        {
            "trigger": "exchange_disconnect",
            "type": "connectivity",
            "source": "scrape:trader",
            "query": "min(exchange_connected)",
            "interval": "1s",
            "action": "halt",
        },
        {
            "trigger": "trading_heartbeat",
            "type": "heartbeat",
            "source": "scrape:trader",
            "query": "max(trading_heartbeat_timestamp_seconds)",
            "interval": "5s",
            "action": "kill",
        },
        {"trigger": "runaway_orders", "type": "order_rate", "max_orders": 100, "per": "1s", "action": "kill"},
    ]


class Metrics(Exporter):
    """The trading process, with metrics that have no label."""

    def show(self, **values: float) -> None:
        for name, value in values.items():
            self._lines[name, ""] = f"{name} {value!r}\n"
        self._lines["heartbeat", ""] = "trading_heartbeat_timestamp_seconds NOW\n"


@contextmanager
def opened(browser: Browser, switch: Sidecar, width: str, scheme: str) -> Iterator[Page]:
    """The page with a token given, in one of the sizes."""
    size = WIDTHS[width]
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]},
        color_scheme="dark" if scheme == "dark" else "light",
        device_scale_factor=1,
    )
    page = context.new_page()
    try:
        page.goto(f"http://127.0.0.1:{switch.operations_port}/")
        page.wait_for_selector("#signin:not([hidden])")
        page.fill("#token", TOKENS["risk"])
        page.press("#token", "Enter")
        page.wait_for_selector("#link[data-live=true]")
        page.wait_for_selector("#audit li")
        page.wait_for_selector("#checks li")
        yield page
    finally:
        context.close()


def shoot(
    browser: Browser, switch: Sidecar, folder: Path, name: str, meanwhile: Callable[[Page], None] | None = None
) -> None:
    """Take the four pictures of a state: the page as a whole, or what is seen of it while something is done."""
    for width in WIDTHS:
        for scheme in SCHEMES:
            with opened(browser, switch, width, scheme) as page:
                if meanwhile:
                    meanwhile(page)
                page.evaluate("() => scrollTo(0, 0)")
                if not meanwhile:
                    page.evaluate("() => document.activeElement?.blur()")
                save(page, folder, f"{name}-{width}-{scheme}", whole=meanwhile is None)


def save(page: Page, folder: Path, name: str, *, whole: bool) -> None:
    """Write a picture, and its first screen where a document shows it."""
    page.screenshot(path=folder / f"{name}.png", full_page=whole)
    if name in IN_DOCUMENTS:
        page.screenshot(path=DOCUMENTS / IN_DOCUMENTS[name])


def take(folder: Path) -> None:
    """Walk a switch through its states, and take pictures on the way."""
    exporter = Metrics()
    exporter.show(**METRICS)
    with tempfile.TemporaryDirectory(prefix="ks") as place, sync_playwright() as playwright:
        switch = make_switch(
            Path(place),
            exporter,
            rules(),
            recovery={
                "cooldown": "5m",
                "steps": [{"factor": 0.5}, {"factor": 0.75, "after": "1h"}, {"factor": 1.0, "after": "2h"}],
            },
        )
        browser = launch(playwright)
        try:
            story(ready(switch), browser, exporter, folder)
        finally:
            browser.close()
            switch.close()
            exporter.close()


def story(switch: Sidecar, browser: Browser, exporter: Metrics, folder: Path) -> None:
    """The states one after another."""
    shoot(browser, switch, folder, "active")
    exporter.show(portfolio_drawdown_ratio=-0.163)
    switch.wait_gate(403, "killed")
    shoot(browser, switch, folder, "killed")
    shoot(browser, switch, folder, "recover", lambda page: page.click("#recover"))
    shoot(browser, switch, folder, "stop", lambda page: page.click("#stop"))
    exporter.show(portfolio_drawdown_ratio=-0.062)
    wait_for(lambda: switch.trigger_of()["status"] == "inactive", "the drawdown to clear")
    switch.recover(by=APPROVER, code=CODE, reason="positions reconciled with the venue")
    switch.wait_status("the cooldown", lambda status: status["state"] == "RECOVERING")
    shoot(browser, switch, folder, "recovering")
    switch.control("DELETE", "/api/v1/recovery", {"by": "alice", "reason": "shorter cooldown for the pictures"})
    switch.kill9()
    switch.write_config(recovery={"cooldown": "1s"})
    ready_again = switch.start()
    ready_again.wait_status("a restart", lambda status: status["ready"])
    switch.recover(by=APPROVER, code=CODE, reason="positions reconciled with the venue")
    switch.wait_status("the first step", lambda status: status["stage"] == "GRADUAL_RESTART")
    shoot(browser, switch, folder, "gradual")

    def cut_off(page: Page) -> None:
        switch.signal(signal.SIGSTOP)
        page.wait_for_selector("#link[data-live=false]")
        page.wait_for_timeout(3000)  # for an age to be seen
        page.evaluate("() => document.activeElement?.blur()")

    for width in WIDTHS:
        for scheme in SCHEMES:
            with opened(browser, switch, width, scheme) as page:
                cut_off(page)
                save(page, folder, f"disconnected-{width}-{scheme}", whole=True)
                switch.signal(signal.SIGCONT)


def main() -> int:
    """Take them all; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", default="build/pictures", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    take(folder)
    print(f"{len(list(folder.glob('*.png')))} pictures in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
