"""The distribution, built once, and an environment that has nothing but it and what it asks for."""

import subprocess
import sys
from collections.abc import Sequence

import pytest
from environments import ROOT, CleanEnvironment, Distribution, outside_checkout


@pytest.fixture(scope="session")
def distribution(tmp_path_factory: pytest.TempPathFactory) -> Distribution:
    """Built as for a release: the sdist from the checkout, the wheel from the sdist, with `build`'s own environment."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--outdir", folder, ROOT], check=True, env=outside_checkout())
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return Distribution(wheel, sdist)


def versions_here() -> Sequence[str]:
    """
    A pip constraint for each package installed here; none for local builds, which no index has.

    Pip is asked, in a process of its own: in this one, whoever has imported setuptools sees the packages inside it.
    """
    pip = [sys.executable, "-m", "pip", "list", "--format=freeze", "--exclude-editable"]
    listed = subprocess.run(pip, check=True, capture_output=True, text=True, env=outside_checkout()).stdout.split()
    return sorted(line for line in listed if "+" not in line and not line.startswith("cascadeinfer=="))


@pytest.fixture(scope="session")
def clean(tmp_path_factory: pytest.TempPathFactory, distribution: Distribution) -> CleanEnvironment:
    """The wheel without extras, in an environment of its own."""
    folder = tmp_path_factory.mktemp("clean")
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(versions_here()) + "\n")
    environment = CleanEnvironment(folder / "venv", folder / "work", constraints)
    environment.work.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment.folder], check=True)
    environment.install(str(distribution.wheel))
    return environment
