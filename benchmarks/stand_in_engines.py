"""
Many EngineCores as a front end sees them, in one process: on vLLM's sockets and in its messages, but without a model.

Each connects to the sockets that its front end has bound, answers the commands that a front end gives, and sends one
token for each of its requests per step, for ever. `serve` is the main function of the process.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec
import zmq
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequestType, UtilityOutput
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder, UtilityResult

from cascadeinfer.core.types import InstanceCapacity
from cascadeinfer.engines.vllm.connector.loads_along import LoadsAlong
from cascadeinfer.engines.vllm.messages import EngineHello, EngineLoad

CAPACITY: Final = InstanceCapacity(kv_blocks=10_000, block_size_tokens=16, max_num_seqs=256, max_batched_tokens=8192)
TOKEN: Final = 7
LONGEST_POLL_S: Final = 0.5
PHASES: Final = 16
"""Engines do not step all at once."""
HELLO: Final = EngineHello(
    engine_id="stand-in",
    host="127.0.0.1",
    port=1,
    tp_size=1,
    block_size=CAPACITY.block_size_tokens,
    kv_blocks=CAPACITY.kv_blocks,
    max_num_seqs=CAPACITY.max_num_seqs,
    max_batched_tokens=CAPACITY.max_batched_tokens,
    max_model_len=100_000,
    movable=True,
    model_runner="V1",
    clock_s=0.0,
)
NO_LOAD: Final = EngineLoad(
    running=[],
    waiting=[],
    foreign_running=[],
    foreign_waiting=[],
    kv_blocks=CAPACITY.kv_blocks,
    kv_blocks_used=0,
    reserved=0,
    pinned=[],
    held_blocks={"reservations": 0, "pins": 0, "finished": 0},
    steps=0,
    timed_steps=[],
    scheduled_tokens=0,
    pulls=0,
    pulled_tokens=0,
    failed_pulls=0,
    listens=True,
    paused=False,
    clock_s=0.0,
)


def addresses(folder: Path, index: int) -> tuple[str, str]:
    """Input and output socket of the client of an engine."""
    return f"ipc://{folder / f'{index}i'}", f"ipc://{folder / f'{index}o'}"


@dataclass(slots=True)
class StandInEngine:
    """
    One of them.

    Attributes:
        tells_unasked: Whether its load comes along with outputs.
        lengths: Of its requests, in tokens.
        loads: How many it has told.
    """

    inputs: "zmq.Socket[bytes]"
    outputs: "zmq.Socket[bytes]"
    encoder: MsgpackEncoder
    decoder: MsgpackDecoder
    tells_unasked: bool
    lengths: dict[str, int] = field(default_factory=dict)
    steps: int = 0
    timed: list[tuple[int, int, int, int, float, float]] = field(default_factory=list)
    loads: int = 0
    loads_along: LoadsAlong = field(init=False)

    def __post_init__(self) -> None:
        """Loads travel along with outputs, as from an engine."""
        self.loads_along = LoadsAlong(self, self._load, lambda _: bool(self.lengths))

    def take(self, frames: Sequence[bytes]) -> None:
        """Carry a message out."""
        kind = EngineCoreRequestType(frames[0])
        content = self.decoder.decode(frames[1:])
        if kind is EngineCoreRequestType.ADD:
            self.lengths[content[0]] = len(content[1])
        elif kind is EngineCoreRequestType.ABORT:
            for name in content:
                self.lengths.pop(name, None)
        elif kind is EngineCoreRequestType.UTILITY:
            _, call_id, command, arguments = content
            told = UtilityOutput(call_id, result=UtilityResult(self._answer(command, arguments)))
            self.put_nowait((0, EngineCoreOutputs(utility_output=told)))

    def _answer(self, command: str, arguments: list[Any]) -> Any:
        if command == "cascade_hello":
            return HELLO.plain()
        if command != "cascade_load":
            return 0
        if self.tells_unasked:
            self.loads_along.told(*arguments)
        return self._load(0)

    def _load(self, _: int) -> dict[str, Any]:
        self.loads += 1
        timed, self.timed = self.timed, []
        load = msgspec.structs.replace(
            NO_LOAD, running=list(self.lengths.items()), steps=self.steps, timed_steps=timed, clock_s=time.monotonic()
        )
        return load.plain()

    def step(self, step_s: float) -> None:
        """A token for each request."""
        self.steps += 1
        tokens = sum(self.lengths.values())
        self.timed.append((len(self.lengths), tokens, max(self.lengths.values()), 0, 0.0, step_s))
        for name in self.lengths:
            self.lengths[name] += 1
        tokens_of_all = [EngineCoreOutput(name, [TOKEN]) for name in self.lengths]
        self.loads_along.put_nowait((0, EngineCoreOutputs(outputs=tokens_of_all)))

    def put_nowait(self, item: tuple[int, EngineCoreOutputs]) -> None:
        """Send outputs to the client."""
        self.outputs.send_multipart(self.encoder.encode(item[1]), copy=False)

    def get(self) -> Any:
        """Nobody does: they have been sent."""
        raise NotImplementedError


def _connected(
    context: "zmq.Context[zmq.Socket[bytes]]", folder: Path, index: int, *, tells_unasked: bool
) -> StandInEngine:
    inputs, outputs = context.socket(zmq.DEALER), context.socket(zmq.PUSH)
    inputs.setsockopt(zmq.IDENTITY, (0).to_bytes(2, "little"))
    for sock, address in zip((inputs, outputs), addresses(folder, index), strict=True):
        sock.setsockopt(zmq.LINGER, 0)
        sock.connect(address)
    return StandInEngine(inputs, outputs, MsgpackEncoder(), MsgpackDecoder(), tells_unasked)


def serve(folder: Path, n_engines: int, step_s: float, tells_unasked: bool, loads: Any, ready: Any, ends: Any) -> None:
    """
    Be the engines until told to end.

    Args:
        folder: Of the sockets.
        n_engines: How many.
        step_s: Seconds from step to step of an engine with requests.
        tells_unasked: Whether loads come along with outputs.
        loads: A shared number: loads that all of them have told.
        ready, ends: Shared events: it serves; it shall end.
    """
    context: zmq.Context[Any] = zmq.Context()
    context.set(zmq.MAX_SOCKETS, 4 * n_engines + 16)
    engines = [_connected(context, folder, index, tells_unasked=tells_unasked) for index in range(n_engines)]
    poller = zmq.Poller()
    by_socket = {}
    for engine in engines:
        poller.register(engine.inputs, zmq.POLLIN)
        by_socket[engine.inputs] = engine
    ready.set()
    next_s, phase = time.monotonic(), 0
    while not ends.is_set():
        now_s = time.monotonic()
        if now_s >= next_s:
            next_s = max(next_s + step_s / PHASES, now_s)
            phase = (phase + 1) % PHASES
            for engine in engines[phase::PHASES]:
                if engine.lengths:
                    engine.step(step_s)
        wait_s = min(LONGEST_POLL_S, max(0.0, next_s - time.monotonic()))
        for sock, _ in poller.poll(int(wait_s * 1000)):
            by_socket[sock].take(sock.recv_multipart())
        loads.value = sum(engine.loads for engine in engines)
    context.destroy(linger=0)
