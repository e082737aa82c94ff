"""
The engine protocol: one instance of the model that runs requests, releases running ones and takes running ones over.

An engine knows nothing of stages or policies. The runtime gives each attempt to run a request its own
`engine_request_id` (a migrated request is a new attempt at the target), so that late output of an old attempt is never
credited to the new one.

All methods are called from one event loop. Commands are carried out in the order of the calls.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from cascadeinfer.core.cost.identity import EngineIdentity
from cascadeinfer.core.events import InstanceReport, PinReason
from cascadeinfer.core.refusals import Refusal
from cascadeinfer.core.types import InstanceCapacity, InstanceId, NodeId, RequestId


class KvTicket(Protocol):
    """Where a cut request's KV cache is pinned. Callers may ask how many tokens it holds; the rest is opaque."""

    @property
    def n_tokens(self) -> int:
        """Tokens whose KV cache can be pulled, from the first one on; 0 when none was pinned."""
        ...


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """
    A request as the runtime sees it.

    Attributes:
        pin_reason: Why it may not migrate, or None.
        payload: The engine's own form of the request; opaque to the runtime.
        prefix_hashes: Hashes of the prompt's leading blocks, each covering all before it; empty when unknown.
    """

    request_id: RequestId
    prompt_token_ids: list[int]
    max_output_tokens: int
    payload: Any
    pin_reason: PinReason | None = None
    priority: int = 0
    prefix_hashes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Resume:
    """
    How a request that has run elsewhere continues.

    Attributes:
        output_token_ids: Its output so far.
        ticket: Where its KV cache can be pulled from; None to recompute it.
        reservation_id: The reservation at the target that it takes over, if any.
        pull_before_s: Deadline of the pull, on the caller's clock (`time.monotonic`); the engine recomputes the KV
            cache if it passes. None: no deadline.
    """

    output_token_ids: list[int]
    ticket: KvTicket | None = None
    reservation_id: str | None = None
    pull_before_s: float | None = None


@dataclass(frozen=True, slots=True)
class EngineCounters:
    """
    What an instance has done since it started.

    Attributes:
        pulls: Requests whose KV cache was pulled from another instance.
        pulled_tokens: Tokens in them, without those that had been copied before their cut.
        precopied_tokens: Tokens whose KV cache had been copied here before the cut of their request, and was used.
        reserved: Reservations held now.
        pinned: Cut requests whose blocks are pinned now.
        failed_pulls: Failed pulls, whose tokens the engine recomputed.
        held_blocks: KV blocks held without a running or waiting request, by reason (`docs/metrics.md` lists the
            reasons).
        listens: Whether the listener of its side channel, where peers do the handshake, is alive.
        paused: Whether it was told to begin no further work; it then may have been told to abort what it had.
        step_budget: Tokens of a step at most; 0 when nothing is known.
    """

    steps: int = 0
    scheduled_tokens: int = 0
    pulls: int = 0
    pulled_tokens: int = 0
    precopied_tokens: int = 0
    reserved: int = 0
    pinned: int = 0
    failed_pulls: int = 0
    held_blocks: Mapping[str, int] = field(default_factory=dict)
    listens: bool = True
    paused: bool = False
    step_budget: int = 0


class InstanceIdentity(NamedTuple):
    """
    What a profile of the engine needs.

    Attributes:
        engine: Its identity.
        kv_bytes_per_token: All devices together.
        multiprocessors: Of a device; None on a CPU.
        graph_tokens: Tokens of a step up to which it uses full CUDA graphs, 0 if it uses none; None if it did not say.
    """

    engine: EngineIdentity
    kv_bytes_per_token: int
    multiprocessors: int | None
    graph_tokens: int | None = None


class TokenDelta(Protocol):
    """
    One request's part of a step's outputs; has the form of vLLM's EngineCoreOutput.

    Attributes:
        kv_transfer_params: Source of its ticket (`Engine.ticket_of`); None for clients.
    """

    request_id: str
    new_token_ids: list[int]
    finish_reason: Any
    kv_transfer_params: Any
    events: Any


class StepOutputs(Protocol):
    """The outputs of one step; has the form of vLLM's EngineCoreOutputs."""

    outputs: list[Any]


class EngineDied(Exception):  # noqa: N818 - a fact about the engine, raised by `next_outputs`
    """The engine is gone; nothing more will come from it."""


class Engine(Protocol):
    """One instance."""

    instance_id: InstanceId

    @property
    def index(self) -> int:
        """Its number among the instances, by which metrics tell them apart."""
        ...

    @property
    def config(self) -> Any:
        """The engine's own configuration, as its start has completed it; opaque to the runtime."""
        ...

    @property
    def node(self) -> NodeId:
        """The machine it runs on, by a name that all instances there share; empty where that is not known."""
        ...

    @property
    def movable(self) -> bool:
        """Whether its running requests can move to another instance at all. Raises EngineError before the start."""
        ...

    async def start(self) -> InstanceCapacity:
        """Start the instance and wait until it answers. Raises EngineError."""
        ...

    async def connect(self, peers: Sequence["Engine"]) -> None:
        """Do the KV transfer handshake with each peer, both ways. Raises EngineError."""
        ...

    async def listens(self) -> bool:
        """
        Whether its side channel answers, so that peers can do the handshake with it; repairs it if possible. Raises
        EngineError.
        """
        ...

    async def reaches(self, peer: "Engine") -> bool:
        """
        Whether the side channel of a peer answers when this instance asks: whether the network between their machines
        carries anything. False when this instance does not say in time. Raises EngineError.
        """
        ...

    async def identity(self) -> InstanceIdentity:
        """The identity of what runs here, for cost profiles. Raises EngineError."""
        ...

    async def add(
        self, engine_request_id: str, request: EngineRequest, resume: Resume | None = None, *, park: bool = False
    ) -> None:
        """
        Run a request; its tokens come from `next_outputs`.

        Args:
            engine_request_id: The name of this attempt.
            request: What to run.
            resume: How it continues, if it has run elsewhere.
            park: Whether to end it with the first token that it gets here, as `cut` would, with its KV cache pinned. A
                request that ends there by itself, or may not move, is run as any other.
        """
        ...

    async def abort(self, engine_request_ids: list[str]) -> None:
        """Stop requests. Output in flight may still arrive."""
        ...

    async def cut(self, engine_request_id: str) -> Refusal | None:
        """
        Ask that a running request end at its next token with its KV cache pinned.

        Returns:
            None if accepted (an output with a ticket follows, unless the request ends by itself), else why not.
        """
        ...

    async def undo_cut(self, engine_request_id: str) -> bool:
        """Let a cut request continue; False if the cut has already taken effect."""
        ...

    async def reserve(self, reservation_id: str, n_tokens: int, *, for_parked: bool = False) -> Refusal | None:
        """
        Reserve room for a request of this many tokens.

        Args:
            reservation_id: Of the reservation.
            n_tokens: Length to reserve room for.
            for_parked: Whether the request is parked; its move does not count among the migrations of an instance.

        Returns:
            None, or why it cannot.
        """
        ...

    async def release_reservation(self, reservation_id: str) -> None:
        """Release reserved room."""
        ...

    async def release_pin(self, engine_request_id: str) -> None:
        """Free the pinned blocks of a cut request."""
        ...

    async def renew_pin(self, engine_request_id: str) -> bool:
        """Begin the lease on a cut request's blocks anew; False if they are not pinned any more."""
        ...

    async def pin_full_blocks(self, engine_request_id: str) -> KvTicket | None:
        """
        Pin the KV blocks of a running request that are full, under a lease, whatever becomes of the request.

        Returns:
            What `precopy` at a peer takes, for as many tokens as these blocks hold; None if there are none.
        """
        ...

    async def release_full_blocks(self, engine_request_id: str) -> None:
        """Nobody reads what `pin_full_blocks` has pinned for this request."""
        ...

    async def precopy(self, reservation_id: str, ticket: KvTicket, pull_before_s: float) -> bool:
        """
        Pull the full blocks of a request that decodes at a peer into room reserved for it, and wait for them.

        They are used when the request comes with this reservation and the ticket of its cut, if that names the same
        blocks; only the rest is pulled then. Releasing the reservation at any time is safe.

        Args:
            reservation_id: The room.
            ticket: What the peer's `pin_full_blocks` gave.
            pull_before_s: Deadline, on the caller's clock (`time.monotonic`); what comes later is not used.

        Returns:
            Whether they are here. False: all is pulled when the request comes.
        """
        ...

    async def set_step_budget(self, n_tokens: int | None) -> int:
        """
        Schedule at most this many tokens per step from the next one on.

        Args:
            n_tokens: The chunk budget; None: as many as the instance was started with.

        Returns:
            The budget in force.

        Raises:
            EngineError: It is more than the instance was started with, or too little for a token of each request that
                may run at once; nothing has changed.
        """
        ...

    async def forget_client(self, client_index: int) -> int | None:
        """
        Abort what a dead front-end process left here, its reservations included.

        Args:
            client_index: Its number among the processes that use this instance.

        Returns:
            How many requests there were; None if it notices by itself which processes are gone.
        """
        ...

    async def utility(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """
        Call one of the engine's other functions (adapters, sleep, profiling) by its own name.

        Raises:
            EngineError: It has no such method, or is not running.
        """
        ...

    async def report(self, next_after_s: float | None = None) -> tuple[InstanceReport, EngineCounters]:
        """
        The current load, with engine request ids.

        Args:
            next_after_s: From now on the load also comes unasked, along with outputs, as long as the engine steps: not
                more often than every so many seconds (`load_in`). None: nothing changes.
        """
        ...

    def load_in(self, outputs: StepOutputs) -> tuple[InstanceReport, EngineCounters] | None:
        """
        The load that came unasked along with these outputs, as it was after their step; None if none did.

        Call it once for all outputs, in their order. Outputs that are empty and have a load came for its sake alone.
        """
        ...

    async def next_outputs(self) -> StepOutputs:
        """The next step's outputs. Raises EngineDied."""
        ...

    def ticket_of(self, delta: TokenDelta) -> KvTicket | None:
        """The ticket when this final output is a cut, else None."""
        ...

    def has_dropped(self, delta: TokenDelta) -> bool:
        """Whether this final output means that the engine gave the request up unasked (it is shutting down)."""
        ...

    def has_failed(self, delta: TokenDelta) -> bool:
        """Whether this final output says that the engine failed at the request."""
        ...

    def failure_of(self, request_id: RequestId) -> StepOutputs:
        """Outputs that end this request with an error. Asks nothing of the instance, which may be dead."""
        ...

    @property
    def pid(self) -> int | None:
        """Process id of the instance, None when it has none (any more)."""
        ...

    def kill(self) -> None:
        """End the instance's process at once; `next_outputs` then raises EngineDied."""
        ...

    async def stop(self, timeout_s: float) -> None:
        """Stop the instance; kill it after the timeout. Stopping twice is harmless."""
        ...
