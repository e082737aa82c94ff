"""What a front end and the engine that it starts under a keeper must agree on."""

import pickle
from dataclasses import dataclass
from typing import Final

from vllm.engine.arg_utils import AsyncEngineArgs

from cascadeinfer.core.types import InstanceId
from cascadeinfer.engines.vllm.configuration import KvTransferSettings

MODULE: Final = "cascadeinfer.engines.vllm.kept_engine"


@dataclass(frozen=True, slots=True)
class Content:
    """
    What an engine is started with; it travels to the engine's machine.

    Attributes:
        instance_id: Its name.
        engine_args: The operator's.
        settings: Of the KV transfer.
        log_stats: Whether its steps carry statistics for vLLM's metrics.
        own_log_level: The least level of our own lines in its log.
        orphan_timeout_s: It ends when no front end has been attached for so long; 0: never.
        mark: What it says of itself, see `knocking.About`.
    """

    instance_id: InstanceId
    engine_args: AsyncEngineArgs
    settings: KvTransferSettings
    log_stats: bool
    own_log_level: str
    orphan_timeout_s: float
    mark: str = ""

    def packed(self) -> bytes:
        """To be sent to whoever starts the engine."""
        return pickle.dumps(self)

    @staticmethod
    def unpacked(packed: bytes) -> "Content":
        """What was sent. It comes from our own user's front end, by ways that nobody else can write to."""
        content = pickle.loads(packed)  # noqa: S301 - see above
        assert isinstance(content, Content)
        return content
