"""Looks this machine's own name up, which may take as long as its resolver waits."""

import socket
import time
from collections.abc import Sequence

from cascadeinfer.doctor.facts import HostName
from cascadeinfer.doctor.gathering.notes import Notes


def gather(notes: Notes, _: Sequence[str]) -> None:
    """Look it up once."""
    name = socket.gethostname()
    notes.doing(f"looking up {name}")
    begun_s = time.monotonic()
    addresses: list[str] = []
    error = ""
    try:
        addresses = sorted({str(info[4][0]) for info in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)})
    except OSError as failure:
        error = failure.strerror or str(failure)
    except UnicodeError:
        error = "it is no name of a host"
    notes.add(HostName(name=name, addresses=addresses, seconds=time.monotonic() - begun_s, error=error))
