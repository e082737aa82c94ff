"""
Does the simulator predict the real run? Mean TTFT and TPOT of five workloads on a real vLLM instance, and as simulated
from its own profile.

    python benchmarks/parity.py [--rounds 3] [--load 0.5] [--seconds 8] [--profile-minutes 0.75] [--name parity]
        [--more]

Each round runs `cascadeinfer profile` on an engine with the same options, then starts the instance, and replays the
same arrivals and lengths, workload after workload, on the real system and in the simulator with that profile. A round
is short, so that profile and workloads see the same machine; comparing rounds shows how much the machine itself changes
meanwhile. Results are written after every round; `--more` adds rounds to those of an earlier run.

The instance computes on one core (the last); everything else has the rest, as a front end should: on shared cores,
steps take up to half as long again as in the profile, by an amount that depends on the load, which no step model knows.
The real side is the runtime under vLLM's `AsyncLLM`, tokens in, text streamed out. What it adds before the first token
(queues between processes, detokenisation) is not in the step model: it is measured in each round, with single short
requests beside a few that decode, and added to every predicted TTFT as one number, `front_end_s`. Nothing is added to
TPOT. Rates follow from the profile: `--load` times what the model says the instance can serve.

Besides the latencies, `step_time` is the profile's prediction of the very steps that the engine made in the workload,
over the time that they took. An error there comes from the step model, or from a machine that has changed since. The
`learnt` prediction is that of the same simulator with the profile as the server would have it after the workload,
because it learns while it serves (`core/cost/learning.py`): it has seen the steps, not the latencies. The rest of its
error is the simulator's.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import measuring

if __name__ == "__main__":  # see client_overhead.py: the engines' processes import this file again and need none of it
    measuring.quiet_environment()
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    from cascadeinfer.assemble import make_runtime
    from cascadeinfer.config.profiles import load_profile
    from cascadeinfer.config.schema import ServeOptions
    from cascadeinfer.core.cost.fit import StepSamples, predict_s
    from cascadeinfer.core.cost.histogram import LengthHistogram
    from cascadeinfer.core.cost.latency import BatchFeatures, StepModel
    from cascadeinfer.core.cost.learning import StepLearner
    from cascadeinfer.core.cost.profile import CostProfile
    from cascadeinfer.core.cost.samples import StepSample
    from cascadeinfer.core.plan.planner import capacity_rate
    from cascadeinfer.core.policies.round_robin import RoundRobin
    from cascadeinfer.frontend.running import running_llm
    from cascadeinfer.sim.run import simulate
    from cascadeinfer.sim.settings import SimConfig
    from cascadeinfer.workload.arrivals import gamma_arrivals, poisson_arrivals
    from cascadeinfer.workload.trace import Trace

MAX_MODEL_TOKENS = 2048
MAX_NUM_SEQS = 48
KV_BLOCKS = 1600
BESIDE = (12, 64, 600)
"""Number of requests that decode while the front end is measured, their prompt and their output length."""
SINGLE_TOKENS = 64
SINGLE_REQUESTS = 24
REPORT_S = 0.05
"""Interval of the reports, which carry the steps that the engine timed."""
FIGURES = ("ttft_s", "tpot_s")
KINDS = ("predicted", "learnt")
FEWEST, MOST = 24, 160
"""Requests of a workload."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """Distribution of lengths, and burstiness of arrivals (coefficient of variation of the gaps)."""

    name: str
    lengths: Callable[[np.random.Generator, int], tuple[NDArray[np.int64], NDArray[np.int64]]]
    cv: float = 1.0


def _equal(
    prompt: int, output: int
) -> Callable[[np.random.Generator, int], tuple[NDArray[np.int64], NDArray[np.int64]]]:
    return lambda _, n: (np.full(n, prompt), np.full(n, output))


def _mixed(rng: np.random.Generator, n: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Nine chat turns per document."""
    long = rng.random(n) < 0.1
    prompts = np.where(long, rng.integers(900, 1600, n), rng.integers(16, 200, n))
    return prompts, rng.integers(16, 150, n)


WORKLOADS = (
    Workload("equal short", _equal(64, 64)),
    Workload("equal long", _equal(1000, 100)),
    Workload("mixed", _mixed),
    Workload("bursty", _mixed, cv=3.0),
    Workload("prefill heavy", _equal(1400, 8)),
)


class Bench:
    """The running system, with its measurements."""

    def __init__(self, llm: Any, rng: np.random.Generator) -> None:
        """Take over a started system, and listen to its instance's reports of its steps."""
        self.llm = llm
        self.rng = rng
        self.steps: list[StepSample] = []
        self._numbers = 0
        reported = llm.runtime.instance_reported

        def heard(engine: Any, report: Any, counters: Any) -> None:
            self.steps += report.steps
            reported(engine, report, counters)

        llm.runtime.instance_reported = heard

    async def one(self, prompt_tokens: int, output_tokens: int, moments: list[float] | None = None) -> list[float]:
        """
        Run a request; returns when it was sent and when each of its tokens reached the client. `moments` is filled as
        they come.
        """
        self._numbers += 1
        parameters = SamplingParams(
            temperature=0, max_tokens=output_tokens, ignore_eos=True, output_kind=RequestOutputKind.DELTA
        )
        prompt = {"prompt_token_ids": measuring.random_prompt(self.rng, prompt_tokens)}
        moments = [] if moments is None else moments
        moments.append(time.perf_counter())
        async for output in self.llm.generate(prompt, parameters, f"p{self._numbers}"):
            moments += [time.perf_counter()] * len(output.outputs[0].token_ids)
        assert len(moments) == 1 + output_tokens, f"{len(moments) - 1} of {output_tokens} tokens came"
        return moments

    async def front_end_s(self, model: StepModel) -> float:
        """Median time of a first token beyond half a decode step and its own step."""
        count, prompt, output = BESIDE
        beside: list[list[float]] = [[] for _ in range(count)]
        decoding = [asyncio.create_task(self.one(prompt, output, moments)) for moments in beside]
        while not all(len(moments) > 2 for moments in beside):  # noqa: ASYNC110 - nobody says when tokens come
            await asyncio.sleep(0.01)
        extra = []
        for wait_s in self.rng.uniform(0.005, 0.025, SINGLE_REQUESTS):
            await asyncio.sleep(wait_s)  # so that requests come anywhere in a step
            kv = sum(prompt + len(moments) for moments in beside)
            batch = BatchFeatures(count, kv, kv // count)
            own = dataclasses.replace(
                batch, prefill_tokens=SINGLE_TOKENS, prefill_attention_tokens=SINGLE_TOKENS * (SINGLE_TOKENS + 1) / 2
            )
            sent_s, first_s = await self.one(SINGLE_TOKENS, 1)
            extra.append(first_s - sent_s - 0.5 * model.step_s(batch) - model.step_s(own))
        assert not any(task.done() for task in decoding), "they ended before the last single request"
        await asyncio.gather(*decoding)
        return float(np.median(extra))

    async def replay(self, trace: Trace) -> dict[str, float]:
        """Replay the trace in real time, open loop: mean TTFT and TPOT. Afterwards `steps` has the steps it took."""
        await asyncio.sleep(2 * REPORT_S)
        self.steps.clear()
        start_s = time.perf_counter() + 0.2

        async def send(at_s: float, prompt: int, output: int) -> tuple[float, float, float]:
            await asyncio.sleep(max(0.0, start_s + at_s - time.perf_counter()))
            moments = await self.one(prompt, output)
            return moments[1] - moments[0], (moments[-1] - moments[1]) / (output - 1), moments[0] - start_s - at_s

        rows = zip(trace.arrival_s.tolist(), trace.prompt_tokens.tolist(), trace.output_tokens.tolist(), strict=True)
        figures = np.array(await asyncio.gather(*(send(*row) for row in rows)))
        await asyncio.sleep(2 * REPORT_S)
        return {
            "ttft_s": float(figures[:, 0].mean()),
            "tpot_s": float(figures[:, 1].mean()),
            "late_s": float(figures[:, 2].mean()),
        }


def engine_options() -> dict[str, Any]:
    """Options of the profiled engine and of the one that serves."""
    return {"max_num_seqs": MAX_NUM_SEQS, "max_num_batched_tokens": MAX_MODEL_TOKENS, "enable_prefix_caching": False}


def measured_profile(arguments: dict[str, Any], folder: Path, minutes: float) -> CostProfile:
    """The profile that `cascadeinfer profile` makes of the engine."""
    file = folder / "profile.json"
    command = [sys.executable, "-c", "from cascadeinfer.cli.main import main; main()", "profile", arguments["model"]]
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if name == "model":
            continue
        command += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    file.unlink(missing_ok=True)
    file.with_name("profile.samples.jsonl").unlink(missing_ok=True)
    command += ["--output", str(file), "--minutes", str(minutes)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"profile ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return load_profile(file)


def predicted(trace: Trace, model: StepModel, capacity: Any, front_end_s: float) -> dict[str, float]:
    """The simulator's figures for the trace."""
    config = SimConfig(
        instances=1,
        capacity=capacity,
        step_model=model,
        kv_bytes_per_token=1000.0,
        context_tokens=MAX_MODEL_TOKENS,
    )
    records = simulate(trace, RoundRobin(), config).requests
    return {"ttft_s": float(np.mean(records.ttft_s)) + front_end_s, "tpot_s": float(np.mean(records.tpot_s))}


def trace_of(
    workload: Workload, model: StepModel, capacity: Any, options: argparse.Namespace, seed: int
) -> tuple[Trace, float]:
    """A few seconds of arrivals at the requested share of the capacity, and their rate."""
    rng = np.random.default_rng(seed)
    prompts, outputs = workload.lengths(rng, 1000)
    most_rps = capacity_rate(LengthHistogram.from_requests(prompts, outputs), model, capacity, 1)
    rate_rps = options.load * most_rps
    n = int(np.clip(round(rate_rps * options.seconds), FEWEST, MOST))
    arrivals = (
        poisson_arrivals(rate_rps, n, rng) if workload.cv == 1.0 else gamma_arrivals(rate_rps, workload.cv, n, rng)
    )
    return Trace.from_columns(prompts[:n], outputs[:n], arrivals), rate_rps


async def one_round(bench: Bench, model: StepModel, options: argparse.Namespace, number: int) -> dict[str, Any]:
    """Every workload, real and simulated."""
    capacity = next(iter(bench.llm.runtime.fleet)).capacity
    front_end_s = await bench.front_end_s(model)
    rows = {}
    for workload in WORKLOADS:
        trace, rate_rps = trace_of(workload, model, capacity, options, seed=number)
        real = await bench.replay(trace)
        taken = StepSamples.of([step.batch for step in bench.steps], [step.step_s for step in bench.steps])
        learner = StepLearner(model)
        learner.observe(bench.steps)
        learner.update(0.0)
        rows[workload.name] = {
            "requests": len(trace), "rate_per_s": rate_rps, "steps": len(taken), "real": real,
            "predicted": predicted(trace, model, capacity, front_end_s),
            "learnt": predicted(trace, learner.model or model, capacity, front_end_s),
            "predicted_over_real_step_time": float(predict_s(model, taken).sum() / taken.step_s.sum()),
            "learnt_over_real_step_time": float(predict_s(learner.model or model, taken).sum() / taken.step_s.sum()),
        }  # fmt: skip
        print(f"round {number + 1}, {workload.name}: {rows[workload.name]}", file=sys.stderr)
    return {"front_end_s": front_end_s, "workloads": rows}


async def serve_round(
    arguments: dict[str, Any], profile: CostProfile, options: argparse.Namespace, number: int
) -> dict[str, Any]:
    """Start the instance, warm it up, measure."""
    serving = ServeOptions(instances=1, policy="round_robin", report_interval_s=REPORT_S)
    runtime = make_runtime(AsyncEngineArgs(**arguments), serving, log_stats=False)
    async with running_llm(runtime, log_stats=False) as llm:
        bench = Bench(llm, np.random.default_rng(number))
        await asyncio.gather(*(bench.one(length, 20) for length in (64, 500, 1500) for _ in range(8)))
        return await one_round(bench, profile.step_model, options, number)


def measure(options: argparse.Namespace, done: int, write: Callable[[dict[str, Any]], None]) -> None:
    """Run the rounds; `write` gets each of them, of which `done` existed before."""
    *others, last = sorted(os.sched_getaffinity(0))
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = str(last)
    os.sched_setaffinity(0, others)
    with tempfile.TemporaryDirectory() as folder:
        arguments = measuring.tiny_engine_args(Path(folder), max_model_tokens=MAX_MODEL_TOKENS, kv_blocks=KV_BLOCKS)
        arguments |= engine_options()
        for number in range(done, done + options.rounds):
            profile = measured_profile(arguments, Path(folder), options.profile_minutes)
            found = asyncio.run(serve_round(arguments, profile, options, number))
            errors = {error.part: error.median for error in profile.fit_errors}
            write({"step_model": dataclasses.asdict(profile.step_model), "profile_errors_median": errors} | found)


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Per workload and figure: real, predicted, error (median over rounds), and the real figure's spread."""
    table: dict[str, Any] = {}
    for workload in WORKLOADS:
        rows = [one["workloads"][workload.name] for one in rounds]
        steps = [row["predicted_over_real_step_time"] for row in rows]
        table[workload.name] = {"step_time": {"predicted_over_real": float(np.median(steps)), "per_round": steps}}
        for figure in FIGURES:
            real = np.array([row["real"][figure] for row in rows])
            table[workload.name][figure] = {
                "real": float(np.median(real)),
                "real_max_over_min": float(real.max() / real.min()),
            }
            for kind in KINDS:
                ratios = np.array([row[kind][figure] for row in rows]) / real
                table[workload.name][figure][kind] = {
                    "over_real": float(np.median(ratios)),
                    "per_round": ratios.tolist(),
                    "error": float(np.median(np.abs(ratios - 1.0))),
                }
    errors = {
        kind: {
            name: float(np.median([row[figure][kind]["error"] for row in table.values() for figure in figures]))
            for name, figures in (("ttft", FIGURES[:1]), ("tpot", FIGURES[1:]), ("both", FIGURES))
        }
        for kind in KINDS
    }
    return {"workloads": table, "median_error": errors}


def show(table: dict[str, Any]) -> None:
    """A table on standard output."""
    print(
        "| workload | figure | real ms; max / min of rounds | predicted / real: median; per round | error | learnt "
        "/ real: median; per round | error "
        "| step time: predicted / real |\n|---|---|---|---|---|---|---|---|"
    )
    for name, row in table["workloads"].items():
        for figure in FIGURES:
            cells = []
            for kind in KINDS:
                found = row[figure][kind]
                per_round = ", ".join(f"{ratio:.2f}" for ratio in found["per_round"])
                cells.append(f"{found['over_real']:.2f}; {per_round} | {100 * found['error']:.0f} %")
            print(
                f"| {name} | {figure.removesuffix('_s').upper()} | {1e3 * row[figure]['real']:.1f}; "
                f"{row[figure]['real_max_over_min']:.2f} "
                f"| {' | '.join(cells)} | {row['step_time']['predicted_over_real']:.2f} |"
            )
    print(json.dumps(table["median_error"]))


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="profiles, each with all workloads")
    parser.add_argument("--load", type=float, default=0.5, help="share of the modelled capacity that arrives")
    parser.add_argument("--seconds", type=float, default=8.0, help="of arrivals per workload")
    parser.add_argument("--more", action="store_true", help="add to the rounds of an earlier run of the same name")
    parser.add_argument("--profile-minutes", type=float, default=0.75, help="of measuring for each profile")
    parser.add_argument("--name", default="parity", help="of the file of results")
    options = parser.parse_args()
    host = measuring.machine()
    names = ("load", "seconds", "profile_minutes")
    settings = {name: getattr(options, name) for name in names} | {
        "max_num_seqs": MAX_NUM_SEQS, "max_model_tokens": MAX_MODEL_TOKENS, "kv_blocks": KV_BLOCKS,
    }  # fmt: skip
    rounds: list[dict[str, Any]] = []
    if options.more:
        before = json.loads((measuring.RESULTS / f"{options.name}.json").read_text())
        if before["settings"] != settings:
            parser.error(f"--more: {options.name} was measured with {before['settings']}")
        rounds = before["results"]["rounds"]

    def write(one: dict[str, Any]) -> None:
        rounds.append(one)
        print(measuring.write_results(options.name, host, settings, {"summary": summary(rounds), "rounds": rounds}))

    measure(options, len(rounds), write)
    show(summary(rounds))


if __name__ == "__main__":
    main()
