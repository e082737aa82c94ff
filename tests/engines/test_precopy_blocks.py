"""Whose blocks they are while full blocks go ahead: vLLM's scheduler and block pool, and workers that are played."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scheduler_bed import BLOCK, SchedulerBed, greedy, make_bed

from cascadeinfer.engines.models.tiny import make_tiny_llama
from cascadeinfer.engines.vllm.connector import commands
from cascadeinfer.engines.vllm.connector.precopy import FullBlockPins
from cascadeinfer.engines.vllm.connector.reservations import Reservations
from cascadeinfer.engines.vllm.connector.ticket import VllmTicket, resume_params
from cascadeinfer.engines.vllm.connector.worker_side import precopied_on_worker, precopy_on_worker

PROMPT = list(range(3, 3 + 100))


class Ranks:
    """The workers of a target: what they are told to read, and the outcomes that the test gives them."""

    def __init__(self, n: int) -> None:
        """Ranks with nothing to tell."""
        self.orders: list[tuple[Any, ...]] = []
        self.outcomes: list[dict[str, bool]] = [{} for _ in range(n)]

    def collective_rpc(self, method: Any, args: tuple[Any, ...] = ()) -> list[Any]:
        """See vLLM's Executor."""
        if method is precopy_on_worker:
            self.orders.append(args)
            return [None] * len(self.outcomes)
        assert method is precopied_on_worker
        told, self.outcomes = self.outcomes, [{} for _ in self.outcomes]
        return told


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, of which the scheduler reads the configuration."""
    return make_tiny_llama(tmp_path_factory.mktemp("precopy") / "tiny")


@pytest.fixture
def beds(model: Path) -> Iterator[tuple[SchedulerBed, SchedulerBed]]:
    """A source and a target, which hold nothing at the end."""
    source, target = make_bed(model), make_bed(model)
    yield source, target
    assert source.holds_nothing()
    assert target.holds_nothing()


def core_of(bed: SchedulerBed, ranks: Ranks | None = None) -> Any:
    """What commands need of an EngineCore."""
    return SimpleNamespace(**vars(bed.core), model_executor=ranks or Ranks(1))


def decoding(bed: SchedulerBed, n_tokens: int = 5) -> None:
    """A request `r` that has this many tokens."""
    bed.add("r", PROMPT, greedy(40))
    bed.steps(n_tokens)


def cut(bed: SchedulerBed) -> dict[str, Any]:
    """Cut request `r`; returns its ticket's parameters."""
    assert commands.cascade_cut(bed.core, "r") is None
    bed.steps(2)
    params = bed.ends["r"].kv_transfer_params
    assert params is not None
    bed.read.add("r")  # the worker will see that it has been read
    return dict(params)


def come(bed: SchedulerBed, output: list[int], ticket: dict[str, Any], room: str) -> None:
    """Request `r` continues at the target, with its reservation."""
    words = resume_params(VllmTicket(ticket), prompt_tokens=len(PROMPT), reservation_id=room)
    bed.add("r~1", PROMPT + output, bed.words(greedy(40), **words))


@pytest.mark.parametrize("kept", [True, False])
def test_what_was_copied_is_not_pulled(beds: tuple[SchedulerBed, SchedulerBed], kept: bool) -> None:
    """The pull asks for the rest, unless the ticket says that the request has other blocks than those copied."""
    source, target = beds
    ranks = Ranks(2)
    decoding(source)
    full = commands.cascade_pin_full_blocks(core_of(source), "r")
    assert full is not None
    n_blocks = (len(PROMPT) + 4) // BLOCK
    assert (full["remote_num_tokens"], len(full["remote_block_ids"][0])) == (n_blocks * BLOCK, n_blocks)
    assert commands.cascade_reserve(core_of(target), "room", 140) is None
    assert commands.cascade_precopy(core_of(target, ranks), "room", full, None)
    ((name, ticket, block_ids, before_s),) = ranks.orders
    assert (name, ticket, len(set(block_ids)), before_s) == ("room", full, n_blocks, None)
    ranks.outcomes[0] = {"room": True}
    assert commands.cascade_precopied(core_of(target, ranks), "room") is None, "one rank is not done"
    ranks.outcomes[1] = {"room": True}
    assert commands.cascade_precopied(core_of(target, ranks), "room") is True
    assert commands.cascade_release_full_blocks(core_of(source), "r")
    ticket = cut(source)
    if not kept:
        ticket["remote_block_ids"] = (list(reversed(ticket["remote_block_ids"][0])),)
    come(target, source.tokens["r"], ticket, "room")
    target.steps(3)
    (pull,) = target.pulled
    n_left = len(ticket["remote_block_ids"][0]) - (n_blocks if kept else 0)
    assert len(pull.local_block_ids[0]) == n_left
    assert not set(pull.local_block_ids[0]) & set(block_ids) or not kept
    assert target.load()["precopied_tokens"] == (n_blocks * BLOCK if kept else 0)
    target.steps(60)
    source.steps(2)


def test_who_is_read_into_waits_for_the_reader(beds: tuple[SchedulerBed, SchedulerBed]) -> None:
    """A reservation that is released during the read returns its blocks when every rank has seen the end of it."""
    source, target = beds
    ranks = Ranks(2)
    decoding(source)
    full = commands.cascade_pin_full_blocks(core_of(source), "r")
    assert full is not None
    core = core_of(target, ranks)
    assert commands.cascade_reserve(core, "client0/room", 140) is None
    held = target.side.reservations.n_blocks()
    assert commands.cascade_precopy(core, "client0/room", full, None)
    commands.cascade_forget_client(SimpleNamespace(**vars(core), abort_requests=lambda _: None), 0)
    assert commands.cascade_precopied(core, "client0/room") is None
    assert target.side.reservations.n_blocks() == held
    assert len(target.side.reservations) == 0, "the slot is free"
    ranks.outcomes[0] = {"client0/room": False}
    commands.cascade_load(core, 0)
    assert target.side.reservations.n_blocks() == held
    ranks.outcomes[1] = {"client0/room": True}
    commands.cascade_load(core, 0)
    assert target.side.reservations.n_blocks() == 0
    assert commands.cascade_precopied(core, "client0/room") is False
    commands.cascade_release_full_blocks(core_of(source), "r")
    source.steps(60)


@pytest.mark.parametrize("wrong", ["nothing", "room", "tokens", "blocks", "more blocks than room"])
def test_what_cannot_be_read_is_not(beds: tuple[SchedulerBed, SchedulerBed], wrong: str) -> None:
    """A ticket that names no full blocks, or no room for them: nothing is read, and nothing held."""
    _, target = beds
    ranks = Ranks(1)
    ticket: dict[str, Any] = {
        "remote_engine_id": "e", "remote_request_id": "r", "remote_host": "h", "remote_port": 1, "tp_size": 1,
        "remote_num_tokens": 2 * BLOCK, "remote_block_ids": ([4, 5],),
    }  # fmt: skip
    match wrong:
        case "tokens":
            ticket["remote_num_tokens"] = 2 * BLOCK - 1
        case "blocks":
            ticket["remote_block_ids"] = ([4, 5], [6])
        case "more blocks than room":
            ticket |= {"remote_num_tokens": 10 * BLOCK, "remote_block_ids": (list(range(10)),)}
    core = core_of(target, ranks)
    assert commands.cascade_reserve(core, "room", 3 * BLOCK) is None
    begun = commands.cascade_precopy(core, "nowhere" if wrong == "room" else "room", ticket, None)
    assert begun == bool(ranks.orders) == (wrong == "nothing")
    if begun:
        ranks.outcomes[0] = {"room": True}
        assert commands.cascade_precopied(core, "room")
    commands.cascade_release_reservation(core, "room")


def test_full_blocks_of_whom() -> None:
    """Of nobody who is unknown."""
    pins = FullBlockPins(BLOCK, 10.0, lambda _: True)
    assert pins.pin(None) == []
    assert not pins.release("r")
    assert len(pins) == pins.n_blocks() == 0


def test_pinned_until_the_lease_ends(model: Path) -> None:
    """Blocks that nobody releases stay with the pins when their request has gone, for the length of the lease."""
    bed = make_bed(model)
    now_s = [100.0]
    pins = FullBlockPins(BLOCK, 10.0, lambda _: True, lambda: now_s[0])
    pins.manager = bed.side.full_block_pins.manager
    bed.add("waits", PROMPT, greedy(40))
    assert pins.pin(bed.scheduler.requests["waits"]) == [], "it does not decode yet"
    bed.steps(5)
    block_ids = pins.pin(bed.scheduler.requests["waits"])
    assert pins.pin(bed.scheduler.requests["waits"]) == block_ids
    assert (len(pins), pins.n_blocks()) == (1, 0), "its request has them, too"
    bed.steps(60)
    assert pins.n_blocks() == len(block_ids) == bed.load()["kv_blocks_used"]
    now_s[0] = 109.9
    assert len(pins) == 1
    now_s[0] = 110.0
    assert len(pins) == 0
    assert bed.holds_nothing()


def test_a_reservation_that_expires_while_it_is_read_into(model: Path) -> None:
    """Its blocks wait for the reader as well."""
    bed = make_bed(model)
    reservations = Reservations(BLOCK, 0.0)
    reservations.pool = bed.side.reservations.pool
    gone: list[str] = []
    reservations.on_gone = gone.append
    assert reservations.reserve("room", BLOCK)
    reservations._held["room"].is_read_into = True
    assert len(reservations) == 0
    assert (gone, reservations.n_blocks()) == (["room"], 2)
    assert not reservations.end_read("room")
    assert reservations.n_blocks() == 0
    assert bed.holds_nothing()
