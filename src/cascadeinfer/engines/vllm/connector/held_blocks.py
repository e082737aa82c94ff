"""
KV blocks that are held without a running or waiting request, by reason.

Read from the scheduler's own tables rather than ours, so that held blocks are seen whatever caused them. Blocks shared
by several requests count for each.
"""

from collections.abc import Mapping
from typing import Final

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

HELD_BY: Final = ("reservations", "pins", "precopies", "pulls", "unfreed", "deferred")
"""
The reasons: reservations for requests on their way here; requests that were cut and wait to be pulled; full blocks that
a peer may read and whose request is gone; requests here whose KV cache is being pulled; finished requests that wait for
anything else (a pull that was under way when they ended); blocks that a step under way may still write.
"""


def held_blocks(scheduler: Scheduler, cut: Mapping[str, object], n_reserved: int, n_precopied: int) -> dict[str, int]:
    """Blocks by reason; `cut` has the finished requests that are pinned because we cut them."""
    held = dict.fromkeys(HELD_BY, 0)
    held["reservations"] = n_reserved
    held["precopies"] = n_precopied
    for request in scheduler.requests.values():
        if request.is_finished():
            reason = "pins" if request.request_id in cut else "unfreed"
        elif request.status == RequestStatus.WAITING_FOR_REMOTE_KVS:
            reason = "pulls"
        else:
            continue
        held[reason] += sum(len(group) for group in scheduler.kv_cache_manager.get_block_ids(request.request_id))
    held["deferred"] = sum(len(blocks) for _, blocks in scheduler.deferred_frees)
    return held
