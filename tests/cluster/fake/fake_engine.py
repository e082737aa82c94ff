"""
Stands in for an engine under a keeper: vLLM's handshake, a worker below it, shared memory, a door that nobody opens.

The file `content` in its folder says how it behaves: `fails` at its start, `stays` when it is told to end, `quits` once
it is ready, or `serves`.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import msgspec
import zmq


def end_with_keeper() -> None:
    """As the engine does."""
    lifeline = int(os.environ.pop("CASCADEINFER_KEEPER_PIPE"))

    def watch() -> None:
        os.read(lifeline, 1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def shake_hands(folder: Path) -> None:
    """As vLLM's EngineCore does."""
    sock = zmq.Context.instance().socket(zmq.DEALER)
    sock.setsockopt(zmq.IDENTITY, b"\0\0")
    sock.connect(f"ipc://{folder}/handshake")
    sock.send(msgspec.msgpack.encode({"status": "HELLO", "local": True, "headless": False}))
    answer = msgspec.msgpack.decode(sock.recv())
    assert answer["parallel_config"] == {}
    [output] = answer["addresses"]["outputs"]
    [_] = answer["addresses"]["inputs"]
    outputs = zmq.Context.instance().socket(zmq.PUSH)
    outputs.connect(output)
    for _ in range(3):
        outputs.send(b"for nobody")
    sock.send(msgspec.msgpack.encode({"status": "READY", "local": True, "headless": False}))


def main() -> None:
    """Behave as told."""
    end_with_keeper()
    folder = Path(sys.argv[1])
    behaviour = (folder / "content").read_text()
    if behaviour == "fails":
        raise ValueError("no such model")
    if behaviour == "stays":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    (folder / "worker").write_text(str(worker.pid))
    if behaviour == "hangs":
        time.sleep(3600)
    segment = SharedMemory(create=True, size=64)
    (folder / "segment").write_text(segment.name)
    shake_hands(folder)
    (folder / "door").write_text("127.0.0.1:7300")
    if behaviour == "quits":
        os._exit(3)
    time.sleep(3600)


if __name__ == "__main__":
    main()
