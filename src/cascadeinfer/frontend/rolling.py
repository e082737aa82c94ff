"""
Routes of the rolling update: `POST /admin/roll` begins one, `GET /admin/roll` shows the one under way, or the last.

Everything that can be checked is checked before the answer to `POST`: 400 for options that cannot be rolled out, 409
while another update is under way or without room, 202 once it has begun.
"""

from http import HTTPStatus
from typing import Annotated, Any, Final

from fastapi import APIRouter, HTTPException
from pydantic import BaseModel, ConfigDict, Field

from cascadeinfer.core.errors import ConfigError, ScalingRefusedError
from cascadeinfer.runtime.rolling import Rolling

MAX_WORDS: Final = 200
SEVERAL: Final = "a server with several front-end processes (--api-servers) cannot update its instances one by one"


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


def roll_routes(rolling: Rolling | None, drain_timeout_s: float) -> APIRouter:
    """
    The routes.

    Args:
        rolling: Replaces the instances; None where several processes use them.
        drain_timeout_s: For updates that name no time-out.
    """
    router = APIRouter(prefix="/admin/roll")

    @router.get("")
    async def shown() -> dict[str, Any]:
        """How far it is."""
        return {"state": "none"} if rolling is None else rolling.shown()

    @router.post("", status_code=HTTPStatus.ACCEPTED)
    async def begin(wanted: NewOptions) -> dict[str, Any]:
        """Check the options, and begin."""
        if rolling is None:
            raise HTTPException(HTTPStatus.BAD_REQUEST, SEVERAL)
        timeout_s = drain_timeout_s if wanted.timeout_s is None else wanted.timeout_s
        try:
            await rolling.begin(wanted.options, timeout_s)
        except ConfigError as error:
            raise HTTPException(HTTPStatus.BAD_REQUEST, str(error)) from error
        except ScalingRefusedError as refused:
            raise HTTPException(HTTPStatus.CONFLICT, str(refused)) from refused
        return rolling.shown()

    return router
