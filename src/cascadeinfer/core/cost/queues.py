"""
What requests of a stage wait for at finite load: prefill, memory, bursts. Compiled, O(1), calibrated against the
simulator.

*Prefill* is a server that works whenever a prompt is there, while decodes share its steps: M/G/1 (Pollaczek-Khinchine).
On k instances a rule that looks at KV tokens evens arrivals out (squared variation of gaps 1/k, by Kingman's formula),
yet sends a run of them to the instance that a long request has just left. To the extent that queued prompts decide
which instance is chosen, there is one queue for k servers instead (Sakasegawa 1977). The price, by which the cascade
chooses (`core/instance.py`), counts a queued token several times (`queued_weight`). Prompts that fit into one step
finish together, so a prompt also waits for those behind it. A request that has just begun to decode still shares steps
with the prompts that arrived while it waited: `stall_s`.

*Memory*: Little's law gives the KV cache and batch slots in use, Sakasegawa's formula the wait of arrivals when nearly
all is in use.

*Bursts* of prefill lengthen the steps of everything that decodes meanwhile and thereby the batch: `surge`.
"""

from typing import Final, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from cascadeinfer.core.cost.histogram import Column
from cascadeinfer.core.cost.steady_state import StageLoad, meets_decode

FEW: Final = 1e-12
"""Starts per request below which there are none: the rounding error of a difference of prefix sums."""
_BURST_RESPONSE: Final = 0.75
"""Correlation of batch and step time over a burst; fitted on one instance, where it lies between 0.7 and 1."""
_HERDING: Final = 0.27
"""
Longer wait per doubling of instances: when a long request leaves one, a run of arrivals goes there. Fitted on 2 to 64
instances.
"""
_PROMPTS_SEEN: Final = 3.0
"""
How much earlier prompts decide which instance is chosen than their share of what it is chosen by suggests: they arrive
in one piece. Fitted to `least_loaded`, by KV tokens.
"""


class ServiceLimits(NamedTuple):
    """An instance's capacity and the cost of a hand-over; floats, as the compiled code expects."""

    kv_tokens: float
    max_num_seqs: float
    max_batched_tokens: float
    block_tokens: float
    pause_s: float
    pause_per_token_s: float
    hand_overs_per_s: float
    ttft_limit_s: float
    tpot_limit_s: float


@njit(cache=True, error_model="numpy")
def queue_factor(utilisation: float, servers: float) -> float:
    """Waiting time over service time of an M/M/c queue: Sakasegawa's closed form."""
    return utilisation ** (np.sqrt(2.0 * (servers + 1.0)) - 1.0) / (servers * (1.0 - utilisation))


@njit(cache=True, error_model="numpy")
def memory_wait_s(stage: StageLoad, limits: ServiceLimits, kv_tokens: float, requests: float, visits: float) -> float:
    """Mean wait for KV cache and a batch slot; infinite when there is not enough."""
    if requests <= 0.0 or visits <= 0.0:
        return 0.0
    size = kv_tokens / requests
    # The last free tokens are too few for another request: half of one on average.
    kv_use = kv_tokens / max(limits.kv_tokens - 0.5 * size, 1.0)
    slot_use = requests / limits.max_num_seqs
    if kv_use >= 1.0 or slot_use >= 1.0:
        return np.inf
    residence_s = requests / (stage.rate * visits)
    by_memory = queue_factor(kv_use, stage.n_instances * max(1.0, limits.kv_tokens / size))
    by_slots = queue_factor(slot_use, stage.n_instances * limits.max_num_seqs)
    return residence_s * max(by_memory, by_slots)


class TokenTimes(NamedTuple):
    """What tokens of a stage take when the batch is as large as it gets."""

    decode_s: float  # a step without prefills
    per_token_s: float  # a prompt token adds, in a chunk of the usual size; attention not included
    queued_per_token_s: float  # the same in a chunk that fills the step
    per_pair_s: float  # a pair of prompt tokens adds, of which one attends to the other


class PrefillQueue(NamedTuple):
    """Prefill at one instance as a server that works whenever a prompt is there; decodes share its steps."""

    load: float  # share of time in prefill
    held_tokens: float  # KV tokens of prompts in prefill, each counted whole
    wait_s: float  # until only the request's own prefill remains
    own_s: float
    stall_s: float  # extra decode time from prompts that arrived meanwhile
    second_moment_s2: float  # of prefill time, times starts per request


@njit(cache=True, error_model="numpy")
def prefill_queue(
    table: NDArray[np.float64],
    stage: StageLoad,
    limits: ServiceLimits,
    others: float,
    in_decode_tokens: float,
    times: TokenTimes,
    queued_weight: float,
) -> PrefillQueue:
    """
    The prefill queue; `load` of 1 or more means that it never empties, and the rest is meaningless.

    `queued_weight` is what a token of a queued prompt adds to an instance's price, relative to one that is decoded.
    """
    if stage.starts <= FEW:
        return PrefillQueue(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    i, j, k = stage.i, stage.j, stage.n_instances
    decode_s, per_pair_s = times.decode_s, times.per_pair_s
    room = max(1.0, limits.max_batched_tokens - others)
    served_s = times.queued_per_token_s + decode_s / room  # a prompt token's share of full steps
    first = served_s * stage.prompt + per_pair_s * stage.attention
    load = stage.rate * first
    if load >= 1.0:
        return PrefillQueue(load, 0.0, 0.0, 0.0, 0.0, 0.0)
    squares = table[Column.PROMPT_SQ, j] - table[Column.PROMPT_SQ, i]
    products = table[Column.PROMPT_ATTENTION, j] - table[Column.PROMPT_ATTENTION, i]
    pair_squares = table[Column.ATTENTION_SQ, j] - table[Column.ATTENTION_SQ, i]
    second = served_s * (served_s * squares + 2.0 * per_pair_s * products) + per_pair_s * per_pair_s * pair_squares
    held = stage.rate * (served_s * squares + per_pair_s * products)
    scv = max(0.0, second * stage.starts / (first * first) - 1.0)
    # Decodes hide which instance has prompts queued, unless prompts are most of the price. An instance with a long
    # queued prompt is passed over, so with more instances variation counts by about its root (fitted).
    even_s = stage.rate * second / (2.0 * (1.0 - load)) * (1.0 / k + scv ** (0.5 + 0.5 / k)) / (1.0 + scv)
    in_line = (held + stage.rate * stage.prompt * even_s) * queued_weight
    by_work = min(1.0, _PROMPTS_SEEN * in_line / (in_line + in_decode_tokens))
    pooled_s = stage.rate * second / (2.0 * (1.0 - load)) * load ** (np.sqrt(2.0 * (k + 1.0)) - 2.0) / k
    herding = 1.0 + _HERDING * (1.0 - by_work) * max(0.0, np.log2(0.5 * k))
    queue_s = (1.0 - by_work) * even_s * herding + by_work * pooled_s
    present = others + load
    queue_s += 0.5 * decode_s * (1.0 - np.exp(-present)) * meets_decode(present, k) * herding
    mean_prompt = stage.prompt / stage.starts
    together = max(0.0, 1.0 - mean_prompt / limits.max_batched_tokens)
    wait_s = queue_s * (1.0 + load * together)
    own_s = decode_s * max(1.0, 0.5 + mean_prompt / room) + mean_prompt * times.per_token_s
    own_s += per_pair_s * stage.attention / stage.starts
    stall_s = load * (wait_s + own_s) * (1.0 - by_work + by_work / k)
    return PrefillQueue(load, held, wait_s, own_s, stall_s, second)


@njit(cache=True, error_model="numpy")
def surge(stage: StageLoad, second_moment_s2: float, residence_s: float, busy: float) -> float:
    """
    Step time over its mean field, because prefill work arrives in bursts.

    Over a residence T the prefill share of time varies by sqrt(rate E[s^2] / T); steps lengthen by that over (1 -
    busy), and so does the batch that waits for them. Tokens see the product of the two. The first order is damped where
    it is no longer small; the least loaded rule evens bursts out over the instances.
    """
    relative = stage.rate * second_moment_s2 / (residence_s * (1.0 - busy) ** 2) / stage.n_instances
    return 1.0 + _BURST_RESPONSE * relative / (1.0 + 2.0 * relative)
