"""Two nodes: moves stay inside one when loads are alike, leave it when they are not, and one node changes nothing."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from sim_builders import MODEL, config

from cascadeinfer.core.effects import Effect, StartMigration
from cascadeinfer.core.events import Event, InstanceJoined, MigrationEnded, MigrationOutcome
from cascadeinfer.core.layout import StageLayout
from cascadeinfer.core.policies.cascade import Cascade
from cascadeinfer.sim.run import SimResult, simulate
from cascadeinfer.sim.settings import NetworkConfig, instance_ids
from cascadeinfer.workload.trace import Trace

IDS = instance_ids(8)
NODES = {instance_id: "ab"[number % 2] for number, instance_id in enumerate(IDS)}
LAYOUT = StageLayout.from_boundaries((1000,), (IDS[:4], IDS[4:]))
FAST, SLOW = 50e9, 0.5e9

Log = list[tuple[float, Event, Sequence[Effect]]]


def trace(seed: int = 1, n: int = 600, rate_rps: float = 12.0) -> Trace:
    """Requests of which most outgrow the first stage."""
    rng = np.random.default_rng(seed)
    arrivals_s = np.cumsum(rng.exponential(1.0 / rate_rps, n))
    return Trace.from_columns(rng.integers(300, 900, n), rng.integers(200, 900, n), arrivals_s)


def a_policy() -> Cascade:
    """With fixed stages and prices in seconds."""
    return Cascade(layout=LAYOUT, step_model=MODEL, refine=False, replan=False)


def run(nodes: dict[str, str], between: float, policy: Cascade | None = None) -> tuple[SimResult, Log]:
    """Eight instances on these nodes, with links of this rate between them."""
    network = NetworkConfig(link_bytes_per_s=FAST, nodes=nodes, between_nodes_bytes_per_s=between)
    log: Log = []
    result = simulate(
        trace(),
        policy or a_policy(),
        config(instances=8, network=network),
        observer=lambda now_s, event, effects: log.append((now_s, event, list(effects))),
    )
    return result, log


def share_inside(log: Log) -> float:
    """Of the moves that were started, those within a node."""
    started = [effect for _, _, effects in log for effect in effects if isinstance(effect, StartMigration)]
    inside = Counter(NODES[move.source_id] == NODES[move.target_id] for move in started)
    assert inside[True] + inside[False] > 300
    return inside[True] / (inside[True] + inside[False])


@pytest.fixture(scope="module")
def far() -> tuple[SimResult, Log]:
    """Two nodes with slow links between them."""
    return run(NODES, SLOW)


def test_moves_stay_inside_a_node_and_load_still_wins(far: tuple[SimResult, Log]) -> None:
    """Clearly more moves than by chance stay inside when the way out is slow; many leave all the same."""
    blind = a_policy()
    blind.view.links.pulled = lambda *_: None  # type: ignore[method-assign]
    by_chance = share_inside(run(NODES, SLOW, blind)[1])
    informed = share_inside(far[1])
    assert informed > by_chance + 0.08
    assert informed < 0.95


def test_what_pulls_tell_of_links(far: tuple[SimResult, Log]) -> None:
    """Events say where instances are and what each pull took, so a replay of them decides the same."""
    events = [event for _, event, _ in far[1]]
    assert {e.instance_id: e.node for e in events if isinstance(e, InstanceJoined)} == NODES
    ended = [event for event in events if isinstance(event, MigrationEnded)]
    assert all((e.pulled_tokens > 0) == (e.outcome is MigrationOutcome.MOVED) for e in ended)
    again = a_policy()
    for now_s, event, effects in far[1]:
        assert again.handle(event, now_s) == effects
    rates = {(link.source, link.target): link for link in again.view.links.known()}
    assert len(rates) == 4
    assert {ends for ends, link in rates.items() if link.is_far} == {("a", "b"), ("b", "a")}


@pytest.mark.parametrize("nodes", [dict.fromkeys(IDS, "here"), NODES], ids=["one node", "two nodes, equal links"])
def test_without_distances_nothing_changes(nodes: dict[str, str]) -> None:
    """On one node, and on two whose links are alike, every effect is what it is where nodes are not known."""
    _, unknown = run({}, FAST)
    _, known = run(nodes, FAST)
    assert [(at_s, effects) for at_s, _, effects in known] == [(at_s, effects) for at_s, _, effects in unknown]
    plain = [_without_places(event) for _, event, _ in known]
    assert plain == [event for _, event, _ in unknown]


def _without_places(event: Event) -> Event:
    if isinstance(event, InstanceJoined):
        return replace(event, node="")
    return replace(event, pulled_tokens=0, pull_s=0.0) if isinstance(event, MigrationEnded) else event
