"""Command lines of `plan`, `simulate` and `sweep` for tests: a small mixed trace, and valid options with changes."""

from pathlib import Path

import numpy as np

from cascadeinfer.cli.main import main

MIXED_ROWS = 400


def mixed_trace(folder: Path) -> Path:
    """A trace file: of every ten requests, one has a long prompt, one a long output, and eight are short."""
    rng = np.random.default_rng(0)
    path = folder / "mixed.csv"
    rows = ["arrival_s,prompt_tokens,output_tokens"]
    for i in range(MIXED_ROWS):
        prompt = int(rng.integers(8_000, 16_000)) if i % 10 == 0 else int(rng.integers(50, 300))
        output = int(rng.integers(2_000, 4_000)) if i % 10 == 5 else int(rng.integers(100, 300))
        rows.append(f",{prompt},{output}")
    path.write_text("\n".join(rows) + "\n")
    return path


def run(*words: str) -> int:
    """Exit code of a command line."""
    try:
        main(words)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def words_for(command: str, trace_file: Path, **changes: str) -> list[str]:
    """A valid command line with these options changed; underscores in their names become hyphens."""
    options = {"profile": "h100-llama-3.1-8b", "trace": str(trace_file), "instances": "8"}
    options |= {"rates": "20,60"} if command == "sweep" else {"rate": "40"}
    options |= changes
    return [command, *(word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value))]
