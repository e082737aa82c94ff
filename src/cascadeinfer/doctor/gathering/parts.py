"""
The program of a part: `python -c "from cascadeinfer.doctor.gathering.parts import main; main()" PART FILE [WORDS]`.

Each part imports what it needs when it runs, so that a package that hangs or crashes takes only its part down.
"""

import importlib
import signal
import sys
from pathlib import Path
from typing import Final

from cascadeinfer.doctor.gathering.notes import Notes

MODULES: Final = {
    "name": "cascadeinfer.doctor.gathering.host_name",
    "machine": "cascadeinfer.doctor.gathering.machine",
    "software": "cascadeinfer.doctor.gathering.software",
    "devices": "cascadeinfer.doctor.gathering.devices",
    "doors": "cascadeinfer.doctor.gathering.doors",
    "kernels": "cascadeinfer.doctor.gathering.kernels",
    "trial": "cascadeinfer.doctor.gathering.trial",
}
"""Module of each part; its function `gather` gets the notes and the words."""


def main() -> None:
    """Gather the facts of one part."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that what the part has started is stopped
    part, file, *words = sys.argv[1:]
    importlib.import_module(MODULES[part]).gather(Notes(Path(file)), words)
