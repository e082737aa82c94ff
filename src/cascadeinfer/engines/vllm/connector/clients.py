"""
Front ends that attach to a running EngineCore and leave it.

vLLM's EngineCore learns the addresses of its clients at its start and serves those for ever. A client that comes later
gets sockets and two threads of its own here; to vLLM's unchanged `AsyncMPClient` at the other end they look the same.
Its requests and calls go into the EngineCore's own queue, in the order in which they come; what is for it is taken out
of the EngineCore's output queue before vLLM's thread sees it.

A client is gone when its connection is: its process has ended, or nothing of it has been heard for
`HEARTBEAT_TIMEOUT_MS`. What it had here is then aborted. It never comes back under its number.
"""

import itertools
import logging
import queue
import threading
from typing import Any, Final

import msgspec
import zmq
from vllm.multimodal.cache import MultiModalCacheMissError
from vllm.v1.engine import EngineCoreRequest, EngineCoreRequestType
from vllm.v1.engine.core import EngineCoreProc
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder
from zmq.utils.monitor import recv_monitor_message

from cascadeinfer.cluster.knocking import HEARTBEAT_TIMEOUT_MS, make_lasting
from cascadeinfer.cluster.shared_key import ClusterKey

logger = logging.getLogger(__name__)

LOOK_MS: Final = 500
"""Interval at which a client's thread checks whether to end."""
IT_IS_GONE: Final = (
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CLOSED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
"""Events of a connection after which nothing comes from it."""
INTERNAL_CALL: Final = 0
"""Number of calls that this process makes to its own EngineCore and whose answer nobody reads."""


class DealtOutputs:
    """In place of the EngineCore's output queue: what is for a client that came later goes into that client's own."""

    def __init__(self, first: "queue.Queue[Any]", n_first: int) -> None:
        """
        Args:
            first: The queue of vLLM's output thread.
            n_first: How many clients there were at the start, which that thread serves.
        """
        self._first = first
        self._n_first = n_first
        #: By number, of the clients that came later.
        self.queues: dict[int, queue.Queue[Any]] = {}

    def put_nowait(self, item: Any) -> None:
        """Outputs with the number of their client, or vLLM's word that the EngineCore is dead, which is for all."""
        if isinstance(item, bytes):
            for own in (self._first, *list(self.queues.values())):
                own.put_nowait(item)
        elif item[0] < self._n_first:
            self._first.put_nowait(item)
        elif (own_queue := self.queues.get(item[0])) is not None:  # else that client has left
            own_queue.put_nowait(item)

    def get(self) -> Any:
        """For vLLM's output thread."""
        return self._first.get()


class FurtherClient:
    """One client's sockets and threads."""

    #: vLLM's cache of processed images belongs to one thread: requests are prepared one at a time.
    _preparing = threading.Lock()

    def __init__(
        self,
        core: EngineCoreProc,
        number: int,
        addresses: tuple[str, str],
        outputs: "queue.Queue[Any]",
        context: "zmq.Context[Any]",
        key: ClusterKey,
    ) -> None:
        """
        Connect to a client.

        Args:
            core: The EngineCore that it wants to use.
            number: Its number here.
            addresses: Its input and output socket, which it has bound.
            outputs: What is for it.
            context: For the sockets.
            key: Authenticates both ends.
        """
        self._core = core
        self._number = number
        self._outputs = outputs
        self._context = context
        self._key = key
        self._ended = threading.Event()
        self._adds = MsgpackDecoder(EngineCoreRequest)
        self._others = MsgpackDecoder()
        for work, address in ((self._read, addresses[0]), (self._write, addresses[1])):
            threading.Thread(target=work, args=(address,), daemon=True, name=f"cascade-client-{number}").start()

    def end(self) -> None:
        """Close its sockets; idempotent. Its threads end within `LOOK_MS`."""
        self._ended.set()
        self._outputs.put_nowait(None)

    def _connected(self, address: str, kind: int, **options: Any) -> "zmq.Socket[Any]":
        sock = self._context.socket(kind)
        make_lasting(sock, address.removeprefix("tcp://").rpartition(":")[0])
        sock.setsockopt(zmq.RECONNECT_IVL, -1)  # a connection that is lost is the end of the client
        sock.setsockopt(zmq.CONNECT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
        for option, value in options.items():
            sock.setsockopt(getattr(zmq, option), value)
        self._key.call(sock)
        return sock

    def _read(self, address: str) -> None:
        identity = self._core.engine_index.to_bytes(length=2, byteorder="little")
        sock = self._connected(address, zmq.DEALER, IDENTITY=identity)
        monitor = sock.get_monitor_socket(IT_IS_GONE)
        poller = zmq.Poller()
        for each in (sock, monitor):
            poller.register(each, zmq.POLLIN)
        try:
            sock.connect(address)
            sock.send(msgspec.msgpack.encode(self._core._make_ready_response()))  # noqa: SLF001 - see docs/vllm.md
            while not self._ended.is_set():
                ready = dict(poller.poll(LOOK_MS))
                if sock in ready:
                    self._take(sock.recv_multipart(copy=False))
                elif monitor in ready:
                    event = zmq.Event(recv_monitor_message(monitor)["event"])
                    logger.info("front end %s is gone: %s", self._number, event.name)
                    break
        except zmq.ZMQError:
            logger.exception("front end %s cannot be served", self._number)
        finally:
            sock.disable_monitor()
            sock.close()
            monitor.close()
            if not self._ended.is_set():
                call = (self._number, INTERNAL_CALL, "cascade_detach", [self._number])
                self._core.input_queue.put_nowait((EngineCoreRequestType.UTILITY, call))

    def _take(self, frames: "list[Any]") -> None:
        """Pass a message on; one that vLLM could not read is dropped."""
        core = self._core
        try:
            kind = EngineCoreRequestType(bytes(frames[0].buffer))
            if kind is not EngineCoreRequestType.ADD:
                content = self._others.decode(frames[1:])
            else:
                request = self._adds.decode(frames[1:])
        except (ValueError, msgspec.MsgspecError, IndexError) as error:
            logger.warning("front end %s: a message that is none was dropped: %r", self._number, error)
            return
        if kind is EngineCoreRequestType.ADD:
            request.client_index = self._number
            try:
                with self._preparing:
                    content = core.preprocess_add_request(request)
            except MultiModalCacheMissError as error:
                core._handle_mm_cache_miss(request, error)  # noqa: SLF001 - as vLLM's own input thread does
                return
            except Exception:  # noqa: BLE001 - whatever it is, it is this request's alone: vLLM logs it and answers
                core._handle_request_preproc_error(request)  # noqa: SLF001 - as vLLM's own input thread does
                return
        elif kind is EngineCoreRequestType.ABORT:
            core.aborts_queue.put_nowait(content)
        core.input_queue.put_nowait((kind, content))

    def _write(self, address: str) -> None:
        encoder = MsgpackEncoder()
        sock = self._connected(address, zmq.PUSH)
        try:
            sock.connect(address)
            while (item := self._outputs.get()) is not None:
                if isinstance(item, bytes):
                    sock.send(item)
                    continue
                item[1].engine_index = self._core.engine_index
                sock.send_multipart(encoder.encode(item[1]), copy=False)
        except zmq.ZMQError:
            logger.exception("front end %s cannot be answered", self._number)
        finally:
            sock.close()


class Clients:
    """The clients of an EngineCore that came after its start. Used in the EngineCore's thread."""

    def __init__(self, core: EngineCoreProc, key: ClusterKey) -> None:
        """Take the EngineCore's output queue over."""
        self._core = core
        self._key = key
        self._context = zmq.Context[Any]()
        n_first = len(core.addresses.inputs)
        self._numbers = itertools.count(n_first)
        self._outputs = DealtOutputs(core.output_queue, n_first)
        core.output_queue = self._outputs
        self._clients: dict[int, FurtherClient] = {}

    def __len__(self) -> int:
        """How many there are."""
        return len(self._clients)

    def own_queue(self) -> "tuple[int, queue.Queue[Any]]":
        """A number for somebody in this process who calls the EngineCore, and the queue of the answers."""
        number = next(self._numbers)
        own = self._outputs.queues[number] = queue.Queue()
        return number, own

    def attach(self, input_address: str, output_address: str) -> int:
        """Serve a client that has bound these sockets. Returns its number."""
        number, own = self.own_queue()
        addresses = (input_address, output_address)
        self._clients[number] = FurtherClient(self._core, number, addresses, own, self._context, self._key)
        logger.info("front end %s is attached (%s)", number, input_address)
        return number

    def detach(self, number: int) -> bool:
        """A client is gone. Returns whether it was there."""
        client = self._clients.pop(number, None)
        if client is None:
            return False
        client.end()
        del self._outputs.queues[number]
        return True
