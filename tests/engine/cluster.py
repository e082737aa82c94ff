"""
Three instances in three stages, the runtime and vLLM's `AsyncLLM` on it: everything but the HTTP server, in-process.

The policy is `static_stages` with a switch. With moves switched off, a request stays where it was dispatched, which
gives the output that the same request has on one instance alone.
"""

import contextlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client import REGISTRY
from zoo import DEADLINE_S, SETTLE_S, eventually

from cascadeinfer.core.effects import Effect
from cascadeinfer.core.errors import EngineError
from cascadeinfer.core.events import Event, MigrationEnded
from cascadeinfer.core.migration import Action
from cascadeinfer.core.migration.limits import PullEstimate
from cascadeinfer.core.policies.static_stages import StaticStages
from cascadeinfer.core.types import InstanceId
from cascadeinfer.engines.protocol import Engine
from cascadeinfer.runtime.migrate import MigrationRecord
from cascadeinfer.runtime.shell import Runtime
from support.holds import held_at

if TYPE_CHECKING:
    from vllm.outputs import CompletionOutput, RequestOutput
    from vllm.sampling_params import SamplingParams

    from cascadeinfer.frontend.engine_client import CascadeLLM

STAGES = "0-64:1,64-128:1,128-:1"
STAGE_EDGES = (64, 128)
BEYOND_EDGES = tuple(edge + 8 for edge in STAGE_EDGES)
"""Lengths at which a request has certainly outgrown its stage."""


class SwitchedStages(StaticStages):
    """
    `static_stages` whose hand-overs can be switched off.

    Attributes:
        copied: Moves so far whose full blocks went ahead.
    """

    moving = True
    copied = 0

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        """See Policy."""
        self.copied += isinstance(event, MigrationEnded) and event.copied_tokens > 0
        return super().handle(event, now_s)

    def _hand_over(self, source_id: InstanceId, cause: str, now_s: float) -> list[Effect]:
        return super()._hand_over(source_id, cause, now_s) if self.moving else []


class Cluster:
    """The runtime under test and what tests ask of it."""

    def __init__(self, runtime: Runtime, llm: "CascadeLLM", policy: SwitchedStages) -> None:
        """Take over a started runtime."""
        self.runtime = runtime
        self.llm = llm
        self.policy = policy
        self._numbers = itertools.count()

    # --- requests ----------------------------------------------------------------------------------------------------

    def stream(
        self,
        prompt: str | list[int],
        params: "SamplingParams",
        *,
        request_id: str | None = None,
        hold_at: Sequence[int] = (),
    ) -> "AsyncIterator[RequestOutput]":
        """
        Run a request; yields its outputs as they come.

        Its first attempt waits at the first length of `hold_at` until it is cut, its second at the second; with
        `BEYOND_EDGES` it moves twice, however busy this process is.
        """
        request_id = held_at(request_id or f"t{next(self._numbers)}", *hold_at)
        given: Any = prompt if isinstance(prompt, str) else {"prompt_token_ids": prompt}
        return self.llm.generate(given, params, request_id)

    async def run(
        self, prompt: str | list[int], params: "SamplingParams", *, hold_at: Sequence[int] = ()
    ) -> "list[CompletionOutput]":
        """Run a request to its end, see `stream`; its completions (one unless `n` says otherwise)."""
        last = None
        async for output in self.stream(prompt, params, hold_at=hold_at):
            last = output
        assert last is not None
        assert last.finished
        return sorted(last.outputs, key=lambda completion: completion.index)

    async def alone(self, prompt: str | list[int], params: "SamplingParams") -> "list[CompletionOutput]":
        """Run it on one instance, with nothing else running and without moves."""
        await self.settled()
        with self.no_moves():
            return await self.run(prompt, params)

    @contextlib.contextmanager
    def no_moves(self) -> Iterator[None]:
        """Within this block, requests stay where they are."""
        self.policy.moving = False
        try:
            yield
        finally:
            self.policy.moving = True

    # --- what happened -----------------------------------------------------------------------------------------------

    def migrations(self, outcome: str | None = None) -> int:
        """Migrations that have ended so far (with this outcome)."""
        ended = self.runtime.snapshot()["migrations"]["ended"]
        return sum(ended.values()) if outcome is None else ended.get(outcome, 0)

    @staticmethod
    def metric(name: str, **labels: str) -> float:
        """The sum of a metric's samples with these labels, from the registry that `/metrics` shows."""
        return sum(
            sample.value
            for family in REGISTRY.collect()
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def instance(self, instance_id: InstanceId) -> Engine:
        """A live engine."""
        engine = self.runtime.fleet.engine(instance_id)
        assert engine is not None
        return engine

    def instance_of(self, request_id: str) -> InstanceId | None:
        """Where the request (its front-end id begins with this) runs now."""
        for stream in self.runtime._streams:
            if stream.request.request_id.startswith(request_id):
                return stream.instance_id
        return None

    async def all_up(self) -> None:
        """Wait until every instance is up."""
        await eventually(lambda: len(self.runtime.live_engines()) == 3, "all instances up", 2 * DEADLINE_S)

    async def settled(self, deadline_s: float = SETTLE_S) -> None:
        """All instances are up, and nothing is held in the engines, the runtime or the policy's view."""
        held: dict[str, Any] = {}

        async def nothing() -> bool:
            await self.all_up()
            with contextlib.suppress(EngineError):  # one has died, but the runtime has not noticed yet
                return await held_nowhere()
            return False

        async def held_nowhere() -> bool:
            held.clear()
            for engine in self.runtime.live_engines():
                report, counters = await engine.report()
                held[engine.instance_id] = [
                    len(report.running_ids) + len(report.waiting_ids),
                    report.kv_blocks_used,
                    counters.pinned,
                    counters.reserved,
                ]
            snapshot = self.runtime.snapshot()
            held["live"] = [snapshot["requests"]["live"], snapshot["migrations"]["under_way"]]
            view = self.policy.view
            held["books"] = [len(view.requests)] + [
                len(i.request_ids) + len(i.inbound) + len(i.outbound) + i.kv_tokens for i in view.instances.values()
            ]
            return not any(any(numbers) for numbers in held.values())

        await eventually(nothing, lambda: f"nothing held: {held}", deadline_s)

    # --- interference ------------------------------------------------------------------------------------------------

    @staticmethod
    @contextlib.contextmanager
    def always_copying() -> Iterator[None]:
        """Within this block every move copies full blocks ahead, though pulls of the tiny model are short."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PullEstimate, "pays_to_copy", True)
            yield

    @contextlib.contextmanager
    def on_action(
        self, action: Action, do: Callable[[MigrationRecord], Awaitable[None] | None], *, before: bool = False
    ) -> Iterator[list[MigrationRecord]]:
        """
        At the first `action` of a migration, do something, before or after the action is started.

        Yields:
            The records of the migrations it was done to; empty while it has not happened.
        """
        migrator = self.runtime._migrator
        original = migrator._act
        done: list[MigrationRecord] = []

        def act(record: MigrationRecord, acted: Action) -> None:
            first = acted is action and not done
            if first:
                done.append(record)
            if first and before:
                do(record)
            original(record, acted)
            if first and not before:
                do(record)

        migrator._act = act
        try:
            with self.always_copying() if action is Action.COPY else contextlib.nullcontext():
                yield done
        finally:
            del migrator._act
