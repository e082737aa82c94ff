"""The options of `serve`: defaults, bounds, stages as text and as TOML, and the messages about bad ones."""

import argparse
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascadeinfer.config.options import flag_of
from cascadeinfer.config.schema import ServeOptions, add_arguments, options_of
from cascadeinfer.core.errors import ConfigError
from cascadeinfer.core.layout import StageLayout
from cascadeinfer.core.policies import POLICIES

STAGES_TOML = """
[[stages]]
range = "0-512"
instances = 2

[[stages]]
range = "512-"
instances = 1
"""


def parsed(*arguments: str) -> ServeOptions:
    """The options of a command line."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_arguments(parser)
    return options_of(parser.parse_args(list(arguments)))


def test_defaults() -> None:
    """Two instances, initially one stage, the cascade; the command line and Python agree."""
    options = ServeOptions()
    assert parsed() == options
    assert options.instance_ids == ("0", "1")
    assert options.layout() == StageLayout.single(("0", "1"))
    assert options.policy_name() == "cascade"


def test_stages_make_stages_the_policy() -> None:
    """With `--stages` the policy is static_stages unless another is named."""
    assert parsed("--stages", "0-512:1,512-:1").policy_name() == "static_stages"
    assert parsed("--stages", "0-512:1,512-:1", "--policy", "round_robin").policy_name() == "round_robin"


def test_every_option_is_an_argument_with_help() -> None:
    """The group has each option once, with its flag, help and choices."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    (group,) = [g for g in parser._action_groups if g.title == "CascadeInfer"]
    flags = [action.option_strings[-1] for action in group._group_actions]
    assert flags == [flag_of(option.name) for option in fields(ServeOptions)]
    assert all(action.help for action in group._group_actions)
    assert tuple(next(a.choices for a in group._group_actions if a.dest == "policy")) == tuple(sorted(POLICIES))


def test_values_have_their_types() -> None:
    """Numbers on the command line become numbers of the option's type."""
    options = parsed("--instances", "4", "--report-interval-s", "0.5", "--kv-lease-s", "20")
    assert (options.instances, options.report_interval_s, options.kv_lease_s) == (4, 0.5, 20)
    with pytest.raises(argparse.ArgumentError, match="--instances"):
        parsed("--instances", "many")
    with pytest.raises(argparse.ArgumentError, match="--policy"):
        parsed("--policy", "magic")


BOUNDED = [option for option in fields(ServeOptions) if option.metadata["low"] is not None]


@pytest.mark.parametrize("option", BOUNDED, ids=lambda option: option.name)
def test_bounds(option: object) -> None:
    """Each bound is inclusive, and a value beyond it is refused with the option's flag and both bounds."""
    name, low, high = option.name, option.metadata["low"], option.metadata["high"]
    for value in (low, high):
        assert getattr(ServeOptions(**{name: value}), name) == value
    for value in (low - 1, high + 1):
        with pytest.raises(ConfigError, match=f"{flag_of(name)}: .*between {low} and {high}") as raised:
            ServeOptions(**{name: value})
        assert raised.value.option == flag_of(name)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bounds_hold_for_what_is_no_number(value: float) -> None:
    """Not-a-number and infinity are outside every bound."""
    with pytest.raises(ConfigError, match="--hang-timeout-s"):
        ServeOptions(hang_timeout_s=value)


def test_stages_as_text_and_as_toml(tmp_path: Path) -> None:
    """The same stages, written either way (spaces allowed), give the same layout, with instances numbered in order."""
    expected = StageLayout.from_boundaries((512,), (("0", "1"), ("2",)))
    path = tmp_path / "stages.toml"
    path.write_text(STAGES_TOML)
    for text in ("0-512:2,512-:1", " 0-512:2 , 512-:1 ", str(path)):
        assert parsed("--instances", "3", "--stages", text).layout() == expected


@given(st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 9)), max_size=6), st.integers(1, 9))
def test_any_layout_can_be_written_as_text(steps: list[tuple[int, int]], last: int) -> None:
    """Adjacent ranges with any numbers of instances come back as they were written."""
    parts, lo = [], 0
    for width, n in steps:
        parts.append(f"{lo}-{lo + width}:{n}")
        lo += width
    parts.append(f"{lo}-:{last}")
    total = sum(n for _, n in steps) + last
    layout = ServeOptions(instances=total, stages=",".join(parts)).layout()
    assert [f"{s.range}:{len(s.instance_ids)}" for s in layout.stages] == parts
    assert [i for s in layout.stages for i in s.instance_ids] == [str(n) for n in range(total)]


def test_a_file_of_stages_is_read_once(tmp_path: Path) -> None:
    """What was read is what every process gets, whatever becomes of the file; with roles and budgets."""
    file = tmp_path / "stages.toml"
    file.write_text(
        STAGES_TOML + '[[stages]]\nrange = "64-"\ninstances = 1\nkind = "prefill"\nmax_num_batched_tokens = 512\n'
    )
    options = parsed("--stages", str(file), "--instances", "4")
    file.unlink()
    assert options.stages == "0-512:2,512-:1,prefill@64-/512:1"
    assert options == parsed("--stages", options.stages, "--instances", "4")
    assert options.policy_name() == "roles"


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("", "'' is not RANGE:INSTANCES .*write e.g. 0-512:1"),
        ("0-512", "'0-512' is not RANGE:INSTANCES"),
        ("0-512:", "is not RANGE:INSTANCES"),
        ("0-512:one", "is not RANGE:INSTANCES"),
        ("0-512:0", "is not RANGE:INSTANCES"),
        ("0-512:-1", "is not RANGE:INSTANCES"),
        ("0-512:1,,512-:1", "'' is not RANGE:INSTANCES"),
        ("512:2", "'512' is not a range of lengths .*0-512 or 512-"),
        ("-512:2", "'-512' is not a range of lengths"),
        ("a-b:2", "'a-b' is not a range of lengths"),
        ("0-1.5:2", "is not a range of lengths"),
        ("5-5:2", "empty or negative"),
        ("9-5:2", "empty or negative"),
        ("1-:2", "must start at 0, not 1 .*ranges must follow on each other"),
        ("0-512:2", "last stage must be unbounded"),
        ("0-512:1,600-:1", "gap between stages 0-512 and 600-"),
        ("0-512:1,500-:1", "overlap between stages 0-512 and 500-"),
        ("0-512:1,512-:2", "3 instances in all, --instances says 2 .*use --instances 3"),
        ("no-such-file.toml", "cannot read no-such-file.toml: No such file"),
    ],
)
def test_bad_stages(stages: str, message: str) -> None:
    """Every mistake is reported with the option and, where there is one, the fix."""
    with pytest.raises(ConfigError, match=message) as raised:
        ServeOptions(stages=stages).layout()
    assert raised.value.option == "--stages"
    assert str(raised.value).startswith("--stages: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"has no \[\[stages\]\] table"),
        ("stages = 3", r"has no \[\[stages\]\] table"),
        ("stages = [1, 2]", "needs range"),
        ("[stages", "stages.toml: Expected"),
        ("[[stages]]\nrange = '0-'", "needs range"),
        ("[[stages]]\nrange = 5\ninstances = 2", "needs range"),
        ("[[stages]]\nrange = '0-'\ninstances = '2'", "needs range"),
        ("[[stages]]\nrange = '0-'\ninstances = true", "needs range"),
        ("[[stages]]\nrange = '0-'\ninstances = 2\nname = 'x'", "needs range"),
        ("[[stages]]\nrange = '0-'\ninstances = 0", "is not RANGE:INSTANCES"),
        ("[[stages]]\nrange = '0:1-'\ninstances = 2", "is not a range of lengths"),
    ],
)
def test_bad_stage_files(tmp_path: Path, content: str, message: str) -> None:
    """A malformed TOML file is reported with its path or the faulty part, never as a traceback."""
    path = tmp_path / "stages.toml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message) as raised:
        ServeOptions(stages=str(path)).layout()
    assert raised.value.option == "--stages"


def test_stage_files_that_are_no_text(tmp_path: Path) -> None:
    """A directory and a binary file are each reported as what they are."""
    (tmp_path / "dir.toml").mkdir()
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    for name in ("dir.toml", "binary.toml"):
        with pytest.raises(ConfigError, match=name) as raised:
            ServeOptions(stages=str(tmp_path / name)).layout()
        assert raised.value.option == "--stages"


STATIC = ("--cluster", "static", "--engines", "a:1,b:2", "--cluster-key", "key")


def test_engines_of_others() -> None:
    """With stages, as many engines are waited for as these have."""
    assert parsed(*STATIC).cluster == "static"
    assert parsed(*STATIC).n_staged() == 0
    assert parsed(*STATIC, "--stages", "0-512:2,512-:1").n_staged() == 3


def test_several_front_ends_of_a_fleet() -> None:
    """Here and on a Ray cluster."""
    for words in (("--fleet", "blue"), ("--cluster", "ray")):
        assert parsed(*words, "--api-servers", "2").api_servers == 2


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (STATIC[:4], "--cluster-key: is missing"),
        ((*STATIC[:2], *STATIC[4:]), "--engines: is missing"),
        ((*STATIC, "--api-servers", "2"), "--api-servers: is 1 with --cluster static"),
        (STATIC[2:], "--engines: is for --cluster static"),
        (STATIC[4:], "--cluster-key: is for --cluster static"),
    ],
)
def test_engines_of_others_contradicted(arguments: tuple[str, ...], error: str) -> None:
    """Each is refused with the option's name before anything starts."""
    with pytest.raises(ConfigError, match=error):
        parsed(*arguments)
