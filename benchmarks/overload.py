"""
Ten times more requests than a server can take, for a minute: what is answered or refused, memory, and time to recover.

    python benchmarks/overload.py [--times 10] [--seconds 60] [--name overload]

A real server (`cascadeinfer serve`, policy `cascade`, two instances of the tiny model, `--max-queued-requests 32`).
First its capacity is measured: answers per second while as many requests as it takes are in progress. Then one trace is
replayed in open loop, each stream on its own connection: calm at a share of the capacity, overload, calm again.
Meanwhile the memory of the front end and of the engines is read every second (resident set size; memory shared by
processes counts in each). The client retries nothing.

"Recovered" is the first moment after the overload from which every request of the calm gets its first token within a
second. All latencies count from the time at which a request was due, so they include the delay of a client that the
machine leaves no time; that lateness is among the figures.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "peers"))

from processes import Service, client_first  # noqa: E402 - in the folder below

import measuring  # noqa: E402
from cascadeinfer.cluster.local import LOOPBACK, free_port  # noqa: E402
from cascadeinfer.loadgen.client import OpenAiClient  # noqa: E402
from cascadeinfer.loadgen.prompts import PromptMaker, make_prompts  # noqa: E402
from cascadeinfer.loadgen.replay import Replay, replay  # noqa: E402
from cascadeinfer.results.estimates import errors_by_kind  # noqa: E402
from cascadeinfer.results.records import RequestRecords  # noqa: E402
from cascadeinfer.workload.arrivals import poisson_arrivals  # noqa: E402
from cascadeinfer.workload.trace import Trace  # noqa: E402

PROMPT_TOKENS, OUTPUT_TOKENS = 64, 600
MAX_NUM_SEQS, MAX_QUEUED = 16, 32
N_INSTANCES = 2
CALM_SHARE = 0.3
CALM_S, CALM_AFTER_S = 30.0, 60.0
CAPACITY_S = 40.0
CAPACITY_WARM_UP_S = 20.0
N_CAPACITY_CLIENTS = N_INSTANCES * MAX_NUM_SEQS * 3 // 2
TTFT_LIMIT_S = 1.0
START_TIMEOUT_S = 240.0
REQUEST_TIMEOUT_S = 300.0
MEMORY_S = 1.0


@dataclass
class Memory:
    """Memory of the server in bytes, over time."""

    server: Service
    front_end: list[int] = field(default_factory=list)
    engines: list[int] = field(default_factory=list)

    async def watch(self) -> None:
        """Read the memory every second until cancelled."""
        while True:
            front_end, *engines = self.server.family()
            self.front_end.append(front_end.memory_info().rss)
            total = 0
            for process in engines:
                with contextlib.suppress(psutil.NoSuchProcess):
                    total += process.memory_info().rss
            self.engines.append(total)
            await asyncio.sleep(MEMORY_S)


def command(folder: Path, port: int) -> list[str]:
    """The command of the server."""
    arguments = measuring.tiny_engine_args(folder, max_model_tokens=1024, kv_blocks=1024)
    return [
        sys.executable, "-c", "from cascadeinfer.cli.main import main; main()", "serve", arguments["model"],
        "--served-model-name", "tiny", "--host", LOOPBACK, "--port", str(port), "--dtype", "float32", "--enforce-eager",
        "--block-size", str(measuring.BLOCK_TOKENS), "--max-model-len", "1024", "--num-gpu-blocks-override", "1024",
        "--max-num-seqs", str(MAX_NUM_SEQS), "--instances", str(N_INSTANCES), "--policy", "cascade",
        "--max-queued-requests", str(MAX_QUEUED), "--disable-uvicorn-access-log",
    ]  # fmt: skip


async def capacity_rps(client: OpenAiClient, prompts: PromptMaker, n_prompts: int) -> float:
    """
    Answers per second with as many requests in progress as can run, and half as many again.

    Each client's first answer has another length, so that they do not all end together.
    """
    loop = asyncio.get_running_loop()
    begin_s = loop.time() + CAPACITY_WARM_UP_S
    end_s = begin_s + CAPACITY_S
    answered = 0

    async def one_after_another(first: int) -> None:
        nonlocal answered
        for number in range(first, n_prompts, N_CAPACITY_CLIENTS):
            n_tokens = OUTPUT_TOKENS if number != first else 1 + OUTPUT_TOKENS * first // N_CAPACITY_CLIENTS
            body = client.body(prompts.prompt(number), n_tokens)
            answer = await client.stream(
                body, n_tokens, loop.time, timeout_s=REQUEST_TIMEOUT_S, request_id=f"capacity-{number}"
            )
            assert not answer.error, answer.error
            if loop.time() > end_s:
                return
            answered += loop.time() > begin_s
        raise AssertionError("too few prompts for the time")

    await asyncio.gather(*(one_after_another(first) for first in range(N_CAPACITY_CLIENTS)))
    return answered / CAPACITY_S


def trace_of(rate_rps: float, options: argparse.Namespace) -> tuple[Trace, tuple[float, float]]:
    """Calm, overload, calm; and the times at which the overload begins and ends."""
    rng = np.random.default_rng(0)
    phases = (
        (CALM_S, CALM_SHARE * rate_rps),
        (options.seconds, options.times * rate_rps),
        (CALM_AFTER_S, CALM_SHARE * rate_rps),
    )
    arrivals: list[Any] = []
    begin_s = 0.0
    for seconds, rate in phases:
        own = poisson_arrivals(rate, max(1, round(rate * seconds)), rng)
        arrivals.append(begin_s + own[own < seconds])
        begin_s += seconds
    times = np.concatenate(arrivals)
    same = np.full(len(times), 1)
    return Trace.from_columns(PROMPT_TOKENS * same, OUTPUT_TOKENS * same, times), (CALM_S, CALM_S + options.seconds)


def figures(result: Replay, borders: tuple[float, float], rate_rps: float, memory: Memory) -> dict[str, Any]:
    """Figures of the replay."""
    begin_s, end_s = borders
    records = result.records
    before = records.arrived_in(0.0, begin_s)
    over = records.arrived_in(begin_s, end_s)
    after = records.arrived_in(end_s, np.inf)
    answered = records.finish_s[np.isfinite(records.finish_s)]
    is_slow = ~(after.ttft_s <= TTFT_LIMIT_S)
    recovered_s = float(after.arrival_s[np.flatnonzero(is_slow)[-1]] - end_s) if is_slow.any() else 0.0
    return {
        "capacity_rps": rate_rps,
        "errors": errors_by_kind(result.errors),
        "late_s": dict(
            zip(("p50", "p99"), np.percentile(records.dispatched_s - records.arrival_s, [50, 99]).tolist(), strict=True)
        ),
        "phases": {"before": phase(before), "overload": phase(over), "after": phase(after)},
        "answers_per_s_in_overload_over_capacity": float(
            np.count_nonzero((answered >= begin_s) & (answered < end_s)) / (end_s - begin_s) / rate_rps
        ),
        "ttft_limit_s": TTFT_LIMIT_S,
        "recovered_after_s": recovered_s,
        "front_end_bytes": spread(memory.front_end),
        "engines_bytes": spread(memory.engines),
    }


def phase(records: RequestRecords) -> dict[str, Any]:
    """Figures of the requests that arrived in one phase."""
    done = records.rows(records.finished)
    return {
        "requests": len(records),
        "answered": len(done),
        "refused": int(records.rejected.sum()),
        "ttft_s_mean": float(done.ttft_s.mean()),
        "tpot_s_mean": float(done.tpot_s.mean()),
        "e2e_s_max": float(done.e2e_s.max()),
    }


def spread(values: list[int]) -> dict[str, int]:
    """First, highest and last value."""
    return {"first": values[0], "most": max(values), "last": values[-1]}


async def measure(server: Service, options: argparse.Namespace) -> dict[str, Any]:
    """Measure the capacity, then replay the trace while watching the memory."""
    async with OpenAiClient.connect(server.url) as client:
        n_prompts = 4000
        warm = Trace.from_columns([PROMPT_TOKENS] * n_prompts, [OUTPUT_TOKENS] * n_prompts, [0.0] * n_prompts)
        rate_rps = await capacity_rps(client, await make_prompts(client, warm, "ids", seed=1), n_prompts)
        trace, borders = trace_of(rate_rps, options)
        prompts = await make_prompts(client, trace, "ids", seed=2)
        memory = Memory(server)
        async with asyncio.TaskGroup() as group:  # ends the replay too, if the server is gone
            watching = group.create_task(memory.watch())
            result = await replay(trace, client, prompts, timeout_s=REQUEST_TIMEOUT_S, name="overload")
            await asyncio.sleep(2 * MEMORY_S)
            watching.cancel()
        return figures(result, borders, rate_rps, memory)


def main() -> None:
    """Parse, start, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=float, default=10.0, help="the capacity that arrives in overload")
    parser.add_argument("--seconds", type=float, default=60.0, help="of overload")
    parser.add_argument("--name", default="overload", help="of the file of results")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is stopped
    measuring.quiet_environment()
    host = measuring.machine()
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        with Service("server", command(Path(folder) / "model", port), port, Path(folder) / "server.log") as server:
            server.wait_ready("/health/ready", START_TIMEOUT_S)
            client_first()
            found = asyncio.run(measure(server, options))
    settings = {
        "times": options.times, "seconds": options.seconds, "calm_share": CALM_SHARE, "calm_s": CALM_S,
        "calm_after_s": CALM_AFTER_S, "instances": N_INSTANCES,
        "max_num_seqs": MAX_NUM_SEQS, "max_queued_requests": MAX_QUEUED, "prompt_tokens": PROMPT_TOKENS,
        "output_tokens": OUTPUT_TOKENS,
    }  # fmt: skip
    print(measuring.write_results(options.name, host, settings, found))
    print(found)


if __name__ == "__main__":
    main()
