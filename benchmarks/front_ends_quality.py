"""
What it costs that several front-end processes decide, each for its own requests. Simulated.

    python benchmarks/front_ends_quality.py [--profile NAME] [--trace NAME] [--instances 16] [--load 0.85]
        [--front-ends 1,2,4] [--seeds 3] [--requests 4000] [--policies cascade]

Every number of processes gets the same requests at the same times. The figures are ratios to one process, per seed,
with their geometric mean: mean normalised latency, TTFT p99, end-to-end p99, moves. `evaluation/front_ends.py` says
what is simulated.
"""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

import measuring
from cascadeinfer.evaluation.runs import RunSpec, run_once
from cascadeinfer.evaluation.setting import load_setting
from cascadeinfer.results.summary import Slo

SLO = Slo(2.0, 0.1)
EDGE = 0.1
"""Share of the requests at either end that the figures leave out."""
FIGURES = ("normalised_latency_s_mean", "ttft_s_p99", "e2e_s_p99", "migrations")


def figures_of(setting: Any, spec: RunSpec) -> dict[str, float]:
    """Of one run."""
    outcome = run_once(setting, spec)
    summary = asdict(outcome.summary)
    return {name: float(summary[name]) for name in FIGURES}


def main() -> None:
    """Parse, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="h100-llama-3.1-8b")
    parser.add_argument("--trace", default="sample")
    parser.add_argument("--instances", type=int, default=16)
    parser.add_argument("--load", type=float, default=0.85)
    parser.add_argument("--front-ends", default="1,2,4")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--policies", default="cascade")
    options = parser.parse_args()
    host = measuring.machine()
    setting = load_setting(options.profile, Path(options.trace), options.instances)
    rate_rps = options.load * setting.one_stage_capacity_rps
    numbers = [int(number) for number in options.front_ends.split(",")]
    results: dict[str, Any] = {}
    print("| policy | front ends | mean normalised latency | TTFT p99 | e2e p99 | moves |")
    print("|---|---|---|---|---|---|")
    for policy in options.policies.split(","):
        runs: dict[int, list[dict[str, float]]] = {number: [] for number in numbers}
        for seed in range(options.seeds):
            for number in numbers:
                spec = RunSpec(
                    policy,
                    rate_rps,
                    seed,
                    options.requests,
                    SLO,
                    warm_up=EDGE,
                    cool_down=EDGE,
                    allow_overload=True,
                    front_ends=number,
                )
                runs[number].append(figures_of(setting, spec))
        for number in numbers:
            ratios = {
                name: [run[name] / base[name] for run, base in zip(runs[number], runs[numbers[0]], strict=True)]
                for name in runs[number][0]
                if all(base[name] for base in runs[numbers[0]])
            }
            results[f"{policy}, {number}"] = {"ratios": ratios, "runs": runs[number]}
            words = [
                f"{np.exp(np.mean(np.log(values))):.3f} [{min(values):.3f}, {max(values):.3f}]"
                for values in ratios.values()
            ]
            print(f"| {policy} | {number} | {' | '.join(words)} |", flush=True)
    print(measuring.write_results("front_ends_quality", host, vars(options), results))


if __name__ == "__main__":
    main()
