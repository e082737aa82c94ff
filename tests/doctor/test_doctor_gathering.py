"""Gathering facts: what the kernel and tools show, read from made-up files and texts; parts that fail or hang."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cascadeinfer.doctor.checks.failures import CAUSES, HANGS, SIGNALS, TITLES, failure_checks, reason_in
from cascadeinfer.doctor.examining import LIMITS_S
from cascadeinfer.doctor.facts import DECODER, Doing, End, Gathered, HostName, Machine, RdmaPort, Software
from cascadeinfer.doctor.gathering import machine as asked
from cascadeinfer.doctor.gathering.devices import links_in
from cascadeinfer.doctor.gathering.notes import Notes, read_notes
from cascadeinfer.doctor.gathering.parts import MODULES
from cascadeinfer.doctor.gathering.running import gather
from cascadeinfer.doctor.gathering.ucx_log import transports_in
from cascadeinfer.doctor.verdicts import Verdict

PATIENCE_S = 120.0
"""For a process that does hardly anything, on a busy machine."""
UCX_LOG = """
[1.0] [vm:9060 :0] ucp_worker.c:1997 UCX  INFO    a7ef self cfg#0 rma_am(tcp/lo)  am(tcp/lo sysv/memory)  ka(tcp/lo)
[1.1] [vm:9060 :0]   | a7ef self cfg#0                                       |
[1.1] [vm:9060 :0]   | remote memory read by ucp_get* into host memory       |
[1.1] [vm:9060 :0]   | 0..inf | zero-copy   | posix/memory                   |
[1.2] [vm:9060 :0] ucp_worker.c:1997 UCX  INFO    a7 intra-node cfg#1 rma_am(tcp/lo) am(tcp/lo cma/memory) ka(tcp/lo)
"""
UCX_READS = """
[1.3] [vm:9060 :0]   +--------+-------------+------------------------------+
[1.3] [vm:9060 :0]   | a7ef intra-node cfg#1                               |
[1.3] [vm:9060 :0]   | remote memory read by ucp_get*(multi) into cuda/GPU0 from cuda |
[1.3] [vm:9060 :0]   +--------+-------------+------------------------------+
[1.3] [vm:9060 :0]   | Range  | Description |              Config          |
[1.3] [vm:9060 :0]   | 0..100 | software    | tcp/lo                       |
[1.3] [vm:9060 :0]   | 101..inf | zero-copy | cuda_ipc/cuda                |
"""
TOPOLOGY = """
\t\x1b[4mGPU0\tGPU1\tNIC0\tCPU Affinity\x1b[0m
GPU0\t X \tNV18\tPIX\t0-31
GPU1\tNV18\t X \tSYS\t0-31
NIC0\tPIX\tSYS\t X
"""


def part_of(program: str) -> list[str]:
    """A command that runs this Python text."""
    return [sys.executable, "-c", program]


def runs(pid: int) -> bool:
    """Whether a process is alive; one that nobody has reaped yet is not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def run(folder: Path, program: str, limit_s: float = PATIENCE_S) -> Gathered:
    """A part with this program, whose file is its last argument."""
    return gather("name", [], folder, limit_s, program=lambda _, file: [*part_of(program), str(file)])


def test_a_part_brings_its_facts(tmp_path: Path) -> None:
    """The real look-up of this machine's name."""
    found = gather("name", [], tmp_path, PATIENCE_S)
    assert (found.end, found.code, found.output) == (End.DONE, 0, "")
    (host,) = found.facts
    assert isinstance(host, HostName)
    assert host.name == socket.gethostname()
    assert failure_checks(found) == []


def test_a_part_that_hangs_is_reported_and_ended(tmp_path: Path) -> None:
    """With what it was doing and what helps; the process that it has started is gone as well."""
    program = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with open(sys.argv[-1], "w") as notes:
    notes.write('{"type": "Doing", "what": "waiting for %d"}\\n' % child.pid)
time.sleep(600)
"""
    limit_s = 1.0
    found = run(tmp_path, program, limit_s)
    while not found.doing:  # a busy machine: it had not come so far
        limit_s *= 2
        found = run(tmp_path, program, limit_s)
    assert found.end is End.TIMED_OUT
    assert not runs(int(found.doing.rpartition(" ")[2]))
    (check,) = failure_checks(found)
    assert (check.name, check.verdict) == ("host name", Verdict.FAULT)
    assert f"no end within {limit_s:g} s while waiting for" in check.found
    assert check.fix == HANGS["name"]


def test_a_part_that_fails_is_reported_with_the_reason(tmp_path: Path) -> None:
    """The last error that it names; facts from before count."""
    program = """
import sys
with open(sys.argv[-1], "w") as notes:
    notes.write('{"type": "Software", "python": "3.11", "versions": {}}\\n{"type": "Doing", "wh')
raise OSError("[Errno 24] Too many open files")
"""
    found = run(tmp_path, program)
    assert (found.end, found.code) == (End.FAILED, 1)
    assert [type(fact) for fact in found.facts] == [Software]
    (check,) = failure_checks(found)
    assert check.found == "failed: OSError: [Errno 24] Too many open files"
    assert "ulimit -n" in check.fix


def test_what_ucx_says_does_not_hide_the_reason(tmp_path: Path) -> None:
    """It prints hundreds of lines; its warnings stay."""
    program = """
print("[1.5] [vm:1 :0]  a.c:1  UCX  WARN  something is slow")
for _ in range(500):
    print("[1.5] [vm:1 :0]   | 0..inf | zero-copy | cma/memory |")
    print("[1.5] [vm:1 :0]  ucp_worker.c:1997 UCX  INFO    a7 self cfg#0 rma_am(tcp/lo)")
raise SystemExit(3)
"""
    found = run(tmp_path, program)
    assert (found.code, found.output) == (3, "[1.5] [vm:1 :0]  a.c:1  UCX  WARN  something is slow")


def test_a_part_that_is_killed_is_reported_with_the_signal(tmp_path: Path) -> None:
    """As the kernel does when memory runs out."""
    (check,) = failure_checks(run(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"))
    assert check.found == "ended by SIGKILL"
    assert "memory" in check.fix


@pytest.mark.parametrize("number", SIGNALS)
def test_each_known_signal_has_a_fix(number: signal.Signals) -> None:
    """In one line."""
    (check,) = failure_checks(Gathered("trial", End.FAILED, code=-number))
    assert check.fix == SIGNALS[number]


@pytest.mark.parametrize(
    ("output", "fix"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate", "nvidia-smi"),
        ("ValueError: Free memory on device cuda:0 (3/80 GiB) on startup is less", "nvidia-smi"),
        ("OSError: [Errno 28] No space left on device", "TMPDIR"),
        ("RuntimeError: Failed to infer device type", "build for this machine"),
        ("ModuleNotFoundError: No module named 'vllm._C'", "reinstall"),
        ("RuntimeError: CUDA error: no kernel image is available for execution", "capability"),
        ("OSError: [Errno 12] Cannot allocate memory", "limit"),
        ("RuntimeError: something new", "attach the report"),
    ],
)
def test_each_known_reason_has_a_fix(output: str, fix: str) -> None:
    """The reason is quoted."""
    (check,) = failure_checks(Gathered("trial", End.FAILED, doing="starting two instances", code=1, output=output))
    assert (
        check.found
        == f"failed while starting two instances: {output.partition('.')[2] if 'torch.' in output else output}"
    )
    assert fix in check.fix


def test_the_tables_are_complete() -> None:
    """Each part has a module, a limit and a title; each fix is one line."""
    assert MODULES.keys() == LIMITS_S.keys() == TITLES.keys()
    assert HANGS.keys() <= MODULES.keys()
    assert all("\n" not in fix for fix in [*HANGS.values(), *SIGNALS.values(), *(fix for _, fix in CAUSES)])


def test_the_reason_is_the_last_error_that_is_named() -> None:
    """Whatever follows it; without one, the last line."""
    text = "Traceback\n  File x\n(EngineCore pid=1) ValueError: first\na.b.EngineError: instance 0: died\nstopping\n"
    assert reason_in(text) == "EngineError: instance 0: died"
    assert reason_in("a\nb\n\n") == "b"
    text = (
        "(EngineCore pid=7) ERROR 11-30 02:44:40 [core.py:1068] ValueError: Free memory on device cuda:0 is less\n"
        "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}\n"
        "cascadeinfer.core.errors.EngineError: instance 0: did not start: Engine core initialization failed.\n"
    )
    assert reason_in(text) == "ValueError: Free memory on device cuda:0 is less"
    assert reason_in(text.split("\n", 1)[1]).startswith("EngineError: instance 0: did not start")
    assert reason_in("") == "it said nothing"


def test_notes_are_read_back(tmp_path: Path) -> None:
    """All whole lines."""
    notes = Notes(tmp_path / "notes")
    notes.doing("this")
    notes.add(HostName(name="a", addresses=[], seconds=1.0))
    with (tmp_path / "notes").open("ab") as file:
        file.write(b'{"type": "Doi')
    assert read_notes(tmp_path / "notes") == [Doing(what="this"), HostName(name="a", addresses=[], seconds=1.0)]
    assert read_notes(tmp_path / "none") == []


def test_this_machine_answers(tmp_path: Path) -> None:
    """Facts of the machine that runs the tests are of the right form."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        taken.listen()
        asked.gather(Notes(tmp_path / "notes"), [str(port)])
    (fact,) = read_notes(tmp_path / "notes")
    assert isinstance(fact, Machine)
    assert fact.cores == len(os.sched_getaffinity(0))
    assert 0 < fact.free_memory_bytes <= fact.memory_bytes
    assert (fact.port, fact.port_fault) == (port, "Address already in use")
    assert (fact.loopback_fault, fact.folder_fault) == ("", "")


def test_limits_of_a_container(tmp_path: Path) -> None:
    """As version 2 of the kernel's groups shows them; without files there are none."""
    assert asked.container_limits(tmp_path) == (None, None, 0)
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "memory.max").write_text("1073741824\n")
    (tmp_path / "memory.current").write_text("4096\n")
    assert asked.container_limits(tmp_path) == (1.5, 2**30, 4096)
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert asked.container_limits(tmp_path) == (None, None, 4096)


def test_ports_of_adapters(tmp_path: Path) -> None:
    """State and kind of link, from the kernel's files."""
    port = tmp_path / "mlx5_0" / "ports" / "1"
    port.mkdir(parents=True)
    (port / "state").write_text("4: ACTIVE\n")
    (port / "link_layer").write_text("InfiniBand\n")
    wanted = RdmaPort(device="mlx5_0", port="1", state="ACTIVE", link_layer="InfiniBand")
    assert asked.rdma_ports(tmp_path) == [wanted]
    assert asked.rdma_ports(tmp_path / "none") == []


def test_a_folder_whose_sockets_names_are_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault and fix come apart."""
    monkeypatch.setenv("VLLM_RPC_BASE_PATH", str(tmp_path / ("x" * 100)))
    found, fix = asked.folder_trial()
    assert "is too long" in found
    assert fix.startswith("set VLLM_RPC_BASE_PATH")
    assert fix not in found


def test_no_other_setting_is_reported() -> None:
    """Whatever else is in the environment."""
    environment = {"UCX_TLS": "tcp", "HF_TOKEN": "hf_secret", "VLLM_API_KEY": "secret", "PATH": "/bin"}
    assert asked.settings_of(environment) == {"UCX_TLS": "tcp"}
    assert not [name for name in asked.SETTINGS if "KEY" in name.split("_") or "TOKEN" in name]


def test_links_between_gpus() -> None:
    """Of `nvidia-smi topo -m`, with its underlined header."""
    assert links_in(TOPOLOGY) == {(0, 1): "NV18", (1, 0): "NV18"}
    assert links_in("") == {}


def test_what_carries_blocks_by_ucx() -> None:
    """The table about reading a peer's memory, large blocks; before there is one, the lanes to the peer."""
    assert transports_in(UCX_LOG) == ["cma", "tcp"]
    assert transports_in(UCX_LOG + UCX_READS) == ["cuda_ipc"]
    assert transports_in("") == []


def test_facts_travel_as_they_are() -> None:
    """Through JSON and back; an unknown field is refused, as it would be a bug."""
    with pytest.raises(Exception, match="unknown field"):
        DECODER.decode(b'{"type": "Doing", "what": "x", "more": 1}')


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_the_command_and_its_part() -> None:
    """Exit code 130, one line, and nothing is left running."""
    command = [*part_of("from cascadeinfer.cli.main import main; main()"), "doctor", "--skip-engines"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "this machine\n"
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 130
        assert errors.splitlines() == [
            "stopping what was started (once more: at once)",
            "interrupted; nothing is left running",
        ]
    deadline_s = time.monotonic() + PATIENCE_S
    while any(runs(child.pid) for child in family):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
