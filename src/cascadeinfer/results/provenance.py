"""Origin of a result: program, version, commit, command line, profile, seeds. Goes into every output file."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cascadeinfer import __version__
from cascadeinfer.core.cost.profile import CostProfile


def provenance(profile: CostProfile, seeds: Sequence[int], words: Sequence[str] | None = None) -> dict[str, Any]:
    """
    What is needed to reproduce a result.

    Args:
        profile: The profile that the step times come from.
        seeds: Seeds of the runs.
        words: The command line; this process's by default.
    """
    return {
        "simulated": True,
        "version": __version__,
        "commit": own_commit(),
        "python": sys.version.split()[0],
        "numpy": np.__version__,
        "command": list(sys.argv if words is None else words),
        "seeds": list(seeds),
        "profile": profile.name,
        "profile_derived": profile.derived,
        "profile_command": profile.provenance.command,
    }


def own_commit() -> str | None:
    """The commit of the checkout with this package, with `+changes` when files differ from it; None outside of one."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(  # noqa: S603 - fixed words
                ["git", "-C", str(Path(__file__).parent), *words],  # noqa: S607 - from the path, like the user's shell
                capture_output=True,
                text=True,
                timeout=10,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", "provenance.py") is None:
        return None  # another checkout that happens to contain this installation
    commit = git("rev-parse", "HEAD")
    if commit is None:
        return None
    return f"{commit}+changes" if git("status", "--porcelain", "--untracked-files=no", ":/src") else commit
