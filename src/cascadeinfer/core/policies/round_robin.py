"""
Round robin: each new request goes to the next instance in order of id.

Inputs read: the set of instances. Edge cases: an instance that joins or leaves shifts the turn by at most one place.
Source: what nginx and most HTTP load balancers do by default.
"""

from collections.abc import Sequence
from typing import Final

from cascadeinfer.core.choice import Choice, Rule
from cascadeinfer.core.placing.dispatch import Chosen
from cascadeinfer.core.policies.info import PolicyInfo
from cascadeinfer.core.policies.placing import PlacingPolicy
from cascadeinfer.core.view import InstanceView, RequestView


class RoundRobin(PlacingPolicy):
    """Dispatches to the instances in turn."""

    def __init__(self) -> None:
        """Start before the first instance."""
        super().__init__()
        self._last_id = ""

    def choose(self, request: RequestView, candidates: Sequence[InstanceView]) -> Chosen:  # noqa: ARG002
        """The next instance by id after the one chosen last, wrapping around."""
        chosen = next((c for c in candidates if c.instance_id > self._last_id), candidates[0])
        self._last_id = chosen.instance_id
        return Chosen(chosen, Choice(Rule.TURN))


INFO: Final = PolicyInfo(make=RoundRobin, help="the next instance")
