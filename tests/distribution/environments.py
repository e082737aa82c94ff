"""The distribution, and an environment that has nothing but it and what it asks for."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def outside_checkout() -> dict[str, str]:
    """The environment of the tests without what would lead to the checkout."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


@dataclass(frozen=True)
class Distribution:
    """A wheel and the sdist that it was built from."""

    wheel: Path
    sdist: Path


@dataclass(frozen=True)
class CleanEnvironment:
    """A virtual environment with its own empty site-packages, and a folder to work in."""

    folder: Path
    work: Path
    constraints: Path

    def install(self, requirement: str) -> None:
        """
        Install with this environment's pip, which downloads only what is not in its cache: the versions are those
        installed here.
        """
        python = self.folder / "bin" / "python"
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-compile"]
        subprocess.run(
            [*pip, "--constraint", str(self.constraints), requirement],
            check=True,
            env=outside_checkout(),
            cwd=self.work,
        )

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a program of that environment in its folder; the first word is the program's name."""
        return subprocess.run(
            [self.program(command[0]), *command[1:]],
            check=False,
            capture_output=True,
            text=True,
            cwd=self.work,
            env=self.variables(),
        )

    def program(self, name: str) -> str:
        """Path of a program."""
        return str(self.folder / "bin" / name)

    def variables(self) -> dict[str, str]:
        """Its environment variables: tables are not folded, nothing leads to the checkout."""
        return outside_checkout() | {"COLUMNS": "200"}
