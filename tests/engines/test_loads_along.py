"""Loads that travel with outputs: whose, how often, and that vLLM's front end does not notice them."""

import queue
import threading
from dataclasses import replace
from typing import Any

from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from cascadeinfer.engines.vllm.connector.loads_along import LoadsAlong, take_load

STATS = SchedulerStats(num_running_reqs=3, kv_connector_stats={"transfer_duration": [0.1]})


class Bed:
    """An engine's outputs, with a clock that the test sets."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.queue: queue.Queue[Any] = queue.Queue()
        self.with_requests: set[int] = set()
        self.fails = False
        self.along = LoadsAlong(self.queue, self._load_of, self.with_requests.__contains__, lambda: self.now_s)

    def _load_of(self, client: int) -> dict[str, Any]:
        if self.fails:
            raise RuntimeError("no load")
        return {"client": client, "at_s": self.now_s}

    def step(self, client: int = 0, *, takes_s: float = 0.05, stats: SchedulerStats | None = None) -> list[Any]:
        """A step with outputs for this client: what is sent, as (client, number of outputs, load, statistics)."""
        self.now_s += takes_s
        self.along.put_nowait((client, EngineCoreOutputs(outputs=[EngineCoreOutput("r", [7])], scheduler_stats=stats)))
        return self.sent()

    def sent(self) -> list[Any]:
        """As the receivers have decoded it."""
        sent = []
        while not self.queue.empty():
            receiver, outputs = self.along.get()
            heard: EngineCoreOutputs = MsgpackDecoder(EngineCoreOutputs).decode(MsgpackEncoder().encode(outputs))
            load = take_load(heard)
            assert take_load(heard) is None
            sent.append((receiver, len(heard.outputs), load, heard.scheduler_stats))
        return sent


def test_nobody_is_sent_what_he_has_not_asked_for() -> None:
    """Not before the first question, not after one that asks for no more, and not when the client is gone."""
    bed = Bed()
    assert bed.step() == [(0, 1, None, None)]
    bed.along.told(0, None)
    assert bed.step(takes_s=1.0) == [(0, 1, None, None)]
    bed.along.told(0, 0.1)
    assert bed.step(takes_s=1.0) == [(0, 1, {"client": 0, "at_s": bed.now_s}, None)]
    bed.along.forget(0)
    assert bed.step(takes_s=1.0) == [(0, 1, None, None)]


def test_at_most_one_load_per_interval() -> None:
    """With the first outputs after it; an answer to a question counts as one."""
    bed = Bed()
    bed.along.told(0, 0.1)
    told = [load is not None for _ in range(8) for _, _, load, _ in bed.step(takes_s=0.06)]
    assert told == [False, True, False, True, False, True, False, True]
    bed.step(takes_s=0.06)
    bed.along.told(0, None)
    assert bed.step(takes_s=0.06) == [(0, 1, None, None)]


def test_the_engines_own_statistics_stay_as_they_are() -> None:
    """Those of the scheduler and of NIXL's connector."""
    bed = Bed()
    bed.along.told(0, 0.1)
    for stats in (STATS, replace(STATS, kv_connector_stats=None)):
        [(_, _, load, left)] = bed.step(takes_s=0.2, stats=replace(stats))
        assert load is not None
        assert left == stats
    assert STATS.kv_connector_stats == {"transfer_duration": [0.1]}


def test_another_front_end_hears_of_the_load_too() -> None:
    """Without outputs of its own it gets a message for the load alone; with requests of its own, after a while only."""
    bed = Bed()
    for client in (0, 4):
        bed.along.told(client, 0.1)
    alone, own = bed.step(takes_s=0.11)
    assert alone == (4, 0, {"client": 4, "at_s": bed.now_s}, None)
    assert own[2] == {"client": 0, "at_s": bed.now_s}
    bed.with_requests.add(4)
    assert [receiver for receiver, *_ in bed.step(takes_s=0.11)] == [0]
    assert bed.step(4, takes_s=0.0) == [(4, 1, {"client": 4, "at_s": bed.now_s}, None)]
    bed.step(takes_s=0.11)
    assert [receiver for receiver, *_ in bed.step(takes_s=0.11)] == [4, 0], "its requests wait: no outputs of its own"


def test_messages_of_other_kinds_pass() -> None:
    """The engine's death, answers to calls, and what vLLM's other threads say."""
    bed = Bed()
    bed.along.told(0, 0.0)
    bed.along.put_nowait(b"dead")
    assert bed.along.get() == b"dead"
    bed.along.put_nowait((0, EngineCoreOutputs()))
    bed.along.put_nowait((-1, EngineCoreOutputs(scheduler_stats=SchedulerStats())))
    assert [load for _, _, load, _ in bed.sent()] == [None, None]
    elsewhere: list[Any] = []
    other = threading.Thread(target=lambda: elsewhere.extend(bed.step()))
    other.start()
    other.join()
    assert [load for _, _, load, _ in elsewhere] == [None]


def test_a_fault_costs_the_loads_and_not_the_outputs() -> None:
    """They go on without; front ends ask when nothing comes, and get what they want again by that."""
    bed = Bed()
    bed.along.told(0, 0.1)
    bed.fails = True
    assert bed.step(takes_s=0.2) == [(0, 1, None, None)]
    bed.fails = False
    assert bed.step(takes_s=0.2) == [(0, 1, None, None)]
    bed.along.told(0, 0.1)
    assert bed.step(takes_s=0.2)[0][2] is not None
