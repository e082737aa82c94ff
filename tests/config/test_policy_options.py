"""From `serve`'s options to a policy: what it is given and what it refuses follows from its `INFO`."""

import pytest

from cascadeinfer.config.policy import policy_spec
from cascadeinfer.config.profiles import load_profile
from cascadeinfer.config.schema import ServeOptions
from cascadeinfer.core.cost.learning import LearningSettings
from cascadeinfer.core.errors import ConfigError
from cascadeinfer.core.policies import POLICIES

PROFILE = "h200-llama-3.1-8b"
REFUSED = [
    ("--stages", "takes_layout", {"stages": "0-512:1,512-:1"}),
    ("--profile", "uses_profile", {"profile": PROFILE}),
    ("--max-queued-requests", "has_queue", {"max_queued_requests": 7}),
]


SERVED = sorted(name for name, info in POLICIES.items() if info.roles is None)


@pytest.mark.parametrize("name", sorted(POLICIES.keys() - set(SERVED)))
def test_policies_with_roles_are_simulated_only(name: str) -> None:
    """They need engines that park a request at its first token: one line says so, and names policies that serve."""
    with pytest.raises(
        ConfigError, match=f"policy {name} needs engines that can stop a request at its first"
    ) as raised:
        policy_spec(ServeOptions(policy=name))
    assert raised.value.option == "--policy"
    assert set(str(raised.value.fix).partition("--policy ")[2].split(" or ")) == set(SERVED)


@pytest.mark.parametrize("name", SERVED)
def test_every_policy_serves(name: str) -> None:
    """With default options, each policy can be made."""
    policy_spec(ServeOptions(policy=name)).make()


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize(("flag", "takes", "given"), REFUSED, ids=[flag for flag, _, _ in REFUSED])
def test_what_a_policy_does_not_take_is_refused(name: str, flag: str, takes: str, given: dict[str, str]) -> None:
    """A policy is made with the options it takes; the refusal of any other option names a policy that takes it."""
    options = ServeOptions(policy=name, **given)  # type: ignore[arg-type]
    if getattr(POLICIES[name], takes):
        policy_spec(options).make()
        return
    with pytest.raises(ConfigError, match=f"policy {name}") as raised:
        policy_spec(options)
    assert raised.value.option == flag
    others = str(raised.value.fix).partition("--policy ")[2].split(" or ")
    assert others == [other for other, info in POLICIES.items() if getattr(info, takes) and other in SERVED]


def test_the_cascade_learns_from_its_profile() -> None:
    """It gets initial costs, the price of a hand-over over the profile's links, and learns on top."""
    options = policy_spec(ServeOptions(profile=PROFILE)).options
    profile = load_profile(PROFILE)
    assert options["step_model"] == profile.step_model
    assert options["planning"].hand_over.pause_per_token_s == profile.transfer_s(1)
    assert options["learning"] == LearningSettings()
    assert "step_model" not in policy_spec(ServeOptions()).options


def test_a_follower_neither_plans_nor_learns_and_has_its_share_of_the_queue() -> None:
    """Process 0 plans for all; a queue bound of 7 becomes 3 in each of three processes."""
    options = policy_spec(ServeOptions(api_servers=3, max_queued_requests=7), follows=True).options
    assert (options["refine"], options["replan"], options["max_queued"]) == (False, False, 3)
    assert "learning" not in options


def test_a_balancer_that_counts_its_own_requests_is_told_of_the_others() -> None:
    """The score of `vllm_dp` weighs its own requests by the number of front ends."""
    assert policy_spec(ServeOptions(policy="vllm_dp", api_servers=3)).options == {"clients": 3}
