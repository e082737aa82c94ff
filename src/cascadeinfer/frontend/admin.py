"""
Routes in addition to vLLM's own: `/admin/instances` (show, add, drain), `/admin/roll` (`rolling.py`), `/health/live`,
`/health/ready`; and `/version` in place of its own.

Adding and draining start here and are answered with 202; `GET` shows their progress.
"""

import contextlib
from collections.abc import Iterator, Sequence
from http import HTTPStatus
from typing import Annotated, Any, Protocol

import vllm
from fastapi import APIRouter, FastAPI, HTTPException, Query
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from cascadeinfer import __version__
from cascadeinfer.core.errors import ScalingRefusedError, UnknownInstanceError
from cascadeinfer.core.types import InstanceId, RequestId
from cascadeinfer.frontend.rolling import roll_routes
from cascadeinfer.runtime.shell import Runtime


class AddInstances(BaseModel):
    """The body of `POST /admin/instances`; may be omitted."""

    model_config = ConfigDict(extra="forbid")
    count: int = Field(1, ge=1, le=64)


class Admin(Protocol):
    """Shows and changes the instances: the runtime of this process, or of another."""

    async def snapshot(self) -> dict[str, Any]:
        """The JSON of `/admin/instances`."""
        ...

    async def picture(self) -> dict[str, Any]:
        """See `cascadeinfer.runtime.picture`."""
        ...

    async def story(self, request_id: RequestId) -> dict[str, Any] | None:
        """
        See `cascadeinfer.runtime.stories`: of a request of any process; None if none has it.

        Raises:
            TimeoutError: No process that answers has it, and another does not answer.
        """
        ...

    async def add(self, count: int) -> list[InstanceId]:
        """See Elasticity.add."""
        ...

    async def drain(self, instance_id: InstanceId, timeout_s: float) -> InstanceId:
        """See Elasticity.drain."""
        ...

    async def rolled(self) -> dict[str, Any]:
        """The JSON of `/admin/roll`."""
        ...

    async def roll(self, options: Sequence[str], timeout_s: float) -> dict[str, Any]:
        """Begin a rolling update, see Rolling.begin; returns the JSON of `/admin/roll`."""
        ...


class OwnRuntime:
    """The runtime of the only process, or what process 0 of several does with its own. See Admin."""

    def __init__(self, runtime: Runtime) -> None:
        """
        Args:
            runtime: The owner of the instances.
        """
        self._runtime = runtime

    async def snapshot(self) -> dict[str, Any]:
        """See Admin."""
        return self._runtime.snapshot()

    async def picture(self) -> dict[str, Any]:
        """See Admin."""
        return self._runtime.lookout.picture()

    async def story(self, request_id: RequestId) -> dict[str, Any] | None:
        """See Admin."""
        return self._runtime.lookout.story(request_id)

    async def add(self, count: int) -> list[InstanceId]:
        """See Admin."""
        self._runtime.elastic.rolling.refuse_meanwhile()
        return self._runtime.elastic.add(count)

    async def drain(self, instance_id: InstanceId, timeout_s: float) -> InstanceId:
        """See Admin."""
        self._runtime.elastic.rolling.refuse_meanwhile()
        return self._runtime.elastic.drain(instance_id, timeout_s).instance_id

    async def rolled(self) -> dict[str, Any]:
        """See Admin."""
        return self._runtime.elastic.rolling.shown()

    async def roll(self, options: Sequence[str], timeout_s: float) -> dict[str, Any]:
        """See Admin."""
        await self._runtime.elastic.rolling.begin(options, timeout_s)
        return await self.rolled()


def attach_admin_routes(app: FastAPI, runtime: Runtime, admin: Admin, *, drain_timeout_s: float) -> None:
    """
    Add the routes to vLLM's app. Keys are checked at the door (`frontend/door`).

    Args:
        runtime: This process's runtime, for its health.
        admin: Answers what concerns all processes.
        drain_timeout_s: For drains that name no time-out.
    """
    app.include_router(roll_routes(admin, drain_timeout_s))
    app.include_router(_instance_routes(admin, drain_timeout_s))
    app.routes.insert(0, Route("/version", version, include_in_schema=False))  # before vLLM's own
    app.include_router(_health_routes(runtime))


async def version(_: Request) -> JSONResponse:
    """The versions of vLLM (as its own server says it) and of this project."""
    return JSONResponse({"version": vllm.__version__, "cascadeinfer": __version__})


def _instance_routes(admin: Admin, drain_timeout_s: float) -> APIRouter:
    router = APIRouter(prefix="/admin/instances")

    @router.get("")
    async def instances() -> dict[str, Any]:
        """Stages, instances, load and migrations now."""
        return await admin.snapshot()

    @router.get("/{instance_id}")
    async def instance(instance_id: str) -> dict[str, Any]:
        """One instance, also one that is gone since a while."""
        everything = await admin.snapshot()
        for shown in everything["instances"] + everything["departed"]:
            if shown["id"] == instance_id:
                return dict(shown)
        raise HTTPException(HTTPStatus.NOT_FOUND, str(UnknownInstanceError(instance_id)))

    @router.post("", status_code=HTTPStatus.ACCEPTED)
    async def add(wanted: AddInstances | None = None) -> dict[str, Any]:
        """Start more instances."""
        with _refusals_as_http():
            return {"added": await admin.add(wanted.count if wanted is not None else 1)}

    @router.delete("/{instance_id}", status_code=HTTPStatus.ACCEPTED)
    async def drain(
        instance_id: str, timeout_s: Annotated[float, Query(ge=0.0, le=86400.0)] = drain_timeout_s
    ) -> dict[str, Any]:
        """Have an instance hand its requests over, then stop it."""
        with _refusals_as_http():
            return {"draining": await admin.drain(instance_id, timeout_s)}

    return router


def _health_routes(runtime: Runtime) -> APIRouter:
    router = APIRouter(prefix="/health")

    @router.get("/live")
    async def live() -> dict[str, str]:
        """The front end answers."""
        return {"status": "live"}

    @router.get("/ready")
    async def ready() -> dict[str, Any]:
        """At least one instance is up."""
        up = [engine.instance_id for engine in runtime.live_engines()]
        if not up:
            raise HTTPException(HTTPStatus.SERVICE_UNAVAILABLE, "no instance is up")
        return {"status": "ready", "instances": up}

    return router


@contextlib.contextmanager
def _refusals_as_http() -> Iterator[None]:
    try:
        yield
    except UnknownInstanceError as unknown:
        raise HTTPException(HTTPStatus.NOT_FOUND, str(unknown)) from unknown
    except ScalingRefusedError as refused:
        raise HTTPException(HTTPStatus.CONFLICT, str(refused)) from refused
