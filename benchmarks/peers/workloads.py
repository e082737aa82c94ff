"""
The workloads: lengths drawn once per round from plain laws, so that anyone can reproduce them.

`mixed` is the case operators complain about: chat turns, long-running chats, and documents to read, all sent to one
model. `equal` has requests of one length and so nothing that a scheduler could tell apart. Arrivals are Poisson, at a
rate that `run.py` derives from what the machine completes. Lengths are per model, because what a processor core does in
a second differs by two orders of magnitude between the two.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cascadeinfer.config.traces import save_trace
from cascadeinfer.workload.arrivals import poisson_arrivals
from cascadeinfer.workload.trace import Trace


@dataclass(frozen=True)
class Kind:
    """
    One kind of request.

    Attributes:
        share: Share of all requests.
        prompt: Lowest and highest prompt length, uniform between them.
        output: The same for the answer.
    """

    name: str
    share: float
    prompt: tuple[int, int]
    output: tuple[int, int]


@dataclass(frozen=True)
class Workload:
    """
    Attributes:
        requests: Requests of a cell.
    """

    kinds: tuple[Kind, ...]
    requests: int

    def trace(self, seed: int, rate_rps: float) -> Trace:
        """A trace at this mean rate; each kind has its exact share, in random order."""
        rng = np.random.default_rng(seed)
        n = self.requests
        counts = [round(kind.share * n) for kind in self.kinds[1:]]
        counts = [n - sum(counts), *counts]
        prompts = [rng.integers(k.prompt[0], k.prompt[1] + 1, c) for k, c in zip(self.kinds, counts, strict=True)]
        outputs = [rng.integers(k.output[0], k.output[1] + 1, c) for k, c in zip(self.kinds, counts, strict=True)]
        order = rng.permutation(n)
        return Trace.from_columns(
            np.concatenate(prompts)[order], np.concatenate(outputs)[order], poisson_arrivals(rate_rps, n, rng)
        )


@dataclass(frozen=True)
class ModelCase:
    """
    A model with its engine options and workloads.

    Attributes:
        max_model_len: Context length.
        kv_blocks: KV blocks per instance.
        stages: Our fixed layout: short requests, long ones.
        long_tokens: Total length from which a request counts as long; the boundary of the stages.
        ttft_slo_s: SLO on the time to first token.
        tpot_slo_s: SLO on the time per output token.
    """

    max_model_len: int
    kv_blocks: int
    stages: str
    long_tokens: int
    ttft_slo_s: float
    tpot_slo_s: float
    workloads: dict[str, Workload]


BLOCK_TOKENS = 32
CASES = {
    "tiny": ModelCase(
        max_model_len=4608, kv_blocks=1024, stages="0-1024:1,1024-:1", long_tokens=1024, ttft_slo_s=1.0,
        tpot_slo_s=0.05,
        workloads={
            "mixed": Workload(
                (
                    Kind("chat turn", 0.75, (40, 320), (20, 100)),
                    Kind("long chat", 0.10, (700, 980), (80, 200)),
                    Kind("document", 0.15, (2600, 4000), (20, 100)),
                ),
                requests=120,
            ),
            "equal": Workload((Kind("equal", 1.0, (256, 256), (64, 64)),), requests=120),
        },
    ),
    "smollm2": ModelCase(
        max_model_len=1024, kv_blocks=256, stages="0-192:1,192-:1", long_tokens=192, ttft_slo_s=4.0, tpot_slo_s=0.5,
        workloads={
            "mixed": Workload(
                (
                    Kind("chat turn", 0.75, (20, 60), (8, 16)),
                    Kind("long chat", 0.10, (150, 185), (16, 32)),
                    Kind("document", 0.15, (300, 400), (8, 16)),
                ),
                requests=40,
            ),
            "equal": Workload((Kind("equal", 1.0, (64, 64), (16, 16)),), requests=40),
        },
    ),
}  # fmt: skip


def write_trace(workload: Workload, seed: int, rate_rps: float, file: Path) -> None:
    """The trace as a file for `cascadeinfer bench`."""
    save_trace(workload.trace(seed, rate_rps), file)
