"""
A second opinion on `cascadeinfer bench`: NVIDIA's aiperf sends the same requests at the same times to the same server.

    python benchmarks/aiperf/compare.py [--rounds 3] [--requests 80] [--rate 2] [--servers paced,engines]
        [--aiperf PROGRAM]

Two servers. `paced` sends every token at a known time (paced_server.py), so both can be held against the truth.
`engines` is `cascadeinfer serve` with the tiny model on two instances and two stages, whose requests move; its prefix
caches are off, so that who comes second finds nothing there. A URL among --servers is one that runs already; it should
have the tiny model and no prefix caches either.

Both tools replay the same trace, and the bodies of the requests are the same bytes; each request has a connection of
its own. They take turns, and who begins alternates from round to round. Every request counts, from the first one
on. The ratios are aiperf's figure over ours, round by round. Without --aiperf, the version of requirements.txt is
installed into out/aiperf-venv.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE.parent))

import measuring  # noqa: E402 - in the folder above
from cascadeinfer.cluster.local import LOOPBACK, free_port  # noqa: E402
from cascadeinfer.config.traces import load_trace  # noqa: E402
from cascadeinfer.engines.models.tiny import make_tiny_llama  # noqa: E402
from cascadeinfer.loadgen.client import OpenAiClient  # noqa: E402
from cascadeinfer.loadgen.prompts import PromptKind, make_prompts  # noqa: E402
from cascadeinfer.loadgen.served_process import ServedProcess  # noqa: E402
from cascadeinfer.results.record_files import read_records  # noqa: E402
from cascadeinfer.results.records import RequestRecords  # noqa: E402
from cascadeinfer.workload.trace import Trace  # noqa: E402

VENV = ROOT / "out" / "aiperf-venv"
MODEL = "tiny"
"""Also the folder of its files; aiperf loads a tokenizer even where the server counts."""
N_INSTANCES = 2
MAX_MODEL_TOKENS = 1024
KV_BLOCKS = 1024
START_TIMEOUT_S = 1200.0
RUN_TIMEOUT_S = 900.0
WARM_UP_REQUESTS = 8
SEED = 1
TOOLS = ("bench", "aiperf")


class Figure(NamedTuple):
    """A figure of both tools; `field` is a property of our records, `tag` and `statistic` are aiperf's names."""

    name: str
    tag: str
    statistic: str
    field: str = ""
    to_seconds: float = 1e-3


FIGURES = (
    *(Figure(f"TTFT {s}", "time_to_first_token", s, "ttft_s") for s in ("avg", "p50", "p99")),
    *(Figure(f"TPOT (ITL) {s}", "inter_token_latency", s, "tpot_s") for s in ("avg", "p50", "p99")),
    *(Figure(f"e2e {s}", "request_latency", s, "e2e_s") for s in ("avg", "p50", "p99")),
    Figure("requests/s", "request_throughput", "avg", to_seconds=1.0),
    Figure("tokens/s", "output_token_throughput", "avg", to_seconds=1.0),
)
STATISTICS: dict[str, Callable[[Any], float]] = {
    "avg": lambda values: float(np.nanmean(values)),
    "p50": lambda values: float(np.nanpercentile(values, 50)),
    "p99": lambda values: float(np.nanpercentile(values, 99)),
}


class Target(NamedTuple):
    """
    A server to measure.

    Attributes:
        process: Not started yet.
        ready: The path that says that it serves.
        prompts: The kind of prompts for it; only a real server counts tokens.
    """

    process: ServedProcess
    ready: str
    prompts: PromptKind


def install_aiperf() -> Path:
    """The program in its own environment, made if it is missing."""
    program = VENV / "bin" / "aiperf"
    if not program.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], check=True)
        pip = [str(VENV / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-compile"]
        subprocess.run([*pip, "-r", str(HERE / "requirements.txt")], check=True)
    return program


def target_of(name: str, folder: Path) -> Target:
    """The server of this name."""
    port = free_port()
    arguments = measuring.tiny_engine_args(folder / MODEL, max_model_tokens=MAX_MODEL_TOKENS, kv_blocks=KV_BLOCKS)
    if name == "paced":
        command = [sys.executable, str(HERE / "paced_server.py"), "--port", str(port)]
        return Target(ServedProcess(command, port=port, log=folder / "paced.log"), "/v1/models", "words")
    words = [
        "serve", arguments["model"], "--served-model-name", MODEL, "--host", LOOPBACK, "--port", str(port),
        "--instances", str(N_INSTANCES), "--stages", "0-128:1,128-:1", "--dtype", arguments["dtype"],
        "--block-size", str(arguments["block_size"]), "--enforce-eager", "--max-model-len", str(MAX_MODEL_TOKENS),
        "--num-gpu-blocks-override", str(KV_BLOCKS), "--no-enable-prefix-caching", "--disable-uvicorn-access-log",
    ]  # fmt: skip
    command = [sys.executable, "-m", "cascadeinfer", *words]
    return Target(ServedProcess(command, port=port, log=folder / "engines.log"), "/health/ready", "text")


def write_trace(file: Path, n_requests: int, rate: float) -> None:
    """Poisson arrivals; prompts of 20 to 200 tokens and outputs of 40 to 240, so that a part crosses the stage edge."""
    rng = np.random.default_rng(SEED)
    arrivals = np.cumsum(rng.exponential(1.0 / rate, n_requests))
    rows = zip(
        arrivals - arrivals[0], rng.integers(20, 201, n_requests), rng.integers(40, 241, n_requests), strict=True
    )
    lines = ["arrival_s,prompt_tokens,output_tokens", *(f"{at:.6f},{prompt},{out}" for at, prompt, out in rows)]
    file.write_text("\n".join(lines) + "\n")


async def bodies_of(trace: Trace, url: str, kind: PromptKind) -> tuple[str, str]:
    """The model's name, and what `bench` will send as a trace of aiperf's with whole bodies."""
    async with OpenAiClient.connect(url) as client:
        maker = await make_prompts(client, trace, kind, seed=SEED)
        rows = [
            {
                "timestamp": 1000.0 * float(trace.arrival_s[row]),
                "payload": json.loads(client.body(maker.prompt(row), int(trace.output_tokens[row]))),
            }
            for row in range(len(trace))
        ]
        return client.model, "".join(json.dumps(row) + "\n" for row in rows)


def run_tool(command: list[str], folder: Path, name: str) -> None:
    """Run to the end; a failure ends the benchmark with what the tool said."""
    # With the hub offline, aiperf takes the folder of a tokenizer for the name of a repository.
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=RUN_TIMEOUT_S
    )
    if done.returncode != 0:
        sys.exit(f"{name} failed:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")


def bench(url: str, trace: Path, kind: PromptKind, folder: Path) -> RequestRecords:
    """One run of ours."""
    out = folder / "bench.parquet"
    words = ["bench", "--url", url, "--trace", str(trace), "--prompts", kind, "--seed", str(SEED), "--warm-up", "0"]
    run_tool([sys.executable, "-m", "cascadeinfer", *words, "--out", str(out)], folder, "bench")
    read = read_records(out)
    failed = [error for error in read.errors if error]
    if failed:
        sys.exit(f"bench: {len(failed)} requests failed, e.g. {failed[0]}")
    return read.records


def aiperf(program: Path, url: str, model: str, bodies: Path, folder: Path) -> dict[str, Any]:
    """One run of theirs: the summary that it exports."""
    artifacts = folder / "aiperf"
    words = [
        "profile", "--model", model, "--url", url, "--endpoint-type", "completions", "--streaming",
        "--input-file", str(bodies), "--custom-dataset-type", "mooncake-trace", "--fixed-schedule",
        "--fixed-schedule-auto-offset", "--use-server-token-count", "--tokenizer", str(folder.parent / MODEL),
        "--connection-reuse-strategy", "never", "--workers-max", "1", "--record-processors", "1", "--ui", "none",
        "--no-server-metrics", "--no-gpu-telemetry", "--artifact-dir", str(artifacts),
    ]  # fmt: skip
    run_tool([str(program), *words], folder, "aiperf")
    [file] = artifacts.rglob("profile_export_aiperf.json")
    summary: dict[str, Any] = json.loads(file.read_text())
    return summary


def ours(records: RequestRecords, since_s: Any) -> dict[str, float]:
    """Our figures, with latencies from these times on: when requests were due, or when they were sent."""
    columns = {"ttft_s": records.first_token_s - since_s, "tpot_s": records.tpot_s, "e2e_s": records.finish_s - since_s}
    figures = {f.name: STATISTICS[f.statistic](columns[f.field]) for f in FIGURES if f.field}
    span_s = float(np.nanmax(records.finish_s) - np.min(since_s))
    rates = {"requests/s": len(records) / span_s, "tokens/s": float(records.produced_tokens.sum()) / span_s}
    return {**figures, **rates}


def theirs(summary: dict[str, Any]) -> dict[str, float]:
    """The same figures as aiperf has them, in seconds."""
    return {f.name: f.to_seconds * float(summary[f.tag][f.statistic]) for f in FIGURES}


def moves_of(url: str) -> int:
    """Moves that have succeeded so far; none on a server that knows of none."""
    with urllib.request.urlopen(f"{url}/metrics") as answer:  # noqa: S310 - the server under test
        lines = answer.read().decode().splitlines()
    counts = [line for line in lines if line.startswith("cascadeinfer_migrations_total{") and 'outcome="moved"' in line]
    return sum(int(float(line.rpartition(" ")[2])) for line in counts)


def measure(name: str, options: argparse.Namespace, program: Path) -> Iterator[dict[str, Any]]:
    """All rounds on one server, each as it is done."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        if name.startswith("http"):
            make_tiny_llama(folder / MODEL)
            yield from rounds_on(name, "text", folder, options, program)
            return
        target = target_of(name, folder)
        with target.process as process:
            process.wait_ready(target.ready, START_TIMEOUT_S)
            yield from rounds_on(process.url, target.prompts, folder, options, program)


def rounds_on(
    url: str, kind: PromptKind, folder: Path, options: argparse.Namespace, program: Path
) -> Iterator[dict[str, Any]]:
    """The rounds on a server that is ready."""
    trace, warm_up, bodies = folder / "trace.csv", folder / "warm_up.csv", folder / "bodies.jsonl"
    write_trace(trace, options.requests, options.rate)
    write_trace(warm_up, WARM_UP_REQUESTS, options.rate)
    model, text = asyncio.run(bodies_of(load_trace(trace), url, kind))
    bodies.write_text(text)
    bench(url, warm_up, kind, folder)
    for number in range(options.rounds):
        one: dict[str, Any] = {}
        for tool in TOOLS if number % 2 == 0 else TOOLS[::-1]:
            before, began_s = moves_of(url), time.monotonic()
            own = folder / f"{number}-{tool}"
            own.mkdir()
            if tool == "bench":
                records = bench(url, trace, kind, own)
                one["bench"] = ours(records, records.arrival_s)
                one["bench from sending"] = ours(records, records.dispatched_s)
            else:
                one["aiperf"] = theirs(aiperf(program, url, model, bodies, own))
            one[f"{tool} run"] = {
                "wall_s": time.monotonic() - began_s,
                "moves": moves_of(url) - before,
                "load_1min": os.getloadavg()[0],
            }
        yield one


def table(name: str, rounds: list[dict[str, Any]]) -> str:
    """Markdown: a row per figure; medians of the rounds, and the ratio of each round."""
    lines = [
        f"| {name}: figure | `bench` | `bench`, from sending | aiperf | aiperf / `bench`, per round |",
        "|---|---|---|---|---|",
    ]
    for figure in FIGURES:
        columns = [[one[tool][figure.name] for one in rounds] for tool in ("bench", "bench from sending", "aiperf")]
        factor, unit = (1e3, " ms") if figure.field else (1.0, "")
        cells = [f"{factor * float(np.median(values)):.4g}{unit}" for values in columns]
        ratios = ", ".join(f"{theirs / mine:.3f}" for mine, theirs in zip(columns[0], columns[2], strict=True))
        lines.append(f"| {figure.name} | {' | '.join(cells)} | {ratios} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print tables, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=80, help="requests of a run")
    parser.add_argument("--rate", type=float, default=2.0, help="requests per second")
    parser.add_argument("--servers", default="paced,engines", help="with commas; also the URL of one that runs")
    parser.add_argument("--aiperf", type=Path, help="the program; default: installed into out/aiperf-venv")
    options = parser.parse_args()
    measuring.quiet_environment()
    host = measuring.machine()
    program = options.aiperf or install_aiperf()
    version = subprocess.run([str(program), "--version"], capture_output=True, text=True, check=True).stdout.strip()
    settings = {"aiperf": version, "rounds": options.rounds, "requests": options.requests, "rate_rps": options.rate}
    for name in options.servers.split(","):
        rounds: list[dict[str, Any]] = []
        label = "running" if name.startswith("http") else name
        for one in measure(name, options, program):
            rounds.append(one)
            file = measuring.write_results(f"aiperf_{label}", host, settings, rounds)
            print(f"{name}: round {len(rounds)} of {options.rounds} done: {file}", file=sys.stderr)
        print(table(label, rounds), end="\n\n")


if __name__ == "__main__":
    main()
