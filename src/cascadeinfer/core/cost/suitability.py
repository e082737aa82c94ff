"""
Whether a cost profile may be used for a running engine.

A profile of another model is wrong by factors, not slightly. A measured profile names the engine it is valid for
(`identity.py`), and every difference that changes step times by factors forbids its use. A shipped profile describes a
device and a model in general: its KV cache per token and its split over devices must match the engine's. Other
differences are only reported, because such a profile is a start value for learning.
"""

from cascadeinfer.core.cost.identity import EngineIdentity, foreign, stale
from cascadeinfer.core.cost.profile import CostProfile
from cascadeinfer.core.errors import ProfileError


def check_suits(profile: CostProfile, engine: EngineIdentity, kv_bytes_per_token: int) -> tuple[str, ...]:
    """
    Refuse a profile of another model or set-up.

    Args:
        profile: The profile to check.
        engine: The running engine.
        kv_bytes_per_token: KV cache per token of the engine, all devices together.

    Returns:
        What makes it doubtful; empty when nothing does.

    Raises:
        ProfileError: It is of another model or set-up.
    """
    if profile.engine is not None:
        if differences := foreign(profile.engine, engine):
            raise ProfileError(f"profile {profile.name} is of another engine: {'; '.join(differences)}")
        return stale(profile.engine, engine)
    if profile.tensor_parallel != engine.tensor_parallel:
        raise ProfileError(
            f"profile {profile.name} is of {profile.tensor_parallel} device(s) per instance, the engine has "
            f"{engine.tensor_parallel}"
        )
    if profile.kv_bytes_per_token != kv_bytes_per_token:
        raise ProfileError(
            f"profile {profile.name} is of another model ({profile.model}): "
            f"{profile.kv_bytes_per_token} bytes of KV cache per token, the engine has {kv_bytes_per_token}"
        )
    return (
        (
            f"measured on {profile.device} with {profile.backend}, "
            f"the engine runs on {engine.device} with {engine.attention_backend}"
        ),
    )
