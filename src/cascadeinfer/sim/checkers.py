"""
Invariants that hold after every event, whatever the faults; checked by tests and on request, not in production runs.

- A request is in exactly one place: with the policy, on one instance, between two instances in a migration, or over.
- Tokens come exactly once and in order: lengths only grow, never beyond the output, and the tokens that instances
  handed out are those that requests have.
- Blocks are conserved: what requests, pins, reservations and caches hold adds up to what the instance has.
"""

from collections import Counter

from cascadeinfer.core.types import RequestId
from cascadeinfer.sim.cluster import SimCluster
from cascadeinfer.sim.instance import SimInstance
from cascadeinfer.sim.requests import OVER, Phase, SimRequest


class Checker:
    """Checks a cluster; keeps what it must remember between two checks."""

    def __init__(self) -> None:
        self._produced: dict[RequestId, int] = {}

    def check(self, cluster: SimCluster) -> None:
        """
        Check everything.

        Raises:
            AssertionError: An invariant is violated; the simulator has a bug.
        """
        self._check_places(cluster)
        self._check_tokens(cluster)
        for instance in cluster.fleet.instances.values():
            _check_blocks(instance)

    def _check_places(self, cluster: SimCluster) -> None:
        here: Counter[RequestId] = Counter()
        for instance in cluster.fleet.instances.values():
            for request in instance.scheduler.requests():
                here[request.request_id] += 1
                assert request.instance_id == instance.instance_id, f"{request} is on {instance.instance_id}"
        for request in cluster.requests:
            places = here[request.request_id]
            over = request.phase in OVER
            assert over != (request.request_id in cluster.live), f"{request} is both over and live, or neither"
            if over or request.phase is Phase.UNPLACED:
                assert places == 0, f"{request} is on {places} instances"
                assert request.instance_id is None, f"{request} is over or unplaced but somewhere"
            elif request.instance_id in cluster.fleet.instances:
                assert places == 1, f"{request} is on {places} instances"
            else:
                assert cluster.migrator.move_of(request) is not None, f"{request} is lost"
        assert sum(here.values()) <= len(cluster.live), "an instance has a request that is over"

    def _check_tokens(self, cluster: SimCluster) -> None:
        total = 0
        for request in cluster.requests:
            produced = _produced(cluster, request)
            before = self._produced.get(request.request_id, 0)
            assert before <= produced <= request.output_tokens, f"{request}: {before}, now {produced} tokens"
            if request.phase is Phase.FINISHED:
                assert produced == request.output_tokens, f"{request} finished early"
            self._produced[request.request_id] = produced
            total += produced
        handed_out = cluster.fleet.tokens_of_the_lost
        handed_out += sum(instance.scheduler.tokens_out for instance in cluster.fleet.instances.values())
        assert total == handed_out, f"instances handed out {handed_out} tokens, requests have {total}"


def _produced(cluster: SimCluster, request: SimRequest) -> int:
    if request.phase is Phase.DECODE and request.instance_id is not None:
        batch = cluster.fleet.instances[request.instance_id].scheduler.batch
        return batch.length_of(request) - request.prompt_tokens
    return request.produced


def _check_blocks(instance: SimInstance) -> None:
    scheduler = instance.scheduler
    kv = scheduler.kv
    # A step in flight holds the blocks for its tokens, even where a crash froze it.
    in_flight = not instance.idle or not instance.alive
    private = sum(scheduler.reserved.values())
    users: Counter[int] = Counter()
    for blocks, units in scheduler.pinned.values():
        private += blocks - len(units) * kv.blocks_per_unit
        users.update(units)
    for request in scheduler.requests():
        if request.phase is Phase.DECODE:
            length = scheduler.batch.length_of(request)
            blocks = scheduler.capacity.blocks_for(length if in_flight else length - 1)
        else:
            blocks = request.blocks
        private += blocks - len(request.units) * kv.blocks_per_unit
        users.update(request.units)
    assert users == Counter(kv.used_by), f"{instance.instance_id}: users of shared units do not add up"
    held = private + (len(kv.used_by) + len(kv.cached)) * kv.blocks_per_unit
    assert held + kv.plain_free == kv.blocks, (
        f"{instance.instance_id}: {held} blocks held and {kv.plain_free} free of {kv.blocks}"
    )
    assert kv.plain_free >= 0, f"{instance.instance_id}: more blocks taken than there are"
    assert scheduler.slots_taken() <= scheduler.capacity.max_num_seqs, f"{instance.instance_id}: too many run"
