"""The value of `--instance-args`: what it gives to which instance, and one line for what it cannot be."""

import pytest

from cascadeinfer.config.instance_args import OPTION, read_instance_args
from cascadeinfer.config.schema import ServeOptions
from cascadeinfer.core.errors import ConfigError

IDS = ("0", "1", "2", "3")


@pytest.mark.parametrize(
    ("text", "given"),
    [
        ("0: --max-num-seqs 8", {"0": ("--max-num-seqs", "8")}),
        ("0,2-3: --enforce-eager", dict.fromkeys(("0", "2", "3"), ("--enforce-eager",))),
        (
            " 1 :--max-num-seqs 8;2 - 3:  --max-num-seqs=64 --no-enable-prefix-caching ",
            {
                "1": ("--max-num-seqs", "8"),
                **dict.fromkeys(("2", "3"), ("--max-num-seqs=64", "--no-enable-prefix-caching")),
            },
        ),
    ],
)
def test_what_is_given(text: str, given: dict[str, tuple[str, ...]]) -> None:
    """Numbers and ranges of them, each with words of a command line."""
    assert read_instance_args(text, IDS) == given


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "'' is not INSTANCES: OPTIONS"),
        ("--max-num-seqs 8", "'--max-num-seqs 8' is not INSTANCES: OPTIONS"),
        ("0: --max-num-seqs 8;", "'' is not INSTANCES: OPTIONS"),
        ("0:", "no options for 0"),
        ("0: '--max", "no closing quotation"),
        ("prefill: --max-num-seqs 8", "'prefill' is no instance: they are numbers from 0 to 3"),
        ("-1: --max-num-seqs 8", "'-1' is no instance"),
        ("²: --max-num-seqs 8", "is no instance"),
        ("0,: --max-num-seqs 8", "'' is no instance"),
        ("3-1: --max-num-seqs 8", "'3-1' is an empty range"),
        ("2-4: --max-num-seqs 8", "there is no instance 4"),
        ("0-2: --max-num-seqs 8; 2: --enforce-eager", "instance 2 is named twice"),
        ("0,0: --max-num-seqs 8", "instance 0 is named twice"),
    ],
)
def test_what_it_cannot_be(text: str, why: str) -> None:
    """The server does not start, whether that is found here or with the other options."""
    with pytest.raises(ConfigError) as refused:
        ServeOptions(instances=4, instance_args=text)
    assert str(refused.value).startswith(f"{OPTION}: ")
    assert why in str(refused.value)


@pytest.mark.parametrize("elsewhere", [{"fleet": "chat"}, {"cluster": "ray"}])
def test_engines_that_outlive_the_server_have_none(elsewhere: dict[str, str]) -> None:
    """A server that comes back would not know which engine has which."""
    with pytest.raises(ConfigError, match="--instance-args: is for instances that end with this server"):
        ServeOptions(instance_args="0: --max-num-seqs 8", **elsewhere)
