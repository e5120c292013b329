"""The bill of materials says what is in the image, all of it, and each package brings its licence."""

from __future__ import annotations

import json
import re
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from sidecar.version import __version__
from tests.cast import ROOT

if TYPE_CHECKING:
    from tests.kubernetes.images import Podman

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]  # the first one builds the image, and gets the tool

INSTALLED = """
import json
from importlib.metadata import distributions
print(json.dumps([
    (one.metadata["Name"], one.version, [str(file) for file in one.files or () if ".dist-info/" in str(file)])
    for one in distributions()
]))
"""


@pytest.fixture(scope="module")
def installed(podman: Podman, image: str) -> dict[str, tuple[str, list[str]]]:
    """Version and files of metadata of each package that the image's own Python finds, by name."""
    entry = json.dumps(["python", "-c", INSTALLED])
    done = podman.run("run", "--rm", "--network=none", "--no-healthcheck", f"--entrypoint={entry}", image)
    found = {normal(name): (version, files) for name, version, files in json.loads(done.stdout)}
    return {name: entry for name, entry in found.items() if entry[1]}  # Debian's own, of the base, have other metadata


@pytest.fixture(scope="module")
def bill(podman: Podman, image: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `make sbom` writes."""
    target = tmp_path_factory.mktemp("sbom") / "sbom.cdx.json"
    subprocess.run(
        [ROOT / ".ci" / "sbom", image, target],
        env={**podman.environ(), "ENGINE": " ".join(podman.command())},
        check=True,
        timeout=500,
    )
    return dict(json.loads(target.read_text()))


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def locked() -> dict[str, str]:
    lines = (ROOT / ".ci" / "requirements.txt").read_text().splitlines()
    return dict(re.match(r"([a-z0-9-]+)==([^ ;]+)", line).groups() for line in lines if re.match("[a-z0-9]", line))  # type: ignore[union-attr, misc]


def test_the_bill_lists_every_package_of_the_image_with_its_version(
    bill: dict[str, Any], installed: dict[str, tuple[str, list[str]]]
) -> None:
    listed = {normal(one["name"]): one["version"] for one in bill["components"]}
    assert listed == {name: version for name, (version, _) in installed.items() if name != "killswitch-sidecar"}
    assert listed.items() <= locked().items()
    assert all(one["purl"].startswith("pkg:pypi/") for one in bill["components"])
    subject = bill["metadata"]["component"]
    assert (subject["name"], subject["version"]) == ("killswitch-sidecar", __version__)


def test_every_package_of_the_image_brings_its_licence(installed: dict[str, tuple[str, list[str]]]) -> None:
    for name, (_, files) in installed.items():
        assert any(re.search(r"licen[cs]e|copying", file, re.IGNORECASE) for file in files), name
