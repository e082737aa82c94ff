"""
Shared parts of the benchmarks on real engines: the tiny model, its engine arguments, statistics, the results file.

The tiny model keeps the engines' own work small, so that what is measured (a pause, a client) is not lost in it. Only
ratios count; absolute times are those of the machine named in the results.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite.binding import ffi
from numpy.typing import NDArray

from cascadeinfer.engines.models.tiny import VOCAB_SIZE, make_tiny_llama

# vLLM's CPU worker looks into every loaded module, numba's among them; llvmlite's library object would answer with a C
# function, and end it.
ffi.lib._fntab["__dict__"] = {}  # noqa: SLF001 - there is no other way

RESULTS = Path(__file__).parent / "results"
BLOCK_TOKENS = 32
FIRST_TEXT_ID = 3
"""Lower ids are special tokens of the tiny model."""
BOOTSTRAP_SAMPLES = 10_000
RESULT_MARK = "RESULT "


def quiet_environment() -> None:
    """Set up the environment before vLLM is imported: no hub, no usage statistics, warnings only."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")


def tiny_engine_args(folder: Path, *, max_model_tokens: int, kv_blocks: int) -> dict[str, Any]:
    """Arguments of vLLM's `AsyncEngineArgs` for the tiny model, made in `folder`; the same for everything compared."""
    return {
        "model": str(make_tiny_llama(folder)),
        "dtype": "float32",
        "block_size": BLOCK_TOKENS,
        "enforce_eager": True,
        "max_model_len": max_model_tokens,
        "num_gpu_blocks_override": kv_blocks,
        "seed": 0,
    }


def sides_parser(
    description: str | None, sides: Sequence[str], *, name: str, rounds: int, samples: int, requests: int
) -> argparse.ArgumentParser:
    """Options of a benchmark that compares sides, each started in a separate process."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help="starts of each side")
    parser.add_argument("--samples", type=int, default=samples, help="samples per start")
    parser.add_argument("--requests", type=int, default=requests, help="requests of a sample")
    parser.add_argument("--tokens", type=int, default=200, help="tokens of each request")
    parser.add_argument("--name", default=name, help="of the file of results")
    parser.add_argument("--side", choices=sides, help=argparse.SUPPRESS)
    return parser


def rotating_rounds(sides: Sequence[str], n_rounds: int, run: Callable[[str], Any]) -> list[dict[str, Any]]:
    """Results of each side per round; the order of the sides rotates from round to round."""
    rounds = []
    for number in range(n_rounds):
        turn = number % len(sides)
        rounds.append({side: run(side) for side in (*sides[turn:], *sides[:turn])})
        print(f"round {number + 1} of {n_rounds} done", file=sys.stderr)
    return rounds


def run_in_own_process(
    file: str, side: str, options: argparse.Namespace, *, prefix: Sequence[str] = (), timeout_s: float | None = None
) -> list[dict[str, float]]:
    """One start of one side: this benchmark again, as a child that prints its samples with `print_samples`."""
    command = [
        *prefix, sys.executable, file, "--side", side, "--samples", str(options.samples),
        "--requests", str(options.requests), "--tokens", str(options.tokens),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith(RESULT_MARK)]
    if done.returncode != 0 or not lines:
        sys.exit(f"{side} failed:\n{done.stdout}\n{done.stderr}")
    samples: list[dict[str, float]] = json.loads(lines[-1].removeprefix(RESULT_MARK))
    return samples


def print_samples(samples: list[dict[str, float]]) -> None:
    """Pass a child's samples to its parent."""
    print(RESULT_MARK + json.dumps(samples))


def random_prompt(rng: np.random.Generator, n_tokens: int) -> list[int]:
    """Token ids of text that no engine has seen, so that nothing of it is in a prefix cache."""
    return [int(token) for token in rng.integers(FIRST_TEXT_ID, VOCAB_SIZE, n_tokens)]


def median_with_spread(values: Sequence[float], rng: np.random.Generator) -> dict[str, Any]:
    """Median with its 95 % bootstrap interval, and the 10th and 90th percentile of the values."""
    array = np.asarray(values)
    low, high = bootstrap_interval(array, rng)
    return {
        "n": len(array),
        "median": float(np.median(array)),
        "median_low": low,
        "median_high": high,
        "p10": float(np.percentile(array, 10)),
        "p90": float(np.percentile(array, 90)),
    }


def bootstrap_interval(values: NDArray[np.float64], rng: np.random.Generator) -> tuple[float, float]:
    """95 % interval of the median by the percentile bootstrap (values drawn with replacement)."""
    draws = values[rng.integers(0, len(values), (BOOTSTRAP_SAMPLES, len(values)))]
    low, high = np.percentile(np.median(draws, axis=1), (2.5, 97.5))
    return float(low), float(high)


def machine() -> dict[str, Any]:
    """The machine: its processor, cores, load at the start, versions, the commit."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    commit = subprocess.run(
        ["/usr/bin/env", "git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "load_1min_at_start": os.getloadavg()[0],
        "python": platform.python_version(),
        **{d.name: d.version for d in distributions() if d.name in {"vllm", "vllm-cpu", "nixl", "torch"}},
        "commit": commit.stdout.strip(),
    }


def write_results(name: str, host: dict[str, Any], settings: dict[str, Any], results: Any) -> Path:
    """Write `results/NAME.json` with the command and the machine; returns the file."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    content = {
        "command": " ".join(
            ["python", *(os.path.relpath(word) if word.endswith(".py") else word for word in sys.argv)]
        ),
        "at": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "machine": host,
        "settings": settings,
        "results": results,
    }
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path
