"""
Routes of the rolling update: `POST /admin/roll` begins one, `GET /admin/roll` shows the one under way, or the last.

Everything that can be checked is checked before the answer to `POST`: 400 for options that cannot be rolled out, 409
while another update is under way or without room, 202 once it has begun.
"""

from collections.abc import Sequence
from http import HTTPStatus
from typing import Annotated, Any, Final, Protocol

from fastapi import APIRouter, HTTPException
from pydantic import BaseModel, ConfigDict, Field

from cascadeinfer.core.errors import ConfigError, ScalingRefusedError

MAX_WORDS: Final = 200


class Rolls(Protocol):
    """Updates the instances, see `cascadeinfer.frontend.admin.Admin`."""

    async def rolled(self) -> dict[str, Any]:
        """See Admin."""
        ...

    async def roll(self, options: Sequence[str], timeout_s: float) -> dict[str, Any]:
        """See Admin."""
        ...


class NewOptions(BaseModel):
    """
    The body of `POST /admin/roll`.

    Attributes:
        options: Words of a command line with engine options of vLLM: what changes.
        timeout_s: Time that each old instance has to hand its requests over; None: `--drain-timeout-s`.
    """

    model_config = ConfigDict(extra="forbid")
    options: Annotated[list[str], Field(max_length=MAX_WORDS)] = []
    timeout_s: Annotated[float | None, Field(ge=0.0, le=86400.0)] = None


def roll_routes(instances: Rolls, drain_timeout_s: float) -> APIRouter:
    """
    The routes.

    Args:
        instances: Those of all processes.
        drain_timeout_s: For updates that name no time-out.
    """
    router = APIRouter(prefix="/admin/roll")

    @router.get("")
    async def shown() -> dict[str, Any]:
        """How far it is."""
        return await instances.rolled()

    @router.post("", status_code=HTTPStatus.ACCEPTED)
    async def begin(wanted: NewOptions) -> dict[str, Any]:
        """Check the options, and begin."""
        timeout_s = drain_timeout_s if wanted.timeout_s is None else wanted.timeout_s
        try:
            return await instances.roll(wanted.options, timeout_s)
        except ConfigError as error:
            raise HTTPException(HTTPStatus.BAD_REQUEST, str(error)) from error
        except ScalingRefusedError as refused:
            raise HTTPException(HTTPStatus.CONFLICT, str(refused)) from refused

    return router
