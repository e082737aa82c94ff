"""
Fingerprints of simulated runs: a change that preserves behaviour gives the same ones before and after, to the last bit.

    python tools/simulated_fingerprint.py > before.txt      # and after the change: ... | diff before.txt -

Every policy, two rates, two seeds, 1,500 requests of the sample trace on six instances (h200-llama-3.1-8b). A
fingerprint is the SHA-256 of an event log without its first line, which names the commit, or of all records of a run.
"""

import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

from pyarrow import parquet

POLICIES = (
    "bucket", "cascade", "cascade-no-refine", "least_loaded", "llumnix", "power_of_two", "prefix_aware", "round_robin",
    "static_length", "vllm_dp",
)  # fmt: skip
RATES = (8, 20)
COMMAND = "from cascadeinfer.cli.main import main; raise SystemExit(main())"


def fingerprints(folder: Path, policy: str, rate: int) -> dict[str, str]:
    """Fingerprints of one simulation: a log per seed, and the records of all seeds."""
    name = f"{policy}-{rate}"
    words = [
        "simulate", "--profile", "h200-llama-3.1-8b", "--trace", "sample", "--rate", str(rate), "--instances", "6",
        "--policy", policy, "--seeds", "2", "--requests", "1500",
        "--event-log", str(folder / f"{name}.log"), "--parquet", str(folder / f"{name}.parquet"),
    ]  # fmt: skip
    subprocess.run([sys.executable, "-c", COMMAND, *words], check=True, stdout=subprocess.DEVNULL)
    found = {}
    for log in sorted(folder.glob(f"{name}*.log")):
        found[log.name] = hashlib.sha256(log.read_bytes().partition(b"\n")[2]).hexdigest()
        log.unlink()
    records = parquet.read_table(folder / f"{name}.parquet")  # type: ignore[no-untyped-call]
    found[f"{name}.parquet"] = hashlib.sha256(repr(records.to_pydict()).encode()).hexdigest()
    return found


def main() -> None:
    """Print them."""
    with tempfile.TemporaryDirectory() as folder:
        for policy in POLICIES:
            for rate in RATES:
                for name, fingerprint in fingerprints(Path(folder), policy, rate).items():
                    print(fingerprint, name, flush=True)


if __name__ == "__main__":
    main()
