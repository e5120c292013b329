# noqa: INP001 - a script, not a module
"""Writes what values.yaml of each chart implies: values.schema.json, closed at every level, and the README's table.

`python .ci/charts.py` writes, `python .ci/charts.py --check` compares and ends with 1 where something is out of date. A
value without a `# --` comment is an error.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

ROOT: Final = Path(__file__).resolve().parents[1]
Schema = dict[str, Any]

STRING_MAP: Final[Schema] = {"type": "object", "additionalProperties": {"type": "string"}}
SWITCHABLE: Final[Schema] = {"enum": ["auto", True, False]}
DURATION: Final[Schema] = {"type": "string", "pattern": "^([0-9]+(ms|s|m|h))+$"}
PORT: Final[Schema] = {"type": "integer", "minimum": 1, "maximum": 65535}
SECONDS: Final[Schema] = {"type": "integer", "minimum": 1}
QUANTITY: Final[Schema] = {"type": ["string", "number"], "pattern": "^[0-9.]+(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"}
ID: Final[Schema] = {"type": ["integer", "null"], "minimum": 1}
PEERS: Final[Schema] = {"type": "array", "items": {"type": "object"}}
NAME: Final[Schema] = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"}
NAME_OR_NOTHING: Final[Schema] = {"type": "string", "pattern": "^([a-z0-9]([-a-z0-9.]*[a-z0-9])?)?$"}
KEY: Final[Schema] = {"type": "string", "pattern": "^[-._a-zA-Z0-9]+$"}


def closed(properties: Mapping[str, Schema], *required: str) -> Schema:
    """An object with these keys and no others."""
    found: Schema = {"type": "object", "additionalProperties": False, "properties": dict(properties)}
    return found | ({"required": list(required)} if required else {})


_AMOUNTS: Final = closed({"cpu": QUANTITY, "memory": QUANTITY, "ephemeral-storage": QUANTITY})
RESOURCES: Final = {"limits": _AMOUNTS, "requests": _AMOUNTS}

# What a default value does not tell: path in values.yaml -> schema.
LIBRARY: Final[dict[str, Schema]] = {
    "fullnameOverride": NAME_OR_NOTHING,
    "image.repository": {"type": "string", "pattern": "^[^:@\\s]+(:[0-9]+/[^:@\\s]+)?$"},
    "image.tag": {"type": "string", "pattern": "^([0-9a-zA-Z_][-._0-9a-zA-Z]*)?$", "not": {"const": "latest"}},
    "image.digest": {"type": "string", "pattern": "^(sha256:[0-9a-f]{64})?$"},
    "image.pullPolicy": {"enum": ["Always", "IfNotPresent", "Never"]},
    "placement": {"enum": ["auto", "native", "container"]},
    "config": {"$ref": "#/definitions/config"},
    "rules": {
        "type": "object",
        "propertyNames": {"pattern": "^[-._a-zA-Z0-9]+\\.yaml$"},
        # What a text says is checked by the sidecar, with every problem's line.
        "additionalProperties": {"anyOf": [{"type": ["string", "null"]}, {"$ref": "#/definitions/rules"}]},
    },
    "existingConfigMap": NAME_OR_NOTHING,
    "existingRulesConfigMap": NAME_OR_NOTHING,
    **{f"{kind}.secretName": NAME_OR_NOTHING for kind in ("approvers", "approvalCode", "tokens", "webhookToken")},
    **{f"{kind}.key": KEY for kind in ("approvers", "approvalCode", "tokens", "webhookToken")},
    "operations.port": PORT,
    "webConfig.secretName": NAME_OR_NOTHING,
    "webConfig.certificateSecretName": NAME_OR_NOTHING,
    "webConfig.healthPort": PORT,
    "run.sizeLimit": QUANTITY,
    "state.volume": {"enum": ["emptyDir", "persistentVolumeClaim", "volumeClaimTemplate"]},
    "state.existingClaim": NAME_OR_NOTHING,
    "state.size": QUANTITY,
    "state.accessMode": {"enum": ["ReadWriteOnce", "ReadWriteOncePod", "ReadWriteMany"]},
    "resources.limits": _AMOUNTS,
    "resources.requests": _AMOUNTS,
    "runAsUser": ID,
    "fsGroup": ID,
    "lingerSeconds": {"type": "integer", "minimum": 0, "maximum": 3600},
    **{
        f"{probe}Probe.{key}": SECONDS
        for probe in ("startup", "liveness", "readiness")
        for key in ("periodSeconds", "failureThreshold", "timeoutSeconds")
    },
    "trading.containers": {"type": "array", "items": NAME},
    "proxy.kind": {"enum": ["none", "envoy", "nginx"]},
    "proxy.image": {
        "type": "string",
        "pattern": "^([^\\s@]+:[0-9a-zA-Z_][-._0-9a-zA-Z]*|[^\\s@]+@sha256:[0-9a-f]{64})?$",
    },
    "proxy.configMap": NAME_OR_NOTHING,
    "proxy.runAsUser": ID,
    "proxy.resources.limits": _AMOUNTS,
    "proxy.resources.requests": _AMOUNTS,
    "env": {
        "type": "array",
        "items": closed(
            {"name": {"type": "string"}, "value": {"type": "string"}, "valueFrom": {"type": "object"}}, "name"
        ),
    },
    "extraVolumes": {
        "type": "array",
        "items": {"type": "object", "required": ["name"], "not": {"required": ["hostPath"]}},
    },
    "extraVolumeMounts": {
        "type": "array",
        "items": closed(
            {"name": NAME, "mountPath": {"type": "string", "pattern": "^/"}, "readOnly": {"type": "boolean"}},
            "name",
            "mountPath",
        ),
    },
    "podMonitor.enabled": SWITCHABLE,
    "podMonitor.labels": STRING_MAP,
    "podMonitor.endpoint": {
        "type": "object",
        "propertyNames": {"not": {"enum": ["port", "path", "interval", "scheme"]}},
    },
    "podMonitor.interval": DURATION,
    "podMonitor.scrapeTimeout": DURATION,
}
APPLICATION: Final[dict[str, Schema]] = {
    # The library's own schema holds it, wherever a chart depends on the library.
    "killswitch": {"type": "object"},
    "fullnameOverride": NAME_OR_NOTHING,
    "example.replicas": {"type": "integer", "minimum": 0},
    "example.metricsPort": PORT,
    "example.resources.limits": _AMOUNTS,
    "example.resources.requests": _AMOUNTS,
    "serviceMonitor.labels": STRING_MAP,
    "serviceMonitor.interval": DURATION,
    "serviceMonitor.scrapeTimeout": DURATION,
    "prometheusRule.enabled": SWITCHABLE,
    "prometheusRule.labels": STRING_MAP,
    "dashboards.labels": STRING_MAP,
    "dashboards.annotations": STRING_MAP,
    "networkPolicy.operationsFrom": {**PEERS, "minItems": 1},
    "networkPolicy.ingress": PEERS,
    "networkPolicy.egress": PEERS,
    "rbac.operators.subjects": {
        "type": "array",
        "items": closed(
            {
                "kind": {"enum": ["User", "Group", "ServiceAccount"]},
                "name": {"type": "string"},
                "namespace": NAME,
                "apiGroup": {"type": "string"},
            },
            "kind",
            "name",
        ),
    },
    "rbac.operators.podNames": {"type": "array", "items": NAME},
}


class Undocumented(Exception):  # noqa: N818 - named for what is wrong
    """A value without a comment that says what it is for."""


@dataclass(frozen=True, kw_only=True)
class Value:
    """One value: its path in values.yaml, its default, and what its comment says."""

    path: str
    default: Any
    meaning: str


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One chart's folder, and what its defaults do not tell."""

    folder: Path
    overrides: Mapping[str, Schema]
    definitions: Mapping[str, Schema]

    def values(self) -> list[Value]:
        """All values in the order of the file.

        Raises:
            Undocumented: one has no `# --` comment.
        """
        text = (self.folder / "values.yaml").read_text(encoding="utf-8")
        return list(_values(yaml.compose(text), text.splitlines(), self.overrides))

    def schema(self) -> str:
        """The text of values.schema.json."""
        root = closed({"global": {"type": "object", "description": "Helm's own, for all charts of a release."}})
        for value in self.values():
            *parents, key = value.path.split(".")
            place = root
            for parent in parents:
                place = place["properties"].setdefault(parent, closed({}))
            found = self.overrides.get(value.path) or {"type": _type(value)}
            # Beside a $ref draft 7 reads nothing else.
            described = {"allOf": [found]} if "$ref" in found else found
            place["properties"][key] = {**described, "description": value.meaning}
        root = {"$schema": "http://json-schema.org/draft-07/schema#", **root}
        return json.dumps(root | ({"definitions": dict(self.definitions)} if self.definitions else {}), indent=2) + "\n"

    def readme(self) -> str:
        """The README with its table as it should be."""
        rows = (
            f"| `{value.path}` | {_shown(value.default)} | {value.meaning.replace('|', '&#124;')} |"
            for value in self.values()
        )
        lines = ["| value | default | meaning |", "|---|---|---|", *rows]
        before, _, rest = (self.folder / "README.md").read_text(encoding="utf-8").partition(_BEGIN)
        _, _, after = rest.partition(_END)
        return f"{before}{_BEGIN}\n\n" + "\n".join(lines) + f"\n\n{_END}{after}"

    def files(self) -> dict[Path, str]:
        """Every file that follows from this chart, with its text."""
        return {self.folder / "values.schema.json": self.schema(), self.folder / "README.md": self.readme()}


_BEGIN: Final = "<!-- values: written by .ci/charts.py -->"
_END: Final = "<!-- end of values -->"


def _values(
    node: yaml.Node, lines: Sequence[str], overrides: Mapping[str, Schema], prefix: str = ""
) -> Iterator[Value]:
    for key_node, value_node in node.value:
        path = f"{prefix}{key_node.value}"
        if _is_group(value_node) and path not in overrides:
            yield from _values(value_node, lines, overrides, f"{path}.")
            continue
        meaning = _comment(lines, key_node.start_mark.line)
        if not meaning and path != "killswitch":
            raise Undocumented(f"{path}: has no comment that begins with '# --'; say what it is for")
        default = yaml.safe_load(yaml.serialize(value_node))
        yield Value(path=path, default=default, meaning=meaning or "The sidecar: see the library chart's README.")


def _is_group(node: yaml.Node) -> bool:
    return isinstance(node, yaml.MappingNode) and bool(node.value)


def _comment(lines: Sequence[str], line: int) -> str:
    found: list[str] = []
    for text in reversed(lines[:line]):
        words = text.strip()
        if not words.startswith("#"):
            return ""
        found.insert(0, words.removeprefix("#").strip())
        if words.startswith("# --"):
            return " ".join([found[0].removeprefix("--").strip(), *found[1:]])
    return ""


def _type(value: Value) -> str:
    kinds = {bool: "boolean", int: "integer", str: "string"}
    if type(value.default) not in kinds:
        raise Undocumented(f"{value.path}: what else than {value.default!r} may stand here? Add it to the table above")
    return kinds[type(value.default)]


def _shown(default: Any) -> str:
    if isinstance(default, dict) and default:
        return "see values.yaml" if len(json.dumps(default)) > 60 else f"`{json.dumps(default)}`"
    return '`""`' if default == "" else f"`{json.dumps(default).strip(chr(34))}`"


def definition(name: str, file: str) -> dict[str, Schema]:
    """One of the sidecar's own schemas as Helm reads it: draft 7, and regular expressions without lookahead."""
    text = (ROOT / "docs" / "schema" / file).read_text(encoding="utf-8").replace("(?=.)", "")
    schema = json.loads(text.replace('"#/$defs/', f'"#/definitions/{name}-'))
    parts = {f"{name}-{key}": part for key, part in schema.pop("$defs").items()}
    schema.pop("$schema")
    return {name: schema, **parts}


def charts() -> tuple[Chart, Chart]:
    """The two charts."""
    sidecars = definition("config", "config.schema.json") | definition("rules", "rules.schema.json")
    return (
        Chart(folder=ROOT / "helm" / "killswitch-lib", overrides=LIBRARY, definitions=sidecars),
        Chart(folder=ROOT / "helm" / "killswitch-sidecar", overrides=APPLICATION, definitions={}),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Write, or compare; return 1 where something was out of date."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; end with 1 where a file is out of date")
    check = parser.parse_args(argv).check
    stale = 0
    for chart in charts():
        for path, text in chart.files().items():
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                stale += 1
                sys.stderr.write(
                    f"{path.relative_to(ROOT)}: {'is out of date; run .ci/charts.py' if check else 'written'}\n"
                )
                if not check:
                    path.write_text(text, encoding="utf-8")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
