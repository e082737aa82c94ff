"""`--max-queued-requests` reaches the policy that has a queue, and is refused for policies without one."""

import pytest

from cascadeinfer.config.policy import policy_spec
from cascadeinfer.config.schema import ServeOptions
from cascadeinfer.core.errors import ConfigError


@pytest.mark.parametrize(("given", "bound"), [({}, 1024), ({"max_queued_requests": 7}, 7)])
def test_the_bound_reaches_the_cascade(given: dict[str, int], bound: int) -> None:
    """The cascade's queue is bounded, even by default."""
    spec = policy_spec(ServeOptions(policy="cascade", **given))  # type: ignore[arg-type]
    assert spec.options["max_queued"] == bound
    spec.make()


@pytest.mark.parametrize("name", ["least_loaded", "round_robin"])
def test_a_policy_without_a_queue_refuses_a_bound(name: str) -> None:
    """A bound that the policy would ignore is an error that names the option and the fix; by default there is none."""
    policy_spec(ServeOptions(policy=name))
    with pytest.raises(ConfigError, match="has no queue") as raised:
        policy_spec(ServeOptions(policy=name, max_queued_requests=7))
    assert raised.value.option == "--max-queued-requests"


def test_no_queue_at_all_is_out_of_bounds() -> None:
    """The bound is at least one request."""
    with pytest.raises(ConfigError):
        ServeOptions(max_queued_requests=0)
