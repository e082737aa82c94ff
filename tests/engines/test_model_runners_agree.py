"""What instances say of their model runners: connected ones agree, and the front end pins by what they say."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from cascadeinfer.core.errors import EngineError
from cascadeinfer.engines.vllm.channel import EngineChannel
from cascadeinfer.engines.vllm.instance import VllmInstance
from cascadeinfer.engines.vllm.messages import ModelRunner
from cascadeinfer.frontend.engine_client import _model_runner_of
from support.hello import hello as engine_hello


class Life:
    """The life of an EngineCore that does nothing but say who it is."""

    index = 0
    pid = None
    vllm_config: Any = None

    def __init__(self, instance_id: str, model_runner: ModelRunner, *, movable: bool) -> None:
        self.instance_id = instance_id
        self.peers: list[str] = []
        self._hello = engine_hello(engine_id=f"life-of-{instance_id}", movable=movable, model_runner=model_runner)

    async def begin(self) -> EngineChannel:
        """It is up at once."""
        client: Any = SimpleNamespace(client_index=0)
        return EngineChannel(self.instance_id, 0, client, self._hello, "token")

    async def connect(self, channel: EngineChannel, peers: Sequence[EngineChannel]) -> None:
        """Record with whom."""
        assert channel.instance_id == self.instance_id
        self.peers += [peer.instance_id for peer in peers]


async def started(*runners: ModelRunner, movable: bool = True) -> list[VllmInstance]:
    """Instances 0, 1, ... with these model runners."""
    lives: list[Any] = [Life(str(number), runner, movable=movable) for number, runner in enumerate(runners)]
    instances = [VllmInstance(life) for life in lives]
    for instance in instances:
        await instance.start()
    return instances


@pytest.mark.parametrize("runner", ["V1", "V2"])
async def test_instances_with_the_same_runner_connect(runner: ModelRunner) -> None:
    """Either runner is fine, if all have it; the front end pins by it."""
    first, second = instances = await started(runner, runner)
    await second.connect([first])
    assert second.life.peers == ["0"]  # type: ignore[attr-defined]
    assert _model_runner_of(instances) == runner


@pytest.mark.parametrize("movable", [True, False])
async def test_instances_with_different_runners_do_not_connect(*, movable: bool) -> None:
    """The error names both instances and the variable, and no handshake is tried; should both run, V1's pins hold."""
    first, second = instances = await started("V2", "V1", movable=movable)
    said = "instance 1: uses vLLM's model runner V1, instance 0 uses V2: set VLLM_USE_V2_MODEL_RUNNER"
    with pytest.raises(EngineError, match=said):
        await second.connect([first])
    assert second.life.peers == []  # type: ignore[attr-defined]
    assert _model_runner_of(instances) == "V1"
