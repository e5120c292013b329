"""Draws both dashboards from live data: `python -m tests.kubernetes.pictures.draw [FOLDER]`, or `make pictures`.

Five real sidecars live through kills and recoveries under a real Prometheus (fleet.py); each panel's queries are run as
Grafana runs them (viewer.py); Grafana's own panel components, published as @grafana/ui, draw the answers in Chromium.
It is no Grafana: headings, page and state timeline are ours (page.jsx).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from playwright.sync_api import sync_playwright

from tests.cast import wait_for
from tests.kubernetes.fleet import MAKER, Fleet, Pace
from tests.kubernetes.viewer import Viewer

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from playwright.sync_api import Page

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
IMAGES = ROOT / "docs" / "images"
WIDTH = 1560
CHROMIUM = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync")  # fmt: skip
LEISURE = Pace(scrape=1.0, calm=20.0, killed=15.0, cooldown=25.0, step=15.0, twin=False)


def main() -> None:
    """Play, draw, write the files."""
    parser = argparse.ArgumentParser(description="Draw the dashboards.")
    parser.add_argument("folder", nargs="?", type=Path, default=IMAGES)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="ks") as scratch:
        script = bundled(Path(scratch))
        fleet = Fleet(Path(scratch), LEISURE)
        try:
            fleet.play()
            fleet.breach_again()
            for viewer in (looking(fleet, "killswitch-switch", switch=MAKER), looking(fleet, "killswitch-fleet")):
                picture = folder / f"grafana-{viewer.dashboard['uid'].removeprefix('killswitch-')}.png"
                draw(seen(viewer), script, picture)
                print(f"{picture}: {picture.stat().st_size / 1000:.0f} kB")
        finally:
            fleet.close()


def bundled(folder: Path) -> Path:
    """The page's script, with Grafana's components in it; installs them when that was not done yet."""
    stamp = HERE / "node_modules" / ".package-lock.json"
    if not stamp.exists() or stamp.stat().st_mtime < (HERE / "package-lock.json").stat().st_mtime:
        subprocess.run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--silent"], cwd=HERE, check=True)
    script = folder / "page.js"
    subprocess.run(["node", "bundle.mjs", str(script)], cwd=HERE, check=True)
    return script


def looking(fleet: Fleet, uid: str, **chosen: str) -> Viewer:
    """Somebody who looks at a dashboard of this fleet, at the end."""
    return Viewer(
        url=fleet.prometheus.url,
        dashboard=json.loads((ROOT / "grafana" / "dashboards" / f"{uid}.json").read_text()),
        start=fleet.start,
        end=fleet.end,
        scrape_interval=fleet.pace.scrape,
        chosen=chosen,
    )


def seen(viewer: Viewer) -> dict[str, Any]:
    """What page.jsx draws."""
    answers: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for answer in viewer.answers():
        place = (answer.panel["id"], str(answer.scope))
        answers.setdefault(place, []).append({"target": answer.target, "series": answer.series})
    shown = [one for one in viewer.dashboard["templating"]["list"] if one["type"] == "query"]
    return {
        "title": viewer.dashboard["title"],
        "width": WIDTH,
        "start": viewer.start,
        "end": viewer.end,
        "step": viewer.step,
        "variables": [
            (one["label"], "All" if viewer.everything[one["name"]] else ", ".join(viewer.values[one["name"]]))
            for one in shown
        ],
        "links": [link["title"] for link in viewer.dashboard["links"]],
        "marks": list(marks(viewer)),
        "panels": list(placed(viewer, answers)),
    }


def marks(viewer: Viewer) -> Iterator[Mapping[str, Any]]:
    """Times of the annotations."""
    for mark in viewer.marks():
        times = {float(value) for series in mark["series"] for _, value in series["values"]}
        color = mark["annotation"]["iconColor"]
        yield from ({"time": at, "color": color} for at in times if viewer.start * 1000 < at < viewer.end * 1000)


def placed(viewer: Viewer, answers: Mapping[tuple[int, str], Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Panels with places; one that is repeated takes as many as it needs and moves down what comes after it."""
    moved = 0
    for panel in viewer.dashboard["panels"]:
        grid = panel["gridPos"]
        scopes = [{}] if panel["type"] == "row" else viewer.scopes(panel)
        across = panel.get("maxPerRow", 1)
        for number, scope in enumerate(scopes):
            place = {"y": grid["y"] + moved + number // across * grid["h"]}
            if "repeat" in panel:
                place |= {"w": 24 // across, "x": number % across * (24 // across)}
            yield {
                **panel,
                "title": viewer.filled(panel["title"], scope),
                "gridPos": {**grid, **place},
                "results": answers.get((panel["id"], str(scope)), []),
            }
        moved += (len(scopes) - 1) // across * grid["h"]


def draw(view: Mapping[str, Any], script: Path, picture: Path) -> None:
    """Show the page in Chromium, see that every panel is there, and take the picture."""
    program = shutil.which("chromium")
    assert program is not None, "chromium is not installed"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=list(CHROMIUM))
        try:
            page = browser.new_page(viewport={"width": WIDTH + 16, "height": 1000})
            complaints: list[str] = []
            page.on("pageerror", lambda error: complaints.append(str(error)))
            html = script.with_suffix(".html")  # a page of its own: one without an address has no local storage
            html.write_text(f"<!doctype html><body style='margin:0'><script>window.view = {json.dumps(view)}</script>")
            page.goto(html.as_uri())
            page.add_style_tag(content=script.with_suffix(".css").read_text())
            page.add_script_tag(content=script.read_text(), type="module")
            wait_until_drawn(page, view, complaints)
            page.locator("body > div").first.screenshot(path=picture)
        finally:
            browser.close()
    subprocess.run(["node", "shrink.mjs", str(picture.absolute())], cwd=HERE, check=True)


def wait_until_drawn(page: Page, view: Mapping[str, Any], complaints: Sequence[str]) -> None:
    """Wait for all panels, and fail where one is empty or broken."""
    wanted = sum(panel["type"] != "row" for panel in view["panels"])
    wait_for(lambda: complaints or page.locator(".panel").count() == wanted, "all panels to be drawn", patience=60)
    whole = page.evaluate("document.body.scrollHeight")
    page.set_viewport_size({"width": WIDTH + 16, "height": whole})  # tables draw only what is on the screen
    page.wait_for_timeout(
        1500
    )  # the components size and draw themselves in several turns, and none of them says when it is done
    assert not complaints, complaints
    failed = page.locator(".failed")
    assert failed.count() == 0, failed.all_inner_texts()
    empty = [panel.get_attribute("data-title") for panel in page.locator('.panel[data-empty="true"]').all()]
    assert not empty, f"no data in {empty}"


if __name__ == "__main__":
    main()
