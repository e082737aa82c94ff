"""Routes beside vLLM's own: `/admin/instances`, `/health/live`, `/health/ready`; and `Retry-After` on 429."""

import math
from argparse import Namespace
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Response
from vllm import envs
from vllm.entrypoints.serve.exception_handling.handlers.exception import exception_handler
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

from cascadeinfer.frontend.engine_client import OverloadedError
from cascadeinfer.runtime.shell import Runtime


def attach_admin_routes(app: FastAPI, runtime: Runtime, args: Namespace) -> None:
    """Add the routes to vLLM's app; the admin ones ask for the same API keys as `/v1`."""
    keys = [key for key in (args.api_key or [envs.VLLM_API_KEY]) if key]
    verifier = AuthenticationMiddleware(app, keys) if keys else None

    async def require_key(request: Request) -> None:
        if verifier is not None and not verifier.verify_token(request.headers):
            raise HTTPException(HTTPStatus.UNAUTHORIZED, "Unauthorized")

    router = APIRouter()

    @router.get("/admin/instances", dependencies=[Depends(require_key)])
    async def instances() -> dict[str, Any]:
        """Stages, instances, load and migrations now."""
        return runtime.snapshot()

    @router.get("/health/live")
    async def live() -> dict[str, str]:
        """The front end answers."""
        return {"status": "live"}

    @router.get("/health/ready")
    async def ready() -> dict[str, Any]:
        """At least one instance is up."""
        up = [engine.instance_id for engine in runtime.live_engines()]
        if not up:
            raise HTTPException(HTTPStatus.SERVICE_UNAVAILABLE, "no instance is up")
        return {"status": "ready", "instances": up}

    app.include_router(router)
    app.add_exception_handler(OverloadedError, _say_when_to_come_again)


async def _say_when_to_come_again(request: Request, error: Exception) -> Response:
    """The error as vLLM's JSON, with the header `Retry-After` in whole seconds."""
    response = await exception_handler(request, error)
    if isinstance(error, OverloadedError):
        response.headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    return response
