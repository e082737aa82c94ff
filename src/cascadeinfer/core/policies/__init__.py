"""
Policies under one protocol, one file each.

`POLICIES` maps the name on the command line to a class whose constructor takes keyword options only. Nothing outside this
package asks which policy runs.
"""

from collections.abc import Callable

from cascadeinfer.core.policies.cascade import Cascade
from cascadeinfer.core.policies.least_loaded import LeastLoaded
from cascadeinfer.core.policies.round_robin import RoundRobin
from cascadeinfer.core.policies.static_stages import StaticStages
from cascadeinfer.core.policy import Policy

POLICIES: dict[str, Callable[..., Policy]] = {
    "cascade": Cascade,
    "least_loaded": LeastLoaded,
    "round_robin": RoundRobin,
    "static_stages": StaticStages,
}

__all__ = ["POLICIES"]
