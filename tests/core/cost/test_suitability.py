"""A profile of another model is refused with the difference; one of another device is accepted with a remark."""

from dataclasses import replace
from functools import partial

import pytest

from cascadeinfer.config.profiles import load_profile
from cascadeinfer.core.cost.suitability import check_suits
from cascadeinfer.core.errors import ProfileError
from support.engine_identity import engine_identity

PROFILE = load_profile("h100-llama-3.1-8b")
engine = partial(engine_identity, device="NVIDIA L40S", attention_backend="FLASH_ATTN_2")
ENGINE = engine()


def test_the_same_model_on_another_device_is_told() -> None:
    """It may serve as a start; the remark names device and backend."""
    (doubt,) = check_suits(PROFILE, ENGINE, PROFILE.kv_bytes_per_token)
    assert "H100" in doubt
    assert "NVIDIA L40S" in doubt


def test_another_model_is_refused() -> None:
    """The KV cache per token shows that it is another model."""
    with pytest.raises(ProfileError, match="another model"):
        check_suits(PROFILE, ENGINE, 2 * PROFILE.kv_bytes_per_token)


def test_another_split_over_devices_is_refused() -> None:
    """Step times of two devices are not those of one."""
    with pytest.raises(ProfileError, match="1 device"):
        check_suits(PROFILE, engine(tensor_parallel=2), PROFILE.kv_bytes_per_token)
    assert check_suits(replace(PROFILE, tensor_parallel=2), engine(tensor_parallel=2), PROFILE.kv_bytes_per_token)


def test_a_measured_profile_is_for_its_engine() -> None:
    """Differences by factors are refused with both values; another release is only reported; the same engine fits."""
    measured = replace(PROFILE, engine=ENGINE)
    kv_bytes = PROFILE.kv_bytes_per_token
    assert check_suits(measured, ENGINE, kv_bytes) == ()
    (doubt,) = check_suits(measured, engine(engine_version="0.33.0"), kv_bytes)
    assert "engine_version" in doubt
    with pytest.raises(ProfileError, match="layers: 32 in the profile, 80 in the engine"):
        check_suits(measured, engine(layers=80), kv_bytes)
