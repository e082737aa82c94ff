"""
vLLM's own data-parallel balancer.

Formula: score = max(clients * in flight, waiting + running) + waiting * 6 * max(0, KV use - 0.5); the lowest score
wins. `in flight` is the exact number of unfinished requests that this client sent to the engine. `waiting`, `running`
and KV use are the engine's last statistics; `waiting` grows by `clients` with each request sent until the next
statistics arrive. The scan starts one engine further with every request, so equal scores take turns.

Inputs read: reports (vLLM's coordinator publishes every 100 ms if something changed), own dispatches and finishes.

Edge cases: an engine that has not reported counts as empty; a draining engine, a notion vLLM does not have, is not in
the list. No migration. Source: vLLM 0.32, `vllm/v1/engine/core_client.py`,
`DPLBAsyncMPClient.get_core_engine_for_request`.
"""

from collections.abc import Sequence
from typing import Any, Final

from cascadeinfer.core.choice import Measure
from cascadeinfer.core.effects import Effect
from cascadeinfer.core.events import Event, InstanceJoined, InstanceLost, InstanceReported
from cascadeinfer.core.placing.dispatch import Chosen, first_of, ranked
from cascadeinfer.core.policies.info import Circumstances, PolicyInfo
from cascadeinfer.core.policies.placing import PlacingPolicy
from cascadeinfer.core.types import InstanceId
from cascadeinfer.core.view import InstanceView, RequestView


class VllmDp(PlacingPolicy):
    """Dispatches to the engine with the lowest score."""

    def __init__(self, *, clients: int = 1) -> None:
        """
        Args:
            clients: Number of API server processes, each of which sees only its own requests; vLLM's `client_count`.
        """
        super().__init__()
        self._clients = clients
        self._turn = 0
        self._waiting: dict[InstanceId, int] = {}
        self._running: dict[InstanceId, int] = {}
        self._kv_use: dict[InstanceId, float] = {}

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        """See `Policy.handle`."""
        if isinstance(event, InstanceReported) and (instance := self.view.instances.get(event.instance_id)) is not None:
            report = event.report
            self._waiting[event.instance_id] = report.n_waiting
            self._running[event.instance_id] = report.n_running
            self._kv_use[event.instance_id] = report.kv_blocks_used / instance.capacity.kv_blocks
        elif isinstance(event, InstanceJoined | InstanceLost):
            for statistics in (self._waiting, self._running, self._kv_use):
                statistics.pop(event.instance_id, None)
        return super().handle(event, now_s)

    def choose(self, request: RequestView, candidates: Sequence[InstanceView]) -> Chosen:  # noqa: ARG002
        """The engine with the lowest score, scanning from this request's turn."""
        n = len(candidates)
        start = self._turn % n
        in_turn = [candidates[(start + place) % n] for place in range(n)]
        chosen = first_of(ranked(Measure.VLLM_SCORE, self._score, in_turn), Measure.VLLM_SCORE, self._score)
        assert chosen is not None  # candidates is not empty
        chosen_id = chosen.instance.instance_id
        self._waiting[chosen_id] = self._waiting.get(chosen_id, 0) + self._clients
        self._turn = (self._turn + 1) % n
        return chosen

    def _score(self, instance: InstanceView) -> float:
        waiting = self._waiting.get(instance.instance_id, 0)
        queued = waiting + self._running.get(instance.instance_id, 0)
        score = float(max(self._clients * len(instance.request_ids), queued))
        if waiting:
            score += waiting * 6.0 * max(0.0, self._kv_use.get(instance.instance_id, 0.0) - 0.5)
        return score


def _options_for(around: Circumstances) -> dict[str, Any]:
    return {"clients": around.front_ends}


INFO: Final = PolicyInfo(
    make=VllmDp, help="vLLM's own score of requests in flight, waiting, running and KV use", options_for=_options_for
)
