"""No module outside `core/policies` asks which policy runs: it names neither a policy nor its class."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from cascadeinfer.core.policies import POLICIES
from cascadeinfer.evaluation.variants import policy_names

PACKAGE = Path(__file__).parents[3] / "src" / "cascadeinfer"
POLICY_FILES = PACKAGE / "core" / "policies"
OUTSIDE = sorted(path for path in PACKAGE.rglob("*.py") if POLICY_FILES not in path.parents)
SHARED = {"info", "placing", "spec"}
"""Modules beside the policies that concern all of them."""
NAMES = set(policy_names())
CLASSES = {info.make.__name__ for info in POLICIES.values()}
MAY_NAME = {
    "config/schema.py": {"cascade", "static_stages", "roles"},  # the defaults of `serve --policy`
    "cli/experiment_options.py": {"cascade", "least_loaded", "round_robin"},  # the default of `simulate` and `sweep`
}


def docstrings_in(tree: ast.AST) -> set[ast.expr]:
    """Strings that are statements: they inform people about policies and decide nothing."""
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}


def named_in(source: str) -> Iterator[str]:
    """Policies that a module names: by name (alone or in a comma-separated list), by class, by importing their file."""
    tree = ast.parse(source)
    told = docstrings_in(tree)
    for node in ast.walk(tree):
        match node:
            case ast.Constant(value=str(text)) if node not in told:
                yield from NAMES.intersection(part.strip() for part in text.split(","))
            case ast.Name(id=name) | ast.Attribute(attr=name) if name in CLASSES:
                yield name
            case ast.ImportFrom(module="cascadeinfer.core.policies", names=names):
                yield from (alias.name for alias in names if alias.name not in {"POLICIES", *SHARED})
            case ast.ImportFrom(module=str(module)):
                yield from policy_file(module)
            case ast.Import(names=names):
                yield from (found for alias in names for found in policy_file(alias.name))


def policy_file(module: str) -> list[str]:
    """The policy that this file defines."""
    stem = module.removeprefix("cascadeinfer.core.policies.")
    return [] if stem == module or stem in SHARED else [stem]


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_policy_is_named_outside(path: Path) -> None:
    """Except for defaults of options: a policy's `INFO` says what it takes, needs and can do without."""
    assert set(named_in(path.read_text())) <= MAY_NAME.get(str(path.relative_to(PACKAGE)), set())


def test_exceptions_are_needed() -> None:
    """Each exception is used."""
    for name, allowed in MAY_NAME.items():
        assert set(named_in((PACKAGE / name).read_text())) == allowed


@pytest.mark.parametrize(
    "source",
    [
        'if policy == "cascade": pass',
        'WITH_STAGES = {"static_length"}',
        'options = {"vllm_dp": 1}',
        'names = "round_robin, nobody"',
        'match name:\n    case "cascade-cold": pass',
        "isinstance(policy, policies.Llumnix)",
        "from cascadeinfer.core.policies import prefix_aware",
        "from cascadeinfer.core.policies.cascade import Agent as A",
        "import cascadeinfer.core.policies.cascade",
    ],
)
def test_naming_a_policy_is_seen(source: str) -> None:
    """The ways in which code can ask which policy runs are detected."""
    assert list(named_in(source))


@pytest.mark.parametrize(
    "source",
    [
        '"""As `cascade` does."""',
        "from cascadeinfer.core.policies import POLICIES",
        "from cascadeinfer.core.policies.info import PolicyInfo",
        "from cascadeinfer.core.placing.dispatch import least_loaded\nleast_loaded(())",
        'f"cascade-{number}"',
    ],
)
def test_other_words_are_not_names(source: str) -> None:
    """Documentation, shared parts of the policies, and words that resemble a policy's name."""
    assert not list(named_in(source))
