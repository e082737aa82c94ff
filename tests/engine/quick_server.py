"""
`cascadeinfer serve` with instances that start in a second or two and restart at once.

They are forked from the server, which has already imported everything. This is a separate program, for tests that kill
many instances. Forking a process that has threads is not safe in general, so the product does not do it. For instance,
a forked process would write the signals it gets to the server's event loop, through the inherited file descriptor.

With HURRY in the environment it learns and plans every few seconds, from few requests and for small gains. With
KEEP_PLAN it plans nothing. With ROLES_IN_TURN every plan with roles is another one, whatever it gains. With
ASYNCHRONOUS, each step is scheduled while another one runs, as on devices; vLLM switches that off on a CPU. If the
environment chooses vLLM's V2 model runner, it runs without a GPU.
"""

import ctypes
import os
import signal
import sys
import tempfile
from dataclasses import replace
from functools import partial
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from llvmlite.binding import ffi

if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
    sys.path.append(str(Path(__file__).parent.parent))
    import support.v2_runner  # noqa: F401 - before vLLM is imported otherwise

from cascadeinfer import assemble
from cascadeinfer.cli.main import main
from cascadeinfer.config import policy, supervision
from cascadeinfer.core.adapt import role_adaptation
from cascadeinfer.core.layout import StageKind
from cascadeinfer.core.plan.problem import PlanProblem
from cascadeinfer.core.plan.role_plan import RolePlan, RoleStage
from cascadeinfer.core.plan.roles import solve_roles
from cascadeinfer.core.policies import cascade, roles
from cascadeinfer.core.types import LengthRange
from cascadeinfer.engines.vllm import launch
from cascadeinfer.runtime.supervise import SupervisionTimes

PR_SET_PDEATHSIG = 1


def as_if_spawned() -> None:
    """
    In a forked process, send no signals to the server's event loop, and exit when the parent does.

    vLLM's workers watch a pipe for their EngineCore's end, and a forked one may hold the pipe's other end itself.
    """
    signal.set_wakeup_fd(-1)
    tempfile.tempdir = None  # a spawned process reads it from its environment
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


instance_config = launch.instance_config


def asynchronous_config(*args: Any) -> Any:
    """A configuration with asynchronous scheduling."""
    config = instance_config(*args)
    config.scheduler_config.async_scheduling = True
    return config


class InTurn:
    """One prefill instance for prompts of 40 and more tokens, then none, and so on; token budgets change as well."""

    turn = 0

    def __call__(self, problem: PlanProblem, budgets: tuple[int, ...], **options: Any) -> RolePlan:
        """See `solve_roles`."""
        InTurn.turn += 1
        n_prefill, budget = InTurn.turn % 2, budgets[InTurn.turn % len(budgets)]
        plain = solve_roles(problem, budgets, may_push=False, max_units=options["max_units"])
        service = plain.stages[0].service
        prefill = (RoleStage(StageKind.PREFILL, LengthRange(40), 1, budget, service),) * n_prefill
        rest = RoleStage(StageKind.MIXED, LengthRange(0), problem.n_instances - n_prefill, budget, service)
        return replace(plain, prefill=prefill, stages=(rest,))


if __name__ == "__main__":
    ffi.lib._fntab["__dict__"] = {}  # see tests/conftest.py
    resource_tracker.ensure_running()  # one for all processes, as with spawned ones
    os.register_at_fork(after_in_child=as_if_spawned)
    fork = {"VLLM_WORKER_MULTIPROC_METHOD": "fork"}  # set for the processes only: the configuration resets it
    assemble.make_runtime = partial(assemble.make_runtime, extra_environment=fork)  # type: ignore[assignment]
    supervision.SupervisionTimes = partial(  # type: ignore[misc, assignment]
        SupervisionTimes, backoff_first_s=0.2, backoff_max_s=1.0, window_s=0.0
    )
    if os.environ.get("ASYNCHRONOUS"):
        launch.instance_config = asynchronous_config
    if os.environ.get("HURRY"):
        cascade.LearningSettings = partial(cascade.LearningSettings, interval_s=2.0)  # type: ignore[misc, assignment]
        policy.PlanSettings = partial(policy.PlanSettings, interval_s=2.0, min_requests=60, hysteresis=0.02)  # type: ignore[misc, assignment]
    if os.environ.get("KEEP_PLAN"):
        policy.PlanSettings = partial(policy.PlanSettings, min_requests=1_000_000_000)  # type: ignore[misc, assignment]
    if os.environ.get("ROLES_IN_TURN"):
        roles.LearningSettings = partial(roles.LearningSettings, interval_s=1.0)  # type: ignore[misc, assignment]
        policy.PlanSettings = partial(policy.PlanSettings, interval_s=2.0, min_requests=8, hysteresis=-1.0)  # type: ignore[misc, assignment]
        role_adaptation.solve_roles = InTurn()  # type: ignore[assignment]
    main()
