"""Where engines listen that others have started: HOST:PORT, where a name may stand for many machines."""

import asyncio
import socket
from dataclasses import dataclass

from cascadeinfer.core.errors import ConfigError

MAX_PORT = 65535


@dataclass(frozen=True, slots=True, order=True)
class EngineAddress:
    """
    Where one engine listens.

    Attributes:
        host: A numeric address.
        port: A TCP port.
    """

    host: str
    port: int

    def __str__(self) -> str:
        """As HOST:PORT."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def host_and_port(text: str, option: str, *, any_port: bool = False) -> tuple[str, int]:
    """
    Split HOST:PORT; an IPv6 host stands in brackets.

    Args:
        text: What was given.
        option: Names the setting in the error.
        any_port: Whether port 0 is allowed, which stands for a free one.

    Raises:
        ConfigError: It is none.
    """
    host, colon, port = text.strip().rpartition(":")
    in_brackets = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if in_brackets else host
    is_port = port.isascii() and port.isdecimal() and (0 if any_port else 1) <= int(port) <= MAX_PORT
    if not colon or not host or not is_port or (":" in host and not in_brackets):
        raise ConfigError(f"{text!r} is not HOST:PORT", option=option, fix="write e.g. 10.0.0.7:7300 or engines:7300")
    return host, int(port)


async def resolve(entries: tuple[tuple[str, int], ...]) -> tuple[list[EngineAddress], list[str]]:
    """
    Look names up.

    Returns:
        All addresses behind them, in order and each once, and the names that could not be looked up, with the reason.
    """
    loop = asyncio.get_running_loop()
    asked = [loop.getaddrinfo(host, port, type=socket.SOCK_STREAM) for host, port in entries]
    found: dict[EngineAddress, None] = {}
    failures = []
    for (host, port), answer in zip(entries, await asyncio.gather(*asked, return_exceptions=True), strict=True):
        if isinstance(answer, OSError):
            failures.append(f"{host}: {answer.strerror}")
        elif isinstance(answer, UnicodeError):
            failures.append(f"{host}: is no name of a host")
        elif isinstance(answer, BaseException):
            raise answer
        else:
            found.update(dict.fromkeys(sorted(EngineAddress(str(info[4][0]), port) for info in answer)))
    return list(found), failures
