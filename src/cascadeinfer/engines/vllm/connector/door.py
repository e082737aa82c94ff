"""
Where front ends knock: a listener in an EngineCore that somebody else has started, such as an ordinary `vllm serve`.

It exists only if the connector's configuration names an address for it:

    --kv-transfer-config '{"kv_connector": "CascadeConnector", "kv_role": "kv_both",
        "kv_connector_module_path": "cascadeinfer.engines.vllm.connector", "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"cascade_listen": "10.0.0.7:7300", "cascade_key_file": "/run/secrets/cascade"}}'

It answers whoever has the cluster's key (`cluster/shared_key.py`), one question at a time, and opens when the engine is
ready to serve. An answer carries the token for words to the connector (`words.py`); therefore there is no listener
without a key.
"""

import contextlib
import logging
import os
import queue
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec
import zmq
from vllm.config import KVTransferConfig
from vllm.v1.engine import EngineCoreRequestType
from vllm.v1.engine.core import EngineCoreProc

from cascadeinfer import __version__
from cascadeinfer.cluster.addresses import EngineAddress, host_and_port
from cascadeinfer.cluster.keeping import write_whole
from cascadeinfer.cluster.knocking import (
    KNOCKS,
    PROTOCOL,
    About,
    Answer,
    AskAbout,
    AskToAttach,
    Attached,
    Knock,
    Refused,
    tcp_address,
)
from cascadeinfer.cluster.shared_key import ClusterKey, others_may_read
from cascadeinfer.core.errors import ConfigError
from cascadeinfer.engines.vllm.connector.clients import Clients
from cascadeinfer.engines.vllm.logs import log_as_vllm_does

logger = logging.getLogger(__name__)

LISTEN: Final = "cascade_listen"
"""In the connector's extra configuration: the address, as HOST:PORT."""
KEY_FILE: Final = "cascade_key_file"
"""In the connector's extra configuration: the file with the cluster's key."""
TOLD_FILE: Final = "cascade_listen_file"
"""In the connector's extra configuration: a file into which the address is written once it is open; for port 0."""
ORPHAN_TIMEOUT: Final = "cascade_orphan_timeout_s"
"""In the connector's extra configuration: the engine ends when no front end has been attached for so long; 0: never."""
MARK: Final = "cascade_mark"
"""In the connector's extra configuration: see `knocking.About`."""
LOOK_MS: Final = 1000
ANSWER_TIMEOUT_S: Final = 60.0
"""A step that takes longer is one that the front end would not wait for either."""
MAX_MESSAGE_BYTES: Final = 4096


class DoorSettings(msgspec.Struct, frozen=True):
    """
    How the listener is configured.

    Attributes:
        host: An address of this machine.
        port: A TCP port.
        key: The cluster's.
        lease_s: How long this engine keeps a cut request's blocks.
        told_file: Where the address is written once it is open; None: nowhere.
        orphan_timeout_s: The engine ends when it has had no front end for so long; 0: never.
        mark: See `knocking.About`.
    """

    host: str
    port: int
    key: ClusterKey
    lease_s: int
    told_file: Path | None = None
    orphan_timeout_s: float = 0.0
    mark: str = ""

    @classmethod
    def of(cls, transfer: KVTransferConfig) -> "DoorSettings | None":
        """
        The settings; None without an address.

        Raises:
            ConfigError: They are incomplete, or others contradict them.
        """
        address = transfer.get_from_extra_config(LISTEN, None)
        if address is None:
            return None
        told_file = transfer.get_from_extra_config(TOLD_FILE, None)
        host, port = host_and_port(str(address), LISTEN, any_port=told_file is not None)
        key_file = transfer.get_from_extra_config(KEY_FILE, None)
        if key_file is None:
            raise ConfigError(f"names an address and no {KEY_FILE}", option=f"kv_connector_extra_config {LISTEN}")
        if transfer.kv_load_failure_policy != "recompute":
            raise ConfigError("must be recompute", option="kv_load_failure_policy")
        path = Path(str(key_file))
        key = ClusterKey.read(path, KEY_FILE)
        if others_may_read(path):
            logger.warning("%s can be read by other users of this machine: whoever reads it can use this engine", path)
        lease_s = int(transfer.get_from_extra_config("kv_lease_duration", 30))
        orphan_timeout_s = float(transfer.get_from_extra_config(ORPHAN_TIMEOUT, 0.0))
        mark = str(transfer.get_from_extra_config(MARK, ""))
        return cls(
            host, port, key, lease_s, None if told_file is None else Path(str(told_file)), orphan_timeout_s, mark
        )


def end_this_process() -> None:
    """As if the operator did: vLLM's EngineCore ends in good order."""
    os.kill(os.getpid(), signal.SIGTERM)


class Door:
    """
    The listener of one EngineCore.

    Attributes:
        port: Where it listens.
        clients: Those that have attached.
    """

    def __init__(
        self,
        core: EngineCoreProc,
        settings: DoorSettings,
        engine_id: str,
        connector_token: str,
        end_engine: Callable[[], None] = end_this_process,
    ) -> None:
        """
        Open it.

        Args:
            core: An EngineCore that is ready to serve; this is its thread.
            settings: Where to listen, and for whom.
            engine_id: The engine's, of this start.
            connector_token: See `Attached`.
            end_engine: Called when no front end has been attached for too long.

        Raises:
            ConfigError: The address cannot be bound.
        """
        log_as_vllm_does()  # an ordinary vLLM server does not know our lines
        self._core = core
        self._settings = settings
        self._about = About(engine_id, socket.gethostname(), os.getpid(), __version__, settings.lease_s, settings.mark)
        self._connector_token = connector_token
        self._end_engine = end_engine
        self._calls = 0
        context = zmq.Context[Any]()
        sock = context.socket(zmq.ROUTER)
        sock.setsockopt(zmq.LINGER, 0)
        sock.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        if ":" in settings.host:
            sock.setsockopt(zmq.IPV6, 1)
        settings.key.listen(sock)
        only_ours = contextlib.ExitStack()
        only_ours.enter_context(settings.key.only_ours(context))  # before anybody can come in
        try:
            sock.bind(tcp_address(settings.host, settings.port or "*"))
        except zmq.ZMQError as error:
            only_ours.close()
            context.destroy(linger=0)
            raise ConfigError(
                f"cannot listen on {settings.host}:{settings.port}: {error.strerror}", option=LISTEN
            ) from error
        self.port = int(sock.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])
        self.clients = Clients(core, settings.key)
        self._number, self._results = self.clients.own_queue()
        threading.Thread(target=self._listen, args=(sock, only_ours), daemon=True, name="cascade-door").start()
        address = EngineAddress(settings.host, self.port)
        if settings.told_file is not None:
            write_whole(settings.told_file, str(address).encode())
        logger.info("front ends can attach at %s", address)

    def _listen(self, sock: "zmq.Socket[Any]", only_ours: contextlib.ExitStack) -> None:
        try:
            with only_ours:
                deserted_s = 0.0
                while True:
                    if sock.poll(LOOK_MS):
                        self._answer_one(sock)
                    deserted_s = 0.0 if len(self.clients) else deserted_s + LOOK_MS / 1000
                    if 0 < self._settings.orphan_timeout_s <= deserted_s:
                        logger.warning("no front end has been attached for %.0f s: this engine ends", deserted_s)
                        self._end_engine()
                        deserted_s = 0.0
        except zmq.ZMQError:
            logger.exception("front ends cannot attach here any more; those that are attached are served as before")

    def _answer_one(self, sock: "zmq.Socket[Any]") -> None:
        *envelope, message = sock.recv_multipart()
        try:
            answer = self._answer(KNOCKS.decode(message))
        except msgspec.MsgspecError as error:
            answer = Refused(f"that is no question: {error}")
        except Exception:  # a fault of ours must not close the door for everybody
            logger.exception("internal error at a question of a front end")
            answer = Refused("internal error; the engine's log says more")
        sock.send_multipart([*envelope, msgspec.msgpack.encode(answer)])

    def _answer(self, question: Knock) -> Answer:
        if question.protocol != PROTOCOL:
            return Refused(f"it speaks version {PROTOCOL} of the protocol, you speak {question.protocol}")
        match question:
            case AskAbout():
                return self._about
            case AskToAttach(_, input_address, output_address):
                return self._attached(input_address, output_address)

    def _attached(self, input_address: str, output_address: str) -> Answer:
        for address in (input_address, output_address):
            if not address.startswith("tcp://"):
                return Refused(f"{address} is no TCP address")
        try:
            told = self._call("cascade_attach", input_address, output_address)
        except (queue.Empty, RuntimeError) as error:
            return Refused(str(error) or f"it is busy: no step ended within {ANSWER_TIMEOUT_S:g} s")
        return Attached(self._about, told["client"], told["ready_payload"], self._connector_token)

    def _call(self, method: str, *args: Any) -> Any:
        """Have a method run in the EngineCore's thread. Raises RuntimeError if it fails, queue.Empty if it is late."""
        self._calls += 1
        self._core.input_queue.put_nowait((EngineCoreRequestType.UTILITY, (self._number, self._calls, method, args)))
        while True:
            _, outputs = self._results.get(timeout=ANSWER_TIMEOUT_S)
            output = outputs.utility_output
            if output.call_id != self._calls:
                continue  # the late answer to an earlier call
            if output.failure_message is not None:
                raise RuntimeError(output.failure_message)
            return output.result.result
