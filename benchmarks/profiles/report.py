"""docs/profiles.md: table of fit errors, how to read it, the check against whole-model measurements."""

import csv
import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from measured import DATA
from numpy.typing import NDArray

from cascadeinfer.core.cost.heterogeneity import ReductionError
from cascadeinfer.core.cost.profile import CostProfile

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


def mixed_batches(rng: np.random.Generator) -> list[NDArray[np.int64]]:
    """Decode batches drawn from every trace: requests in proportion to their decode steps, at a uniform point of their output."""
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


def write_page(path: Path, table: list[Row], date: str) -> None:
    """Write the page."""
    head = ["profile", "backend", "decode attention", "dense", "prefill attention", "whole step", "mixed lengths",
            "base ms", "knee tokens", "us / prompt token", "KV K tokens"]  # fmt: skip
    lines = ["# Shipped profiles", "", f"Made on {date}.", "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    lines += [row.line() for row in table]
    path.write_text("\n".join(lines) + "\n")
