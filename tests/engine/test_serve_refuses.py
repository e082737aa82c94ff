"""
Operator mistakes on `cascadeinfer serve`'s command line: one line naming the option, exit code 2, no start.

All cases run in one subprocess, which imports vLLM once; one more runs as the real command.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import QUICK_ENVIRONMENT

pytestmark = pytest.mark.engine

DRIVER = """
import contextlib, io, json, sys, traceback
import psutil
from cascadeinfer.cli import main as entry

def run(words):
    output, errors = io.StringIO(), io.StringIO()
    code = None
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            entry.main(["serve", *words])
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
    n_children = len(psutil.Process().children(recursive=True))
    return {"code": code, "out": output.getvalue(), "err": errors.getvalue(), "children": n_children}

if __name__ == "__main__":
    json.dump({name: run(words) for name, words in json.load(sys.stdin).items()}, sys.__stdout__)
"""

CASES: dict[str, tuple[list[str], list[str]]] = {
    "no such folder": (["/no/such/folder"], ["MODEL", "/no/such/folder"]),
    "no such repository": (["no-org/no-model"], ["MODEL", "no-org/no-model"]),
    "no instances": (["TINY", "--instances", "0"], ["--instances", "0 is not between 1"]),
    "no front end": (["TINY", "--api-servers", "0"], ["--api-servers", "0 is not between 1"]),
    "vLLM's front ends": (["TINY", "--api-server-count", "2"], ["--api-server-count", "use --api-servers"]),
    "instances in words": (["TINY", "--instances", "two"], ["--instances", "'two'"]),
    "overlapping stages": (["TINY", "--stages", "0-512:1,256-:1"], ["--stages", "overlap"]),
    "gap between stages": (["TINY", "--stages", "0-256:1,512-:1"], ["--stages", "gap"]),
    "stages from the middle": (["TINY", "--stages", "10-:2"], ["--stages", "start at 0"]),
    "bounded stages": (["TINY", "--stages", "0-512:1,512-1024:1"], ["--stages", "unbounded"]),
    "too many in stages": (["TINY", "--stages", "0-512:1,512-:2"], ["--stages", "--instances 3"]),
    "empty stage": (["TINY", "--stages", "0-512:0,512-:2"], ["--stages", "0-512:0"]),
    "stages in words": (["TINY", "--stages", "short,long"], ["--stages", "'short'"]),
    "options for no instance": (
        ["TINY", "--instance-args", "2: --max-num-seqs 8"],
        ["--instance-args", "no instance 2"],
    ),
    "contradictory options": (
        ["TINY", "--instance-args", "0: --max-num-seqs 8; 0-1: --max-num-seqs 16"],
        ["--instance-args", "instance 0 is named twice"],
    ),
    "options for all": (
        ["TINY", "--instance-args", "1: --model org/model"],
        ["--instance-args", "instance 1: --model: is the same for all instances"],
    ),
    "bad TOML": (["TINY", "--stages", "BAD_TOML"], ["--stages", "bad.toml", "line 1"]),
    "TOML of another kind": (["TINY", "--stages", "OTHER_TOML"], ["--stages", "other.toml", "[[stages]]"]),
    "no such TOML": (["TINY", "--stages", "/no/such.toml"], ["--stages", "/no/such.toml"]),
    "port in use": (["TINY", "--port", "USED_PORT"], ["--port", "in use"]),
    "port too high": (["TINY", "--port", "99999"], ["--port", "99999"]),
    "no such host": (["TINY", "--host", "no.such.host.invalid"], ["--host", "no.such.host.invalid"]),
    "unknown flag": (["TINY", "--frobnicate"], ["--frobnicate", "--help"]),
    "data parallel": (["TINY", "--data-parallel-size", "2"], ["--data-parallel-size", "--instances"]),
    "prefill context parallel": (
        ["TINY", "--prefill-context-parallel-size", "2"],
        ["--prefill-context-parallel-size", "remove"],
    ),
    "KV transfer": (["TINY", "--kv-transfer-config", "{}"], ["--kv-transfer-config", "remove"]),
    "KV offloading": (["TINY", "--kv-offloading-size", "1"], ["--kv-offloading-size", "remove"]),
    "sleep mode": (["TINY", "--enable-sleep-mode"], ["--enable-sleep-mode", "remove"]),
    "routed experts": (["TINY", "--enable-return-routed-experts"], ["--enable-return-routed-experts", "remove"]),
    "gRPC": (["TINY", "--grpc"], ["--grpc", "HTTP"]),
    "headless": (["TINY", "--headless"], ["--headless", "remove"]),
    "elastic": (["TINY", "--enable-elastic-ep"], ["--enable-elastic-ep", "--instances"]),
    "several machines": (["TINY", "--nnodes", "2"], ["--nnodes", "machines"]),
    "KV events": (["TINY", "--kv-events-config", "{}"], ["--kv-events-config", "remove"]),
    "vLLM's drain": (["TINY", "--shutdown-timeout", "5"], ["--shutdown-timeout", "--drain-timeout-s"]),
    "no key file": (
        ["TINY", "--ssl-keyfile", "/no/key.pem", "--ssl-certfile", "/no/c.pem"],
        ["--ssl-keyfile", "/no/key"],
    ),
    "nothing to refresh": (["TINY", "--enable-ssl-refresh"], ["--enable-ssl-refresh", "--ssl-certfile"]),
    "a socket that is a folder": (["TINY", "--uds", "/dev"], ["--uds", "/dev"]),
    "no file of options": (["TINY", "--config", "/no/such.yaml"], ["--config", "/no/such.yaml"]),
    "unknown policy": (["TINY", "--policy", "luck"], ["--policy", "static_stages"]),
    "report interval": (["TINY", "--report-interval-s", "0"], ["--report-interval-s"]),
    "lease": (["TINY", "--kv-lease-s", "1"], ["--kv-lease-s", "between 5 and 300"]),
    "event log nowhere": (["TINY", "--event-log", "/no/such/log"], ["--event-log", "/no/such/log"]),
    "unknown dtype": (["TINY", "--dtype", "float7"], ["--dtype", "float7"]),
    "too long for the model": (["TINY", "--max-model-len", "999999"], ["max_model_len", "999999"]),
    "no tensor parallel": (["TINY", "--tensor-parallel-size", "0"], ["--tensor-parallel-size", "greater than"]),
    "no chat template": (["TINY", "--chat-template", "/no/template"], ["/no/template"]),
    "tools without a parser": (["TINY", "--enable-auto-tool-choice"], ["--tool-call-parser"]),
    "unknown tool parser": (
        ["TINY", "--enable-auto-tool-choice", "--tool-call-parser", "magic"],
        ["tool call parser", "magic"],
    ),
    "flag without a value": (["TINY", "--api-key"], ["--api-key"]),
}
"""Arguments after `serve`, and what the message must contain."""


@pytest.fixture(scope="module")
def used_port() -> Iterator[int]:
    """A port that is in use."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.fixture(scope="module")
def results(tiny_model: Path, used_port: int, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The outcome of each case."""
    folder = tmp_path_factory.mktemp("toml")
    (folder / "bad.toml").write_text("[[stages]\n")
    (folder / "other.toml").write_text("[server]\nport = 1\n")
    names = {
        "TINY": str(tiny_model),
        "USED_PORT": str(used_port),
        "BAD_TOML": str(folder / "bad.toml"),
        "OTHER_TOML": str(folder / "other.toml"),
    }
    cases = {name: [names.get(word, word) for word in words] for name, (words, _) in CASES.items()}
    driver = folder / "driver.py"
    driver.write_text(DRIVER)
    done = subprocess.run(
        [sys.executable, str(driver)],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        timeout=280,
        check=True,
        env={**os.environ, **QUICK_ENVIRONMENT},
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_bad_option(results: dict[str, Any], name: str) -> None:
    """The mistake is reported in one line that names the option, with exit code 2, before anything is started."""
    result = results[name]
    assert result["code"] == 2, result["err"]
    lines = [line for line in result["err"].splitlines() if "Triton" not in line]  # vLLM's own warning
    assert len(lines) == 1, result["err"]
    [line] = lines
    assert line.startswith("cascadeinfer: error: ")
    for part in CASES[name][1]:
        assert part in line
    assert "Traceback" not in line
    assert result["out"] == ""
    assert result["children"] == 0


def test_bad_option_as_command(tiny_model: Path, used_port: int) -> None:
    """The installed command ends with exit code 2, one line, and no output."""
    name = "port in use"
    names = {"TINY": str(tiny_model), "USED_PORT": str(used_port)}
    command = Path(sys.executable).parent / "cascadeinfer"
    done = subprocess.run(
        [str(command), "serve", *(names.get(word, word) for word in CASES[name][0])],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env={**os.environ, **QUICK_ENVIRONMENT},
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("cascadeinfer: error: ")
    for part in CASES[name][1]:
        assert part in last
    assert done.stdout == ""
