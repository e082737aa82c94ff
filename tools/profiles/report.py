"""docs/profiles.md: table of fit errors, how to read it, check against whole-model measurements."""

import csv
import gzip
from dataclasses import dataclass, replace

import numpy as np
from measured import DATA
from numpy.typing import NDArray

from cascadeinfer.core.cost.heterogeneity import MixedError, ReductionError
from cascadeinfer.core.cost.latency import SEPARATE_CALLS_TOKENS, BatchFeatures
from cascadeinfer.core.cost.profile import CostProfile
from cascadeinfer.core.cost.varlen import Heads

TRACES = (
    "azure_2023_conv",
    "mooncake_synthetic",
    "servegen_deepseek_r1_1h",
    "sharegpt_v3_firstturn_llama3",
    "sharegpt_8k_llama2",
    "arxiv_summarization_llama2",
    "bwb_llama2",
)
BATCH_SIZES = (4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
BATCHES_PER_SIZE = 4
LONGEST_TOKENS = 131_072
MOST_BUDGET = 16_384
"""Largest token budget of a step; a rule that holds beyond it is none."""


def mixed_batches(rng: np.random.Generator) -> list[NDArray[np.int64]]:
    """Decode batches drawn from every trace: requests weighted by decode steps, at a uniform point of their output."""
    batches = []
    for name in TRACES:
        with gzip.open(DATA / "traces" / f"{name}.csv.gz", "rt", newline="") as stream:
            lengths = np.array([(int(r["prompt_tokens"]), int(r["output_tokens"])) for r in csv.DictReader(stream)])
        weight = lengths[:, 1] / lengths[:, 1].sum()
        for size in BATCH_SIZES:
            for _ in range(BATCHES_PER_SIZE):
                chosen = lengths[rng.choice(len(lengths), size, p=weight)]
                done = (chosen[:, 1] * rng.random(size)).astype(np.int64)
                batches.append(np.clip(chosen[:, 0] + done, 1, LONGEST_TOKENS))
    return batches


@dataclass(frozen=True)
class Row:
    """One profile's line of the table."""

    profile: CostProfile
    mixed: ReductionError

    def cells(self) -> list[str]:
        """The line's cells."""
        profile = self.profile
        errors = {e.part.split(",")[0]: e for e in profile.fit_errors}

        def percent(part: str) -> str:
            error = errors[part]
            return f"{100 * error.median:.1f} / {100 * error.p90:.1f}{'' if error.measured else ' d'}"

        model = profile.step_model
        return [
            profile.name,
            profile.backend + (" *" if profile.derived else ""),
            percent("decode attention"),
            percent("dense layers and overhead"),
            percent("prefill attention"),
            percent("whole step"),
            f"{100 * self.mixed.median:.1f} / {100 * self.mixed.p90:.1f} ({100 * self.mixed.median_without:.0f})",
            f"{1e3 * model.base_s:.2f}",
            f"{model.dense_knee_tokens:.0f}",
            f"{1e6 * model.compute_per_prefill_token_s:.1f}",
            f"{profile.capacity.kv_tokens / 1000:.0f}",
        ]

    def line(self) -> str:
        """The line as Markdown."""
        return "| " + " | ".join(self.cells()) + " |"


def beside_line(profile: CostProfile) -> str:
    """A profile's steps with the priced batches beside a chunk, and as a multiple of those without the rule."""
    cells = []
    model = profile.step_model
    without = replace(model, mixed_split_tokens=SEPARATE_CALLS_TOKENS)
    for n, total, longest in PRICED.values():
        for chunk in BESIDE_TOKENS:
            batch = BatchFeatures(n, total, longest, chunk, chunk * (chunk + 1) / 2)
            cells.append(f"{1e3 * model.step_s(batch):.1f} (x{model.step_s(batch) / without.step_s(batch):.2f})")
    return f"| {profile.name} | " + " | ".join(cells) + " |"


def price_line(profile: CostProfile) -> str:
    """A profile's steps for the priced batches."""
    cells = []
    for n, total, longest in PRICED.values():
        mixed = profile.step_model.step_s(BatchFeatures(n, total, longest))
        equal = profile.step_model.step_s(BatchFeatures(n, total, total // n))
        cells.append(f"{1e3 * mixed:.1f} (x{mixed / equal:.2f})")
    return f"| {profile.name} | " + " | ".join(cells) + " |"


HEAD = (
    "profile", "backend", "decode attention", "dense layers", "prefill attention", "whole step", "mixed lengths",
    "base ms", "knee", "us/token", "KV K tokens",
)  # fmt: skip

PRICED = {
    "31 x 1K + 1 x 128K": (32, 31 * 1_024 + 131_072, 131_072),
    "63 x 2K + 1 x 64K": (64, 63 * 2_048 + 65_536, 65_536),
    "60 x 2K + 4 x 32K": (64, 60 * 2_048 + 4 * 32_768, 32_768),
}
"""Requests, total and longest length of the batches of kernels.md, section 3d."""

BESIDE_TOKENS = (256, 1024)
"""Chunks beside the priced batches, of new prompts."""

BESIDE = """
The same batches beside a chunk of 256 or 1,024 tokens of a new prompt: predicted step in ms, and as a multiple of what
it would be if decodes were cut as they are alone.
"""

PRICES = """
## What mixing does to a whole step

Predicted step in ms, and as a multiple of the step of equal lengths with the same count and total. From the split
rules, not measured. B200 is an upper bound (its blocks may be faster), L40S and L40 a lower one (theirs may be
slower; 10 GB/s instead of 15.5 fits the data as well).
"""

READING = """
## Reading

Errors are median / 90th percentile of the absolute relative error in percent. `d` behind a figure: its samples are
derived or composed, not measured on this device; `*` behind a backend: a main part of the profile is derived (the
file's `derived` flag; its `notes` say which).

- **decode attention**: the attention terms of the step model against one layer's measured kernel times x layers,
  equal lengths, cells whose KV exceeds 1.5 x the L2 cache (smaller ones are L2-warm in the source) and whose batch
  vLLM would run. H20: simulated cells.
- **dense layers**: base, per-token terms and knee against matrix products (interpolated in log n, log k between
  measured shapes), elementwise kernels, all-reduce, output projection and the assumed overhead, for decode, prefill
  and both.
- **prefill attention**: per token and per (token, context) pair, prompts from 128 to 16K tokens.
- **whole step**: the profile against the sum of the parts' tables. Nobody measured whole steps on these devices with
  one engine; see the check below for what there is.
- **mixed lengths**: the profile's attention terms against the thread-block simulation of the same kernel on batches
  drawn from the seven traces of shared/data (4 to 256 requests, in proportion to their decode steps, at a random
  point of their output, as many as fit the KV cache). In brackets the median error of the same terms without
  heterogeneity. SIMULATED: no measured mixed batches exist.
- **base ms**: an empty step (weights, floors, overhead); mixtures of experts pay for the experts they pick on top.
  **knee**: tokens in a step up to which the products cost only the read of their weights. **us/token**: a prompt
  token above the knee, attention aside.
- **KV K tokens**: capacity in thousands of tokens at gpu_memory_utilization 0.9 with 2 GB of working memory per
  device.

A name ends in `-tpN` where the model needs N devices: 4 for Llama-3.1-70B, else the fewest whose KV cache holds one
request of 32K tokens. Qwen3-32B leaves an 80 GB device only 17K tokens, so it is `-tp2` there; an L40S or L40 needs
two for both Qwen models.

In a mixture of experts, uniform routing is assumed: n tokens read 1 - (1 - 8/128)^n of the experts.

What stays out: rounding of lengths to blocks; FA3's wave quantisation for equal lengths at one to two waves (H20 with
8 KV heads shows it: p90 of simulated equal lengths 30 %).
"""

MIXED = """
## Decodes beside a prompt

FlashAttention computes a step with prompts and decodes in one call. FA2 then splits no request and gives each query
head a thread block of its own; FA3 splits only in steps of up to 512 tokens (vLLM's limit for CUDA graphs), and
beside prompts that do not fill the device. FlashInfer and trtllm-gen have separate calls. The fast form against the
simulation of the same call, percent; without the rule, a prompt's attention is added to that of a decode-only step.
SIMULATED on both sides, with every fourth trace batch beside chunks of 64, 256 and 400 tokens (small) and of 800 and
2,048 (large), new and after 8,192 tokens of the same prompt. Heads are per device.

Uncached: how much longer the simulated call takes if no query head of FA2 finds in the L2 cache what its neighbour has
read; the model assumes that all do, so FA2's mixed steps lie between.

| call | query / KV heads | chunks | median | p90 | bias | without the rule: median | bias | uncached |
|---|---|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Page:
    """
    docs/profiles.md.

    Attributes:
        reductions: Rule, KV heads per device and error of its fast form.
        mixed: Call, heads per device, chunks and error of the fast form of steps with prompts.
        checks: Lines of the whole-model table.
    """

    date: str
    command: str
    rows: list[Row]
    reductions: list[tuple[str, int, ReductionError]]
    mixed: list[tuple[str, Heads, str, MixedError]]
    checks: list[str]

    def text(self) -> str:
        """The page as Markdown."""
        lines = [
            "# Shipped profiles",
            "",
            f"Generated by `{self.command}` from measurements published by others (shared/data/gpu). Do not edit.",
            "",
            "| " + " | ".join(HEAD) + " |",
            "|---" * len(HEAD) + "|",
            *(row.line() for row in self.rows),
            READING,
            "## The fast form of each split rule",
            "",
            (
                "`reduce_kernel` against the simulation of the same kernel on the trace batches up to a million "
                "tokens, percent. SIMULATED on both sides."
            ),
            "",
            "| rule | KV heads per device | median | p90 | bias | median without the term |",
            "|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {name} | {kv_heads} | {100 * e.median:.1f} | {100 * e.p90:.1f} | {100 * e.bias:+.1f} | "
            f"{100 * e.median_without:.0f} |"
            for name, kv_heads, e in self.reductions
        ]
        lines[-1] += "\n" + MIXED.rstrip()
        lines += [
            f"| {name} | {heads.query} / {heads.kv} | {chunks} | {100 * e.median:.1f} | {100 * e.p90:.1f} | "
            f"{100 * e.bias:+.1f} | {100 * e.median_without:.0f} | {100 * e.bias_without:+.0f} | x{e.uncached:.2f} |"
            for name, heads, chunks, e in self.mixed
        ]
        notes = dict.fromkeys(note for row in self.rows for note in row.profile.provenance.notes)
        lines += ["", "## What is derived or assumed, and how", "", *(f"- {note}" for note in notes)]
        lines += [PRICES, "| profile | " + " | ".join(PRICED) + " |", "|---" * (len(PRICED) + 1) + "|"]
        priced = [row.profile for row in self.rows if "llama" in row.profile.name]
        lines += [price_line(profile) for profile in priced]
        beside = [f"{batch}, + {chunk}" for batch in PRICED for chunk in BESIDE_TOKENS]
        lines += [BESIDE, "| profile | " + " | ".join(beside) + " |", "|---" * (len(beside) + 1) + "|"]
        lines += [beside_line(profile) for profile in priced if profile.step_model.mixed_split_tokens < MOST_BUDGET]
        lines += [
            CHECK,
            "| device | TP | prompt: measured / predicted | token: measured / predicted |",
            "|---|---|---|---|",
        ]
        return "\n".join([*lines, *self.checks]) + "\n"


CHECK = """
## Check against whole-model measurements

Llama-2-70B on DGX-A100 and DGX-H100, measured by the authors of Splitwise (ISCA 2024) with the vLLM of 2023, against
a model made as above for its shape; median (range) of the ratio; prompts that fit one step of today's defaults. That
vLLM launched kernels one by one from Python: 28 to 45 ms per step whatever the GPU, which hides the GPU at TP 4 and
8. At TP 2 on A100 the GPU is the bottleneck, and there the decode step agrees within some 10 to 20 %. Prompts were
computed with older kernels (ratio above one).
"""
