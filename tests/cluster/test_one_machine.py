"""Single-machine facts stay behind the launcher; exceptions are listed here, each with its reason."""

import ast
from collections.abc import Iterator
from pathlib import Path

import cascadeinfer

PACKAGE = Path(cascadeinfer.__file__).parent
BEHIND = PACKAGE / "cluster"
"""The launchers and their parts."""

TEXTS = {
    "127.0.0.1": "loopback",
    "ipc://": "socket file",
    "/dev/shm": "shared memory",  # noqa: S108 - looked for
    "/proc/": "proc",
}
NAMES = {
    "LOOPBACK": "loopback",
    "LOOPBACK_DEVICE": "loopback",
    "SharedMemory": "shared memory",
    "getpid": "process id",
    "getppid": "process id",
    "kill_process_tree": "process id",
    "killpg": "process id",
    "open_unix_connection": "socket pair",
    "psutil": "process id",
    "sched_getaffinity": "cores",
    "socketpair": "socket pair",
}
MODULES = {"multiprocessing": "child process", "psutil": "process id"}

MAY_STAY = {
    ("assemble.py", "loopback"): "where the HTTP server listens unless told otherwise",
    ("assemble.py", "child process"): "front-end processes share a listening socket, so they are on one machine",
    ("cli/admin_calls.py", "loopback"): "an example in an error's fix",
    ("cli/bench.py", "loopback"): "an example in a help text",
    ("cli/bench.py", "process id"): "makes the ids of two runs different",
    ("cli/roll.py", "loopback"): "the server is here unless told otherwise",
    ("cli/top.py", "loopback"): "an example in a help text",
    ("demo/server.py", "loopback"): "the demo starts its server on the machine that it runs on",
    ("doctor/checks/machine.py", "shared memory"): "names the file system that is too small",
    ("doctor/checks/failures.py", "shared memory"): "names the file system that is too small",
    ("doctor/gathering/machine.py", "loopback"): "the doctor examines the machine that it runs on",
    ("doctor/gathering/machine.py", "proc"): "the doctor examines the machine that it runs on",
    ("doctor/gathering/machine.py", "process id"): "the doctor examines the machine that it runs on",
    ("doctor/gathering/machine.py", "shared memory"): "the doctor examines the machine that it runs on",
    ("engines/vllm/connector/cores.py", "cores"): "of the instance's own process, inside it",
    ("engines/vllm/connector/cores.py", "proc"): "of the instance's own process, inside it",
    ("engines/vllm/connector/door.py", "process id"): "of the engine's own process, shown to the operator",
    ("engines/vllm/connector/identity.py", "proc"): "the name of the processor, asked where the instance runs",
    (
        "engines/vllm/connector/orphan.py",
        "child process",
    ): "an EngineCore ends with whoever keeps it, on its own machine",
    ("engines/vllm/connector/orphan.py", "process id"): "an EngineCore ends with whoever keeps it, on its own machine",
    ("engines/vllm/ending.py", "process id"): "vLLM's own client ends its processes by their ids",
    ("engines/vllm/kept_engine.py", "process id"): "an engine ends with its keeper, on its own machine",
    ("engines/vllm/kept_engine.py", "socket file"): "an engine talks to its keeper, on its own machine",
    ("engines/vllm/ending.py", "child process"): "the type of what the launcher for this machine is given",
    ("engines/vllm/processes.py", "child process"): "the type of what the launcher for this machine is given",
    ("evaluation/pool.py", "child process"): "simulations in parallel",
    ("eventlog/run_file.py", "process id"): "makes the names of two unfinished logs different",
    ("frontend/processes/follower.py", "process id"): "shown to the operator",
    (
        "frontend/processes/owner.py",
        "child process",
    ): "front-end processes share a listening socket, so they are on one machine",
    ("frontend/processes/owner.py", "process id"): "shown to the operator",
    (
        "frontend/processes/owner.py",
        "socket pair",
    ): "front-end processes share a listening socket, so they are on one machine",
    (
        "frontend/stop_signals.py",
        "child process",
    ): "a server that is told twice to stop ends what is below it on this machine",
    (
        "frontend/stop_signals.py",
        "process id",
    ): "a server that is told twice to stop ends what is below it on this machine",
    ("frontend/server_options.py", "loopback"): "a sentence of the options' page: where the server listens",
    ("loadgen/served_process.py", "loopback"): "a server for a demo, a test or a benchmark runs beside it",
    ("loadgen/served_process.py", "process id"): "and is ended by it",
    ("results/output_files.py", "process id"): "makes the names of two unfinished files different",
}
"""The reason for each exception, by (file, fact)."""


def facts_in(source: str) -> set[str]:
    """The single-machine facts that this code uses; docstrings do not count."""
    return set(_facts_in(ast.parse(source)))


def _facts_in(tree: ast.Module) -> Iterator[str]:
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        match node:
            case ast.Constant(value=str(text)) if id(node) not in prose:
                yield from (fact for piece, fact in TEXTS.items() if piece in text)
            case ast.Name(id=name) | ast.Attribute(attr=name) if name in NAMES:
                yield NAMES[name]
            case ast.Import(names=names):
                yield from (MODULES[top] for alias in names if (top := alias.name.split(".")[0]) in MODULES)
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] in MODULES:
                yield MODULES[module.split(".")[0]]
            case _:
                pass


def test_what_is_looked_for_is_found() -> None:
    """Finds addresses in plain strings and f-strings, names however they are reached, and modules; nothing in prose."""
    assert facts_in('"""On 127.0.0.1."""\ndef f():\n    """See /dev/shm."""\n    return 1') == set()
    assert facts_in('a = f"ipc://{folder}/x"') == {"socket file"}
    assert facts_in("host = '127.0.0.1:80'") == {"loopback"}
    assert facts_in("import os\nos.getpid()") == {"process id"}
    assert facts_in("from multiprocessing.shared_memory import SharedMemory\nSharedMemory()") == {
        "child process",
        "shared memory",
    }


def test_facts_of_one_machine_are_behind_the_launcher() -> None:
    """
    Outside `cluster/`, only the listed exceptions use loopback, socket files,
    shared memory, process ids, child processes or cores.
    """
    found = {
        (path.relative_to(PACKAGE).as_posix(), fact)
        for path in PACKAGE.rglob("*.py")
        if BEHIND not in path.parents
        for fact in facts_in(path.read_text(encoding="utf-8"))
    }
    assert found - MAY_STAY.keys() == set(), "put it behind the launcher, or say here why it may stay"
    assert MAY_STAY.keys() - found == set(), "it is gone: strike it off the list"
