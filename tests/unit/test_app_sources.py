import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from sidecar.app.sources import RuleSources
from sidecar.rules.model import Connectivity, Group, Operator, OrderRate, Rule, RuleSet, Threshold
from sidecar.rules.readings import Answer, Failure, Series

FINE = Answer(series=(Series(value=1.0),), evaluated_at=0.0, oldest_sample=0.0)
DOWN = Failure(reason="unreachable", message="refused", unreachable=True)
BAD = Failure(reason="query_error", message="bad", unreachable=False)


class FakePrometheus:
    def __init__(self) -> None:
        self.up = True
        self.answer: Answer | Failure = FINE
        self.asked: list[list[str]] = []

    async def query(
        self, queries: Sequence[Any], arrived: Callable[[str, Any], None] | None = None
    ) -> dict[str, Answer | Failure]:
        self.asked.append([query.text for query in queries])
        for query in queries:
            if arrived is not None:
                arrived(query.key, self.answer)
        return {query.key: self.answer for query in queries}


class FakeScrape:
    up = False
    tried = True
    answer: Answer | Failure = DOWN

    def query(self, query: Any) -> Answer | Failure:
        return self.answer


def threshold(name: str, query: str = "up", **changes: Any) -> Rule:
    condition = Threshold(query=query, operator=Operator.LT, threshold=1.0)
    return Rule(trigger=name, group="g", condition=condition, **changes)


def venue(name: str = "venue") -> Rule:
    return Rule(trigger=name, group="g", condition=Connectivity(tcp="v:1"))


class World:
    def __init__(self, *rules: Rule, prometheus: FakePrometheus | None = None, **probes: Any) -> None:
        self.sources = RuleSources(
            prometheus=prometheus,  # type: ignore[arg-type]
            prometheus_timeout=2.0,
            scrapes={"trader": FakeScrape()},  # type: ignore[dict-item]
            probes=probes,
        )
        self.rules = rules
        self.sources.prepare(self.set(*rules))
        self.received: list[tuple[str, Answer | Failure]] = []

    @staticmethod
    def set(*rules: Rule) -> RuleSet:
        return RuleSet(groups=(Group(name="g", interval=1.0, rules=rules),))

    async def ask(self) -> None:
        await self.sources.ask(self.rules, lambda rule, answer: self.received.append((rule.trigger, answer)))


async def test_rules_of_one_group_are_asked_in_one_call() -> None:
    prometheus = FakePrometheus()
    world = World(threshold("a", "one"), threshold("b", "two"), prometheus=prometheus)
    await world.ask()
    assert prometheus.asked == [["one", "two"]]
    assert world.received == [("a", FINE), ("b", FINE)]


async def test_without_a_server_every_rule_hears_that_it_is_unreachable() -> None:
    world = World(threshold("a"))
    await world.ask()
    ((_, answer),) = world.received
    assert isinstance(answer, Failure)
    assert answer.unreachable
    assert await world.sources.ask_queries(["up"]) == [answer]
    assert world.sources.states() == [("scrape:trader", None, "")]


async def test_a_scraped_source_answers_from_what_it_has_and_an_unknown_one_is_unreachable() -> None:
    world = World(threshold("a", source="scrape:trader"), threshold("b", source="scrape:gone"))
    await world.ask()
    assert world.received[0] == ("a", DOWN)
    assert "there is no scrape source 'gone'" in getattr(world.received[1][1], "message", "")


async def test_a_source_is_noted_down_by_what_it_says_and_up_again_by_its_next_answer() -> None:
    prometheus = FakePrometheus()
    world = World(threshold("a"), threshold("b", shadow=True, source="scrape:trader"), prometheus=prometheus)
    prometheus.answer, prometheus.up = DOWN, False
    await world.ask()
    assert world.sources.states()[0] == ("prometheus", False, "refused")
    assert world.sources.states_of_used() == [("prometheus", False, "refused")]
    prometheus.answer, prometheus.up = BAD, True
    await world.ask()
    assert world.sources.states()[0] == ("prometheus", True, "")


@pytest.mark.parametrize("reason", ["http_error", "bad_response"])
async def test_a_server_that_gives_no_answer_of_the_query_api_is_down_for_what_it_said(reason: str) -> None:
    prometheus = FakePrometheus()
    world = World(threshold("a"), prometheus=prometheus)
    prometheus.answer, prometheus.up = Failure(reason=reason, message="HTTP 500", unreachable=False), False
    await world.ask()
    assert world.sources.states()[0] == ("prometheus", False, "HTTP 500")


async def test_an_endpoint_that_exports_nothing_usable_is_down_for_what_it_said() -> None:
    world = World(threshold("a", source="scrape:trader"))
    world.sources._scrapes["trader"].answer = Failure(reason="too_large", message="16 MiB", unreachable=False)  # type: ignore[index, attr-defined]
    await world.ask()
    assert world.sources.states() == [("scrape:trader", False, "16 MiB")]


async def test_an_endpoint_that_was_not_scraped_yet_gives_no_answer_and_is_not_down(
    caplog: pytest.LogCaptureFixture,
) -> None:
    scrape = FakeScrape()
    scrape.tried = False
    world = World(threshold("a", source="scrape:trader"))
    world.sources._scrapes = {"trader": scrape}  # type: ignore[dict-item]
    await world.ask()
    assert world.received == [("a", DOWN)]
    assert world.sources.states() == [("scrape:trader", None, "")]
    assert "source.down" not in caplog.messages
    scrape.tried = True
    await world.ask()
    assert world.sources.states() == [("scrape:trader", False, "refused")]


async def test_a_source_that_no_rule_asks_is_neither_up_nor_down() -> None:
    prometheus = FakePrometheus()
    prometheus.up = False
    world = World(threshold("a"), prometheus=prometheus)
    assert world.sources.states()[0] == ("prometheus", None, "")
    prometheus.answer = DOWN
    await world.ask()
    assert world.sources.states()[0] == ("prometheus", False, "refused")
    world.sources.prepare(World.set(venue()))  # a reload took the rule away: nobody will hear that it is back
    assert world.sources.states()[0] == ("prometheus", None, "")


async def test_a_probe_that_hangs_delays_no_other_rule_and_is_not_started_again() -> None:
    free, began = asyncio.Event(), 0

    async def probe(rule: Rule) -> Answer | Failure:
        nonlocal began
        began += 1
        await free.wait()
        return FINE

    world = World(venue(), threshold("a"), prometheus=FakePrometheus(), connectivity=probe)
    await world.ask()
    await world.ask()
    await asyncio.sleep(0)
    assert [name for name, _ in world.received] == ["a", "a"]
    assert began == 1
    free.set()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert world.received[-1] == ("venue", FINE)
    await world.ask()
    await asyncio.sleep(0)
    assert began == 2
    await world.sources.close()


async def test_a_defect_in_a_probe_is_not_passed_over() -> None:
    async def probe(rule: Rule) -> Answer | Failure:
        raise RuntimeError("defect")

    world = World(venue(), connectivity=probe)
    await world.ask()
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="defect"):
        await world.ask()


async def test_a_probe_of_a_rule_that_changed_or_went_is_given_up() -> None:
    ended: list[Rule] = []

    async def probe(rule: Rule) -> Answer | Failure:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(rule)
        return FINE

    old, new = venue(), venue()
    world = World(old, connectivity=probe)
    await world.ask()
    await asyncio.sleep(0)
    world.rules = (new,)
    await world.ask()
    await asyncio.sleep(0)
    assert len(ended) == 1
    world.sources.prepare(world.set(threshold("a")))
    await asyncio.sleep(0)
    assert len(ended) == 2


async def test_a_rule_that_nothing_answers_hears_that() -> None:
    world = World(Rule(trigger="r", group="g", condition=OrderRate()))
    await world.ask()
    await asyncio.sleep(0)
    ((_, answer),) = world.received
    assert "nothing here answers rules of type order_rate" in getattr(answer, "message", "")


async def test_free_queries_come_back_in_order_and_an_invalid_one_is_a_failure_of_its_own() -> None:
    world = World(prometheus=FakePrometheus())
    first, second, third = await world.sources.ask_queries(["up", "sum(", "down"])
    assert (first, third) == (FINE, FINE)
    assert isinstance(second, Failure)
    assert second.reason == "query_error"


async def test_disabled_rules_are_neither_parsed_nor_counted_as_using_a_source() -> None:
    world = World(threshold("a", enabled=False), prometheus=FakePrometheus())
    assert world.sources.used == frozenset()
