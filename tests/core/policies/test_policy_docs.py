"""The page docs/policies.md names every policy and every option, and every policy names its source."""

import inspect
import re
from pathlib import Path

import pytest

from cascadeinfer.core.policies import POLICIES

PAGE = (Path(__file__).parents[3] / "docs" / "policies.md").read_text()


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_policy_says_what_it_does_in_half_a_line(name: str) -> None:
    """The help text fits into a list: short, not a sentence, and without anything that argparse would substitute."""
    told = POLICIES[name].help
    assert 0 < len(told) <= 90
    assert not told.endswith(".")
    assert "%" not in told


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_policy_is_documented(name: str) -> None:
    """The table of policies names it, the table of options has each of its options, and all are keyword-only."""
    assert f"| `{name}` |" in PAGE
    for option in inspect.signature(POLICIES[name].make).parameters.values():
        assert option.kind is inspect.Parameter.KEYWORD_ONLY
        assert re.search(rf"`{option.name}`", PAGE), f"{name}: option {option.name} is not documented"


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_policy_header_says_what_it_reads_and_where_it_is_from(name: str) -> None:
    """The file's header gives formula or rules, inputs, edge cases and source."""
    module = inspect.getmodule(POLICIES[name].make)
    assert module is not None
    header = module.__doc__ or ""
    assert "Inputs read" in header
    if name != "least_loaded":
        assert "Source" in header
    if name != "cascade":
        assert "Edge case" in header
