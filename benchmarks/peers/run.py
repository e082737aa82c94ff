"""
Our server and today's alternatives, on the same engines and the same traces, interleaved.

    python benchmarks/peers/run.py measure --model tiny --rounds 5 [--load 0.8] [--starts 1] [--only vllm-dp,servers]
        [--workloads mixed]
    python benchmarks/peers/run.py report [--only-json NAME]

A cell is one system, one workload, one round: a trace replayed with `cascadeinfer bench`, at a share (`--load`) of the
machine's capacity. That is measured first, once for each workload, on vLLM's data parallelism: requests per second that
it completes when `CAPACITY_REQUESTS` come almost at once, the median of `CAPACITY_RUNS`. Capacity and finished cells
are kept in out/peers and not measured again, so a run may be interrupted, or split with `--starts` and `--budget-s`
(servers started, seconds after which no cell is begun; exit code 3 while cells are missing, 0 when none is). In a
round, all systems get the same lengths and arrivals, with different words, so that no prefix cache holds anything from
the system before. The order of the systems rotates from round to round.

A cell is not kept, and is measured again, when the client was late, or when other work (or the host) took more than
`DISTURBED` of the machine's processor time while it ran. Each cell records that share.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE.parent))

import peer_tables  # noqa: E402 - beside this file, needs the folder above
from processes import Service, client_first  # noqa: E402
from systems import Group, Setup, entry_of, groups_for, running  # noqa: E402
from workloads import CASES, write_trace  # noqa: E402

from cascadeinfer.engines.models import embedded  # noqa: E402
from cascadeinfer.engines.models.tiny import make_tiny_llama  # noqa: E402
from cascadeinfer.loadgen.served_process import ServerFailedError  # noqa: E402
from cascadeinfer.results.record_files import read_records  # noqa: E402

OUT = ROOT / "out" / "peers"
VENV = ROOT / "out" / "peers-venv"
REQUIREMENTS = HERE / "requirements.txt"
INCOMPLETE = 3
CELL_TIMEOUT_S = 400
LATE_S = 0.25
"""
A cell whose requests went out later than this (99th percentile) says more about the client than about the system: it is
measured again.
"""
DISTURBED = 0.12
TRIES = 4
"""Times that a disturbed cell is measured in one call before it is left for the next."""
WARM_UP_REQUESTS = 12
WARM_UP_RATE_RPS = 4.0
CAPACITY_GROUP = "vllm-dp"
CAPACITY_REQUESTS = 200
CAPACITY_RATE_RPS = 50.0
CAPACITY_RUNS = 3


def install_routers() -> Path:
    """The routers' virtual environment; made once, and again when the requirements change."""
    stamp = VENV / ".installed"
    wanted = REQUIREMENTS.read_text()
    if not stamp.is_file() or stamp.read_text() != wanted:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], check=True)
        pip = [str(VENV / "bin" / "python"), "-m", "pip", "install", "--quiet", "--requirement", str(REQUIREMENTS)]
        subprocess.run(pip, check=True)
        stamp.write_text(wanted)
    return VENV / "bin"


def model_folder(name: str) -> Path:
    """The model's folder; the model is made if needed."""
    return embedded.prepare() if name == "smollm2" else make_tiny_llama(OUT / "models" / "tiny")


def cell_file(model: str, workload: str, system: str, number: int) -> Path:
    """File of a cell's records; a JSON file of the same name has its circumstances."""
    return OUT / model / workload / f"{system.replace(' ', '_').replace(':', '-').replace(',', '')}.{number}.parquet"


def capacity_rps(model: str, workload: str, setup: Setup) -> float:
    """Requests per second that the machine completes of this workload; measured once, see above."""
    folder = OUT / model / workload
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "capacity.json"
    if not file.is_file():
        group = next(group for group in groups_for(setup.case) if group.name == CAPACITY_GROUP)
        several = replace(setup.case.workloads[workload], requests=CAPACITY_REQUESTS)
        found = []
        with running(group, setup) as servers:
            url = servers[0].url
            warm_up(model, workload, servers[0], url, WARM_UP_RATE_RPS)
            for number in range(CAPACITY_RUNS):
                trace, records = folder / "capacity.jsonl", folder / "capacity.part"
                write_trace(several, 20_000 + number, CAPACITY_RATE_RPS, trace)
                bench(url, url, trace, 20_000 + number, "--label", group.name, "--out", str(records))
                done = read_records(records).records
                found.append(float(done.finished.sum() / (np.nanmax(done.finish_s) - np.min(done.arrival_s))))
        text = json.dumps({"capacity_rps": float(np.median(found)), "runs": found, "load_1min": os.getloadavg()[0]})
        file.write_text(text + "\n")
        print(f"{model} {workload}: {float(np.median(found)):.2f} requests/s are completed at most", file=sys.stderr)
    return float(json.loads(file.read_text())["capacity_rps"])


def replay(
    model: str, workload: str, system: str, number: int, services: list[Service], engine_url: str, rate_rps: float
) -> bool:
    """One cell; returns whether it was kept."""
    case = CASES[model]
    file = cell_file(model, workload, system, number)
    file.parent.mkdir(parents=True, exist_ok=True)
    trace = file.parent / f"trace.{number}.jsonl"
    write_trace(case.workloads[workload], number, rate_rps, trace)
    before = (time.monotonic(), sum(s.cpu_s() for s in services), psutil.cpu_times(), psutil.Process().cpu_times())
    done = bench(
        services[0].url, engine_url, trace, zlib.crc32(f"{system}/{number}".encode()),
        "--label", system, "--out", str(file.with_suffix(".part")), "--long-tokens", str(case.long_tokens),
        "--ttft-slo", str(case.ttft_slo_s), "--tpot-slo", str(case.tpot_slo_s),
    )  # fmt: skip
    wall_s = time.monotonic() - before[0]
    machine = psutil.cpu_times()
    now = psutil.Process().cpu_times()
    client_s = now.children_user + now.children_system - before[3].children_user - before[3].children_system
    servers_s = sum(s.cpu_s() for s in services) - before[1]
    all_s = _busy_s(machine) - _busy_s(before[2])
    capacity_s = wall_s * (psutil.cpu_count() or 1)
    beside = {
        "rate_rps": rate_rps,
        "at": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "wall_s": wall_s,
        "load_1min": os.getloadavg()[0],
        "servers_cpu_share": servers_s / capacity_s,
        "client_cpu_share": client_s / capacity_s,
        "others_cpu_share": max(0.0, all_s - servers_s - client_s) / capacity_s,
        "stolen_cpu_share": (_stolen_s(machine) - _stolen_s(before[2])) / capacity_s,
        "notes": [line for line in done.stderr.splitlines() if line.strip()],
    }
    records = read_records(file.with_suffix(".part")).records
    late_s = float(np.nanpercentile(records.dispatched_s - records.arrival_s, 99))
    disturbed = beside["others_cpu_share"] + beside["stolen_cpu_share"]
    if late_s > LATE_S or disturbed > DISTURBED:
        file.with_suffix(".part").unlink()
        print(
            f"{model} {workload} round {number} {system}: not kept, requests were sent {late_s:.2f} s late, other work "
            f"took {disturbed:.0%}",
            file=sys.stderr,
        )
        return False
    file.with_suffix(".json").write_text(json.dumps(beside, indent=2) + "\n")
    file.with_suffix(".part").rename(file)
    print(
        f"{model} {workload} round {number} {system}: {wall_s:.0f} s, load {beside['load_1min']:.1f}", file=sys.stderr
    )
    return True


def bench(url: str, engine_url: str, trace: Path, seed: int, *words: str) -> subprocess.CompletedProcess[str]:
    """`cascadeinfer bench` in a separate process; requests may fail, the generator may not."""
    command = [
        sys.executable, "-c", "from cascadeinfer.cli.main import main; main()", "bench", "--url", url, "--tokenize-url",
        engine_url, "--trace", str(trace), "--model", "bench", "--seed", str(seed), "--prompts", "text", *words,
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=CELL_TIMEOUT_S, check=False, preexec_fn=client_first
    )
    if done.returncode not in {0, 1} or "Traceback" in done.stderr:
        sys.exit(f"peers: bench ended with {done.returncode}:\n{done.stderr}")
    return done


def _busy_s(times: Any) -> float:
    """Processor time of the machine that was not idle."""
    return float(times.user + times.nice + times.system + times.irq + times.softirq)


def _stolen_s(times: Any) -> float:
    """Processor time that this (virtual) machine wanted and its host gave to others."""
    return float(times.steal)


def warm_up(model: str, workload: str, entry: Service, engine_url: str, rate_rps: float) -> None:
    """Send unmeasured requests of every kind: first contact, compilation, allocator."""
    trace = OUT / model / "warm-up.jsonl"
    trace.parent.mkdir(parents=True, exist_ok=True)
    write_trace(CASES[model].workloads[workload], 10_000, rate_rps, trace)
    words = ["--requests", str(WARM_UP_REQUESTS), "--rate", str(min(WARM_UP_RATE_RPS, rate_rps))]
    bench(entry.url, engine_url, trace, 10_000 + os.getpid(), *words)


def measure(options: argparse.Namespace) -> int:
    """Measure what is missing; returns the exit code."""
    setup = Setup(CASES[options.model], model_folder(options.model), install_routers(), OUT / "logs")
    setup.logs.mkdir(parents=True, exist_ok=True)
    chosen = [g for g in groups_for(setup.case) if not options.only or g.name in options.only.split(",")]
    workloads = options.workloads.split(",")
    rates = {workload: options.load * capacity_rps(options.model, workload, setup) for workload in workloads}
    started = 0
    deadline_s = time.monotonic() + options.budget_s if options.budget_s else float("inf")
    for number in range(options.rounds):
        turn = number % len(chosen)
        for group in chosen[turn:] + chosen[:turn]:
            missing = _missing(options.model, workloads, group, number)
            if not missing:
                continue
            if (options.starts and started == options.starts) or time.monotonic() > deadline_s:
                return INCOMPLETE
            started += 1
            _measure_group(options.model, group, missing, number, setup, rates, deadline_s)
    left = [_missing(options.model, workloads, group, n) for n in range(options.rounds) for group in chosen]
    return INCOMPLETE if any(left) else 0


def _missing(model: str, workloads: list[str], group: Group, number: int) -> list[tuple[str, str]]:
    """(workload, system) pairs without a finished cell, systems rotated."""
    turn = number % len(group.systems)
    systems = group.systems[turn:] + group.systems[:turn]
    return [(w, s) for w in workloads for s in systems if not cell_file(model, w, s, number).is_file()]


def _measure_group(
    model: str,
    group: Group,
    missing: list[tuple[str, str]],
    number: int,
    setup: Setup,
    rates: dict[str, float],
    deadline_s: float,
) -> None:
    with running(group, setup) as servers:
        # An engine's first requests are its slowest; each server gets its own, routers or not.
        for server in servers:
            warm_up(model, missing[0][0], server, servers[0].url, rates[missing[0][0]])
        for workload, system in missing:
            with entry_of(system, servers, setup) as services:
                for _ in range(TRIES):
                    if time.monotonic() > deadline_s:
                        return
                    if replay(model, workload, system, number, services, servers[0].url, rates[workload]):
                        break


def main() -> None:
    """Parse the options and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure", help="measure missing cells")
    measuring.add_argument("--model", choices=sorted(CASES), default="tiny")
    measuring.add_argument("--workloads", default="mixed,equal")
    measuring.add_argument("--rounds", type=int, default=5)
    measuring.add_argument("--load", type=float, default=0.8, help="rate as a share of the measured capacity")
    measuring.add_argument("--only", help="groups, separated by commas")
    measuring.add_argument("--starts", type=int, default=0, help="server starts in this call, 0 for all")
    measuring.add_argument("--budget-s", type=float, default=0.0, help="begin no cell after so long, 0 for no limit")
    reporting = commands.add_parser("report", help="tables from the cells that are there")
    reporting.add_argument("--only-json", metavar="NAME", help="write benchmarks/results/NAME.json and no tables")
    options = parser.parse_args()
    if options.command == "report":
        peer_tables.write(OUT, options.only_json)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is stopped
    try:
        sys.exit(measure(options))
    except ServerFailedError as error:
        sys.exit(f"peers: {error}")


if __name__ == "__main__":
    main()
