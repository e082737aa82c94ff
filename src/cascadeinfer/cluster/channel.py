"""Length-prefixed messages between two processes over a socket pair; sending never waits."""

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Any, Generic, TypeVar

import msgspec

LENGTH_BYTES = 4
MAX_UNSENT_BYTES = 64 << 20
"""A process that leaves this much unread gets no more memory."""

Received = TypeVar("Received")


class Channel(Generic[Received]):
    """One end. `Received` is the union of what the other end may send."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, received: Any) -> None:
        """Use `open`."""
        self._reader = reader
        self._writer = writer
        self._encoder = msgspec.json.Encoder()
        self._decoder: msgspec.json.Decoder[Received] = msgspec.json.Decoder(received)

    @classmethod
    async def open(cls, end: socket.socket, received: Any) -> "Channel[Received]":
        """Take over one end of a socket pair."""
        reader, writer = await asyncio.open_unix_connection(sock=end)
        return cls(reader, writer, received)

    @property
    def unsent_bytes(self) -> int:
        """Bytes not yet in the kernel's buffer."""
        return self._writer.transport.get_write_buffer_size()

    def send(self, message: Any) -> None:
        """Send; never waits. Messages to a closed end are dropped."""
        if self._writer.transport.is_closing():
            return
        if self.unsent_bytes > MAX_UNSENT_BYTES:
            self._writer.transport.abort()
            return
        content = self._encoder.encode(message)
        self._writer.write(len(content).to_bytes(LENGTH_BYTES, "big") + content)

    async def messages(self) -> AsyncIterator[Received]:
        """Incoming messages, until the other end is closed."""
        try:
            while True:
                length = int.from_bytes(await self._reader.readexactly(LENGTH_BYTES), "big")
                yield self._decoder.decode(await self._reader.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionError):
            return

    def close(self) -> None:
        """Close this end."""
        self._writer.close()
