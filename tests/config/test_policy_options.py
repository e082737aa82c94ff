"""From `serve`'s options to a policy: what it is given and what it refuses follows from its `INFO`."""

import pytest

from cascadeinfer.config.policy import policy_spec
from cascadeinfer.config.profiles import load_profile
from cascadeinfer.config.schema import ServeOptions
from cascadeinfer.core.cost.learning import LearningSettings
from cascadeinfer.core.errors import ConfigError
from cascadeinfer.core.kind import InstanceTerms, Role
from cascadeinfer.core.policies import POLICIES

PROFILE = "h200-llama-3.1-8b"
REFUSED = [
    ("--stages", "takes_layout", {"stages": "0-512:1,512-:1"}),
    ("--profile", "uses_profile", {"profile": PROFILE}),
    ("--max-queued-requests", "has_queue", {"max_queued_requests": 7}),
]


SERVED = sorted(POLICIES)
STAGES = {"roles": "prefill@0-:1,0-512:1,512-:1", "pd_fixed": "prefill@0-:1,0-:2"}
"""For the policies that do not serve without."""


def options_for(name: str, **more: object) -> ServeOptions:
    """Options with which a policy serves."""
    stages = {"stages": STAGES[name], "instances": 3} if name in STAGES else {}
    return ServeOptions(policy=name, **(stages | more))  # type: ignore[arg-type]


def test_a_fixed_ratio_needs_its_stages() -> None:
    """It does not plan while it serves: one line says so."""
    with pytest.raises(ConfigError, match="policy pd_fixed does not plan while it serves") as raised:
        policy_spec(ServeOptions(policy="pd_fixed"))
    assert "plan --roles" in str(raised.value.fix)


def test_roles_plan_while_they_serve() -> None:
    """With stages to start with or without; a process that follows another plans nothing."""
    assert "roles" not in policy_spec(ServeOptions(policy="roles")).options
    assert "replan" not in policy_spec(options_for("roles")).options
    assert policy_spec(options_for("roles", api_servers=2), follows=True).options["replan"] is False


@pytest.mark.parametrize("name", sorted(STAGES))
def test_followers_have_the_stages_from_the_start(name: str) -> None:
    """They begin with those of the command line, until the process that plans announces others."""
    assert policy_spec(options_for(name, api_servers=2), follows=True).options["roles"].prefill


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ("prefill@0-:1,0-512:1,512-:1", "one stage for prompts and one that decodes"),
        ("0-:3", "one stage for prompts and one that decodes"),
        ("prefill@64-:1,0-:2", "computes all prompts apart"),
    ],
)
def test_a_fixed_split_has_two_stages(stages: str, said: str) -> None:
    """Other plans need another policy, which the message names."""
    with pytest.raises(ConfigError, match=said) as raised:
        policy_spec(ServeOptions(policy="pd_fixed", stages=stages, instances=3))
    assert raised.value.option == "--stages"


@pytest.mark.parametrize("stages", ["prefill@0-:1,0-:2", "0-/512:3"])
@pytest.mark.parametrize("name", ["cascade", "static_stages"])
def test_roles_and_budgets_are_refused_elsewhere(name: str, stages: str) -> None:
    """Refused in one line, not ignored."""
    with pytest.raises(ConfigError, match=f"policy {name} has no (prefill stages|chunk budgets)") as raised:
        policy_spec(ServeOptions(policy=name, stages=stages, instances=3))
    assert raised.value.fix == "use --policy roles"


def test_roles_come_with_their_stages() -> None:
    """The stages of a plan reach the policy, which learns what steps cost, and it is the default for them."""
    given = ServeOptions(stages="prefill@256-/1024:1,0-512/256:1,512-:1", instances=3)
    assert given.policy_name() == "roles"
    options = policy_spec(given).options
    assert options["roles"].threshold_tokens == 256
    assert [stage.instance_ids for stage in (*options["roles"].prefill, *options["roles"].stages.stages)] == [
        ("0",),
        ("1",),
        ("2",),
    ]
    assert options["learning"] == LearningSettings()
    assert given.terms() == {
        "0": InstanceTerms(Role.PREFILL, 1024),
        "1": InstanceTerms(Role.MIXED, 256),
        "2": InstanceTerms(Role.DECODE, None),
    }


@pytest.mark.parametrize("name", SERVED)
def test_every_policy_serves(name: str) -> None:
    """With default options, each policy can be made."""
    policy_spec(options_for(name)).make()


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize(("flag", "takes", "given"), REFUSED, ids=[flag for flag, _, _ in REFUSED])
def test_what_a_policy_does_not_take_is_refused(name: str, flag: str, takes: str, given: dict[str, str]) -> None:
    """A policy is made with the options it takes; the refusal of any other option names a policy that takes it."""
    options = options_for(name, **given)
    if flag == "--stages" and POLICIES[name].roles is not None:
        return  # it has no stages but with roles
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
    assert options["planning"].hand_over.copied_ahead
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
