"""What is written beside the templates: schemas, READMEs, versions, notes, and what a packaged chart holds."""

from __future__ import annotations

import tarfile
from typing import TYPE_CHECKING

import pytest
import yaml

from sidecar.version import __version__
from tests.kubernetes.charts import CHART, LIBRARY, ROOT, VALUES, helm, template

if TYPE_CHECKING:
    from pathlib import Path

CHARTS = (LIBRARY, CHART)
both_charts = pytest.mark.parametrize("chart", CHARTS, ids=lambda chart: chart.name)
both_helms = pytest.mark.parametrize("version", [3, 4], ids=["helm3", "helm4"])


# Schema


@pytest.mark.parametrize(
    "typo",
    [
        "exmaple={}",
        "example.replcas=1",
        "dashboards.lables={}",
        'rbac.operators.subjects=[{"kind": "User", "nmae": "bob", "name": "bob"}]',
        "killswitch.imgae={}",
        'killswitch.image.tga="1"',
        'killswitch.config.gate.lisen="off"',
        'killswitch.config.recovery.steps=[{"facter": 1.0}]',
        'killswitch.rules={"x.yaml": {"groups": [{"name": "a", "rule": []}]}}',
        'killswitch.rules={"x.yaml": {"groups": [{"name": "a", "rules": [{"type": "watchdog", "x": 0}]}]}}',
        'killswitch.env=[{"name": "A", "vlaue": "b"}]',
        "killswitch.livenessProbe.periodSecond=1",
        "killswitch.resources.limits.memroy=1",
    ],
)
@both_helms
def test_a_typo_is_refused_at_every_level(typo: str, version: int) -> None:
    done = template(sets=(typo,), version=version)
    assert done.returncode != 0
    assert "don't meet the specifications of the schema" in done.stderr


@pytest.mark.parametrize(
    "bad",
    [
        'killswitch.image.tag="latest"',
        'killswitch.image.digest="sha256:abc"',
        'killswitch.state.volume="hostPath"',
        'killswitch.placement="sidecar"',
        'killswitch.extraVolumes=[{"name": "a", "hostPath": {"path": "/"}}]',
        'killswitch.extraVolumeMounts=[{"name": "a", "mountPath": "/a", "subPath": "b"}]',
        'killswitch.podMonitor.enabled="yes"',
        "killswitch.runAsUser=0",
        'killswitch.lingerSeconds="20s"',
        'killswitch.config.recovery.cooldown="5 minutes"',
        "networkPolicy.operationsFrom=[]",
    ],
)
@both_helms
def test_a_value_that_cannot_be_meant_is_refused(bad: str, version: int) -> None:
    done = template(sets=(bad,), version=version)
    assert done.returncode != 0
    assert "don't meet the specifications of the schema" in done.stderr


# Versions


@both_charts
def test_charts_and_sidecar_have_one_version(chart: Path) -> None:
    declared = yaml.safe_load((chart / "Chart.yaml").read_text())
    assert (declared["version"], declared["appVersion"]) == (__version__, __version__)
    assert all(one["version"] == __version__ for one in declared.get("dependencies", []))


NAMING = [
    *ROOT.glob("docs/*.md"),
    *ROOT.glob("helm/*/README.md"),
    ROOT / "docs/examples/chart/after/Chart.yaml",
]


@pytest.mark.parametrize("file", NAMING, ids=lambda file: str(file.relative_to(ROOT)))
def test_documents_name_the_version_that_there_is(file: Path) -> None:
    lines = [line for line in file.read_text().splitlines() if "name: killswitch-lib" in line]
    assert all(f"version: {__version__}" in line for line in lines)


# Packages


@both_charts
@both_helms
def test_a_packaged_chart_holds_the_originals_behind_its_links(chart: Path, version: int, tmp_path: Path) -> None:
    done = helm("package", chart, "--destination", tmp_path, version=version)
    assert done.returncode == 0, done.stderr
    links = [path for path in chart.glob("files/**/*") if path.is_file()]
    links += [path for folder in chart.glob("files/*") if folder.is_symlink() for path in folder.glob("*.json")]
    with tarfile.open(next(tmp_path.glob("*.tgz"))) as package:
        names = package.getnames()
        for link in links:
            member = package.extractfile(f"{chart.name}/{link.relative_to(chart)}")
            assert member is not None
            assert member.read() == link.resolve().read_bytes()
    originals = [ROOT / "rules/default.yaml"] if chart is LIBRARY else [ROOT / "rules/prometheus/killswitch.rules.yaml"]
    originals += [] if chart is LIBRARY else sorted(ROOT.glob("grafana/dashboards/*.json"))
    assert {link.resolve() for link in links} == set(originals)
    assert f"{chart.name}/values.schema.json" in names
    if chart is CHART:
        assert f"{chart.name}/charts/killswitch-lib/files/default.yaml" in names


@both_helms
def test_a_packaged_chart_renders_as_its_folder_does(version: int, tmp_path: Path) -> None:
    helm("package", CHART, "--destination", tmp_path, version=version)
    packed = next(tmp_path.glob("*.tgz"))
    assert template(packed, version=version).stdout == template(CHART, version=version).stdout


# Notes


def notes(*sets: str) -> str:
    """What Helm 4 prints after an installation; Helm 3 asks a cluster before it would."""
    options = [option for one in sets for option in ("--set-json", one)]
    done = helm("install", "desk", CHART, "--namespace", "trading", "--dry-run=client", *options)
    assert done.returncode == 0, done.stderr
    return done.stdout.partition("NOTES:\n")[2]


def test_notes_say_how_to_kill_check_and_recover_and_what_is_not_protected() -> None:
    said = notes()
    for command in ("killswitch trigger --reason", "killswitch status", "killswitch recover --reason"):
        assert f"kubectl exec -it -n trading POD -c killswitch -- {command}" in said.replace("exec -n", "exec -it -n")
    assert 'kubectl killswitch -n trading trigger --reason "TEXT" --by YOU' in said
    assert "NOT PROTECTED" in said
    assert "a kill cancels none" in said


@pytest.mark.parametrize(
    ("sets", "warning"),
    [
        ((), "NO APPROVERS"),
        ((), "NO PROMETHEUS URL: rules see only what is scraped directly"),
        (("killswitch.config.scrape=[]",), "NO PROMETHEUS URL: rules ask http://prometheus:9090"),
        ((), "No Alertmanager"),
        (('killswitch.config.switch.mode="shadow"',), "SHADOW MODE"),
        (('killswitch.config.switch.mode="disabled"',), "The switch is DISABLED"),
        (("killswitch.config.recovery.require_approval=false",), "Recovery needs no approval"),
        (('killswitch.approvalCode.secretName="code"',), "in the container's environment"),
        (("killswitch.defaultRules=true",), "The default rules are in force"),
        (("killswitch.enabled=false",), "no pod of this release has a kill switch"),
        (('killswitch.existingConfigMap="mine"',), "which this chart does not look into"),
    ],
)
def test_notes_warn_of_what_makes_it_weaker(sets: tuple[str, ...], warning: str) -> None:
    assert warning in notes(*sets)


def test_notes_warn_of_nothing_where_all_is_there() -> None:
    said = notes(
        'killswitch.approvers.secretName="a"',
        'killswitch.config.prometheus.urls=["http://p:9090"]',
        'killswitch.config.alertmanager.notify.urls=["http://a:9093"]',
    )
    assert "WARNING" not in said


def test_each_values_file_says_what_it_shows() -> None:
    for file in VALUES:
        assert file.read_text().startswith("# "), file.name
