"""
Nanoseconds per call of the step model, compiled and from Python, and of the simulation that it replaces.

    OMP_NUM_THREADS=1 .venv/bin/python tools/profiles/step_cost.py
"""

import time
from collections.abc import Callable

import numpy as np
from numba import njit
from numpy.typing import NDArray

from cascadeinfer.config.profiles import load_profile
from cascadeinfer.core.cost.latency import BatchFeatures, step_time_s
from cascadeinfer.core.cost.splitkv import AttentionKernel, SplitRule, kernel_s

CALLS = 2_000_000
REPEATS = 5


@njit
def many_steps(coefficients: NDArray[np.float64], calls: int) -> float:
    """Sum of step times over changing batches, so that nothing is hoisted out of the loop."""
    total = 0.0
    for i in range(calls):
        n = float(1 + i % 200)
        total += step_time_s(coefficients, n, n * 1_000.0 + i, 9_000.0 + i % 7, float(i % 3 * 256), 1e5)
    return total


def best_ns(work: Callable[[], object], calls: int) -> float:
    """Shortest of some runs, per call."""
    spent = []
    for _ in range(REPEATS):
        begin = time.perf_counter_ns()
        work()
        spent.append((time.perf_counter_ns() - begin) / calls)
    return min(spent)


def main() -> None:
    """Print one line per form."""
    for name in ("h100-llama-3.1-8b", "a100-llama-3.1-8b", "b200-llama-3.1-8b", "h100-qwen3-30b-a3b"):
        model = load_profile(name).step_model
        coefficients = model.coefficients()
        batch = BatchFeatures(64, 100_000, 9_000, 256, 1e5)
        many_steps(coefficients, 10)
        compiled = best_ns(lambda c=coefficients: many_steps(c, CALLS), CALLS)
        called = best_ns(
            lambda c=coefficients: [step_time_s(c, 64.0, 1e5, 9e3, 256.0, 1e5) for _ in range(20_000)], 20_000
        )
        method = best_ns(lambda m=model, b=batch: [m.step_s(b) for _ in range(20_000)], 20_000)
        print(f"{name:24} compiled {compiled:6.1f} ns, from Python {called:6.0f} ns, StepModel.step_s {method:6.0f} ns")
    lengths = np.full(64, 1_500)
    kernel = AttentionKernel(SplitRule.FA3, 132, 1, 3.15e12, 26e9, 11e-6, 5.5e-6, 1.2e-6)
    kernel_s(lengths, 8, kernel)
    simulated = best_ns(lambda: [kernel_s(lengths, 8, kernel) for _ in range(200)], 200)
    print(f"thread-block simulation of one layer, 64 requests: {simulated / 1e3:.0f} us")


if __name__ == "__main__":
    main()
