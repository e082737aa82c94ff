"""The operator's settings for the door, and the door built from them."""

import logging
from argparse import Namespace
from dataclasses import dataclass

from starlette.types import ASGIApp
from vllm import envs

from cascadeinfer.frontend.door.connections import ConnectionLimits, GuardedProtocol, guarded
from cascadeinfer.frontend.door.door import Door
from cascadeinfer.frontend.door.keys import Keys

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DoorSettings:
    """
    Our own options; vLLM's (`--api-key`, `--h11-max-*`, `--root-path`) are in its arguments.

    Attributes:
        admin_keys: For everything but inference; if empty, the API keys are used.
        max_body_bytes: Limit on a request's body.
        max_connections: Open connections in this process.
        head_timeout_s: Time for the head of a request.
        body_timeout_s: Time for its body.
        send_timeout_s: Time in which a client must read some of its answer.
    """

    admin_keys: tuple[str, ...]
    max_body_bytes: int
    max_connections: int
    head_timeout_s: float
    body_timeout_s: float
    send_timeout_s: float

    def around(self, app: ASGIApp, args: Namespace) -> Door:
        """The door in front of an app."""
        keys = Keys(api_keys_of(args), self.admin_keys)
        if api_keys_of(args) and not keys.separate:
            logger.warning("no --admin-api-key: every API key also opens /admin and whatever else changes the service")
        return Door(app, keys, max_body_bytes=self.max_body_bytes, root_path=args.root_path or "")

    def protocol(self, args: Namespace) -> type[GuardedProtocol]:
        """The class for uvicorn's `http` option. It enforces vLLM's header limits, made for another parser."""
        return guarded(
            ConnectionLimits(
                self.max_connections,
                self.head_timeout_s,
                self.body_timeout_s,
                args.h11_max_incomplete_event_size,
                args.h11_max_header_count,
                self.send_timeout_s,
            )
        )


def api_keys_of(args: Namespace) -> list[str]:
    """The API keys by vLLM's rule: the option, else the environment."""
    return [key for key in (args.api_key or [envs.VLLM_API_KEY]) if key]


def without_keys(args: Namespace) -> Namespace:
    """
    The arguments for vLLM's app without keys: the door replaces its own check of a few paths, and the environment is
    not consulted either.
    """
    return Namespace(**{**vars(args), "api_key": [""]})
