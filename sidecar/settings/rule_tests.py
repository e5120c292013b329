"""Unit tests of rule files, `*.test.yaml`: from YAML to tests that can be run, or every problem at once with its place.

Reads the rule files that the tests are about with the code that the sidecar reads them with. Runs nothing.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError, WithJsonSchema

from sidecar.core.events import CauseCode
from sidecar.core.orders import Intent, Order, Side
from sidecar.core.policy import GatePolicy
from sidecar.core.snapshot import ReasonCode
from sidecar.core.states import Action, Restriction, State
from sidecar.core.transitions import Policies
from sidecar.rules.model import AlertMatch, OrderRate, Rule, RuleSet
from sidecar.rules.notation import Value, Word, expand
from sidecar.rules.testing import (
    Check,
    Expectation,
    Fact,
    Metric,
    OrderCheck,
    Others,
    RuleTest,
    Track,
    causes_text,
    evaluations,
)
from sidecar.rules.triggers import Health, Status
from sidecar.settings import promql
from sidecar.settings.fields import (
    Duration,
    Flag,
    Interval,
    KilledPolicy,
    Labels,
    Limits,
    Misfit,
    Number,
    Quantity,
    Section,
    Text,
    choice,
    from_text,
    json_words,
    problems_of,
    seconds,
    shown,
    suggestion,
    taken_names,
    text,
    word,
)
from sidecar.settings.problems import Path, RuleFileProblems
from sidecar.settings.quantities import parse_decimal
from sidecar.settings.rule_files import TEST_SUFFIXES, load_rules
from sidecar.settings.yaml_source import Document, read_file

MOST_EVALUATIONS = 1_000_000
"""A test that needs more is refused: it would run for minutes."""

STAND_INS: Mapping[str, str] = MappingProxyType(
    {name: name.lower().replace("_", "-") for name in ("POD_NAME", "POD_NAMESPACE", "NODE_NAME", "POD_UID", "POD_IP")}
)
"""What the downward API gives a sidecar, for rule files that use it; `environment` may say otherwise."""


def _words(kind: str, words: Mapping[str, Any] | Sequence[str]) -> Any:
    return json_words(kind, words)


_ALLOW_DENY = ("allow", "deny")
AllowDeny = Annotated[str, word(*_ALLOW_DENY), _words("allow or deny", _ALLOW_DENY)]
StateWord = Annotated[str, word(*State), _words("state", list(State))]
RestrictionWord = Annotated[
    str, word(*(one.label for one in Restriction)), _words("restriction", [one.label for one in Restriction])
]
ReasonWord = Annotated[str, word(*ReasonCode), _words("reason code", list(ReasonCode))]
StatusWord = Annotated[str, word(*Status), _words("trigger status", list(Status))]
HealthWord = Annotated[str, word(*Health), _words("rule health", list(Health))]
StepWord = Annotated[str, word(*(one.label for one in Action)), _words("action", [one.label for one in Action])]
CauseWord = Annotated[str, word(*CauseCode), _words("cause", list(CauseCode))]
_OTHERS = {one.value: one for one in Others}
OthersWord = Annotated[Others, from_text(choice(_OTHERS)), _words("word", _OTHERS)]

_SIGNED = {"type": ["number", "string"], "x-kind": "number"}
Signed = Annotated[Any, from_text(parse_decimal), WithJsonSchema(_SIGNED)]


class TriggerSection(Section):
    """What a trigger is expected to be; what is left out is not looked at."""

    status: StatusWord | None = Field(default=None, description="Whether it fires.")
    health: HealthWord | None = Field(default=None, description="Whether it can see.")
    armed: Flag | None = Field(default=None, description="Whether its last reading was a fresh one.")
    step: StepWord | None = Field(default=None, description="Strictest action among its firing steps; null for none.")
    value: Number | None = Field(default=None, description="What it read last; null for nothing yet.")


class GateSection(Section):
    """What the gate is expected to answer to a question without a size."""

    new: AllowDeny | None = Field(default=None, description="To a new order.")
    reduce: AllowDeny | None = Field(default=None, description="To an order that claims to reduce.")
    cancel: AllowDeny | None = Field(default=None, description="To a cancel.")
    reason: ReasonWord | None = Field(default=None, description="Reason code of the answer to a new order.")
    trigger: Text | None = Field(default=None, description="The rule behind that answer; null for none.")


_INTENTS = {one.value: one for one in (Intent.NEW, Intent.REPLACE, Intent.CANCEL)}
_SIDES = {one.value: one for one in Side}


class OrderSection(Section):
    """An order as `POST /v1/orders/check` takes it."""

    intent: Annotated[Intent, from_text(choice(_INTENTS)), _words("intent", _INTENTS)] = shown(
        Intent.NEW, "new", "What it is for."
    )
    symbol: Text | None = Field(default=None, description="Instrument.")
    side: Annotated[Side, from_text(choice(_SIDES)), _words("side", _SIDES)] | None = Field(
        default=None, description="Required but for a cancel."
    )
    quantity: Quantity | None = Field(default=None, description="Required but for a cancel.")
    position: Signed | None = Field(default=None, description="Signed present position.")
    open_quantity: Signed | None = Field(default=None, description="Working orders on the same side.")
    position_limit: Signed | None = Field(default=None, description="The caller's own limit.")
    reduce_only: Flag = Field(default=False, description="The caller's flag to the venue.")

    def misfits(self) -> Iterator[Misfit]:
        """All but a cancel say how much of what."""
        if self.intent is not Intent.CANCEL:
            for name in ("side", "quantity"):
                if getattr(self, name) is None:
                    yield (name,), "is required for all but a cancel"
        for name in ("open_quantity", "position_limit"):
            number = getattr(self, name)
            if number is not None and number < 0:
                yield (name,), f"must not be below 0, not {number}"

    def build(self) -> Order:
        """Make the order that is decided on."""
        given = {name: getattr(self, name) for name in self.model_fields_set if getattr(self, name) is not None}
        return Order(**{"intent": self.intent, **given})


class OrderCheckSection(Section):
    """An order, and the decision that is expected."""

    order: OrderSection = Field(description="The order.")
    decision: AllowDeny | None = Field(default=None, description="Whether it passes.")
    reason: ReasonWord | None = Field(default=None, description="Reason code.")
    max_quantity: Number | None = Field(default=None, description="What quantity would pass; null for no limit.")

    def misfits(self) -> Iterator[Misfit]:
        """An order without an expectation is a mistake."""
        if self.model_fields_set <= {"order"}:
            yield (), "expects nothing; write decision, reason or max_quantity"


class ExpectSection(Section):
    """What is expected at one moment, after all evaluations that are due then."""

    at: Duration = Field(description="Time from the start.")
    state: StateWord | None = Field(default=None, description="State of the switch.")
    restriction: RestrictionWord | None = Field(default=None, description="As status shows it.")
    factor: Number | None = Field(default=None, description="Position limit factor.")
    causes: Annotated[
        dict[Text, CauseWord] | None,
        WithJsonSchema({"type": "object", "x-kind": "cause by trigger", "additionalProperties": {"type": "string"}}),
    ] = Field(default=None, description="Every cause of the kill, `{<trigger>: breach}`; `{}` for none.")
    gate: GateSection | None = Field(default=None, description="The gate's answers to questions without a size.")
    triggers: dict[Text, TriggerSection] = Field(default={}, description="Triggers by name.")
    orders: tuple[OrderCheckSection, ...] = Field(default=(), description="The gate's answers to orders, each alone.")

    def misfits(self) -> Iterator[Misfit]:
        """An expectation of nothing is a mistake."""
        named = [one for one in (self.gate, *self.triggers.values()) if one is not None]
        own = (self.state, self.restriction, self.factor, self.causes)
        silent = all(one is None for one in own) and not any(one.model_fields_set for one in named)
        if silent and not self.orders:
            yield (), "expects nothing; write state, restriction, factor, causes, gate, triggers or orders"


def _notation(value: Any) -> tuple[Value, ...]:
    try:
        return expand(text(value))
    except ValueError as error:
        raise ValueError(str(error)) from None


_NOTATION = {"type": ["string", "number"], "x-kind": "values over time"}
Notation = Annotated[tuple[Value, ...], BeforeValidator(_notation), WithJsonSchema(_NOTATION)]

_LABELS = re.compile(r'\s*([a-zA-Z_][a-zA-Z0-9_]*)\s*=\s*"((?:[^"\\]|\\["\\])*)"\s*(,|$)')


def _read_labels(written: str) -> Mapping[str, str]:
    inside = written.strip()
    if not (inside.startswith("{") and inside.endswith("}")):
        raise ValueError(f"""{written!r} are no labels; write {{pod="a"}} in quotes: '{{pod="a"}}'""")
    inside, labels = inside[1:-1].strip(), {}
    while inside:
        match = _LABELS.match(inside)
        if match is None:
            raise ValueError(f"""{written!r} are no labels at {inside!r}; write {{pod="a",zone="b"}}""")
        labels[match[1]] = re.sub(r"\\(.)", r"\1", match[2])
        inside = inside[match.end() :]
    return labels


class SeriesSection(Section):
    """A query that returns several series."""

    series: dict[str, Notation] = Field(description="""Values over time by labels, `'{pod="a"}': '1 2'`.""")

    def misfits(self) -> Iterator[Misfit]:
        """Series are told apart by their labels."""
        if not self.series:
            yield ("series",), "holds no series; for a query that returns nothing write _"
        taken: dict[tuple[tuple[str, str], ...], str] = {}
        for written in self.series:
            try:
                labels = tuple(sorted(_read_labels(written).items()))
            except ValueError as error:
                yield ("series", written), str(error)
                continue
            if taken.setdefault(labels, written) != written:
                yield ("series", written), f"has the labels of {taken[labels]!r}"

    def tracks(self) -> tuple[Track, ...]:
        """The series as they are run."""
        return tuple(Track(values=values, labels=_read_labels(labels)) for labels, values in self.series.items())


def _input(value: Any) -> tuple[Track, ...]:
    if isinstance(value, dict):
        return SeriesSection.model_validate(value).tracks()
    return (Track(values=_notation(value)),)


Input = Annotated[
    tuple[Track, ...],
    BeforeValidator(_input),
    WithJsonSchema(
        {
            "x-kind": "values over time, or `series`",
            "anyOf": [{"type": ["string", "number"]}, SeriesSection.model_json_schema()],
        }
    ),
]


def _metric_name(value: str) -> str:
    if not _metric_names(value):
        raise ValueError(f'{value!r} is no series; write the name of a metric with its labels, x{{pod="a"}}')
    return value


def _metric_names(series: str) -> tuple[str, ...]:
    try:
        return promql.parse(series).metric_names
    except promql.PromQLError:
        return ()


def _promtool_values(value: Any) -> str:
    written = text(value)
    words = {item for item in _notation(written) if isinstance(item, Word)}
    strange = sorted(words - {Word.MISSING, Word.STALE})
    if strange:
        raise ValueError(f"{strange[0].value!r} is no sample; a metric takes numbers, _ and stale")
    return written


class MetricSection(Section):
    """One series of the Prometheus that is asked."""

    series: Annotated[str, from_text(_metric_name), WithJsonSchema({"type": "string", "x-kind": "series"})] = Field(
        description="""Its name and labels, `portfolio_drawdown_ratio{pod="a"}`."""
    )
    values: Annotated[str, BeforeValidator(_promtool_values), WithJsonSchema(_NOTATION)] = Field(
        description="Its samples, one each `interval`, in promtool's notation."
    )


class TestSection(Section):
    """One test: what the queries return over time, and what is expected."""

    __test__ = False  # pytest takes classes of this name for tests

    name: Text = Field(description="A sentence that is true when the test passes.")
    interval: Interval = seconds("1s", "Time between two values.")
    enable: tuple[Text, ...] = Field(default=(), description="Rules to test as if enabled and out of shadow.")
    input: Annotated[
        dict[Text, Input],
        WithJsonSchema({"type": "object", "x-kind": "values by trigger", "additionalProperties": True}),
    ] = Field(default={}, description="By trigger, what its query returns over time.")
    metrics: tuple[MetricSection, ...] = Field(
        default=(), description="Series that promtool evaluates the real queries on, for rules without `input`."
    )
    others: OthersWord = shown(
        Others.QUIET, "quiet", "What all other queries say: `quiet` (nothing bad), `missing` or `unreachable`."
    )
    expect: tuple[ExpectSection, ...] = Field(description="What is expected, and when.")

    def misfits(self) -> Iterator[Misfit]:
        """A test expects something."""
        if not self.expect:
            yield ("expect",), "is empty: a test that expects nothing always passes"


class PolicySection(Section):
    """The gate's configuration, as far as it decides."""

    killed_policy: KilledPolicy = shown(Restriction.HALT, "halt", "As `gate.killed_policy`.")
    position_limits: Limits = Field(default={}, description="As `gate.position_limits`.")
    blind_orders: AllowDeny = Field(default="allow", description="As `gate.blind_orders`.")
    trust_reduce_claim: Flag = Field(default=False, description="As `gate.trust_reduce_claim`.")

    def build(self) -> Policies:
        """Make the policies that are run."""
        gate = GatePolicy(
            killed_policy=self.killed_policy,
            position_limits=MappingProxyType(dict(self.position_limits)),
            blind_orders=self.blind_orders == "allow",
            trust_reduce_claim=self.trust_reduce_claim,
        )
        return Policies(gate=gate)


class RuleTestFile(Section):
    """The whole file."""

    rule_files: tuple[Text, ...] | None = Field(
        default=None, description="Rule files, from the folder of this one; by default `x.yaml` for `x.test.yaml`."
    )
    environment: Labels = Field(default={}, description="For `${VAR}` in the rule files; nothing else is set.")
    interval: Interval = seconds("5s", "As `rules.interval`: for groups that have none of their own.")
    scrape: tuple[Text, ...] = Field(default=(), description="Names of scrape targets that the rule files use.")
    gate: PolicySection = Field(default_factory=PolicySection, description="The gate's configuration.")
    tests: tuple[TestSection, ...] = Field(description="The tests.")

    @classmethod
    def misfits_as_written(cls, written: Mapping[str, Any]) -> Iterator[Misfit]:
        """Tests are told apart by their names, and there is at least one."""
        yield from taken_names("tests", written.get("tests"))
        if written.get("tests") == []:
            yield ("tests",), "is empty; write at least one test"


@dataclass(frozen=True, kw_only=True, slots=True)
class TestFile:
    """One file of tests, ready to run."""

    __test__ = False  # pytest takes classes of this name for tests

    path: str
    tests: tuple[RuleTest, ...]


def load_rule_tests(path: FilePath) -> TestFile:
    """Read one file of tests and the rule files it is about.

    Raises:
        RuleFileProblems: with every problem of the file, or of the rule files.
    """
    document = read_file(path, STAND_INS)
    try:
        file = RuleTestFile.model_validate(document.data)
    except ValidationError as error:
        raise RuleFileProblems([*document.problems, *problems_of(error, document)]) from None
    if document.problems:
        raise RuleFileProblems(document.problems)
    rules = _rules(path, file, document)
    problems = [document.problem(at, reason) for at, reason in _misfits(file, rules)]
    if problems:
        raise RuleFileProblems(problems)
    builder = _Builder(file, rules, document)
    return TestFile(path=str(path), tests=tuple(builder.test(index) for index in range(len(file.tests))))


def _rules(path: FilePath, file: RuleTestFile, document: Document) -> RuleSet:
    patterns = file.rule_files
    if patterns is None:
        suffix = next((one for one in TEST_SUFFIXES if path.name.endswith(one)), None)
        if suffix is None:
            reason = f"is required where the file is not named x{TEST_SUFFIXES[0]} for a rule file x.yaml"
            raise RuleFileProblems([document.problem(("rule_files",), reason)])
        patterns = (path.name.removesuffix(suffix) + suffix.removeprefix(".test"),)
    places = [str(path.parent / pattern) for pattern in patterns]
    rules = load_rules(places, file.interval, {**STAND_INS, **file.environment}, file.scrape)
    if not rules.rules:
        where = ", ".join(places)
        raise RuleFileProblems([document.problem(("rule_files",), f"there is no rule to test in {where}")])
    return rules


def _misfits(file: RuleTestFile, rules: RuleSet) -> Iterator[Misfit]:
    """Check what only shows beside the rules."""
    by_name = {rule.trigger: rule for rule in rules.rules}
    for index, test in enumerate(file.tests):
        for path, reason in _test_misfits(test, rules, by_name):
            yield ("tests", index, *path), reason


def _test_misfits(test: TestSection, rules: RuleSet, by_name: Mapping[str, Rule]) -> Iterator[Misfit]:
    for path, name in _named(test):
        if name not in by_name:
            yield path, f"there is no rule {name!r}{suggestion(name, by_name)}"
        elif path[0] != "enable" and not by_name[name].enabled and name not in test.enable:
            yield path, f"rule {name!r} is disabled and never evaluated; write enable: [{name}] to test it"
    for name, tracks in test.input.items():
        if name in by_name:
            yield from ((("input", name), reason) for reason in _input_misfits(by_name[name], tracks))
    cost = evaluations(rules, max(one.at for one in test.expect))
    if cost > MOST_EVALUATIONS:
        yield ("expect",), f"takes {cost} evaluations to get to, more than {MOST_EVALUATIONS}; expect it earlier"


def _named(test: TestSection) -> Iterator[tuple[Path, str]]:
    yield from ((("enable", index), name) for index, name in enumerate(test.enable))
    yield from ((("input", name), name) for name in test.input)
    for index, expect in enumerate(test.expect):
        yield from ((("expect", index, "triggers", name), name) for name in expect.triggers)
        yield from ((("expect", index, "causes", name), name) for name in expect.causes or ())
        if expect.gate is not None and expect.gate.trigger is not None:
            yield ("expect", index, "gate", "trigger"), expect.gate.trigger


def _input_misfits(rule: Rule, tracks: Sequence[Track]) -> Iterator[str]:
    """Alerts and orders are counted by the sidecar itself: no source stands between that could fail."""
    if not isinstance(rule.condition, AlertMatch | OrderRate):
        return
    if len(tracks) > 1 or tracks[0].labels:
        yield f"rule {rule.trigger!r} of type {rule.kind} has no series; write one sequence of counts"
    for value in tracks[0].values:
        if isinstance(value, Word) or value < 0 or not float(value).is_integer():
            yield f"{value} is no count; rule {rule.trigger!r} of type {rule.kind} takes whole numbers from 0 on"
            return


class _Builder:
    """From the file as written to tests that can be run."""

    def __init__(self, file: RuleTestFile, rules: RuleSet, document: Document) -> None:
        self._file = file
        self._rules = rules
        self._document = document

    def test(self, index: int) -> RuleTest:
        section = self._file.tests[index]
        rules = _enabled(self._rules, frozenset(section.enable))
        metrics = tuple(Metric(series=one.series, values=one.values) for one in section.metrics)
        return RuleTest(
            name=section.name,
            origin=self._origin(("tests", index)),
            rules=rules,
            step=section.interval,
            tracks=MappingProxyType(dict(section.input)),
            metrics=metrics,
            measured=frozenset(_measured(rules, metrics)) - section.input.keys(),
            others=section.others,
            policies=self._file.gate.build(),
            expectations=tuple(
                self._expectation(("tests", index, "expect", number), one) for number, one in enumerate(section.expect)
            ),
        )

    def _origin(self, path: Path) -> str:
        return f"{self._document.file}:{self._document.line(path)}"

    def _check(self, path: Path, fact: tuple[str, ...], wanted: Fact) -> Check:
        return Check(path=fact, wanted=wanted, origin=self._origin(path))

    def _expectation(self, path: Path, section: ExpectSection) -> Expectation:
        return Expectation(
            at=section.at,
            checks=tuple(self._checks(path, section)),
            orders=tuple(self._order((*path, "orders", index), one) for index, one in enumerate(section.orders)),
        )

    def _checks(self, path: Path, section: ExpectSection) -> Iterator[Check]:
        for key in ("state", "restriction", "factor"):
            if getattr(section, key) is not None:
                yield self._check((*path, key), (key,), getattr(section, key))
        if section.causes is not None:
            yield self._check((*path, "causes"), ("causes",), causes_text(section.causes))
        if section.gate is not None:
            yield from self._of_section((*path, "gate"), ("gate",), section.gate)
        for name, trigger in section.triggers.items():
            yield from self._of_section((*path, "triggers", name), ("triggers", name), trigger)

    def _of_section(self, path: Path, facts: tuple[str, ...], section: Section) -> Iterator[Check]:
        # A null that is written is expected; one that is only the default is not looked at.
        written = section.model_fields_set - {"order"}
        for key in section.keys():  # noqa: SIM118 - a method of sections, which are no mappings
            if key in written:
                yield self._check((*path, key), (*facts, key), getattr(section, key))

    def _order(self, path: Path, section: OrderCheckSection) -> OrderCheck:
        return OrderCheck(order=section.order.build(), checks=tuple(self._of_section(path, (), section)))


def _enabled(rules: RuleSet, names: frozenset[str]) -> RuleSet:
    groups = tuple(
        replace(
            group,
            rules=tuple(
                replace(rule, enabled=True, shadow=False) if rule.trigger in names else rule for rule in group.rules
            ),
        )
        for group in rules.groups
    )
    return replace(rules, groups=groups)


def _measured(rules: RuleSet, metrics: Sequence[Metric]) -> Iterator[str]:
    """Rules whose query looks at one of these metrics."""
    known = {name for metric in metrics for name in _metric_names(metric.series)}
    for rule in rules.rules:
        asked = rule.query if rule.enabled and rule.source == "prometheus" else None
        if asked is not None and known.intersection(promql.parse(asked).metric_names):
            yield rule.trigger


def rule_tests_schema() -> dict[str, Any]:
    """JSON Schema of a file of tests, for editors."""
    schema = RuleTestFile.model_json_schema(by_alias=True)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "killswitch-sidecar rule test file",
    }
