"""
Whether a cost profile may be used for a running engine.

A profile of another model is not slightly wrong but wrong by factors. One that was measured says which engine it is valid for
(`identity.py`), and every difference that changes step times by factors forbids it. A shipped one is of a device and a model in general: the KV cache
of a token and the split over devices must be the engine's, and what else differs is told, since it is a start value that is learnt from.
"""

from cascadeinfer.core.cost.identity import EngineIdentity, foreign, stale
from cascadeinfer.core.cost.profile import CostProfile
from cascadeinfer.core.errors import ProfileError


def check_suits(profile: CostProfile, engine: EngineIdentity, kv_bytes_per_token: int) -> tuple[str, ...]:
    """
    Refuse a profile of something else.

    Args:
        profile: To be used.
        engine: That runs.
        kv_bytes_per_token: Of the engine, all devices together.

    Returns:
        What makes it doubtful; empty when nothing does.

    Raises:
        ProfileError: It is of another model, or of another set-up.
    """
    if profile.engine is not None:
        if differences := foreign(profile.engine, engine):
            raise ProfileError(f"profile {profile.name} is of another engine: {'; '.join(differences)}")
        return stale(profile.engine, engine)
    if profile.tensor_parallel != engine.tensor_parallel:
        raise ProfileError(
            f"profile {profile.name} is of {profile.tensor_parallel} device(s) per instance, the engine has {engine.tensor_parallel}"
        )
    if profile.kv_bytes_per_token != kv_bytes_per_token:
        raise ProfileError(
            f"profile {profile.name} is of another model ({profile.model}): {profile.kv_bytes_per_token} bytes of KV cache per token, "
            f"the engine has {kv_bytes_per_token}"
        )
    return (
        f"measured on {profile.device} with {profile.backend}, the engine runs on {engine.device} with {engine.attention_backend}",
    )
