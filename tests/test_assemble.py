"""What the server asks of its instances before it serves: of each, not of the first."""

import logging
from types import SimpleNamespace

import pytest

from cascadeinfer.config.profiles import check_profile, load_profile
from cascadeinfer.config.schema import ServeOptions
from cascadeinfer.core.cost.identity import EngineIdentity
from cascadeinfer.core.errors import ProfileError
from cascadeinfer.engines.vllm.instance import InstanceIdentity, VllmInstance
from support.engine_identity import engine_identity

PROFILE = "h100-llama-3.1-8b"


class Told(VllmInstance):
    """An instance that only says what it is."""

    def __init__(self, engine: EngineIdentity) -> None:
        self._engine = engine

    async def identity(self) -> InstanceIdentity:
        """As it was made."""
        return InstanceIdentity(self._engine, load_profile(PROFILE).kv_bytes_per_token, None)


def running(*engines: EngineIdentity) -> SimpleNamespace:
    """A runtime in which these are up."""
    return SimpleNamespace(live_engines=lambda: [Told(engine) for engine in engines])


async def test_a_profile_is_compared_with_every_instance() -> None:
    """One instance of another set-up is enough to refuse it, wherever it stands."""
    suits, other = engine_identity(), engine_identity(tensor_parallel=2)
    options = ServeOptions(profile=PROFILE)
    await check_profile(running(suits, suits), options)
    for engines in ((suits, other), (other, suits)):
        with pytest.raises(ProfileError, match="1 device"):
            await check_profile(running(*engines), options)


async def test_each_doubt_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """Two instances on one other device are one doubt, a third on yet another is a second."""
    l40s, a100 = engine_identity(device="NVIDIA L40S"), engine_identity(device="NVIDIA A100")
    with caplog.at_level(logging.WARNING, logger="cascadeinfer.config.profiles"):
        await check_profile(running(l40s, l40s, a100), ServeOptions(profile=PROFILE))
    told = [record.getMessage() for record in caplog.records]
    assert [name for name in ("L40S", "A100") for message in told if name in message] == ["L40S", "A100"]
