"""
Prefill/decode disaggregation at a fixed ratio: what DistServe and Dynamo do.

Some instances compute prompts and nothing else, all others decode. Formula: a prompt goes to the prefill instance with
the shortest queue, in first come, first served order; with its first token the request is moved to the least loaded
decode instance with room, and stays there. The ratio is part of the layout and does not change; an experiment gives the
one that the planner predicts to be best, or another (`PolicyInfo.roles`). No length stages.

Inputs read: reports, corrected by what has been placed since. Edge cases: a request that may not move is computed where
it decodes, and so is one for which no prefill instance has room; while no decode instance is up and answers, prefill
instances decode, too. Sources: DistServe (arXiv 2401.09670, section 4.3: FCFS, shortest queue for prefill, least
loaded for decoding) and NVIDIA Dynamo's disaggregated serving (`docs/architecture/disagg_serving.md`). Dynamo computes
short prompts on the decode worker when its prefill queue is long; that is the threshold of `roles`, not this policy.
"""

from collections.abc import Sequence
from typing import Any, Final

from cascadeinfer.core.effects import Effect
from cascadeinfer.core.events import Event
from cascadeinfer.core.layout import RoleLayout
from cascadeinfer.core.placing.dispatch import Chosen, has_room, least_loaded, pick
from cascadeinfer.core.placing.pushing import PrefillStages
from cascadeinfer.core.policies.info import Circumstances, PolicyInfo, RoleSearch
from cascadeinfer.core.policies.placing import PlacingPolicy
from cascadeinfer.core.view import InstanceView, RequestView


class PdFixed(PlacingPolicy):
    """Prompts on some instances, decoding on the others."""

    def __init__(self, *, roles: RoleLayout | None = None) -> None:
        """
        Args:
            roles: Which instances compute prompts; all others decode. None: none does, and nothing is split.
        """
        super().__init__()
        self._prefill = PrefillStages(roles, self.view, self._target_for)

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        """See `Policy.handle`."""
        return self._prefill.handle(event, now_s, super().handle)

    def place_waiting(self, cause: str) -> list[Effect]:
        """Dispatch prompts to prefill instances, and the rest where it decodes."""
        return self._prefill.dispatches(cause) + super().place_waiting(cause)

    def choose(self, request: RequestView, candidates: Sequence[InstanceView]) -> Chosen:
        """The least loaded decode instance."""
        chosen = pick(candidates, request.tokens)
        assert chosen is not None  # there are candidates
        return chosen

    def _target_for(self, request: RequestView) -> Chosen | None:
        able = self.view.able(request, self.view.available())
        return least_loaded([instance for instance in able if has_room(instance, request.tokens)])


def _options_for(around: Circumstances) -> dict[str, Any]:
    return {} if around.roles is None else {"roles": around.roles}


INFO: Final = PolicyInfo(
    make=PdFixed,
    help="prompts on instances of their own, in a fixed ratio",
    roles=RoleSearch.SPLIT,
    options_for=_options_for,
)
