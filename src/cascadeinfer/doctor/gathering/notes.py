"""Where a part notes its facts: a file of JSON lines, each on disk before the next thing is tried."""

from pathlib import Path
from typing import Final

import msgspec

from cascadeinfer.doctor.facts import DECODER, Doing, Fact

ENCODER: Final = msgspec.json.Encoder()


class Notes:
    """The facts of a part, as it writes them."""

    def __init__(self, path: Path) -> None:
        """
        Args:
            path: A file of its own.
        """
        self._path = path

    def add(self, fact: Fact) -> None:
        """Note a fact."""
        with self._path.open("ab") as file:
            file.write(ENCODER.encode(fact) + b"\n")

    def doing(self, what: str) -> None:
        """Note what comes next."""
        self.add(Doing(what=what))


def read_notes(path: Path) -> list[Fact]:
    """The facts in a file; a last line that was cut off by the part's end does not count."""
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    return [DECODER.decode(line) for line in lines[:-1]]
