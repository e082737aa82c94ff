"""The two sockets by which a further client talks to an EngineCore: it binds them, and the EngineCore connects."""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, Final

import zmq
import zmq.asyncio

from cascadeinfer.cluster.knocking import keep_all, make_lasting, tcp_address
from cascadeinfer.cluster.shared_key import ClusterKey

LOOKS_S: Final = (0.0, 0.05, 0.5)
"""Pauses before the looks at a connection after one has ended: ZMQ tells of an end before a sender feels it."""


class ClientSockets:
    """
    The sockets, bound.

    Attributes:
        plain_context: Theirs, on which nothing else runs.
        context: The same for asyncio.
        input: ROUTER, on which requests and calls are sent.
        output: PULL, from which outputs and answers are read.
    """

    def __init__(self, bind: Callable[["ClientSockets"], None]) -> None:
        """
        Make and bind them.

        Args:
            bind: Makes the input and then the output, with the method `adopt`.
        """
        self.plain_context = zmq.Context(io_threads=2)
        self.context = zmq.asyncio.Context(self.plain_context)
        self.until_closed = contextlib.ExitStack()
        self._bound: list[zmq.asyncio.Socket] = []
        try:
            bind(self)
            self.input, self.output = self._bound
        except BaseException:
            self.close()
            raise

    @classmethod
    def at(cls, input_address: str, output_address: str) -> "ClientSockets":
        """
        Sockets at addresses that the EngineCore knows already.

        Raises:
            zmq.ZMQError: They cannot be bound there.
        """

        def bind(sockets: ClientSockets) -> None:
            for kind, address in ((zmq.ROUTER, input_address), (zmq.PULL, output_address)):
                sock = sockets.adopt(kind)
                keep_all(sock)
                sock.bind(address)

        return cls(bind)

    @classmethod
    def on(cls, host: str, key: ClusterKey) -> "ClientSockets":
        """
        Sockets on free TCP ports of an address of this machine, for engines that have the cluster's key.

        Raises:
            zmq.ZMQError: The address is none of this machine.
        """

        def bind(sockets: ClientSockets) -> None:
            sockets.until_closed.enter_context(key.only_ours(sockets.plain_context))
            for kind in (zmq.ROUTER, zmq.PULL):
                sock = sockets.adopt(kind)
                make_lasting(sock, host)
                key.listen(sock)
                sock.bind(tcp_address(host, "*"))

        return cls(bind)

    def adopt(self, kind: int) -> zmq.asyncio.Socket:
        """
        A new socket of the context, which `close` closes, whatever becomes of it. It has to be bound.

        The context would wait for ever for the end of a socket that nobody closes.
        """
        sock = self.context.socket(kind)
        self._bound.append(sock)
        return sock

    @property
    def addresses(self) -> tuple[str, str]:
        """Of the input and the output."""
        return tuple(sock.getsockopt_string(zmq.LAST_ENDPOINT) for sock in (self.input, self.output))  # type: ignore[return-value]

    async def until_gone(self, is_connected: Callable[[], bool]) -> None:
        """
        Wait until the EngineCore is not connected any more.

        Args:
            is_connected: Asked at the beginning, and whenever a connection of the input has ended, anybody's.
        """
        monitor: Any = self.input.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        try:
            while True:
                for pause_s in LOOKS_S:
                    await asyncio.sleep(pause_s)
                    if not is_connected():
                        return
                await monitor.recv_multipart()
        finally:
            self.input.disable_monitor()
            monitor.close(linger=0)  # one that is open would keep the context from ending

    def accept_nobody(self) -> None:
        """Before the context is destroyed: end the thread that authenticates engines. Idempotent."""
        self.until_closed.close()

    def close(self) -> None:
        """Close everything. For sockets that no client of vLLM's has taken over."""
        self.accept_nobody()
        for sock in self._bound:
            sock.close(linger=0)
        self.plain_context.term()
