"""`--ttft-slo-s`, `--tpot-slo-s`, `--slo-attainment`: what the number of instances is advised for."""

import pytest

from cascadeinfer.config.policy import policy_spec
from cascadeinfer.config.schema import ServeOptions
from cascadeinfer.core.errors import ConfigError
from cascadeinfer.core.plan.scale import ServiceLevel


def test_the_slo_reaches_the_planning() -> None:
    """Given both limits, planning has them; by default it has none. The policy of a follower plans nothing."""
    assert policy_spec(ServeOptions()).options["planning"].service_level is None
    spec = policy_spec(ServeOptions(ttft_slo_s=2.0, tpot_slo_s=0.1, slo_attainment=0.9))
    assert spec.options["planning"].service_level == ServiceLevel(2.0, 0.1, 0.9)
    spec.make()


@pytest.mark.parametrize(
    ("given", "option", "fix"),
    [
        ({"ttft_slo_s": 2.0}, "--ttft-slo-s", "give --tpot-slo-s"),
        ({"tpot_slo_s": 0.1}, "--tpot-slo-s", "give --ttft-slo-s"),
        ({"policy": "least_loaded", "ttft_slo_s": 2.0, "tpot_slo_s": 0.1}, "--ttft-slo-s", "--policy cascade"),
        ({"stages": "0-:2", "ttft_slo_s": 2.0, "tpot_slo_s": 0.1}, "--ttft-slo-s", "--policy cascade"),
    ],
)
def test_what_cannot_be_kept_is_refused(given: dict[str, object], option: str, fix: str) -> None:
    """Half an SLO, or one for a policy that does not plan, is an error that names the option and the fix."""
    with pytest.raises(ConfigError, match=fix) as raised:
        policy_spec(ServeOptions(**given))  # type: ignore[arg-type]
    assert raised.value.option == option
