"""
An instance's side channel: the ZMQ socket where peers request what they need to reach its KV cache (NIXL's handshake).

vLLM's listener exits at the first message it does not understand, unnoticed until the next instance attempts a
handshake. This one speaks the same protocol but drops such messages and continues, accepts no large ones, and is
reopened on the same port if its thread ends nevertheless.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final

import msgspec
import zmq
import zmq.asyncio
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import GET_META_MSG
from vllm.utils.network_utils import make_zmq_path

from cascadeinfer.engines.patience import within

logger = logging.getLogger(__name__)

MAX_MESSAGE_BYTES: Final = 4096
"""Largest message; a question has about twenty bytes. ZMQ disconnects senders of larger ones."""
LOOK_MS: Final = 1000
"""Interval at which the thread checks whether to stop."""
LOGGED_MESSAGES: Final = 10
"""Malformed messages that are logged individually; after that, every hundredth."""
PROBE_TIMEOUT_S: Final = 5.0
OPEN_TIMEOUT_S: Final = 5.0

QUESTION: Final = msgspec.msgpack.Decoder(tuple[bytes, int, int])
"""`GET_META_MSG`, pipeline rank, tensor rank."""


class Probes:
    """Questions to the side channels of peers, asked from this process without keeping it from its steps."""

    def __init__(self) -> None:
        """Nothing is asked."""
        self._asked: dict[tuple[str, int], Future[bool]] = {}
        self._threads = ThreadPoolExecutor(thread_name_prefix="side_channel_probe")

    def poll(self, host: str, port: int) -> bool | None:
        """Ask, or look for the answer: whether the side channel there answers from here; None: not known yet."""
        asked = self._asked.get((host, port))
        if asked is None:
            self._asked[host, port] = self._threads.submit(lambda: asyncio.run(answers(host, port)))
            return None
        if not asked.done():
            return None
        return self._asked.pop((host, port)).result()


class SideChannel:
    """
    The listener of one instance.

    Attributes:
        n_refused: Messages that were dropped.
        probes: Of those of others.
    """

    def __init__(self) -> None:
        """Start closed."""
        self.n_refused = 0
        self.probes = Probes()
        self._open = threading.Event()
        self._thread: threading.Thread | None = None
        self._arguments: tuple[Any, ...] | None = None

    def listen(
        self,
        answers: Mapping[tuple[int, int], bytes],
        ready: threading.Event,
        stop: threading.Event,
        host: str,
        port: int,
    ) -> None:
        """
        Answer questions until `stop` is set; runs in a thread. `ready` is set when the socket is open or cannot be
        opened.
        """
        self._thread, self._arguments = threading.current_thread(), (answers, stop, host, port)
        context: zmq.Context[Any] = zmq.Context()
        try:
            with context.socket(zmq.ROUTER) as sock:
                sock.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
                sock.setsockopt(zmq.RCVTIMEO, LOOK_MS)
                sock.setsockopt(zmq.LINGER, 0)
                sock.bind(make_zmq_path("tcp", host, port))
                self._open.set()
                ready.set()
                while not stop.is_set():
                    self._answer_one(sock, answers)
        except zmq.ZMQError as error:
            logger.error("the side channel on port %s is closed: %s", port, error)  # noqa: TRY400 - an address in use
        finally:
            self._open.clear()
            ready.set()  # otherwise the start waits for ever
            context.destroy(linger=0)

    def listens(self) -> bool:
        """Whether the socket is open; one that has closed is opened again."""
        if self._arguments is None:
            return True  # no channel, as nothing is transferred
        answers, stop, host, port = self._arguments
        if stop.is_set() or self._is_open():
            return True
        ready = threading.Event()
        logger.error("the side channel on port %s was closed; it is opened again", port)
        threading.Thread(
            target=self.listen, args=(answers, ready, stop, host, port), daemon=True, name="nixl_handshake_listener"
        ).start()
        ready.wait(OPEN_TIMEOUT_S)
        return self._is_open()

    def _is_open(self) -> bool:
        return self._open.is_set() and self._thread is not None and self._thread.is_alive()

    def _answer_one(self, sock: "zmq.Socket[Any]", answers: Mapping[tuple[int, int], bytes]) -> None:
        try:
            frames = sock.recv_multipart()
        except zmq.Again:
            return
        try:
            identity, _, message = frames
            question, pipeline_rank, tensor_rank = QUESTION.decode(message)
            answer = {GET_META_MSG: answers}[question][pipeline_rank, tensor_rank]
        except (ValueError, KeyError, msgspec.MsgspecError) as error:
            self.n_refused += 1
            if self.n_refused <= LOGGED_MESSAGES or self.n_refused % 100 == 0:
                logger.warning("side channel: message no. %s that is none was dropped: %r", self.n_refused, error)
            return
        # The peer estimates the offset between our clocks from it.
        sock.send_multipart((identity, b"", answer, msgspec.msgpack.encode(time.perf_counter())))


async def answers(host: str, port: int) -> bool:
    """Whether the side channel at this address answers a question."""
    context = zmq.asyncio.Context()
    sock = context.socket(zmq.REQ)
    try:
        sock.setsockopt(zmq.LINGER, 0)
        sock.connect(make_zmq_path("tcp", host, port))
        await sock.send(msgspec.msgpack.encode((GET_META_MSG, 0, 0)))
        await within(PROBE_TIMEOUT_S, sock.recv_multipart())
    except TimeoutError:
        return False
    finally:
        sock.close()
        context.term()
    return True
