"""Every option of `vllm serve` has a place: passed on, read by the server, or refused by name."""

import ast
import asyncio
import resource
import runpy
import socket
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

import vllm
from vllm.engine.arg_utils import AsyncEngineArgs

from cascadeinfer.cli.config_file import words_with_config
from cascadeinfer.cli.serve import make_parser, parse
from cascadeinfer.cli.vllm_options import defaults
from cascadeinfer.config.schema import ServeOptions, options_of
from cascadeinfer.core.errors import ConfigError
from cascadeinfer.engines.vllm.launch import parse_engine_args
from cascadeinfer.engines.vllm.refused_options import REFUSED_ENGINE_OPTIONS, check_engine_args, engine_default
from cascadeinfer.frontend import listening
from cascadeinfer.frontend.server_options import (
    DIFFERENT_HERE,
    READ_HERE,
    REFUSED_SERVER_OPTIONS,
    check_server_options,
)

ROOT = Path(__file__).parents[2]
VLLM = Path(vllm.__file__).parent
OURS = {field.name for field in fields(ServeOptions)}
ENGINE = {field.name for field in fields(AsyncEngineArgs)}
REPLACED = tuple(
    f"launchers/{name}.py"
    for name in (
        "launcher",
        "api_server/entry",
        "cli_args",
        "grpc_server",
        "dp_supervisor",
        "run_batch",
        "render/entry",
    )
)
"""Modules of vLLM's that start a server or check its options, which is done here; reading an option there is no use."""


@pytest.fixture(autouse=True)
def logging_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parsing sets up the logging of a server; other tests of this process read ours."""
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    monkeypatch.setattr("cascadeinfer.frontend.logs.set_up_logs", lambda *_, **__: None)


@pytest.fixture(scope="module")
def parser() -> ArgumentParser:
    """The parser of `cascadeinfer serve`."""
    return make_parser()


def server_options(parser: ArgumentParser) -> set[str]:
    """Names of vLLM's options that are not for engines."""
    return {action.dest for action in parser._actions} - OURS - ENGINE - {"help"}


def names_read(files: list[Path], owners: tuple[str, ...]) -> set[str]:
    """Attributes that these files read of variables (or attributes) with these names, `getattr` included."""
    found = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            match node:
                case ast.Attribute(value=owner, attr=name) if ast.unparse(owner).rpartition(".")[2] in owners:
                    found.add(name)
                case ast.Call(func=ast.Name(id="getattr"), args=[owner, ast.Constant(value=str(name)), *_]) if (
                    ast.unparse(owner).rpartition(".")[2] in owners
                ):
                    found.add(name)
                case _:
                    pass
    return found


def names_read_by_resolving() -> set[str]:
    """What vLLM's application has resolved by a function beside the parser."""
    tree = ast.parse((VLLM / "entrypoints" / "launchers" / "cli_args.py").read_text())
    [function] = [n for n in tree.body if getattr(n, "name", "") == "resolve_default_chat_template_kwargs"]
    return {node.attr for node in ast.walk(function) if isinstance(node, ast.Attribute)}


def test_every_server_option_is_read_or_refused(parser: ArgumentParser) -> None:
    """Each is refused by name, read here, or read by vLLM's application; no table names one that does not exist."""
    application = [
        file
        for file in (VLLM / "entrypoints").rglob("*.py")
        if not str(file).endswith(REPLACED) and "cli" not in file.relative_to(VLLM / "entrypoints").parts
    ]
    by_vllm = names_read(application, ("args",)) | names_read_by_resolving()
    known = server_options(parser)
    handled = REFUSED_SERVER_OPTIONS.keys() | READ_HERE | {"api_server_count"}
    assert known - handled - by_vllm == set()
    assert handled - known == set()
    assert DIFFERENT_HERE.keys() <= known | ENGINE


def test_what_is_read_here_is_read(parser: ArgumentParser) -> None:
    """Our source reads each of the options that vLLM's own start would have read."""
    ours = names_read(list((ROOT / "src").rglob("*.py")), ("args", "namespace"))
    tls = {name for name in server_options(parser) if name in listening.TLS_FILES}
    assert READ_HERE - ours - tls == set()


def test_every_engine_option_reaches_the_engines() -> None:
    """Each is refused by name, goes into the engines' configuration, or is read here."""
    tree = ast.parse((VLLM / "engine" / "arg_utils.py").read_text())
    read = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in {"self", "args"}
    }
    ours = names_read(list((ROOT / "src").rglob("*.py")), ("args", "engine_args"))
    application = names_read(list((VLLM / "entrypoints").rglob("*.py")), ("args",))
    private = {name for name in ENGINE if name.startswith("_")}
    assert ENGINE - private - REFUSED_ENGINE_OPTIONS.keys() - read - ours - (application & {"tokens_only"}) == set()
    assert REFUSED_ENGINE_OPTIONS.keys() <= ENGINE


@pytest.mark.parametrize("name", REFUSED_ENGINE_OPTIONS)
def test_refused_engine_option(name: str) -> None:
    """It is refused with its own name and a fix, and its default is not."""
    untouched = Namespace(**{refused: engine_default(refused) for refused in REFUSED_ENGINE_OPTIONS})
    check_engine_args(untouched)  # type: ignore[arg-type]
    row = REFUSED_ENGINE_OPTIONS[name]
    setattr(untouched, name, row.values[0] if row.values else "something else")
    with pytest.raises(ConfigError) as raised:
        check_engine_args(untouched)  # type: ignore[arg-type]
    assert raised.value.option == "--" + name.replace("_", "-")
    assert raised.value.fix == row.fix


@pytest.mark.parametrize("name", REFUSED_SERVER_OPTIONS)
def test_refused_server_option(name: str, parser: ArgumentParser) -> None:
    """The same for vLLM's server."""
    untouched = defaults(parser)
    check_server_options(untouched, defaults(parser), api_servers=1)
    setattr(untouched, name, "something else")
    with pytest.raises(ConfigError) as raised:
        check_server_options(untouched, defaults(parser), api_servers=1)
    assert raised.value.option == "--" + name.replace("_", "-")


@pytest.mark.parametrize(
    ("variable", "api_servers"), [("VLLM_USE_RUST_FRONTEND", 1), ("VLLM_ALLOW_RUNTIME_LORA_UPDATING", 2)]
)
def test_refused_variables(
    variable: str, api_servers: int, parser: ArgumentParser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Variables that would have no effect, or harm, are named."""
    monkeypatch.setenv(variable, "1")
    with pytest.raises(ConfigError, match=variable):
        check_server_options(defaults(parser), defaults(parser), api_servers=api_servers)


def test_limits_that_each_process_would_count_alone(parser: ArgumentParser) -> None:
    """The queue bound of vLLM works with one process and is refused with more."""
    args = parser.parse_args(["m", "--max-num-queued-reqs", "5"])
    check_server_options(args, defaults(parser), api_servers=1)
    with pytest.raises(ConfigError, match="--max-num-queued-reqs"):
        check_server_options(args, defaults(parser), api_servers=2)


# --- a file of options -----------------------------------------------------------------------------------------------


def written(folder: Path, text: str, name: str = "serve.yaml") -> str:
    """A file with this content."""
    path = folder / name
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("form", ["two words", "one word"])
def test_a_file_names_model_and_options_of_both(form: str, tmp_path: Path) -> None:
    """Its `model` is served, its options count, ours included, and the command line wins."""
    file = written(tmp_path, "model: org/model\ninstances: 3\nstages: 0-64:1,64-:2\nport: 1234\nenforce-eager: true\n")
    words = ["--config", file] if form == "two words" else [f"--config={file}"]
    args = parse([*words, "--port", "4321"])
    assert (args.model, args.port, args.enforce_eager) == ("org/model", 4321, True)
    assert args.served_model_name is None
    assert len(options_of(args).layout().stages) == 2
    assert parse(["other/model", *words]).model == "other/model"
    assert parse(["--model", "other/model", *words]).model == "other/model"


def test_a_list_in_a_file_does_not_take_the_model(tmp_path: Path) -> None:
    """The model may come after the file, whatever the file's last option is."""
    file = written(tmp_path, "port: 1234\nserved-model-name: [a, b]\n")
    args = parse(["--config", file, "org/model", "--port", "4321"])
    assert (args.model, args.served_model_name, args.port) == ("org/model", ["a", "b"], 4321)


@pytest.mark.parametrize(
    ("text", "name", "said"),
    [
        (None, "none.yaml", "No such file"),
        ("port: 1", "serve.toml", "no"),
        ("", "serve.yaml", "no table"),
        ("- port\n", "serve.yaml", "no table"),
        ("port: [", "serve.yaml", "serve.yaml"),
        ("config: other.yaml\n", "serve.yaml", "further file"),
        ("frobnicate: 3\n", "serve.yaml", "--frobnicate"),
    ],
)
def test_a_file_that_cannot_be_used(text: str | None, name: str, said: str, tmp_path: Path) -> None:
    """One sentence that names option or file."""
    file = str(tmp_path / name) if text is None else written(tmp_path, text, name)
    with pytest.raises(ConfigError, match=said):
        parse(["org/model", "--config", file])


def test_the_option_of_the_file_itself() -> None:
    """Without a file, given twice, or abbreviated, it is refused rather than ignored."""
    for words in (["--config"], ["--config", "a.yaml", "--config=b.yaml"]):
        with pytest.raises(ConfigError, match="--config"):
            words_with_config(words)
    with pytest.raises(ConfigError, match="--config"):
        parse(["org/model", "--conf", "a.yaml"])


def test_the_example_is_a_valid_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """`examples/serve.yaml` parses, each of its options exists and is taken, and its stages fit its instances."""
    monkeypatch.setattr(listening, "_check_readable", lambda *_: None)
    monkeypatch.setattr(listening, "create_ssl_context", lambda **_: None)
    args = parse(["--config", str(ROOT / "examples" / "serve.yaml")])
    assert args.model == "meta-llama/Llama-3.1-70B-Instruct"
    assert args.tensor_parallel_size == 2
    options = options_of(args)
    assert (options.instances, options.api_servers, options.policy_name()) == (4, 2, "cascade")
    options.layout()


def test_the_page_of_all_options_is_current() -> None:
    """docs/vllm_options.md is what `python docs/generate_vllm_options.py` writes."""
    page = runpy.run_path(str(ROOT / "docs" / "generate_vllm_options.py"))["render"]()
    assert (ROOT / "docs" / "vllm_options.md").read_text(encoding="utf-8") == page


# --- around the application ------------------------------------------------------------------------------------------


def test_late_interaction_is_told_to_the_engines(tiny_config: Path) -> None:
    """The server's option without fused scoring goes into the engines' pooler configuration."""
    for words, expected in (([], None), (["--no-enable-flash-late-interaction"], False)):
        pooler = parse_engine_args(parse([str(tiny_config), *words])).pooler_config
        assert (None if pooler is None else pooler.enable_flash_late_interaction) == expected


@pytest.fixture
def tiny_config(tmp_path: Path) -> Path:
    """A folder that looks like a model's."""
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def tls(**given: Any) -> Namespace:
    """The TLS options, these ones given."""
    absent = dict.fromkeys(("ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "ssl_ciphers"))
    return Namespace(**{**absent, "ssl_cert_reqs": 0, "enable_ssl_refresh": False, **given})


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A key and its certificate, as files."""
    folder = tmp_path_factory.mktemp("tls")
    key, cert = str(folder / "key.pem"), str(folder / "cert.pem")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "2",
         "-keyout", key, "-out", cert],
        check=True, capture_output=True,
    )  # fmt: skip
    return key, cert


def test_tls_files_are_checked_before_anything_starts(certificate: tuple[str, str], tmp_path: Path) -> None:
    """Missing, foreign and useless files are refused with the option; a fitting pair is not."""
    key, cert = certificate
    listening.check_tls(tls())
    listening.check_tls(tls(ssl_keyfile=key, ssl_certfile=cert, enable_ssl_refresh=True))
    other = tmp_path / "other.pem"
    other.write_text("no key")
    for wrong, option in (
        (tls(ssl_keyfile="/no/key.pem", ssl_certfile=cert), "--ssl-keyfile"),
        (tls(ssl_keyfile=key, ssl_certfile="/no/cert.pem"), "--ssl-certfile"),
        (tls(ssl_keyfile=key, ssl_certfile=cert, ssl_ca_certs="/no/ca.pem"), "--ssl-ca-certs"),
        (tls(ssl_keyfile=str(other), ssl_certfile=cert), "--ssl-certfile"),
        (tls(ssl_keyfile=key, ssl_certfile=cert, ssl_cert_reqs=7), "--ssl-certfile"),
        (tls(ssl_keyfile=key, ssl_certfile=cert, ssl_ciphers="none such"), "--ssl-certfile"),
        (tls(ssl_keyfile=key), "--ssl-keyfile"),
        (tls(enable_ssl_refresh=True), "--enable-ssl-refresh"),
    ):
        with pytest.raises(ConfigError) as raised:
            listening.check_tls(wrong)
        assert raised.value.option == option


def test_a_unix_socket(tmp_path: Path) -> None:
    """It is bound, removed at the end, and replaced if nobody listens on it; a living server's and a file are not."""
    path = tmp_path / "socket"
    leave: list[Any] = []
    with listening.listening("", 0, str(path), leave) as listener:
        listener.listen()
        with pytest.raises(ConfigError, match="--uds"), listening.listening("", 0, str(path), []):
            pass
        assert path.is_socket()
    assert not path.exists()
    leave[0]()  # the same again does no harm
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))
    with listening.listening("", 0, str(path), []):
        pass
    path.write_text("not a socket")
    with pytest.raises(ConfigError, match="--uds"), listening.listening("", 0, str(path), []):
        pass
    assert path.read_text() == "not a socket"


async def test_an_address_that_is_let_go_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that takes over waits while others listen there, not for ever, and not for what cannot be bound."""
    path = tmp_path / "socket"
    with listening.listening("127.0.0.1", 0, None, []) as tcp, listening.listening("", 0, str(path), []) as unix:
        tcp.listen()
        unix.listen()
        port = tcp.getsockname()[1]
        waiting = [
            asyncio.ensure_future(listening.until_let_go("127.0.0.1", port, None)),
            asyncio.ensure_future(listening.until_let_go("", 0, str(path))),
        ]
        done, _ = await asyncio.wait(waiting, timeout=0.2)
        assert not done
    await asyncio.gather(*waiting)
    assert not path.exists()
    await listening.until_let_go("192.0.2.1", 0, None)
    await listening.until_let_go("127.0.0.1", 70000, None)
    monkeypatch.setattr(listening, "LET_GO_S", 0.1)
    with listening.listening("127.0.0.1", 0, None, []) as tcp:
        tcp.listen()
        await listening.until_let_go("127.0.0.1", tcp.getsockname()[1], None)


def test_the_limit_on_open_files_is_raised() -> None:
    """As vLLM does; in a process of its own, since the limit is one."""
    program = (
        "import resource\n"
        "from cascadeinfer.frontend.listening import raise_open_files_limit\n"
        "hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))\n"
        "raise_open_files_limit(100)\n"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert int(done.stdout) == (
        listening.OPEN_FILES if hard == resource.RLIM_INFINITY else min(listening.OPEN_FILES, hard)
    )
