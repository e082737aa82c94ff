"""
Scheduling policies behind one protocol, one file each.

`POLICIES` maps each name on the command line to the policy's description of itself (`info.py`). A constructor takes
keyword options only. All have defaults except the layout of `static_stages`; `docs/policies.md` lists them. Nothing
outside this package asks which policy runs.
"""

from typing import Final

from cascadeinfer.core.policies import (
    bucket,
    cascade,
    least_loaded,
    llumnix,
    pd_fixed,
    power_of_two,
    prefix_aware,
    roles,
    round_robin,
    static_length,
    static_stages,
    vllm_dp,
)
from cascadeinfer.core.policies.info import PolicyInfo

POLICIES: Final[dict[str, PolicyInfo]] = {
    "bucket": bucket.INFO,
    "cascade": cascade.INFO,
    "least_loaded": least_loaded.INFO,
    "llumnix": llumnix.INFO,
    "pd_fixed": pd_fixed.INFO,
    "power_of_two": power_of_two.INFO,
    "prefix_aware": prefix_aware.INFO,
    "roles": roles.INFO,
    "round_robin": round_robin.INFO,
    "static_length": static_length.INFO,
    "static_stages": static_stages.INFO,
    "vllm_dp": vllm_dp.INFO,
}

__all__ = ["POLICIES"]
