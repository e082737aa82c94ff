"""Which engine options a rolling update may change, what makes two builds alike, and what is no version of a model."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs

from cascadeinfer.core.errors import ConfigError
from cascadeinfer.core.kind import InstanceTerms, Role
from cascadeinfer.engines.build import FIRST_BUILD, Build
from cascadeinfer.engines.models.tiny import make_tiny_llama
from cascadeinfer.engines.vllm import other_build
from cascadeinfer.engines.vllm.builds import Builds
from cascadeinfer.engines.vllm.configuration import KvTransferSettings
from cascadeinfer.engines.vllm.launch import VllmSource
from cascadeinfer.engines.vllm.other_build import changes_in

LENGTH = 512


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The served model."""
    return make_tiny_llama(tmp_path_factory.mktemp("old") / "tiny")


@pytest.fixture(scope="module")
def next_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its next version."""
    return make_tiny_llama(tmp_path_factory.mktemp("new") / "tiny", seed=1)


@pytest.fixture
def source(model: Path, monkeypatch: pytest.MonkeyPatch) -> VllmSource:
    """Makes engines for the model; one of them lives."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    engine_args = AsyncEngineArgs(model=str(model), dtype="float32", max_model_len=LENGTH, enforce_eager=True)
    made = VllmSource(engine_args, 2, KvTransferSettings(), log_stats=False)
    living: Any = {"0": SimpleNamespace(config=SimpleNamespace(model_config=SimpleNamespace(max_model_len=LENGTH)))}
    monkeypatch.setattr(made._launcher, "living", lambda: living)
    return made


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ([], {}),
        (["--max-num-seqs", "8"], {"max_num_seqs": 8}),
        (["--max_num_batched_tokens=2k", "--no-enable-prefix-caching"],
         {"max_num_batched_tokens": 2000, "enable_prefix_caching": False}),
        (["--model", "org/model", "--revision", "v2"], {"model": "org/model", "revision": "v2"}),
    ],
)  # fmt: skip
def test_what_is_said_changes(words: list[str], changes: dict[str, Any]) -> None:
    """And nothing else does."""
    assert changes_in(words) == changes


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--max-num-seqs", "few"], "argument --max-num-seqs: invalid int value: 'few'"),
        (["--max-num-seqs"], "expected one argument"),
        (["--port", "1"], "unrecognized arguments: --port 1"),
        (["a-model"], "unrecognized arguments: a-model"),
        (["--help"], "unrecognized arguments: --help"),
        (["--config", "/etc/passwd"], "--config: name the options themselves"),
        (["--config=/etc/passwd"], "--config=/etc/passwd: name the options themselves"),
        (["--served-model-name", "x"], "--served-model-name: is read by the front end"),
        (["--max-model-len", "4k"], "--max-model-len: is read by the front end"),
        (["--tensor-parallel-size", "2"], "--tensor-parallel-size: changes the cores or devices"),
        (["--data-parallel-size", "2"], "--data-parallel-size: is a part of vLLM's own way"),
        (["--seed", "3"], "--seed: cannot be changed while instances with another value serve"),
    ],
)
def test_what_cannot_change_is_refused_by_name(words: list[str], line: str) -> None:
    """In one line."""
    with pytest.raises(ConfigError) as refused:
        changes_in(words)
    assert line in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_sets_name_arguments_of_vllm() -> None:
    """Each in one set only; a version of vLLM that renames one is noticed."""
    sets = (other_build.ALIKE, other_build.OTHER_CACHE, other_build.OTHER_MODEL, other_build.REFUSED_HERE)
    names = [name for each in sets for name in each]
    assert len(names) == len(set(names))
    assert set(names) <= set(AsyncEngineArgs.__dataclass_fields__)


def test_builds(model: Path, next_model: Path) -> None:
    """Equal options are the same build; the KV cache and the model are told apart as far as they differ."""
    engine_args = AsyncEngineArgs(model=str(model))
    builds = Builds(engine_args, replace(engine_args, kv_cache_memory_bytes=1 << 28))

    def made(current: Build, *words: str) -> Build:
        return builds.keep(builds.prepare(current, words, LENGTH))

    assert made(FIRST_BUILD) is FIRST_BUILD
    assert made(FIRST_BUILD, "--model", str(model)) is FIRST_BUILD
    more = made(FIRST_BUILD, "--max-num-seqs", "8")
    assert more == Build(1, ("--max-num-seqs 8",))
    assert builds.args_of(more).max_model_len == LENGTH
    assert builds.args_of(more).kv_cache_memory_bytes == 1 << 28
    assert builds.said_of(more).kv_cache_memory_bytes is None
    assert builds.args_of(FIRST_BUILD).max_model_len is None
    blocks = made(more, "--block-size", "32")
    assert blocks.options == ("--block-size 32", "--max-num-seqs 8")
    assert (blocks.model_version, blocks.kv_group == more.kv_group) == ("", False)
    new = made(blocks, "--model", str(next_model))
    assert new.model_version != ""
    assert len({build.kv_group for build in (more, blocks, new)}) == 3
    flags = made(more, "--enforce-eager", "--no-enable-prefix-caching")
    assert flags.options == ("--no-enable-prefix-caching", "--max-num-seqs 8", "--enforce-eager")
    assert flags.kv_group == more.kv_group
    back = made(new, "--model", str(model))
    assert back is blocks


def test_new_files_under_the_same_path_are_another_version(model: Path, next_model: Path, tmp_path: Path) -> None:
    """An instance that starts from then on would load them."""
    path = tmp_path / "served"
    shutil.copytree(model, path)
    engine_args = AsyncEngineArgs(model=str(path))
    builds = Builds(engine_args, engine_args)
    assert builds.prepare(FIRST_BUILD, (), LENGTH).build is FIRST_BUILD
    for file in next_model.iterdir():
        shutil.copyfile(file, path / file.name)
    changed = builds.prepare(FIRST_BUILD, (), LENGTH).build
    assert (changed.number, changed.options) == (1, ())
    assert changed.model_version != ""


def test_the_configuration_is_made_before_anything_is_touched(source: VllmSource, next_model: Path) -> None:
    """What vLLM refuses is refused; what it takes can be placed."""
    with pytest.raises(ConfigError, match=r"vLLM refuses the engine arguments: .*--max-num-seqs: Input should be"):
        source.prepare(["--max-num-seqs", "0"])
    with pytest.raises(ConfigError, match="/nowhere"):
        source.prepare(["--model", "/nowhere"])
    build = source.prepare(["--model", str(next_model), "--max-num-seqs", "8"])
    assert source.prepare(["--max-num-seqs", "8", "--model", str(next_model)]) is build
    assert source.build is FIRST_BUILD
    source.place("0")
    source.place("1", build)
    new = source.place("1000", build)(0).config
    assert (new.model_config.model, new.scheduler_config.max_num_seqs) == (str(next_model), 8)
    assert source.place("1001")(1).config.model_config.model != str(next_model)


def test_instances_with_options_of_their_own(source: VllmSource) -> None:
    """They have them at every start, on top of those of all; equal ones are one build."""
    few = ["--max-num-seqs", "8"]
    source.give_own({"0": few, "1": ["--max-num-seqs", "16", "--max-num-batched-tokens", "64"], "2": few})
    own = source.own_builds
    assert own["0"] is own["2"]
    assert [own[name].options for name in "01"] == [
        ("--max-num-seqs 8",),
        ("--max-num-batched-tokens 64", "--max-num-seqs 16"),
    ]
    assert {build.model_version for build in own.values()} == {FIRST_BUILD.model_version}
    assert {build.kv_group for build in own.values()} == {FIRST_BUILD.kv_group}
    makers = {name: source.place(name) for name in "013"}
    for start in range(2):
        seqs = [makers[name](start).config.scheduler_config.max_num_seqs for name in "01"]
        assert seqs == [8, 16]
        limits = makers["3"](start).config
        assert limits.scheduler_config.max_num_seqs not in seqs
        assert limits.model_config.max_model_len == LENGTH


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--model", "org/model"], "--model: is the same for all instances (give it to the server itself)"),
        (["--block-size", "32"], "--block-size: is the same for all instances"),
        (["--kv-cache-dtype", "fp8"], "--kv-cache-dtype: is the same for all instances"),
        (["--max-model-len", "64"], "--max-model-len: is the same for all instances"),
        (["--no-such-option"], "unrecognized arguments: --no-such-option"),
        (["--max-num-seqs", "few"], "few"),
        (["--max-num-seqs", "64", "--max-num-batched-tokens", "32"], "max_num_batched_tokens"),
    ],
)
def test_what_all_instances_share(source: VllmSource, words: list[str], why: str) -> None:
    """And what vLLM refuses; the line names the instance."""
    with pytest.raises(ConfigError) as refused:
        source.give_own({"1": words})
    assert str(refused.value).startswith("--instance-args: instance 1: ")
    assert why in str(refused.value)
    assert not source.own_builds


def test_a_budget_is_judged_by_the_options_of_its_instance(source: VllmSource) -> None:
    """What is too little for others is enough for one with a small batch."""
    terms = {name: InstanceTerms(Role.MIXED, 16) for name in "01"}
    source.give_own({"0": ["--max-num-seqs", "8"]})
    with pytest.raises(ConfigError, match="--stages"):
        source.check_budgets(terms)
    source.check_budgets({"0": terms["0"]})


async def test_places(source: VllmSource) -> None:
    """Cores are shared only where that is asked for."""
    assert await source.has_room(shared=False)
    for number in range(2):
        source.place(str(number))
    while await source.has_room(shared=False):  # cores that are left over
        number += 1
        source.place(str(number))
    assert await source.has_room(shared=True)


def changed(folder: Path, name: str, **changes: Any) -> Path:
    """A folder with other entries in one of its JSON files."""
    file = folder / name
    told = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**told, **changes}))
    return folder


def with_template(folder: Path) -> Path:
    """A folder with another chat template."""
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def test_another_model_is_no_version(source: VllmSource, model: Path, tmp_path: Path) -> None:
    """The front end would go on with the old one's tokeniser, limits and defaults."""

    def copied(name: str) -> Path:
        return shutil.copytree(model, tmp_path / name)

    for folder, line in (
        (changed(copied("other"), "config.json", num_attention_heads=2), "its config.json has num_attention_heads 2"),
        (changed(copied("defaults"), "generation_config.json", temperature=0.5), "its generation_config.json differs"),
        (with_template(copied("template")), "its tokeniser differs"),
        (changed(copied("shorter"), "config.json", max_position_embeddings=LENGTH // 2), "max_model_len"),
    ):
        with pytest.raises(ConfigError) as refused:
            source.prepare(["--model", str(folder)])
        assert line in str(refused.value), folder
        assert "\n" not in str(refused.value)
    same = changed(copied("same"), "config.json", transformers_version="9")
    assert source.prepare(["--model", str(same)]).model_version != ""


def test_no_foreign_code(source: VllmSource, model: Path, next_model: Path) -> None:
    """A model that brings its own code along is not changed by a call; its other options are."""
    engine_args = AsyncEngineArgs(
        model=str(model), dtype="float32", max_model_len=LENGTH, enforce_eager=True, trust_remote_code=True
    )
    source._builds = Builds(engine_args, engine_args)
    with pytest.raises(ConfigError, match="--model: with --trust-remote-code, the new version's code would run"):
        source.prepare(["--model", str(next_model)])
    assert source.prepare(["--max-num-seqs", "8"]).number == 1


def test_without_an_instance_that_is_up(source: VllmSource, monkeypatch: pytest.MonkeyPatch) -> None:
    """How long a context the front end serves is known from those that are."""
    monkeypatch.setattr(source._launcher, "living", dict)
    with pytest.raises(ConfigError, match="no instance is up"):
        source.prepare(["--max-num-seqs", "8"])
