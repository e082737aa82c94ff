"""
Predicted service of one stage: a range of lengths, k instances, a request rate.

The step time comes from the steady state (`steady_state.py`), waiting from the queues (`queues.py`). Here they become
the stage's part of an objective, a weighted sum of waits, steps, hand-overs and missed limits. docs/planning.md has the
derivations and a table of errors against the simulator.

Everything is compiled, pure, and O(1) in the number of requests.
"""

import math
from typing import Final, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from cascadeinfer.core.cost.histogram import Column
from cascadeinfer.core.cost.latency import step_time_s
from cascadeinfer.core.cost.queues import (
    FEW,
    PrefillQueue,
    ServiceLimits,
    TokenTimes,
    memory_wait_s,
    prefill_queue,
    surge,
)
from cascadeinfer.core.cost.steady_state import (
    StageLoad,
    chunk_per_token_s,
    decode_step_s,
    longest_in_batch,
    prefill_per_token_s,
    solve_step_s,
)

DEMAND_ROWS: Final = 9
"""Rows of a stage table that hold the plain demand: `Column.STEPS` to `Column.LAST_STEPS` in order."""
W_WAIT: Final = 9
"""Weight of each start's waiting time. From here on, rows are weights of an objective (`plan/objective.py`)."""
W_PROMPT: Final = 10
"""Weighted prompt tokens."""
W_ATTENTION: Final = 11
"""Weighted prefill attention."""
W_CHUNKS: Final = 12
"""Weighted steps that a prefill takes."""
W_STEPS: Final = 13
"""Weighted decode steps."""
W_STARTS: Final = 14
"""
Weight of each start's delays while it decodes; its difference to the next row at a boundary is the weight of the
hand-overs there.
"""
W_LASTS: Final = 15
"""The same weight where requests do their last step."""
W_ATTAIN_STEPS: Final = 16
"""Decode steps as fractions of all steps of their request."""
WEIGHT_ROWS: Final = 8
"""Rows of weights."""
PUSHED: Final = 17
"""Requests whose prompt was computed in a prefill stage, by prompt length; they enter the stage that decodes them here.
"""
TABLE_ROWS: Final = 18
"""Rows of a stage table."""

_TPOT_SPREAD: Final = 0.12
"""Relative standard deviation of a request's mean step time about its stage's."""


class ObjectiveTerms(NamedTuple):
    """Scalars of an objective: the weight of missed TTFT and TPOT, and the limits they refer to."""

    miss_weight: float
    ttft_slo_s: float
    tpot_slo_s: float


class ServiceInputs(NamedTuple):
    """
    What every prediction for a workload reads, whatever the stage: compiled code takes it as one value.

    Attributes:
        table: Prefix sums per edge, rows as named above.  # (TABLE_ROWS, n_edges)
        edges: Lengths in tokens, as floats.  # (n_edges,)
        coefficients: Of the step time.
        rate_per_s: Requests per second of the whole workload.
        limits: Of an instance, and the price of a hand-over.
        terms: Of the objective.
        queued_weight: How much a token of a queued prompt adds to an instance's price, relative to one that is decoded.
    """

    table: NDArray[np.float64]
    edges: NDArray[np.float64]
    coefficients: NDArray[np.float64]
    rate_per_s: float
    limits: ServiceLimits
    terms: ObjectiveTerms
    queued_weight: float


class StageService(NamedTuple):
    """
    What one stage does, per instance where that makes a difference.

    Attributes:
        cost: Its part of the objective; infinite when the stage cannot carry the load.
        step_s: Step time that a decoding token sees.
        decode_step_s: The same without prefills.
        batch: Requests decoding.
        utilisation: Share of each second that is work, excluding the constant cost of steps.
        prefill_utilisation: Share of each second in which a prompt is in prefill.
        kv_use: KV tokens in use over capacity.
        wait_s: Mean time from arrival to the start of a request's own prefill.
        ttft_s: Mean time to first token of requests that start here.
        stall_s: Extra decode time of a request, caused by prompts queued when it began to decode.
    """

    cost: float
    step_s: float
    decode_step_s: float
    batch: float
    utilisation: float
    prefill_utilisation: float
    kv_use: float
    wait_s: float
    ttft_s: float
    stall_s: float


@njit(cache=True, error_model="numpy")
def _infeasible() -> StageService:
    inf = np.inf
    return StageService(inf, inf, inf, inf, inf, inf, inf, inf, inf, inf)


@njit(cache=True, error_model="numpy")
def _share_below(inputs: ServiceInputs, stage: StageLoad, prompt: float) -> float:
    """Share of the stage's starts with a prompt shorter than this."""
    table, edges = inputs.table, inputs.edges
    if prompt <= edges[stage.i] or stage.starts <= 0.0:
        return 0.0
    if prompt >= edges[stage.j]:
        return 1.0
    at = np.searchsorted(edges, prompt) - 1
    inside = (prompt - edges[at]) / (edges[at + 1] - edges[at])
    below = (
        table[Column.STARTS, at]
        + inside * (table[Column.STARTS, at + 1] - table[Column.STARTS, at])
        - table[Column.STARTS, stage.i]
    )
    return below / stage.starts


@njit(cache=True, error_model="numpy")
def _misses(
    inputs: ServiceInputs,
    stage: StageLoad,
    times: TokenTimes,
    wait_s: float,
    wait_share: float,
    served_s: float,
    tpot_s: float,
) -> float:
    """Requests that miss their TTFT, plus fractions of requests that miss their TPOT (union bound), per request."""
    table, terms, per_pair_s = inputs.table, inputs.terms, times.per_pair_s
    late = 0.0
    # Half of the waits are below the mean and half above, as in an exponential; a request that finds no queue does not
    # wait.
    for share, wait in ((1.0 - wait_share, 0.0), (0.5 * wait_share, 0.31), (0.5 * wait_share, 1.69)):
        left_s = terms.ttft_slo_s - times.decode_s - wait * wait_s / max(wait_share, 1e-9)
        longest = 0.0
        if left_s > 0.0:
            half = 0.5 * (served_s + 0.5 * per_pair_s)
            longest = left_s / (half + np.sqrt(half * half + 0.5 * per_pair_s * left_s))
        late += share * (1.0 - _share_below(inputs, stage, longest))
    slow = 0.5 * math.erfc(math.log(terms.tpot_slo_s / tpot_s) / (_TPOT_SPREAD * math.sqrt(2.0)))
    attain = table[W_ATTAIN_STEPS, stage.j] - table[W_ATTAIN_STEPS, stage.i]
    return late * stage.starts + slow * attain


@njit(cache=True, error_model="numpy")
def _stage_cost(
    inputs: ServiceInputs,
    stage: StageLoad,
    prefill: PrefillQueue,
    times: TokenTimes,
    t: float,
    wait_s: float,
    visits: float,
) -> float:
    """The stage's part of the objective."""
    i, j = stage.i, stage.j
    table, limits, terms = inputs.table, inputs.limits, inputs.terms
    decode_s, per_token_s, per_pair_s = times.decode_s, times.per_token_s, times.per_pair_s
    room = max(1.0, limits.max_batched_tokens - stage.rate * stage.steps * t)
    # A full step delays a request in at most each of its steps; the two bounds are blended as 1/x + 1/y.
    stall = prefill.stall_s * (table[W_STARTS, j] - table[W_STARTS, i])
    most = (decode_s + room * per_token_s) * (table[W_STEPS, j] - table[W_STEPS, i])
    stall = stall * most / (stall + most) if stall > 0.0 else 0.0
    cost = (
        wait_s * (table[W_WAIT, j] - table[W_WAIT, i])
        + decode_s * (table[W_CHUNKS, j] - table[W_CHUNKS, i])
        + per_token_s * (table[W_PROMPT, j] - table[W_PROMPT, i])
        + per_pair_s * (table[W_ATTENTION, j] - table[W_ATTENTION, i])
        + t * (table[W_STEPS, j] - table[W_STEPS, i])
        + stall
        + max(0.0, table[W_STARTS, i] - table[W_LASTS, i])
        * (limits.pause_s + limits.pause_per_token_s * inputs.edges[i])
    )
    if terms.miss_weight > 0.0:
        steps_per_visit = stage.steps / visits if visits > FEW else 1.0
        tpot_s = t + prefill.stall_s / max(1.0, steps_per_visit)
        served_s = per_token_s + decode_s / room
        cost += terms.miss_weight * _misses(inputs, stage, times, wait_s, prefill.load, served_s, tpot_s)
    return cost


@njit(cache=True, error_model="numpy")
def _assess(inputs: ServiceInputs, longest: NDArray[np.float64], stage: StageLoad, t: float) -> StageService:
    """What follows from the step time: waiting, memory, and the stage's part of the objective."""
    table, coefficients, limits = inputs.table, inputs.coefficients, inputs.limits
    i, rate = stage.i, stage.rate
    others = rate * stage.steps * t
    in_decode = rate * stage.kv_steps * t
    batch = max(1.0, others + 1.0 / stage.n_instances) if stage.steps > 0.0 else 0.0
    room = max(1.0, limits.max_batched_tokens - others)
    decode_s = decode_step_s(coefficients, longest, stage, batch)
    per_token_s = 0.0
    queued_per_token_s = 0.0
    if stage.prompt > 0.0:
        per_token_s = chunk_per_token_s(coefficients, longest, stage, batch, min(room, stage.chunk))
        queued_per_token_s = chunk_per_token_s(coefficients, longest, stage, batch, room)
    times = TokenTimes(decode_s, per_token_s, queued_per_token_s, coefficients[4])
    prefill = prefill_queue(table, stage, limits, others, in_decode, times, inputs.queued_weight)
    if prefill.load >= 1.0:
        return _infeasible()
    visits = stage.starts + table[PUSHED, stage.j] - table[PUSHED, i]
    visits += max(0.0, table[Column.STARTS, i] + table[PUSHED, i] - table[Column.LAST_STEPS, i])
    empty_s = step_time_s(coefficients, 0.0, 0.0, 0.0, 0.0, 0.0)
    busy = max(0.0, 1.0 - empty_s / t)
    if stage.steps > 0.0 and visits > FEW:
        factor = surge(stage, prefill.second_moment_s2, stage.steps / visits * t, busy)
        t *= factor
        others *= factor
        in_decode *= factor
    requests = others + prefill.load
    kv_tokens = in_decode + 0.5 * prefill.held_tokens + 0.5 * limits.block_tokens * requests
    for_memory_s = memory_wait_s(stage, limits, kv_tokens, requests, visits)
    wait_s = prefill.wait_s + for_memory_s if stage.starts > FEW else 0.0
    ttft_s = wait_s + prefill.own_s
    if not (np.isfinite(for_memory_s) and ttft_s <= limits.ttft_limit_s):
        return _infeasible()
    cost = _stage_cost(inputs, stage, prefill, times, t, wait_s, visits)
    kv_use = kv_tokens / limits.kv_tokens
    return StageService(cost, t, decode_s, others, busy, prefill.load, kv_use, wait_s, ttft_s, prefill.stall_s)


@njit(cache=True, error_model="numpy")
def longest_of(inputs: ServiceInputs, i: int, j: int) -> NDArray[np.float64]:
    """`longest_in_batch` of the range between edges i and j, which `stage_service` takes."""
    return longest_in_batch(inputs.table, inputs.edges, i, j, inputs.coefficients)


@njit(cache=True, error_model="numpy")
def stage_service(
    inputs: ServiceInputs, i: int, j: int, longest: NDArray[np.float64], n_instances: float
) -> StageService:
    """
    Predict one stage.

    Args:
        inputs: Workload, cost of a step, instances and objective.
        i: First edge of the range.
        j: Last edge of the range, > i.
        longest: As from `longest_of` for this range; the same for any number of instances.
        n_instances: Instances that share the stage evenly.

    Returns:
        The prediction; every field infinite when the stage cannot carry the load within its limits.

    Complexity: O(1).
    """
    table, coefficients, limits = inputs.table, inputs.coefficients, inputs.limits
    rate = inputs.rate_per_s / n_instances
    starts = table[Column.STARTS, j] - table[Column.STARTS, i]
    prompt = table[Column.PROMPT, j] - table[Column.PROMPT, i]
    attention = table[Column.ATTENTION, j] - table[Column.ATTENTION, i]
    steps = table[Column.STEPS, j] - table[Column.STEPS, i]
    chunk = 1.0
    prefill_load = 0.0
    if starts > FEW:
        chunk = min(limits.max_batched_tokens, prompt / starts)
        per_token_s = prefill_per_token_s(coefficients, 1.0, chunk)
        prefill_load = rate * (prompt * per_token_s + attention * coefficients[4])
    stage = StageLoad(
        i,
        j,
        n_instances,
        rate,
        steps,
        table[Column.KV_STEPS, j] - table[Column.KV_STEPS, i],
        starts,
        prompt,
        attention,
        chunk,
        prefill_load,
        limits.max_batched_tokens,
    )
    moved = rate * max(
        0.0,
        table[Column.STARTS, i]
        + table[PUSHED, i]
        - table[Column.LAST_STEPS, i]
        + table[Column.STARTS, j]
        + table[PUSHED, j]
        - table[Column.LAST_STEPS, j],
    )  # in and out; pushes from prefill stages do not count
    if moved > limits.hand_overs_per_s:
        return _infeasible()
    # No step can be longer than the time that keeps tokens in flight within KV cache, batch slots and token budget.
    t_max = limits.tpot_limit_s
    if steps > 0.0:
        t_max = min(t_max, limits.kv_tokens / (rate * stage.kv_steps), limits.max_num_seqs / (rate * steps))
    if steps + prompt > 0.0:
        t_max = min(t_max, limits.max_batched_tokens / (rate * (steps + prompt)))
    if steps + prompt <= 0.0:
        t = step_time_s(coefficients, 1.0, 0.0, 0.0, 0.0, 0.0)
    else:
        t = solve_step_s(coefficients, longest, stage, t_max)
    if not np.isfinite(t):
        return _infeasible()
    return _assess(inputs, longest, stage, t)


@njit(cache=True, error_model="numpy")
def range_service(inputs: ServiceInputs, i: int, j: int, n_instances: float) -> StageService:
    """`stage_service` of one range in one call from outside, where passing the inputs takes longer than predicting."""
    return stage_service(inputs, i, j, longest_of(inputs, i, j), n_instances)
