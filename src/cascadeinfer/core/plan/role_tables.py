"""
What a stage of each kind has to do, as tables that `stage_service` reads: roles need no other model than stages.

- *mixed*: the plain table. Every prompt is computed where its request decodes.
- *decode* from a threshold x on: prompts of x and more tokens are computed elsewhere. Their prompt work and their waits
  are taken out; they enter at their prompt length (row `PUSHED`), and everything they decode remains. A stage below x
  is then what it was, one above x only decodes, and one around x does both.
- *prefill*: prompts alone, by prompt length. Nothing is decoded and nothing is handed over.

What a push costs beside is the pause of each pushed request before its second token (`push_cost`).
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from cascadeinfer.core.cost.histogram import Column
from cascadeinfer.core.cost.qoe import (
    PUSHED,
    W_ATTAIN_STEPS,
    W_ATTENTION,
    W_CHUNKS,
    W_LASTS,
    W_PROMPT,
    W_STARTS,
    W_STEPS,
    W_WAIT,
)

Table = NDArray[np.float64]

_COMPUTED: Final = (
    Column.STARTS,
    Column.PROMPT,
    Column.ATTENTION,
    Column.PROMPT_SQ,
    Column.PROMPT_ATTENTION,
    Column.ATTENTION_SQ,
    W_WAIT,
    W_PROMPT,
    W_ATTENTION,
    W_CHUNKS,
)
"""Rows of what belongs to the computation of prompts."""
_DECODED: Final = (Column.STEPS, Column.KV_STEPS, W_STEPS, W_STARTS, W_LASTS, W_ATTAIN_STEPS)
"""Rows of what belongs to decoding."""


def decode_table(table: Table, threshold_edge: int) -> Table:
    """
    The table of stages that compute the prompts below an edge and decode everything.

    Args:
        table: Of mixed stages.
        threshold_edge: Index of the edge; 0 leaves no prompts.
    """
    decoding = table.copy()
    for row in _COMPUTED:
        decoding[row, threshold_edge:] = table[row, threshold_edge]
    decoding[PUSHED] = table[Column.STARTS] - decoding[Column.STARTS]
    return decoding


def prefill_table(table: Table) -> Table:
    """The table of stages that compute prompts and decode nothing; only ranges from the threshold on mean anything."""
    computing = table.copy()
    for row in _DECODED:
        computing[row] = 0.0
    computing[Column.LAST_STEPS] = table[Column.STARTS]
    return computing


def push_cost(table: Table, threshold_edge: int, pause_s: float, pause_per_token_s: float) -> float:
    """
    What pushes cost in the objective: each pushed request pauses once while it decodes.

    Args:
        table: Of mixed stages.
        threshold_edge: From this edge on, requests are pushed.
        pause_s: Pause of each.
        pause_per_token_s: Pause per token of its prompt.
    """
    starts = table[W_STARTS, -1] - table[W_STARTS, threshold_edge]
    tokens = table[W_PROMPT, -1] - table[W_PROMPT, threshold_edge]
    return float(pause_s * starts + pause_per_token_s * tokens)
