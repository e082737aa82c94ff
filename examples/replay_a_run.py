"""
Write the event log of a simulated run, then pass its events to a fresh policy, which makes the same decisions again.

    python examples/replay_a_run.py

`cascadeinfer serve --event-log FILE` writes the same kind of log on real engines, so that a production decision can be
repeated on a laptop.
"""

import tempfile
from pathlib import Path

from cascadeinfer.core.effects import StartMigration
from cascadeinfer.evaluation.runs import RunSpec, run_once
from cascadeinfer.evaluation.setting import load_setting
from cascadeinfer.eventlog.reader import Gap, open_log
from cascadeinfer.eventlog.replay import replay
from cascadeinfer.results.summary import Slo


def main() -> None:
    """Run, read, replay."""
    setting = load_setting("h200-llama-3.1-8b", Path("sample"), 4)
    spec = RunSpec("cascade", rate_rps=12.0, seed=0, requests=400, slo=Slo(ttft_s=2.0, tpot_s=0.1))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.log"
        outcome = run_once(setting, spec, event_log=path)
        effects = [effect for entry in open_log(path) if not isinstance(entry, Gap) for effect in entry.effects]
        moves = [effect for effect in effects if isinstance(effect, StartMigration)]
        print(f"{len(outcome.requests)} requests, {len(effects)} decisions, {len(moves)} of them migrations, simulated")
        result = replay(open_log(path))
        same = "the same" if result.difference is None else f"different at {result.difference.logged.place}"
        print(f"replayed {result.events} events: {same}")


if __name__ == "__main__":
    main()
