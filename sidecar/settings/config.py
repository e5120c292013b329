"""The configuration as the program uses it: frozen, complete, durations in seconds, sizes in bytes, paths absolute.

`load_settings` reads the file, or raises with every problem it has. Nothing here needs pydantic to be used or built, so
tests and embedders may construct `Settings` by hand. Does not open any file that the configuration names.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal, TypeVar, cast, overload

from pydantic import ValidationError

from sidecar.core.policy import GatePolicy, RecoveryPolicy, RestartStep, StepGate
from sidecar.core.states import Mode
from sidecar.settings import config_file as written
from sidecar.settings.fields import problems_of, split_address
from sidecar.settings.http_config import HttpConfig
from sidecar.settings.http_section import http_config
from sidecar.settings.problems import Problem, SettingsProblems
from sidecar.settings.yaml_source import Document, read_file

DEFAULT_CONFIG = "/etc/killswitch/config.yaml"
CONFIG_VARIABLE = "KILLSWITCH_CONFIG"
SOCKET_VARIABLE = "KILLSWITCH_SOCKET"
_DEFAULT_SCRAPE_TIMEOUT = 0.2  # seconds; never longer than the target's interval

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Switch:
    """Who the switch is.

    Attributes:
        name: identity over restarts and reschedules.
        mode: how much of it is in force.
        labels: matched by external triggers and fleet scopes.
    """

    name: str
    mode: Mode = Mode.ACTIVE
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prometheus:
    """Who answers queries.

    Attributes:
        urls: without trailing slash; empty where all rules look elsewhere. May hold a user and a password.
        timeout: seconds.
        headers: sent with every request; may hold secrets.
        http: credentials and TLS; None where nothing is configured.
        on_warnings: what an answer with warnings is worth.
    """

    urls: tuple[str, ...] = field(default=("http://prometheus:9090",), repr=False)
    timeout: float = 2.0
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    http: HttpConfig | None = None
    on_warnings: Literal["inconclusive", "ignore"] = "inconclusive"


@dataclass(frozen=True, kw_only=True, slots=True)
class ScrapeTarget:
    """One endpoint that is scraped directly; `interval` and `timeout` in seconds."""

    name: str
    url: str
    interval: float = 0.25
    timeout: float = _DEFAULT_SCRAPE_TIMEOUT


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """Paths and patterns of rule files, and the interval in seconds of groups that name none."""

    files: tuple[str, ...] = (written.DEFAULT_RULE_FILES,)
    interval: float = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Listen:
    """Where a TCP listener binds; an IPv6 host stands here without brackets, port 0 takes any free one."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Gate:
    """What answers the trading code; `lease` in seconds, the rest of its rules in `policy`."""

    listen: Listen | None = Listen(host="127.0.0.1", port=9780)
    socket: str = "/run/killswitch/gate.sock"
    page: str = "/run/killswitch/state.page"
    lease: float = 0.5
    policy: GatePolicy = field(default_factory=GatePolicy)


@dataclass(frozen=True, kw_only=True, slots=True)
class Operations:
    """Metrics, health, API, web page and webhook; `hosts` in lower case."""

    listen: Listen = Listen(host="0.0.0.0", port=9781)  # noqa: S104 - probes and Prometheus come to the pod's address
    hosts: tuple[str, ...] = ()
    health_listen: Listen | None = None
    web_config: str | None = None
    tokens_file: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Control:
    """The way in for the command line; `KILLSWITCH_SOCKET` has been applied."""

    socket: str = "/run/killswitch-control/control.sock"


@dataclass(frozen=True, kw_only=True, slots=True)
class Webhook:
    """What Alertmanager sends us; `expires` in seconds."""

    match: tuple[str, ...] = ()
    token_file: str | None = None
    allow_unauthenticated: bool = False
    expires: float = 18_000.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Notify:
    """Alertmanagers that get our alerts, each of them all, and where people find what to do about one."""

    urls: tuple[str, ...] = ("http://alertmanager:9093",)
    runbook_url: str = "docs/RUNBOOK.md"


@dataclass(frozen=True, kw_only=True, slots=True)
class Alertmanager:
    """Alerts in and out."""

    webhook: Webhook = field(default_factory=Webhook)
    notify: Notify = field(default_factory=Notify)


@dataclass(frozen=True, kw_only=True, slots=True)
class HealthQuery:
    """`query operator threshold` must hold; `operator` as a word, `lt`; `max_age` of its samples in seconds."""

    name: str
    query: str
    operator: str
    threshold: float
    max_age: float = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Health:
    """What must be well for a recovery; bytes and percent, None does not look."""

    sources_up: bool = True
    min_memory_available: int | None = None
    max_cpu_percent: float | None = None
    queries: tuple[HealthQuery, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Recovery:
    """How trading comes back."""

    policy: RecoveryPolicy = field(default_factory=RecoveryPolicy)
    approvers_file: str | None = None
    health: Health = field(default_factory=Health)


@dataclass(frozen=True, kw_only=True, slots=True)
class Storage:
    """What is remembered.

    Attributes:
        dir: folder of state and audit.
        audit_max_bytes: an audit file that has grown to this is closed.
        audit_retention: seconds that closed audit files are kept.
        restore_from_prometheus: seconds that a restore looks back; None does not restore from Prometheus.
    """

    dir: str = "/var/lib/killswitch"
    audit_max_bytes: int = 10 * 2**20
    audit_retention: float = 90 * 86_400.0
    restore_from_prometheus: float | None = 86_400.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Logging:
    """What is written to standard output."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["json", "console"] = "json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """The whole configuration.

    Attributes:
        path: the file it was read from.
        content_hash: SHA-256 hex of its text and of the environment variables it used, to notice a change.
    """

    switch: Switch
    prometheus: Prometheus = field(default_factory=Prometheus)
    scrape: tuple[ScrapeTarget, ...] = ()
    rules: Rules = field(default_factory=Rules)
    gate: Gate = field(default_factory=Gate)
    operations: Operations = field(default_factory=Operations)
    control: Control = field(default_factory=Control)
    alertmanager: Alertmanager = field(default_factory=Alertmanager)
    recovery: Recovery = field(default_factory=Recovery)
    storage: Storage = field(default_factory=Storage)
    logging: Logging = field(default_factory=Logging)
    path: str = ""
    content_hash: str = ""

    @property
    def scrape_names(self) -> frozenset[str]:
        """What may follow `scrape:` in the source of a rule."""
        return frozenset(target.name for target in self.scrape)


def load_settings(path: str | Path | None = None, environ: Mapping[str, str] | None = None) -> Settings:
    """Read the configuration.

    Args:
        path: the file; None takes `KILLSWITCH_CONFIG` from the environment, else `/etc/killswitch/config.yaml`.
        environ: for `${VAR}`, `KILLSWITCH_CONFIG` and `KILLSWITCH_SOCKET`; None takes the process's own.

    Raises:
        SettingsProblems: with every problem of the file.
    """
    environ = os.environ if environ is None else environ
    file = Path(path or environ.get(CONFIG_VARIABLE) or DEFAULT_CONFIG)
    if not file.exists():
        reason = f"there is no such file; name one with --config or {CONFIG_VARIABLE}"
        raise SettingsProblems([Problem(file=str(file), line=1, key="(file)", reason=reason)])
    document = read_file(file, environ)
    config = _validated(document)
    settings = _Builder(config, document, environ, file.absolute().parent).settings()
    problems = [document.problem(path_, reason) for path_, reason in _misfits(settings)]
    if problems:
        raise SettingsProblems(problems)
    return settings


def _validated(document: Document) -> written.ConfigFile:
    try:
        config = written.ConfigFile.model_validate(document.data)
    except ValidationError as error:
        raise SettingsProblems([*document.problems, *problems_of(error, document)]) from None
    if document.problems:
        raise SettingsProblems(document.problems)
    return config


def _misfits(settings: Settings) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Check what only shows once defaults, environment and folder are known."""
    if not settings.switch.name:
        yield (
            ("switch", "name"),
            "is required, for POD_NAMESPACE and POD_NAME, which make its default, are not both in the environment",
        )
    sockets = {("gate", "socket"): settings.gate.socket, ("control", "socket"): settings.control.socket}
    for path, socket in sockets.items():
        length = len(os.fsencode(socket))
        if length > written.LONGEST_SOCKET_PATH:
            yield (
                path,
                f"{socket!r} has {length} bytes; the path of a Unix socket has at most {written.LONGEST_SOCKET_PATH}",
            )
    health, listen = settings.operations.health_listen, settings.operations.listen
    if health is not None and health.port != 0 and health in (listen, settings.gate.listen):
        yield ("operations", "health_listen"), f"{health} is taken by another listener; choose a port of its own"
    if settings.gate.socket == settings.control.socket:
        yield ("control", "socket"), "is also the gate's socket: whoever reaches the control socket owns the switch"


class _Builder:
    """From the file as written to what the program uses."""

    def __init__(
        self, config: written.ConfigFile, document: Document, environ: Mapping[str, str], folder: Path
    ) -> None:
        self._config = config
        self._document = document
        self._environ = environ
        self._folder = folder

    def settings(self) -> Settings:
        config = self._config
        return Settings(
            switch=self._switch(),
            prometheus=self._prometheus(),
            scrape=tuple(_scrape_target(section) for section in config.scrape),
            rules=Rules(files=tuple(self._place(path) for path in config.rules.files), interval=config.rules.interval),
            gate=self._gate(),
            operations=self._operations(),
            control=Control(socket=self._environ.get(SOCKET_VARIABLE) or self._place(config.control.socket)),
            alertmanager=self._alertmanager(),
            recovery=self._recovery(),
            storage=self._storage(),
            logging=_logging(config.logging),
            path=self._document.file,
            content_hash=self._document.digest,
        )

    @overload
    def _place(self, path: str) -> str: ...
    @overload
    def _place(self, path: None) -> None: ...
    def _place(self, path: str | None) -> str | None:
        """Relative paths count from the configuration file, wherever the process was started."""
        return None if path is None else str(self._folder / path)

    def _switch(self) -> Switch:
        section = self._config.switch
        namespace, pod = self._environ.get("POD_NAMESPACE"), self._environ.get("POD_NAME")
        default = f"{namespace}/{pod}" if namespace and pod else ""
        return Switch(name=section.name or default, mode=section.mode, labels=_frozen(section.labels))

    def _prometheus(self) -> Prometheus:
        section = self._config.prometheus
        # Who scrapes directly and names no server has none: the default would keep the gate waiting for a stranger.
        unnamed = bool(self._config.scrape) and "urls" not in section.model_fields_set
        return Prometheus(
            urls=() if unnamed else section.urls,
            timeout=section.timeout,
            headers=_frozen(section.headers),
            http=http_config(section.http_config, self._place),
            on_warnings=cast("Literal['inconclusive', 'ignore']", section.on_warnings),
        )

    def _gate(self) -> Gate:
        section = self._config.gate
        policy = GatePolicy(
            killed_policy=section.killed_policy,
            position_limits=_frozen(section.position_limits),
            blind_orders=section.blind_orders == "allow",
            trust_reduce_claim=section.trust_reduce_claim,
            lease_ms=round(section.lease * 1000),
        )
        return Gate(
            listen=None if section.listen is None else _listen(section.listen),
            socket=self._place(section.socket),
            page=self._place(section.page),
            lease=section.lease,
            policy=policy,
        )

    def _operations(self) -> Operations:
        section = self._config.operations
        return Operations(
            listen=_listen(section.listen),
            hosts=section.hosts,
            health_listen=None if section.health_listen is None else _listen(section.health_listen),
            web_config=self._place(section.web_config),
            tokens_file=self._place(section.tokens_file),
        )

    def _alertmanager(self) -> Alertmanager:
        webhook = self._config.alertmanager.webhook
        return Alertmanager(
            webhook=Webhook(
                match=webhook.match,
                token_file=self._place(webhook.token_file),
                allow_unauthenticated=webhook.allow_unauthenticated,
                expires=webhook.expires,
            ),
            notify=Notify(
                urls=self._config.alertmanager.notify.urls,
                runbook_url=self._config.alertmanager.notify.runbook_url,
            ),
        )

    def _recovery(self) -> Recovery:
        section = self._config.recovery
        policy = RecoveryPolicy(
            cooldown=section.cooldown,
            backoff_factor=section.backoff.factor,
            backoff_max=section.backoff.max,
            steps=tuple(_restart_step(step) for step in section.steps),
            require_approval=section.require_approval,
            approvals=section.approvals,
            approval_ttl=section.approval_ttl,
            require_triggers_clear=section.require_triggers_clear,
        )
        return Recovery(
            policy=policy, approvers_file=self._place(section.approvers_file), health=_health(section.health)
        )

    def _storage(self) -> Storage:
        section = self._config.storage
        return Storage(
            dir=self._place(section.dir),
            audit_max_bytes=section.audit.max_bytes,
            audit_retention=section.audit.retention,
            restore_from_prometheus=section.restore_from_prometheus,
        )


def _frozen(mapping: Mapping[str, _T]) -> Mapping[str, _T]:
    return MappingProxyType(dict(mapping))


def _listen(address: str) -> Listen:
    host, port = split_address(address)
    return Listen(host=host, port=port)


def _scrape_target(section: written.ScrapeSection) -> ScrapeTarget:
    timeout = min(_DEFAULT_SCRAPE_TIMEOUT, section.interval) if section.timeout is None else section.timeout
    return ScrapeTarget(name=section.name, url=section.url, interval=section.interval, timeout=timeout)


def _restart_step(section: written.RestartStepSection) -> RestartStep:
    gates = tuple(
        StepGate(
            query=gate.query,
            operator=gate.operator.value,
            threshold=gate.threshold,
            max_age=gate.max_age,
            interval=gate.interval,
            failure_limit=gate.failure_limit,
            inconclusive_limit=gate.inconclusive_limit,
            consecutive_error_limit=gate.consecutive_error_limit,
            on_failure=gate.on_failure,
        )
        for gate in section.gates
    )
    return RestartStep(factor=section.factor, after=section.after, gates=gates)


def _health(section: written.HealthSection) -> Health:
    queries = tuple(
        HealthQuery(
            name=query.name or query.query,
            query=query.query,
            operator=query.operator.value,
            threshold=query.threshold,
            max_age=query.max_age,
        )
        for query in section.queries
    )
    return Health(
        sources_up=section.sources_up,
        min_memory_available=section.min_memory_available,
        max_cpu_percent=section.max_cpu_percent,
        queries=queries,
    )


def _logging(section: written.LoggingSection) -> Logging:
    return Logging(
        level=cast("Literal['debug', 'info', 'warning', 'error']", section.level),
        format=cast("Literal['json', 'console']", section.format),
    )
