"""
Policies under one protocol, one file each.

`POLICIES` maps the name on the command line to a class whose constructor takes keyword options only, all with defaults but
`static_stages`' layout; `docs/policies.md` lists them. Nothing outside this package asks which policy runs.
"""

from collections.abc import Callable

from cascadeinfer.core.policies.cascade import Cascade
from cascadeinfer.core.policies.least_loaded import LeastLoaded
from cascadeinfer.core.policies.llumnix import Llumnix
from cascadeinfer.core.policies.prefix_aware import PrefixAware
from cascadeinfer.core.policies.round_robin import RoundRobin
from cascadeinfer.core.policies.static_length import StaticLength
from cascadeinfer.core.policies.static_stages import StaticStages
from cascadeinfer.core.policies.vllm_dp import VllmDp
from cascadeinfer.core.policy import Policy

POLICIES: dict[str, Callable[..., Policy]] = {
    "cascade": Cascade,
    "least_loaded": LeastLoaded,
    "llumnix": Llumnix,
    "prefix_aware": PrefixAware,
    "round_robin": RoundRobin,
    "static_length": StaticLength,
    "static_stages": StaticStages,
    "vllm_dp": VllmDp,
}

__all__ = ["POLICIES"]
