"""A follower's knowledge of the instances: which are up, and its clients of them."""

import asyncio
from collections.abc import Mapping
from typing import Protocol

from cascadeinfer.core.errors import EngineError
from cascadeinfer.core.types import InstanceId
from cascadeinfer.engines.vllm.attachment import AnyAttachment


class Attached(Protocol):
    """A client of an instance that process 0 looks after: `AttachedCore` or `FollowedCore` of `engines.vllm`."""

    instance_id: InstanceId
    stopped: bool

    def died(self) -> None:
        """The owner says that the instance is gone."""
        ...


class Board:
    """The owner's statements about each instance, for tasks that wait for it."""

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._up: dict[InstanceId, AnyAttachment] = {}
        self._attached: dict[InstanceId, tuple[Attached, str]] = {}
        self._news = asyncio.Event()

    def follow(self, up: Mapping[InstanceId, AnyAttachment]) -> None:
        """Exactly these are up: waiting tasks continue, and clients of earlier lives learn that those have ended."""
        self._up = dict(up)
        for instance_id, (instance, engine_id) in list(self._attached.items()):
            attachment = up.get(instance_id)
            if attachment is None or attachment.engine_id != engine_id:
                del self._attached[instance_id]
                instance.died()
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def attach(self, instance: Attached) -> AnyAttachment:
        """
        Wait until an instance is up; from then on the client is notified when it goes down.

        Raises:
            EngineError: The client was stopped meanwhile.
        """
        while (attachment := self._up.get(instance.instance_id)) is None:
            await self._news.wait()
        if instance.stopped:
            raise EngineError("is not wanted any more", instance_id=instance.instance_id)
        self._attached[instance.instance_id] = (instance, attachment.engine_id)
        return attachment
