"""The composition root: builds every part, starts it, watches over it, reloads it and stops it.

Nothing is decided here but order. The gate listens (and denies) as soon as no second sidecar can be meant; what fails
later leaves it denying with a reason, and the process up so that somebody can read that reason.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from sidecar.adapters import audit_log
from sidecar.adapters.approvers import Approvers
from sidecar.adapters.gate_http import GateServer
from sidecar.adapters.instruments import Instruments
from sidecar.adapters.notifier import Notifier
from sidecar.adapters.operations_http import OperationsServer, WebAccess, WebhookAccess
from sidecar.adapters.prometheus import PrometheusSource
from sidecar.adapters.scrape import ScrapeSource
from sidecar.adapters.state_file import FolderLocked, Nothing
from sidecar.adapters.state_page import StatePage
from sidecar.adapters.storage_thread import StorageThread
from sidecar.app.alerts import Alerts
from sidecar.app.asked import asked_document
from sidecar.app.audit_trail import CHANGES, AuditEvent, audit_event
from sidecar.app.clock import Clock
from sidecar.app.descriptors import gate_limits
from sidecar.app.desk import Desk
from sidecar.app.evaluation import Evaluator
from sidecar.app.health import HealthChecks, QueryCheck
from sidecar.app.keeper import Document, Keeper
from sidecar.app.memory import DiskMemory
from sidecar.app.notifications import Notifications
from sidecar.app.order_brake import OrderBrake
from sidecar.app.places import run_path
from sidecar.app.recollection import ASKING, CHECKING, Recollection, start_from_record
from sidecar.app.recoveries import RecoveryDesk
from sidecar.app.reload import Reloader
from sidecar.app.restore import CannotRestore, Start, choose_start
from sidecar.app.sources import Probe, RuleSources
from sidecar.app.step_gates import StepGateKeeper
from sidecar.app.telemetry import AppTelemetry
from sidecar.core.compose import Overlay
from sidecar.core.document import lockouts_document, state_document
from sidecar.core.errors import InvariantViolation, RuleFileError, SettingsError, StorageError
from sidecar.core.snapshot import Snapshot
from sidecar.core.states import Instant, Mode, State
from sidecar.core.switch import Switch
from sidecar.core.transitions import Policies, SwitchState
from sidecar.rules.document import trigger_document
from sidecar.rules.model import Operator, Rule, RuleSet
from sidecar.rules.readings import Answer, Failure
from sidecar.settings.config import Settings
from sidecar.settings.rule_files import load_rules

log = logging.getLogger("sidecar.app")

APPROVAL_CODE = "KILL_SWITCH_APPROVAL_CODE"
STORAGE_PATIENCE_SECONDS = 2.0
STORAGE_RETRY_SECONDS = 2.0
BEATS_PER_LEASE = 8  # the contract's five, and room for a timer that is late
DEGRADED_LIVENESS_SECONDS = 30.0
STOP_SECONDS = 5.0
CREDENTIALS_SECONDS = 5.0


NOT_OPEN_YET = "the state folder is not open yet"


class AnotherSidecar(Exception):  # noqa: N818 - named for what happened
    """Another process holds the state folder of this switch."""


class Application:
    """One sidecar, from start to stop.

    Args:
        settings: what was read at the start; listeners, storage and mode hold for the life of the process.
        environ: for rule files, the approval code and the run folders.
        clock: where `now` comes from.
        probes: what answers rules without a query, by rule type.
        dropped_log_lines: how many lines of log and audit nobody took.
    """

    def __init__(
        self,
        *,
        settings: Settings,
        environ: Mapping[str, str],
        clock: Clock,
        probes: Mapping[str, Probe],
        dropped_log_lines: Callable[[], int] = lambda: 0,
    ) -> None:
        self.settings = settings
        self.dropped_log_lines = dropped_log_lines
        self.environ = environ
        self.clock = clock
        self.started = clock.now()
        self.policies = Policies(recovery=settings.recovery.policy, gate=settings.gate.policy)
        self.switch = Switch(
            name=settings.switch.name,
            mode=settings.switch.mode,
            state=SwitchState(since=self.started.wall),
            policies=self.policies,
        )
        self.keeper = Keeper(switch=self.switch, clock=clock, document=self._document)
        self.prometheus = _build_prometheus(settings)
        self.scrapes = _build_scrapes(settings)
        self.sources = RuleSources(
            prometheus=self.prometheus,
            prometheus_timeout=settings.prometheus.timeout,
            scrapes=self.scrapes,
            probes={**probes, "order_rate": self._probe_orders, "alertmanager": self._probe_alerts},
        )
        self.evaluator = Evaluator(
            keeper=self.keeper,
            clock=clock,
            sources=self.sources,
            pod=settings.switch.name,
            warnings_count=settings.prometheus.on_warnings == "inconclusive",
        )
        self.alerts = Alerts(keeper=self.keeper, clock=clock, evaluator=self.evaluator)
        self.webhook_access = WebhookAccess()
        self.notifier = Notifier()
        self.take_alertmanager(settings)
        self.recoveries = RecoveryDesk(
            keeper=self.keeper,
            clock=clock,
            evaluator=self.evaluator,
            health=self._build_health(settings),
            approvers=self._load_approvers(settings),
            gates=StepGateKeeper(clock=clock, ask=self.sources.ask_queries),
            ready=self.shut,
        )
        self.recoveries.health_interval = min(settings.rules.interval, 5.0)
        self.brake = OrderBrake(evaluator=self.evaluator, clock=clock)
        self.gate = GateServer(switch=settings.switch.name, limits=gate_limits())
        self.operations: OperationsServer | None = None
        self.web_access: WebAccess | None = None
        self.page: StatePage | None = None
        self.memory: DiskMemory | None = None
        self.recollection = self._build_recollection(settings)
        self.opened = False
        self.rules_error: str | None = None
        self.storage_error: str | None = NOT_OPEN_YET
        self.page_error: str | None = None
        self.approvers_error: str | None = None
        self.failure: tuple[float, str] | None = None
        self.gate_address: tuple[str, int] | None = None
        self.operations_address: tuple[str, int] | None = None
        self.health_address: tuple[str, int] | None = None
        self.reloader = Reloader(self)
        self.notifications = Notifications(self, self.notifier)
        self.desk = Desk(self)
        self.registry = CollectorRegistry(auto_describe=False)
        self.instruments = Instruments(self.registry, AppTelemetry(self))
        self.keeper.observers.snapshot.append(self._show)
        self.evaluator.on_evaluation.append(lambda _, took: self.instruments.observe_evaluation(took))
        self.evaluator.on_kill.append(self.instruments.observe_breach_to_block)
        self.config_loosened = 0
        self._stale_since: float | None = None
        self._retired: list[PrometheusSource] = []
        self._scrapes_changed = asyncio.Event()
        self._thread = StorageThread()
        self._stopping = asyncio.Event()
        self._folder_is_ours = asyncio.Event()

    # Parts

    def _build_recollection(self, settings: Settings) -> Recollection | None:
        lookback = settings.storage.restore_from_prometheus
        if lookback is None or not settings.prometheus.urls or settings.switch.mode is Mode.DISABLED:
            return None
        return Recollection(
            switch=settings.switch.name,
            lookback=lookback,
            started=self.started,
            clock=self.clock,
            servers=lambda: self.settings.prometheus,
            keeper=self.keeper,
        )

    def _build_health(self, settings: Settings) -> HealthChecks:
        wanted = settings.recovery.health
        queries = [
            QueryCheck(
                name=one.name,
                query=one.query,
                operator=Operator(one.operator),
                threshold=one.threshold,
                max_age=one.max_age,
            )
            for one in wanted.queries
        ]
        return HealthChecks(
            sources=self.sources.states_of_used if wanted.sources_up else None,
            min_memory_available=wanted.min_memory_available,
            max_cpu_percent=wanted.max_cpu_percent,
            queries=queries,
            ask=self.sources.ask_queries,
        )

    def _load_approvers(self, settings: Settings) -> Approvers:
        if settings.recovery.approvers_file is not None:
            return Approvers.from_file(settings.recovery.approvers_file)
        code = self.environ.get(APPROVAL_CODE)
        if code:
            log.warning(
                "approvers.from_environment",
                extra={
                    "fields": {
                        "message": "whoever may exec into this container can read the approval code from its "
                        "environment; use recovery.approvers_file"
                    }
                },
            )
        return Approvers.from_environment(code)

    async def _probe_orders(self, rule: Rule) -> Answer | Failure:
        return await self.brake.probe(rule)

    async def _probe_alerts(self, rule: Rule) -> Answer | Failure:
        return await self.alerts.probe(rule)

    # Running

    async def run(self) -> None:
        """Run until told to stop.

        Raises:
            AnotherSidecar: the state folder is in use.
            OSError: a listener cannot be bound.
        """
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self._close)
            storage = asyncio.create_task(self._open_memory(), name="storage")
            stack.push_async_callback(_cancel, storage)
            await self._wait_for_storage(storage)
            await self._start_listeners(stack)
            self._load_rules()
            self._announce("sidecar.started")
            tasks = self._start_tasks()
            stack.push_async_callback(_cancel, *tasks, storage)
            stack.push_async_callback(self.evaluator.stop)
            await self._supervise([*tasks, storage])
            self._announce("sidecar.stopped")
            self.keeper.checkpoint()  # running time that was counted since the last save
            await self.keeper.drain(STOP_SECONDS)

    def stop(self) -> None:
        """Begin an orderly stop."""
        self._stopping.set()

    async def _wait_for_storage(self, storage: "asyncio.Task[None]") -> None:
        # A second sidecar must find out before it touches anything of the first; a hung volume must not hold us up, and
        # neither must a question to Prometheus.
        ours = asyncio.create_task(self._folder_is_ours.wait())
        await asyncio.wait({storage, ours}, timeout=STORAGE_PATIENCE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        ours.cancel()
        _refuse_second(storage)

    async def _start_listeners(self, stack: AsyncExitStack) -> None:
        gate, operations = self.settings.gate, self.settings.operations
        self._open_page()
        stack.callback(self._close_page)
        self.keeper.publish()
        if gate.listen is not None:
            self.gate_address = await self.gate.start_tcp(gate.listen.host, gate.listen.port)
        stack.push_async_callback(self.gate.stop, 1.0)
        await self.gate.start_unix(run_path(gate.socket, self.environ))
        await self._load_web_access()
        server = OperationsServer(
            desk=self.desk,
            registry=self.registry,
            hosts=operations.hosts,
            tokens_file=operations.tokens_file,
            webhook=self.webhook_access,
            access=self.web_access,
        )
        stack.push_async_callback(server.stop)
        self.operations = server
        self.operations_address = await server.start_tcp(operations.listen.host, operations.listen.port)
        if operations.health_listen is not None:
            health = operations.health_listen
            self.health_address = await server.start_health(health.host, health.port)
        await server.start_control(run_path(self.settings.control.socket, self.environ))
        log.info(
            "sidecar.listening",
            extra={
                "fields": {
                    "gate": _text(self.gate_address),
                    "operations": _text(self.operations_address),
                    **({"health": _text(self.health_address)} if self.health_address else {}),
                }
            },
        )

    async def _load_web_access(self) -> None:
        operations = self.settings.operations
        if operations.web_config is None:
            return
        self.web_access = WebAccess(operations.web_config)
        await self.web_access.load()
        if self.web_access.wants_client_certificates and operations.health_listen is None:
            log.warning(
                "operations.probes_need_a_certificate",
                extra={
                    "fields": {
                        "message": "a kubelet has no client certificate, so its probes fail at this listener; set "
                        "operations.health_listen"
                    }
                },
            )

    def _start_tasks(self) -> list["asyncio.Task[None]"]:
        work: dict[str, Callable[[], Awaitable[None]]] = {
            "heartbeat": self._beat,
            "keeper": self.keeper.run,
            "recoveries": self.recoveries.drive,
            "reload": self.reloader.watch,
            "housekeeping": self._keep_house,
            "credentials": self._watch_credentials,
            "scrapes": self._scrape,
            "notifications": self.notifications.run,
            "notifier": self.notifier.run,
        }
        return [asyncio.create_task(_run(start), name=name) for name, start in work.items()]

    async def _supervise(self, tasks: list["asyncio.Task[None]"]) -> None:
        stopping = asyncio.create_task(self._stopping.wait(), name="stop")
        watched: set[asyncio.Task[Any]] = {task for task in tasks if not _has_ended_well(task)}
        while not self._stopping.is_set():
            done, _ = await asyncio.wait({*watched, stopping}, return_when=asyncio.FIRST_COMPLETED)
            for task in done - {stopping}:
                watched.discard(task)
                _refuse_second(task)
                if not _has_ended_well(task):
                    self._fail(f"the task {task.get_name()!r} ended: {_outcome(task)}")

    def _fail(self, what: str) -> None:
        self._degrade(what)
        self.refresh()

    def _degrade(self, what: str) -> None:
        if self.failure is None:
            log.critical("sidecar.degraded", extra={"fields": {"message": what}})
            self.failure = (self.clock.now().mono, what)
            self.keeper.audit(audit_event("sidecar.degraded", self.clock.now(), reason=what))

    async def _close(self) -> None:
        if self.memory is not None:
            try:
                async with asyncio.timeout(STOP_SECONDS):
                    await self.memory.close()
            except (TimeoutError, StorageError) as error:
                log.warning("storage.close_failed", extra={"fields": {"error": str(error)}})
        await self._thread.stop(STOP_SECONDS)
        await self.sources.close()
        await self._close_retired()
        if self.prometheus is not None:
            await self.prometheus.close()

    async def _close_retired(self) -> None:
        retired, self._retired = self._retired, []
        for source in retired:
            await source.close()

    def _announce(self, what: str) -> None:
        fields = {"mode": self.switch.mode.value, "config": self.settings.path, "hash": self.settings.content_hash}
        self.keeper.audit(audit_event(what, self.clock.now(), by="sidecar", **fields))
        # Whatever does not block is said loudly: nobody should find out from an order that went through.
        level = logging.INFO if self.switch.mode is Mode.ACTIVE else logging.WARNING
        log.log(level, what, extra={"fields": {"switch": self.switch.name, **fields}})

    # Storage

    async def _open_memory(self) -> None:
        storage = self.settings.storage
        while self.memory is None:
            try:
                self.memory = await DiskMemory.open(
                    Path(storage.dir),
                    switch=self.switch.name,
                    audit_max_bytes=storage.audit_max_bytes,
                    audit_retention=storage.audit_retention,
                    thread=self._thread,
                )
            except FolderLocked:
                raise
            except StorageError as error:
                self._storage_failed(str(error))
                await asyncio.sleep(STORAGE_RETRY_SECONDS)
        await self._restore(self.memory)

    async def _restore(self, memory: DiskMemory) -> None:
        try:
            loaded = await memory.load()
            audited = await memory.call(self._last_audited)
            start = choose_start(loaded, audited, self.clock.now(), self.policies)
        except CannotRestore as error:
            self._storage_failed(str(error))
            return
        recollection = self.recollection
        if recollection is None:
            self._take_start(start, memory)
        elif isinstance(loaded, Nothing) and start.state.state is State.ACTIVE:
            await self._recall(recollection, start, memory)
        else:
            # What is stored counts at once; a later answer can only tighten.
            recollection.checking = CHECKING
            self._take_start(start, memory)
            await recollection.check(start.state.epoch, self.refresh)

    async def _recall(self, recollection: Recollection, start: Start, memory: DiskMemory) -> None:
        self.storage_error = ASKING
        self._folder_is_ours.set()
        record = await recollection.recall(self._not_recalled)
        if record is None:
            self._take_start(start, memory)
            await recollection.catch_up()
        else:
            self._take_start(start_from_record(start, record, self.clock.now(), self.policies), memory)

    def _not_recalled(self, why: str) -> None:
        self._storage_failed(f"nothing is stored here, and Prometheus does not tell the last known state: {why}")

    def _take_start(self, start: Start, memory: DiskMemory) -> None:
        self.recoveries.lockouts = start.lockouts
        self.alerts.restore(start.alerts)
        # The state first: the waivers in it say which of the stored triggers may kill.
        self.keeper.attach(memory if self.switch.mode is not Mode.DISABLED else _AuditOnly(memory), start.state)
        self.evaluator.restore(start.triggers, start.asked)
        self.storage_error = None
        self._audit_restore(start, memory)
        self.refresh()
        self._folder_is_ours.set()

    def _last_audited(self) -> list[dict[str, Any]]:
        events = audit_log.read(
            Path(self.settings.storage.dir) / "audit", since=None, until=None, types=set(CHANGES), limit=200
        )
        return [event for event in events if event.get("to") is not None]

    def _audit_restore(self, start: Start, memory: DiskMemory) -> None:
        now = self.clock.now()
        if start.note:
            log.warning("state.restored", extra={"fields": {"note": start.note}})
        self.keeper.audit(
            audit_event(
                "state.restored",
                now,
                by="sidecar",
                reason=start.note or ("first start" if start.fresh else "restored from disk"),
                state=start.state.state.value,
                stage=start.state.stage.value,
                factor=start.state.factor,
                epoch=self.switch.state.epoch,
            )
        )
        if start.mode is not None and start.mode != self.switch.mode.value and start.mode == Mode.ACTIVE.value:
            change = {"switch.mode": [start.mode, self.switch.mode.value]}
            self.keeper.audit(audit_event("config.loosened", now, reason="mode changed at restart", changes=change))
            self.config_loosened += 1
            self.reloader.loosened = (now, f"switch.mode at this start: {start.mode} → {self.switch.mode.value}")
        opened = memory.opened
        if opened.torn is not None or opened.missing is not None:
            self.keeper.audit(
                audit_event("audit.repaired", now, by="sidecar", torn=str(opened.torn), missing=str(opened.missing))
            )

    def _storage_failed(self, error: str) -> None:
        if error != self.storage_error:
            log.error("storage.unusable", extra={"fields": {"error": error}})
        self.storage_error = error
        self.refresh()

    def _document(self, state: SwitchState, now: Instant) -> Document:
        timers = {
            name: document
            for name, trigger in self.evaluator.timers()
            if (document := trigger_document(trigger, now)) is not None
        }
        return {
            "switch": self.switch.name,
            "mode": self.switch.mode.value,
            **state_document(state, now),
            "timers": timers,
            "asked": asked_document(self.evaluator.asked()),
            "lockouts": lockouts_document(self.recoveries.lockouts, now),
            "alerts": self.alerts.book.state.document(now),
            "written": now.wall,
        }

    async def _watch_credentials(self) -> None:
        # With each request they are looked at anyhow; this is for the status, should nobody ask for anything.
        while True:
            await asyncio.sleep(CREDENTIALS_SECONDS)
            if self.operations is not None:
                await self.operations.refresh()

    async def _keep_house(self) -> None:
        while True:
            await asyncio.sleep(3600.0)
            if self.memory is not None:
                await self.memory.flush()
            await self._close_retired()

    # Rules

    def _load_rules(self) -> None:
        try:
            rules = load_rules(
                self.settings.rules.files,
                self.settings.rules.interval,
                self.environ,
                self.settings.scrape_names,
            )
            self.rules_error = None
        except (RuleFileError, SettingsError) as error:
            self.rules_error = str(error)
            self.reloader.failed(str(error))
            log.error("rules.unusable", extra={"fields": {"error": str(error)}})  # noqa: TRY400 - says it all
            rules = RuleSet()
        self.take_rules(rules)

    def take_rules(self, rules: RuleSet) -> None:
        """Evaluate these rules from now on."""
        self.sources.prepare(rules)
        self.evaluator.load(rules, opened=self.opened)
        self.alerts.load(rules)
        self.brake.load(rules)
        self.gate.set_admit(self.brake.admit if self.brake.counts and self.switch.mode is not Mode.DISABLED else None)
        if self.switch.mode is not Mode.DISABLED:
            self.evaluator.start()
        self.refresh()

    def take_sources(self, settings: Settings) -> None:
        """Ask these sources from now on."""
        if settings.prometheus != self.settings.prometheus:
            if self.prometheus is not None:
                self._retired.append(self.prometheus)
            self.prometheus = _build_prometheus(settings)
            self.evaluator.forget_newest()
        if settings.scrape != self.settings.scrape:
            self.scrapes = _build_scrapes(settings)
            self._scrapes_changed.set()
        self.sources.connect(self.prometheus, settings.prometheus.timeout, self.scrapes)
        self.evaluator.warnings_count = settings.prometheus.on_warnings == "inconclusive"
        self.settings = replace(
            self.settings, prometheus=settings.prometheus, scrape=settings.scrape, rules=settings.rules
        )

    def take_alertmanager(self, settings: Settings) -> None:
        """Take alerts that match this, from those who may send them, and send ours there, from now on."""
        webhook = settings.alertmanager.webhook
        self.notifier.connect(settings.alertmanager.notify.urls)
        self.alerts.configure(match=webhook.match, expires=webhook.expires, switch_labels=settings.switch.labels)
        self.webhook_access.configure(
            token_file=webhook.token_file, allow_unauthenticated=webhook.allow_unauthenticated
        )
        self.settings = replace(self.settings, alertmanager=settings.alertmanager)

    def take_limits(self, settings: Settings) -> None:
        """Let the gate decide by these limits; what a kill means waits until no kill is under way."""
        kept = self.switch.policies.gate
        policy = replace(settings.gate.policy, killed_policy=kept.killed_policy, lease_ms=kept.lease_ms)
        self._use(replace(self.switch.policies, gate=policy))
        self.settings = replace(
            self.settings,
            gate=replace(self.settings.gate, policy=policy),
            switch=replace(self.settings.switch, labels=settings.switch.labels),
            content_hash=settings.content_hash,
        )

    def take_recovery(self, settings: Settings) -> None:
        """Recover by these rules from now on; raise SettingsError where the approvers file cannot be used."""
        if settings.recovery.approvers_file != self.settings.recovery.approvers_file:
            self.recoveries.approvers = self._load_approvers(settings)
        gate = replace(self.switch.policies.gate, killed_policy=settings.gate.policy.killed_policy)
        self._use(Policies(recovery=settings.recovery.policy, gate=gate))
        self.recoveries.health = self._build_health(settings)
        self.settings = replace(
            self.settings, recovery=settings.recovery, gate=replace(self.settings.gate, policy=gate)
        )

    def _use(self, policies: Policies) -> None:
        self.switch.policies = policies
        self.keeper.publish()

    async def _scrape(self) -> None:
        while True:
            self._scrapes_changed.clear()
            running = [asyncio.create_task(one.run(), name=f"scrape {name}") for name, one in self.scrapes.items()]
            changed = asyncio.create_task(self._scrapes_changed.wait(), name="scrapes changed")
            try:
                done, _ = await asyncio.wait([*running, changed], return_when=asyncio.FIRST_COMPLETED)
                for task in done - {changed}:
                    raise InvariantViolation(f"{task.get_name()} ended: {_outcome(task)}")
            finally:
                await _cancel(*running)
                changed.cancel()

    # Readiness, staleness, heartbeat

    def not_ready(self) -> str | None:
        """What keeps the gate at `not_ready`; None if nothing does."""
        if self.storage_error is not None:
            return self._unrestored()
        if not self.opened and self.recollection is not None and self.recollection.checking is not None:
            return self.recollection.checking
        if self.rules_error is not None and not self.evaluator.rules.groups:
            return f"no rules are loaded: {self.rules_error}"
        if not self.evaluator.rules.rules:
            return f"no rules are loaded: {self._no_rules_text()}"
        if not self.opened and (unready := self.evaluator.unready()):
            return self._unready_text(unready)
        return None

    def _no_rules_text(self) -> str:
        patterns = list(self.settings.rules.files)
        files = self.evaluator.rules.files
        return f"no rule stands in {', '.join(files)}" if files else f"nothing matches rules.files {patterns}"

    def _unrestored(self) -> str | None:
        return None if self.storage_error is None else f"the stored state is not known: {self.storage_error}"

    def _unready_text(self, unready: list[str]) -> str:
        first = self.evaluator.triggers[unready[0]]
        why = first.message or "it has not been evaluated yet"
        more = f" (and {len(unready) - 1} more)" if len(unready) > 1 else ""
        return f"rule {unready[0]} has had no fresh reading since the start{more}: {why}"

    def refresh(self) -> None:
        """Look anew at what keeps the gate shut beside the state."""
        not_ready = self.not_ready()
        if not_ready is None and not self.opened:
            self.opened = True
            log.info("sidecar.ready", extra={"fields": {"switch": self.switch.name}})
        if (broken := self.evaluator.failed() or self.keeper.broken) is not None:
            self._degrade(broken)
        now = self.clock.now()
        stale = self.evaluator.stale(now)
        self._stale_since = None if stale is None else (self._stale_since or now.mono)
        self.recoveries.end_waivers()
        self.keeper.cover(
            Overlay(
                unrestored=self._unrestored(),
                not_ready=not_ready,
                stale=stale,
                internal_error=self.failure[1] if self.failure else None,
            )
        )

    def shut(self) -> str | None:
        """Everything beside the state that speaks against trading; None if nothing does."""
        broken = self.failure[1] if self.failure else None
        return broken or self.not_ready() or self.evaluator.stale(self.clock.now())

    async def _beat(self) -> None:
        loop = asyncio.get_running_loop()
        interval = self.settings.gate.lease / BEATS_PER_LEASE
        due = loop.time()
        while True:
            self.instruments.observe_lease_delay(max(0.0, loop.time() - due))
            self.refresh()
            self._renew()
            due = max(due + interval, loop.time())
            await asyncio.sleep(due - loop.time())

    def _renew(self) -> None:
        self.gate.renew(time.monotonic())
        if self.page is not None:
            self.page.beat(time.monotonic_ns())

    def _show(self, snapshot: Snapshot) -> None:
        self.gate.update(snapshot, self.switch.policies.gate)
        if self.page is not None:
            self.page.publish(
                state=snapshot.state.number,
                restriction=int(snapshot.gate_restriction),
                factor=snapshot.gate_factor,
                epoch=snapshot.epoch,
                now_ns=time.monotonic_ns(),
            )
        self.desk.changed()

    def _open_page(self) -> None:
        path = run_path(self.settings.gate.page, self.environ)
        try:
            self.page = StatePage.open(path, lease_ns=int(self.settings.gate.lease * 1e9))
        except OSError as error:
            self.page_error = f"the state page {path} cannot be used: {error}"
            log.error("page.unusable", extra={"fields": {"error": self.page_error}})  # noqa: TRY400 - says it all

    def _close_page(self) -> None:
        if self.page is not None:
            self.page.close()
            self.page = None

    def live(self) -> str | None:
        """Why the process should be restarted; None while it should not."""
        long_ago = self.clock.now().mono - DEGRADED_LIVENESS_SECONDS
        if self.failure is not None and self.failure[0] < long_ago:
            return self.failure[1]
        if self._stale_since is not None and self._stale_since < long_ago:
            return self.evaluator.stale(self.clock.now())
        return None

    def config_ready(self) -> str | None:
        """Why the sidecar is not up yet, whatever its state and its sources; None once it is."""
        if self.storage_error in (NOT_OPEN_YET, ASKING):
            return f"the last state is not known yet: {self.storage_error}"
        waiting = self.evaluator.never_evaluated()
        return f"groups not evaluated yet: {', '.join(waiting)}" if waiting else None


class _AuditOnly:
    """The memory of a disabled switch: it audits, and leaves the stored state as it is."""

    def __init__(self, memory: DiskMemory) -> None:
        self._memory = memory

    async def write(self, document: Document | None, events: "list[AuditEvent] | tuple[AuditEvent, ...] | Any") -> None:
        del document
        await self._memory.write(None, events)


def _build_prometheus(settings: Settings) -> PrometheusSource | None:
    wanted = settings.prometheus
    if not wanted.urls:
        return None
    return PrometheusSource(urls=wanted.urls, timeout=wanted.timeout, headers=wanted.headers, http=wanted.http)


def _build_scrapes(settings: Settings) -> dict[str, ScrapeSource]:
    return {
        target.name: ScrapeSource(name=target.name, url=target.url, interval=target.interval, timeout=target.timeout)
        for target in settings.scrape
    }


async def _run(start: Callable[[], Awaitable[None]]) -> None:
    await start()


async def _cancel(*tasks: "asyncio.Task[None]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _refuse_second(task: "asyncio.Task[Any]") -> None:
    if task.done() and not task.cancelled() and isinstance(task.exception(), FolderLocked):
        raise AnotherSidecar(str(task.exception()))


def _has_ended_well(task: "asyncio.Task[Any]") -> bool:
    ended = task.done() and not task.cancelled() and task.exception() is None
    return ended and task.get_name() == "storage"


def _outcome(task: "asyncio.Task[Any]") -> str:
    if task.cancelled():
        return "it was cancelled"
    error = task.exception()
    if error is None:
        return "it returned"
    log.error("sidecar.task_failed", exc_info=error, extra={"fields": {"task": task.get_name()}})
    return f"{type(error).__name__}: {error}"


def _text(address: tuple[str, int] | None) -> str:
    return "off" if address is None else f"{address[0]}:{address[1]}"
