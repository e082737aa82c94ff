"""Routes beside vLLM's own: `/admin/instances`, `/health/live`, `/health/ready`."""

from argparse import Namespace
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from vllm import envs
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

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
