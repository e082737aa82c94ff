"""
Size of an event log whose load reports are written as changes, against one in which each is written in full.

    python benchmarks/event_log_size.py [--instances 64] [--idle-rate 0.5] [--loaded-rate 200] [--requests 60 6000]

Two simulated runs (the sample trace, profile h200-llama-3.1-8b, policy cascade, ten reports per second and instance):
one of nearly idle instances, one of busy ones. The log of each is read and encoded once more, with every report in
full. A server asks idle instances less often than the simulator does (`--idle-report-interval-s`), which saves more.
"""

import argparse
import gzip
import subprocess
import sys
import tempfile
from pathlib import Path

import measuring
from cascadeinfer.core.events import InstanceReported
from cascadeinfer.eventlog.reader import LoggedEvent, open_log
from cascadeinfer.eventlog.rotation import GZIP_LEVEL
from cascadeinfer.eventlog.writer import Encoder

COMMAND = "from cascadeinfer.cli.main import main; raise SystemExit(main())"


def simulated(path: Path, instances: int, rate: float, requests: int) -> None:
    """Simulate a run and write its log."""
    words = [
        "simulate", "--profile", "h200-llama-3.1-8b", "--trace", "sample", "--rate", str(rate), "--instances",
        str(instances), "--policy", "cascade", "--seeds", "1", "--requests", str(requests), "--event-log", str(path),
    ]  # fmt: skip
    subprocess.run([sys.executable, "-c", COMMAND, *words], check=True, stdout=subprocess.DEVNULL)


def in_full(path: Path) -> bytes:
    """The log with every report in full."""
    log, encoder = open_log(path), Encoder()
    lines = [encoder.header(log.header)]
    for entry in log:
        assert isinstance(entry, LoggedEvent)
        encoder.header(log.header)  # forgets what has been written
        lines.append(encoder.event((entry.n, entry.at_s, entry.event, entry.effects, entry.failed)))
    return b"\n".join(lines)


def sizes(path: Path) -> dict[str, float]:
    """Bytes of a log as it is and in full, plain and compressed, and the share of reports among its events."""
    written, full = path.read_bytes(), in_full(path)
    reports = [isinstance(entry, LoggedEvent) and isinstance(entry.event, InstanceReported) for entry in open_log(path)]
    packed, packed_full = (len(gzip.compress(content, GZIP_LEVEL)) for content in (written, full))
    return {
        "events": len(reports),
        "reports_share": sum(reports) / len(reports),
        "bytes": len(written),
        "bytes_in_full": len(full),
        "ratio": len(full) / len(written),
        "ratio_compressed": packed_full / packed,
    }


def main() -> None:
    """Simulate, compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, default=64)
    parser.add_argument("--idle-rate", type=float, default=0.5, help="requests per second of the idle run")
    parser.add_argument("--loaded-rate", type=float, default=200.0, help="requests per second of the loaded run")
    parser.add_argument("--requests", type=int, nargs=2, default=(60, 6000), help="requests of the two runs")
    options = parser.parse_args()
    host, results = measuring.machine(), {}
    print("| run | events | reports among them | MB in full | MB as changes | ratio | ratio, compressed |")
    print("|---|---|---|---|---|---|---|")
    runs = (("idle", options.idle_rate), ("loaded", options.loaded_rate))
    for (name, rate), requests in zip(runs, options.requests, strict=True):
        with tempfile.TemporaryDirectory() as folder:
            simulated(Path(folder) / "log", options.instances, rate, requests)
            found = results[name] = sizes(Path(folder) / "log")
        print(
            f"| {name} | {found['events']:,} | {found['reports_share']:.1%} | {found['bytes_in_full'] / 1e6:.1f} | "
            f"{found['bytes'] / 1e6:.1f} | {found['ratio']:.1f} | {found['ratio_compressed']:.1f} |"
        )
    print(measuring.write_results("event_log_size", host, vars(options), results))


if __name__ == "__main__":
    main()
