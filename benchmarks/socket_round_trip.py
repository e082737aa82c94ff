"""
Round trip of a token between a front end and an engine by each kind of connection, side by side.

    python benchmarks/socket_round_trip.py [--rounds 7] [--tokens 3000]

An engine process answers every message of an abort's size with the outputs of one step (vLLM's `EngineCoreOutputs` of
eight requests). Nothing is computed, so what is measured is the connection alone: `ipc`, the Unix sockets to an own
engine; `tcp`, the loopback without a key; `tcp under a key`, as engines of a fleet and of others are reached (CURVE).
The kinds alternate in each round, in an order that rotates.
"""

import argparse
import asyncio
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import zmq
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

import measuring
from cascadeinfer.cluster.knocking import make_lasting, tcp_address
from cascadeinfer.cluster.local import LOOPBACK
from cascadeinfer.cluster.shared_key import ClusterKey
from cascadeinfer.engines.vllm.client_sockets import ClientSockets

KEY: Final = ClusterKey.of("k" * 40)
N_REQUESTS: Final = 8
"""Whose tokens one step brings."""
WARM_UP: Final = 300


def engine(addresses: tuple[str, str], *, with_key: bool) -> None:
    """Answer for ever: connect, say that it is ready, and send the outputs of a step for each message."""
    context = zmq.Context[Any]()
    sockets = []
    for kind, address in zip((zmq.DEALER, zmq.PUSH), addresses, strict=True):
        sock = context.socket(kind)
        make_lasting(sock, LOOPBACK)
        if with_key:
            KEY.call(sock)
        if kind == zmq.DEALER:
            sock.setsockopt(zmq.IDENTITY, b"\0\0")
        sock.connect(address)
        sockets.append(sock)
    inputs, outputs = sockets
    inputs.send(b"ready")
    encoder = MsgpackEncoder()
    step = EngineCoreOutputs(outputs=[EngineCoreOutput(f"request-{i}", [7]) for i in range(N_REQUESTS)])
    while True:
        inputs.recv_multipart()
        outputs.send_multipart(encoder.encode(step), copy=False)


def sockets_of(kind: str, folder: str) -> ClientSockets:
    """A front end's sockets of a kind, bound."""
    if kind == "ipc":
        return ClientSockets.at(f"ipc://{folder}/input", f"ipc://{folder}/output")
    if kind == "tcp":
        return ClientSockets.at(tcp_address(LOOPBACK, "*"), tcp_address(LOOPBACK, "*"))
    return ClientSockets.on(LOOPBACK, KEY)


KINDS: Final = ("ipc", "tcp", "tcp under a key")


async def round_trip_us(kind: str, n_tokens: int) -> float:
    """Median round trip of one connection of this kind, in microseconds."""
    with tempfile.TemporaryDirectory() as folder:
        sockets = sockets_of(kind, folder)
        process = multiprocessing.get_context("spawn").Process(
            target=engine, args=(sockets.addresses,), kwargs={"with_key": kind == KINDS[-1]}, daemon=True
        )
        process.start()
        try:
            identity, _ = await sockets.input.recv_multipart()
            decoder = MsgpackDecoder(EngineCoreOutputs)
            taken_s = []
            for _ in range(WARM_UP + n_tokens):
                began_s = time.perf_counter()
                await sockets.input.send_multipart([identity, b"\x01", b"\x90"])
                decoder.decode(await sockets.output.recv_multipart(copy=False))
                taken_s.append(time.perf_counter() - began_s)
        finally:
            process.kill()
            process.join()
            sockets.close()
    return float(np.median(taken_s[WARM_UP:])) * 1e6


async def measure(rounds: int, n_tokens: int, say: Callable[[str], None]) -> list[dict[str, float]]:
    """Each round's medians, by kind."""
    results = []
    for number in range(rounds):
        order = [KINDS[(number + i) % len(KINDS)] for i in range(len(KINDS))]
        taken = {kind: await round_trip_us(kind, n_tokens) for kind in order}
        results.append({kind: taken[kind] for kind in KINDS})
        say(", ".join(f"{kind} {taken[kind]:.0f} us" for kind in KINDS))
    return results


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=3000)
    options = parser.parse_args()
    host = measuring.machine()
    rounds = asyncio.run(measure(options.rounds, options.tokens, print))
    results = {}
    for kind in KINDS[1:]:
        ratios = [each[kind] / each["ipc"] for each in rounds]
        results[kind] = {"of_ipc": float(np.median(ratios)), "lowest": min(ratios), "highest": max(ratios)}
        print(f"{kind}: {np.median(ratios):.2f} of ipc [{min(ratios):.2f}, {max(ratios):.2f}]")
    print(measuring.write_results("socket_round_trip", host, vars(options), {"rounds": rounds, **results}))


if __name__ == "__main__":
    main()
