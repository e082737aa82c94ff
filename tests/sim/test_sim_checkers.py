"""The invariant checkers find the faults they are meant to find."""

from collections.abc import Callable

import numpy as np
import pytest
from sim_builders import policy_named, random_trace, tight

from cascadeinfer.sim.checkers import Checker
from cascadeinfer.sim.cluster import SimCluster
from cascadeinfer.sim.requests import Phase, SimRequest


def halfway() -> tuple[SimCluster, Checker]:
    """A run stopped midway with requests in every phase, all checks passed so far."""
    trace = random_trace(np.random.default_rng(5), 60, 200.0)
    cluster = SimCluster(trace, policy_named("least_loaded", 3), tight())
    checker = Checker()
    while sum(request.phase is Phase.FINISHED for request in cluster.requests) < 10:
        assert cluster.step()
        checker.check(cluster)
    return cluster, checker


def one(cluster: SimCluster, phase: Phase) -> SimRequest:
    """Some request in this phase."""
    return next(request for request in cluster.requests if request.phase is phase)


def repeat_token(cluster: SimCluster) -> None:
    """A request gets a token that no step produced."""
    one(cluster, Phase.WAITING).produced += 1


def lose_tokens(cluster: SimCluster) -> None:
    """A request loses its tokens."""
    one(cluster, Phase.FINISHED).produced -= 1


def leak_block(cluster: SimCluster) -> None:
    """A block belongs to no request."""
    next(iter(cluster.fleet.instances.values())).scheduler.kv.plain_free -= 1


def be_twice(cluster: SimCluster) -> None:
    """A request is queued on a second instance."""
    request = one(cluster, Phase.DECODE)
    other = next(i for i in cluster.fleet.instances.values() if i.instance_id != request.instance_id)
    other.scheduler.waiting.append((9, 9, request))


def vanish(cluster: SimCluster) -> None:
    """A request is in no queue."""
    request = one(cluster, Phase.WAITING)
    scheduler = cluster.fleet.instances[str(request.instance_id)].scheduler
    scheduler.waiting = [entry for entry in scheduler.waiting if entry[2] is not request]


@pytest.mark.parametrize("tamper", [repeat_token, lose_tokens, leak_block, be_twice, vanish])
def test_a_fault_in_the_books_is_found(tamper: Callable[[SimCluster], None]) -> None:
    """Each kind of corruption raises at the next check."""
    cluster, checker = halfway()
    checker.check(cluster)
    tamper(cluster)
    with pytest.raises(AssertionError):
        checker.check(cluster)
