"""`--config FILE.yaml`: options of `serve` from a file, as vLLM reads them, with mistakes found before vLLM looks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import yaml

from cascadeinfer.core.errors import ConfigError

OPTION: Final = "--config"
SUFFIXES: Final = (".yaml", ".yml")


def words_with_config(words: Sequence[str]) -> list[str]:
    """
    The command line in the form in which vLLM finds the file: `--config FILE` in two words.

    Returns:
        The words; vLLM's parser puts the file's options in front of them, so that the command line wins.

    Raises:
        ConfigError: There are two files, or one cannot be read or is no table of options.
    """
    split: list[str] = []
    for word in words:
        split += [OPTION, word.partition("=")[2]] if word.startswith(f"{OPTION}=") else [word]
    if OPTION not in split:
        return split
    if split.count(OPTION) > 1:
        raise ConfigError("is given twice", option=OPTION, fix="put all options into one file")
    index = split.index(OPTION)
    if index == len(split) - 1:
        raise ConfigError("names no file", option=OPTION, fix="write --config FILE.yaml")
    _check(Path(split[index + 1]))
    model = split[2:3] if index == 0 and not "".join(split[2:3]).startswith("-") else []
    return [*model, *split[:2], *split[3:]] if model else split  # else a list in the file would take it for its own


def _check(path: Path) -> None:
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{path} is not named as YAML", option=OPTION, fix=f"its name must end in {SUFFIXES[0]}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", option=OPTION) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}", option=OPTION) from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ConfigError(f"{path} is no table of options", option=OPTION, fix="write lines such as `port: 8000`")
    if "config" in content:
        raise ConfigError(f"{path} names a further file", option=OPTION, fix="put all options into one file")
