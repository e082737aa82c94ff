"""The engine's step times: the contents of each step, and seconds that add up to a busy engine's wall time."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascadeinfer.engines.vllm.connector.step_timer import STEPS_KEPT, StepTimer, entries_of, features_of


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        """Start at zero."""
        self.now_s = 0.0

    def __call__(self) -> float:
        """The time in seconds."""
        return self.now_s


def output(
    new: dict[str, tuple[int, int]],
    cached: dict[str, tuple[int, int]] | None = None,
    drafts: dict[str, list[int]] | None = None,
) -> Any:
    """A scheduler output, as far as the timer looks: per request (computed before, computed now)."""
    cached = cached or {}
    return SimpleNamespace(
        num_scheduled_tokens={name: now for name, (_, now) in (new | cached).items()},
        scheduled_spec_decode_tokens=drafts or {},
        scheduled_new_reqs=[SimpleNamespace(req_id=n, num_computed_tokens=before) for n, (before, _) in new.items()],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=list(cached), num_computed_tokens=[before for before, _ in cached.values()]
        ),
    )


def test_a_step_carries_what_was_in_it() -> None:
    """A decode counts as one, with the KV it reads; a chunk counts its tokens and the context of each."""
    timer = StepTimer(Clock())
    timer.scheduled(output({"new": (0, 100), "late": (50, 10)}, {"a": (19, 1), "b": (299, 1)}))
    timer.ended(busy=False)
    (step,) = timer.take(0)
    assert step[:5] == (2, 20 + 300, 300, 110, 100 * 101 / 2 + 10 * 50 + 10 * 11 / 2)
    assert timer.take(0) == []


def test_busy_steps_follow_each_other() -> None:
    """While requests remain, a step begins when the previous one ended; after idling, when it is scheduled."""
    clock = Clock()
    timer = StepTimer(clock)
    one = output({}, {"a": (9, 1)})
    for scheduled_s, ended_s, busy in ((1.0, 1.5, True), (1.6, 2.0, False), (7.0, 7.25, False)):
        clock.now_s = scheduled_s
        timer.scheduled(one)
        clock.now_s = ended_s
        timer.ended(busy=busy)
    assert [step.step_s for step in timer.take(0)] == pytest.approx([0.5, 0.5, 0.25])


def test_asynchronous_steps_are_timed_end_to_end() -> None:
    """A step scheduled during another begins when that one ends, so overlapping time is not counted twice."""
    clock = Clock()
    timer = StepTimer(clock)
    timer.scheduled(output({"a": (0, 64)}))
    clock.now_s = 0.1
    timer.scheduled(output({}, {"a": (64, 1)}))
    clock.now_s = 1.0
    timer.ended(busy=True)
    clock.now_s = 1.01
    timer.scheduled(output({}, {"a": (65, 1)}))
    for ended_s in (1.3, 1.6):
        clock.now_s = ended_s
        timer.ended(busy=True)
    steps = timer.take(0)
    assert [step.step_s for step in steps] == pytest.approx([1.0, 0.3, 0.3])
    assert [step.prefill_tokens for step in steps] == [64, 0, 0]


def test_the_last_request_aborted_ends_the_busy_time() -> None:
    """When the remaining requests are aborted between two steps, the time until the next request is idle."""
    clock = Clock()
    timer = StepTimer(clock)
    one = output({}, {"a": (9, 1)})
    timer.scheduled(one)
    timer.ended(busy=True)
    timer.idle()
    clock.now_s = 100.0
    timer.scheduled(one)
    clock.now_s = 100.5
    timer.ended(busy=False)
    assert timer.take(0)[-1].step_s == pytest.approx(0.5)


def test_empty_steps_are_no_samples() -> None:
    """A step that computes nothing (it waits for KV) is not a sample, and no sample includes its time."""
    clock = Clock()
    timer = StepTimer(clock)
    timer.scheduled(output({}))
    clock.now_s = 1.0
    timer.ended(busy=True)
    timer.ended(busy=True)  # an end without a beginning is ignored
    timer.scheduled(output({}, {"a": (9, 1)}))
    clock.now_s = 1.5
    timer.ended(busy=True)
    assert [step.step_s for step in timer.take(0)] == pytest.approx([0.5])


def test_memory_is_bounded() -> None:
    """If nobody reads them, only the newest steps are kept."""
    timer = StepTimer(Clock())
    for i in range(STEPS_KEPT + 10):
        timer.scheduled(output({}, {"a": (i, 1)}))
        timer.ended(busy=True)
    steps = timer.take(0)
    assert len(steps) == STEPS_KEPT
    assert steps[-1].kv_tokens == STEPS_KEPT + 10


def test_drafts_are_no_prompt() -> None:
    """A decode that verifies three drafts is one decode, beside a chunk of a prompt that has none."""
    step = output({"new": (0, 30)}, {"old": (100, 4)}, {"old": [7, 8, 9]})
    assert features_of(entries_of(step)) == (1, 101, 101, 30, 30 * 31 / 2)


@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 512)), max_size=20))
def test_features_count_every_token(entries: list[tuple[int, int]]) -> None:
    """Decodes and prompt tokens add up to the scheduled tokens, and the longest is no longer than their total."""
    n_decode, kv, longest, prefill, attention = features_of(entries)
    assert n_decode + prefill == sum(new for _, new in entries)
    assert longest <= kv
    assert attention >= prefill


def test_each_front_end_process_takes_every_step() -> None:
    """Each front-end process gets every step, whoever reads first; a new or restarted one gets those from now on."""
    clock = Clock()
    timer = StepTimer(clock)
    taken: dict[int, list[int]] = {0: [], 1: []}
    for n_decode in range(1, 7):
        timer.scheduled(output({}, {f"r{number}": (9, 1) for number in range(n_decode)}))
        timer.ended(busy=True)
        for client_index in (0, 1) if n_decode % 2 else (0,):
            taken[client_index] += [step.n_decode for step in timer.take(client_index)]
        if n_decode == 4:
            timer.forget(1)
    assert taken == {0: [1, 2, 3, 4, 5, 6], 1: [2, 3]}
