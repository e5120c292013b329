"""Finds the source of each rule and asks it: Prometheus for many rules at once, a scraped endpoint, a probe.

Parses a rule's query once, when the rule is loaded. Answers are handed on as they arrive, so no rule waits for another.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence

from sidecar.adapters.prometheus import PrometheusSource, Query
from sidecar.adapters.scrape import ScrapeSource
from sidecar.rules.model import Rule, RuleSet
from sidecar.rules.readings import Answer, Failure
from sidecar.settings.promql import ParsedQuery, PromQLError, ScrapeQuery, parse, parse_selector

log = logging.getLogger("sidecar.sources")

PROMETHEUS = "prometheus"
NOT_CONFIGURED = Failure(reason="unreachable", message="prometheus.urls is empty", unreachable=True)

_NO_ANSWER = frozenset({"http_error", "bad_response"})
"""Reasons of a failure that lie in the server, though it can be reached."""

State = tuple[str, bool | None, str]
"""Name of a source; whether it gave a usable answer last time, None while no rule asks it; and what is wrong."""

Receive = Callable[[Rule, Answer | Failure], None]
Probe = Callable[[Rule], Awaitable[Answer | Failure]]


class RuleSources:
    """Answers rules.

    Args:
        prometheus: the server; None where none is configured.
        prometheus_timeout: seconds that one ask of it may take in all.
        scrapes: scraped endpoints by name.
        probes: what answers rules that have no query, by rule type.
    """

    def __init__(
        self,
        *,
        prometheus: PrometheusSource | None,
        prometheus_timeout: float,
        scrapes: Mapping[str, ScrapeSource],
        probes: Mapping[str, Probe],
    ) -> None:
        self._probes = probes
        self.connect(prometheus, prometheus_timeout, scrapes)
        self._parsed: dict[str, ParsedQuery] = {}
        self._selected: dict[str, ScrapeQuery] = {}
        self._probing: dict[str, tuple[Rule, asyncio.Task[None]]] = {}
        self.errors: dict[str, str] = {}
        self.used: frozenset[str] = frozenset()

    def connect(
        self, prometheus: PrometheusSource | None, prometheus_timeout: float, scrapes: Mapping[str, ScrapeSource]
    ) -> None:
        """Ask these sources from now on."""
        self._prometheus = prometheus
        self._prometheus_timeout = prometheus_timeout
        self._scrapes = scrapes

    @property
    def timeout(self) -> float:
        """Seconds after which an ask has surely ended."""
        return self._prometheus_timeout

    def prepare(self, rules: RuleSet) -> None:
        """Parse the queries of a rule set; what is no longer needed is forgotten."""
        asked = [rule for rule in rules.rules if rule.query is not None and rule.enabled]
        self._parsed = {rule.query: parse(rule.query) for rule in asked if rule.query and rule.source == PROMETHEUS}
        self._selected = {
            rule.query: parse_selector(rule.query) for rule in asked if rule.query and rule.source != PROMETHEUS
        }
        self.used = frozenset(rule.source for rule in asked if rule.enforcing)
        # Of a source that nobody asks any more, nobody would hear that it is back.
        sources = {rule.source for rule in asked}
        self.errors = {name: error for name, error in self.errors.items() if name in sources}
        names = {rule.trigger for rule in rules.rules if rule.enabled}
        for name in self._probing.keys() - names:
            self._probing.pop(name)[1].cancel()

    def states(self) -> list[State]:
        """How every configured source is doing."""
        found = [self._state(f"scrape:{name}", up=scrape.up) for name, scrape in self._scrapes.items()]
        if self._prometheus is not None:
            found.insert(0, self._state(PROMETHEUS, up=self._prometheus.up))
        return found

    def _state(self, name: str, *, up: bool) -> State:
        error = self.errors.get(name, "")
        # One that is down has an error as soon as a rule has asked it.
        return name, up or (False if error else None), error

    def states_of_used(self) -> list[State]:
        """The same for sources that an enforcing rule asks."""
        return [state for state in self.states() if state[0] in self.used]

    async def ask(self, rules: Sequence[Rule], receive: Receive) -> None:
        """Ask for all rules at once and hand on each answer as it arrives.

        Returns when all queries have been answered. A probe may take longer than that: a venue that hangs must not
        hold up the drawdown next to it. One whose probe is still under way is not probed again.
        """
        queried = [rule for rule in rules if rule.query is not None and rule.source == PROMETHEUS]
        for rule in rules:
            if rule.query is None:
                self._start_probe(rule, receive)
            elif rule.source != PROMETHEUS:
                receive(rule, self._ask_scrape(rule))
        if queried:
            await self._ask_prometheus(queried, receive)
        else:
            await asyncio.sleep(0)  # lets probes that need not wait answer within this very turn

    def _ask_scrape(self, rule: Rule) -> Answer | Failure:
        name = rule.source.partition(":")[2]
        scrape = self._scrapes.get(name)
        if scrape is None:
            return Failure(reason="unreachable", message=f"there is no scrape source {name!r}", unreachable=True)
        answer = scrape.query(self._selected[rule.query or ""])
        if scrape.tried:
            self._note(rule.source, answer)
        return answer

    def _start_probe(self, rule: Rule, receive: Receive) -> None:
        probed, task = self._probing.get(rule.trigger, (None, None))
        if task is not None and task.done():
            del self._probing[rule.trigger]
            task.result()  # a defect in a probe, or in what was made of its answer, is not to be passed over
        elif task is not None and probed is rule:
            return
        elif task is not None:
            task.cancel()  # the rule has changed since
        probing = asyncio.create_task(self._ask_probe(rule, receive), name=f"probe {rule.trigger}")
        self._probing[rule.trigger] = rule, probing

    async def _ask_probe(self, rule: Rule, receive: Receive) -> None:
        probe = self._probes.get(rule.kind)
        if probe is None:
            message = f"nothing here answers rules of type {rule.kind}"
            receive(rule, Failure(reason="query_error", message=message, unreachable=False))
        else:
            receive(rule, await probe(rule))

    async def close(self) -> None:
        """End the probes that are under way."""
        tasks = [task for _, task in self._probing.values()]
        self._probing = {}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask_prometheus(self, rules: Sequence[Rule], receive: Receive) -> None:
        if self._prometheus is None:
            for rule in rules:
                receive(rule, NOT_CONFIGURED)
            return
        by_name = {rule.trigger: rule for rule in rules}

        def arrived(key: str, outcome: Answer | Failure) -> None:
            self._note(PROMETHEUS, outcome)
            receive(by_name[key], outcome)

        await self._prometheus.query([self._query(rule) for rule in rules], arrived)

    def _query(self, rule: Rule) -> Query:
        parsed = self._parsed[rule.query or ""]
        return Query(key=rule.trigger, text=parsed.text, kind=parsed.kind, selectors=parsed.selectors)

    def _note(self, source: str, outcome: Answer | Failure) -> None:
        if isinstance(outcome, Failure) and _is_down(source, outcome):
            if source not in self.errors:
                log.warning("source.down", extra={"fields": {"source": source, "error": outcome.message}})
            self.errors[source] = outcome.message
        elif self.errors.pop(source, None) is not None:
            log.info("source.up", extra={"fields": {"source": source}})

    async def ask_queries(self, queries: Sequence[str]) -> list[Answer | Failure]:
        """Ask Prometheus free queries, in order; an invalid one is a failure like any other."""
        if self._prometheus is None:
            return [NOT_CONFIGURED for _ in queries]
        outcomes: dict[str, Answer | Failure] = {}
        asked = []
        for index, text in enumerate(queries):
            try:
                parsed = parse(text)
            except PromQLError as error:
                outcomes[str(index)] = Failure(reason="query_error", message=str(error), unreachable=False)
            else:
                asked.append(Query(key=str(index), text=parsed.text, kind=parsed.kind, selectors=parsed.selectors))
        outcomes |= await self._prometheus.query(asked)
        return [outcomes[str(index)] for index in range(len(queries))]


def _is_down(source: str, failure: Failure) -> bool:
    # What Prometheus says about a query is an answer. An endpoint is asked none: whatever it does wrong is its own.
    return failure.unreachable or failure.reason in _NO_ANSWER or source != PROMETHEUS
