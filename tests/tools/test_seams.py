"""One table lists what we rely on inside vLLM; the installed version has all of it, and changes are noticed."""

import ast
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "seams"))

from facts import BASE, HERE, SOURCE, Facts, assumptions, differences, facts_of, recorded
from our_uses import Use, uses_of
from vllm_sources import VllmSources, body_hash, parameters

from cascadeinfer.frontend.engine_client import CascadeEngineClient

NOT_OURS = {
    "commit_elastic_ep": "data parallelism of one engine, refused at start",
    "prepare_elastic_ep": "the same",
    "get_kv_event_sources": "there is no publisher of KV events: the base's answer, none, is right",
    "handle_fault": "vLLM's own fault tolerance of data-parallel ranks; instances are restarted by the runtime",
    "get_status": "of the same",
}
"""Calls of `AsyncLLM` on its engine core that our client leaves to its base class, with the reason."""


@pytest.fixture(scope="module")
def vllm() -> VllmSources:
    """The sources of the installed version."""
    return VllmSources.installed()


@pytest.fixture(scope="module")
def uses(vllm: VllmSources) -> dict[str, Use]:
    """Our uses of vLLM."""
    return uses_of(SOURCE, vllm)


def test_every_use_is_in_the_table(uses: dict[str, Use]) -> None:
    """Each vLLM name that the source uses has an assumption, and no assumption is left over."""
    assert assumptions().keys() == uses.keys()


def test_the_installed_version_is_the_recorded_one(vllm: VllmSources, uses: dict[str, Use]) -> None:
    """All names exist with the recorded parameters; bodies that we override or patch are unchanged."""
    assert differences(recorded(BASE), facts_of(vllm, uses)) == []


def absent(vllm_facts: Facts, uses: dict[str, Use], version: tuple[int, ...]) -> list[str]:
    """Names that a version lacks, except those whose assumption says they exist only until or since another version."""
    said = assumptions()
    names = {
        key if member is None else f"{key}:{member}" for key, use in uses.items() for member in (None, *use.members)
    }
    missing = []
    for name in sorted(names - vllm_facts.keys()):
        border = re.match(r"\((until|since) (\d+)\.(\d+)\)", said[name.split(":")[0]])
        elsewhere = border is not None and (
            version > (int(border[2]), int(border[3]))
            if border[1] == "until"
            else version < (int(border[2]), int(border[3]))
        )
        if not elsewhere:
            missing.append(name)
    return missing


def test_every_use_is_there(vllm: VllmSources, uses: dict[str, Use]) -> None:
    """We use no name that the installed vLLM lacks."""
    assert absent(facts_of(vllm, uses), uses, (0, 32)) == []


@pytest.mark.parametrize("file", sorted(HERE.glob("*.json")), ids=lambda file: file.stem)
def test_every_use_is_in_every_recorded_version(file: Path, uses: dict[str, Use]) -> None:
    """Versions that were only read also have everything we use, and their facts cover today's uses."""
    facts = recorded(file.stem)
    major, minor, _ = file.stem.split(".")
    assert absent(facts, uses, (int(major), int(minor))) == []
    assert facts.keys() <= {
        key if member is None else f"{key}:{member}" for key, use in uses.items() for member in (None, *use.members)
    }


def test_all_that_async_llm_calls_is_ours(vllm: VllmSources) -> None:
    """All that `AsyncLLM` calls on its engine core is our client's own; each exception is real and has a reason."""
    found = vllm.find("vllm.v1.engine.async_llm", "AsyncLLM")
    assert found is not None
    assert found.node is not None
    called = {
        node.attr
        for node in ast.walk(found.node)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Attribute)
        and node.value.attr == "engine_core"
    }
    set_at_start = {"resources", "engine_ranks_managed"}
    assert called - vars(CascadeEngineClient).keys() - set_at_start == NOT_OURS.keys() & called == NOT_OURS.keys()


def fake_vllm(folder: Path, core: str) -> VllmSources:
    """A package `vllm` with a module `core` and a re-export of its contents."""
    package = folder / "vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from .core import Engine as Engine\n")
    (package / "core.py").write_text(core)
    return VllmSources(folder)


CORE = '''
class Base:
    block_size: int
    def step(self, n: int) -> int:
        """Text."""
        return n + 1
class Engine(Base):
    def __init__(self, name, *, fast=False):
        self.queue = []
def patched(): return 1
'''
OURS = """
from vllm import Engine
from vllm import core
class Mine(Engine):
    def step(self, n):
        return super().step(n) + len(self.queue)
core.patched = lambda: 2
def look(engine: "Engine | None"): return engine.block_size
"""


def facts_with(folder: Path, core: str) -> tuple[dict[str, Use], Facts]:
    """Uses of `OURS` and the facts of a fake version."""
    ours = folder / "ours"
    ours.mkdir(parents=True)
    (ours / "mine.py").write_text(OURS)
    vllm = fake_vllm(folder / "site", core)
    uses = uses_of(ours, vllm)
    return uses, facts_of(vllm, uses)


def test_what_is_found_of_our_source(tmp_path: Path) -> None:
    """Imports, overrides, inherited attributes, patches and attributes of annotated parameters are uses."""
    uses, facts = facts_with(tmp_path, CORE)
    assert {key: use.members for key, use in uses.items()} == {
        "vllm.Engine": {"step": "overridden", "queue": "used", "block_size": "used"},
        "vllm.core": {"patched": "patched"},
    }
    assert facts["vllm.Engine"] == {"parameters": "self, name, *, fast=False"}
    assert facts["vllm.Engine:step"]["parameters"] == "self, n"
    assert facts["vllm.core:patched"]["body"]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("queue", "line", ["vllm.Engine:queue: gone"]),
        (
            "fast=False",
            "slow=False",
            ["vllm.Engine: parameters (self, name, *, fast=False) became (self, name, *, slow=False)"],
        ),
        ("n + 1", "n + 2", ["vllm.Engine:step: the body that we override or patch has changed"]),
        ("return 1", "return 3", ["vllm.core:patched: the body that we override or patch has changed"]),
        ("Text", "Words", []),
    ],
)
def test_a_change_is_said(tmp_path: Path, old: str, new: str, said: list[str]) -> None:
    """Reported are a missing name, different parameters or a changed body, but not a changed docstring."""
    _, before = facts_with(tmp_path / "before", CORE)
    _, after = facts_with(tmp_path / "after", CORE.replace(old, new))
    assert differences(before, after) == said


def test_parameters_and_bodies_of_what_is_no_function() -> None:
    """An assignment has neither parameters nor body."""
    [node] = ast.parse("x = 1").body
    assert parameters(node) is None
    assert body_hash(node) is None
