"""The profiler on a simulated engine, in virtual time: it finds the engine's step model."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from profiled_engine import CAPACITY, IDENTITY, KV_BYTES_PER_TOKEN, TRUTH, started

from cascadeinfer.core.cost.profile import decode_profile, encode_profile
from cascadeinfer.core.errors import EngineError, ProfileError
from cascadeinfer.core.types import InstanceCapacity
from cascadeinfer.engines.simulated import SimulatedEngine
from cascadeinfer.profiling.log import SampleLog
from cascadeinfer.profiling.profiler import Found, Profiler, Progress, header_of, make_profile, measure_pulls
from cascadeinfer.profiling.subject import Subject
from cascadeinfer.profiling.verdict import Grade, judge
from support.virtual_time import virtual_time

LINE = ("base_s", "per_decode_s", "per_kv_token_s", "per_prefill_token_s", "per_prefill_attention_s")
SMALL = InstanceCapacity(kv_blocks=200, block_size_tokens=16, max_num_seqs=8, max_batched_tokens=256)
DATE = "2026-11-23"


class Watch:
    """Records the progress that it is told, and sets `enough` when that is enough."""

    def __init__(self, n_enough: int) -> None:
        self.told: list[Progress] = []
        self.enough = asyncio.Event()
        self._n_enough = n_enough

    def __call__(self, progress: Progress) -> None:
        """See `profiler.Watch`."""
        self.told.append(progress)
        if len(self.told) >= self._n_enough:
            self.enough.set()


async def measured(
    path: Path, subject: Subject, *, budget_s: float = 3000.0, rounds: int = 2, watch: "Watch | None" = None
) -> Profiler:
    """Measure into a log at this path; returns the profiler."""
    with SampleLog(path) as log:
        log.open(header_of(subject))
        profiler = Profiler(subject, log, budget_s=budget_s, watch=watch or Watch(1), rounds=rounds)
        await profiler.measure()
    return profiler


def found_in(path: Path, subject: Subject, n_kinds: int) -> Found:
    """The profile of the log at this path."""
    log = SampleLog(path)
    log.open(header_of(subject))
    log.close()
    return make_profile(subject, log, n_kinds=n_kinds, command="test", date=DATE)


async def profiled(path: Path, subject: Subject) -> Found:
    """Measure, stop the engine, and fit."""
    profiler = await measured(path, subject)
    await subject.engine.stop(1.0)
    return found_in(path, subject, len(profiler.kinds))


@virtual_time
async def test_finds_a_linear_step_model(tmp_path: Path) -> None:
    """Each coefficient of a linear step time is found to a percent, and no richer model is chosen."""
    found = await profiled(tmp_path / "x.samples.jsonl", await started())
    assert found.fit.form == "line"
    for name in LINE:
        assert getattr(found.profile.step_model, name) == pytest.approx(getattr(TRUTH, name), rel=0.01), name
    assert found.fit.held_out[0].p90 < 0.01
    verdict = judge(found.profile, found.fit.samples)
    assert (verdict.grade, verdict.unmeasured, verdict.remedies) == (Grade.GOOD, (), ())


@virtual_time
async def test_finds_knee_and_straggler(tmp_path: Path) -> None:
    """Dense layers with a knee, and a straggler in mixed batches, are found where they are."""
    truth = replace(
        TRUTH, straggler_per_kv_token_s=1.5e-6, dense_knee_tokens=60.0, per_dense_token_s=4e-5, per_prefill_token_s=0.0
    )
    found = await profiled(tmp_path / "x.samples.jsonl", await started(model=truth))
    assert found.fit.form == "line, knee and straggler"
    for name in ("base_s", "per_kv_token_s", "straggler_per_kv_token_s", "dense_knee_tokens", "per_dense_token_s"):
        assert getattr(found.profile.step_model, name) == pytest.approx(getattr(truth, name), rel=0.05), name


@virtual_time
async def test_the_profile_says_what_it_is_of(tmp_path: Path) -> None:
    """The file decodes; it has the engine's identity and capacity, measured ranges, held-out errors and assumptions."""
    profile = (await profiled(tmp_path / "x.samples.jsonl", await started())).profile
    assert decode_profile(encode_profile(profile)) == profile
    assert profile.engine == IDENTITY
    assert profile.capacity == CAPACITY
    assert profile.kv_bytes_per_token == KV_BYTES_PER_TOKEN
    assert profile.memory is None
    assert not profile.derived
    assert profile.measurement is not None
    assert profile.measurement.max_decodes == CAPACITY.max_num_seqs
    assert profile.measurement.max_kv_tokens > 0.7 * CAPACITY.kv_tokens
    assert profile.measurement.step_share == pytest.approx(1.0, abs=0.02)
    assert profile.measurement.left_out == 0
    assert {error.part for error in profile.fit_errors} >= {
        "held out: all", "held out: decode, mixed lengths", "held out: decode with prefill",
        "the same batch in another round",
    }  # fmt: skip
    assert profile.transfer is None
    assert any("assumed, not measured" in note for note in profile.provenance.notes)


@virtual_time
async def test_batches_are_what_was_asked_for(tmp_path: Path) -> None:
    """A kind of batch with n requests gives steps with n decoding requests only; each added prompt is one chunk."""
    subject = await started(capacity=SMALL, max_model_tokens=1024)
    profiler = await measured(tmp_path / "x.samples.jsonl", subject, rounds=1)
    await subject.engine.stop(1.0)
    log = SampleLog(tmp_path / "x.samples.jsonl")
    log.open(header_of(subject))
    log.close()
    runs = {run.kind: run for run in log.runs}
    for kind in profiler.kinds:
        steps = runs[kind.name].steps
        n = len(kind.lengths)
        if n:
            assert sum(step.n_decode == n and not step.prefill_tokens for step in steps) >= 24
            first = next(step for step in steps if step.n_decode == n)
            assert first.kv_tokens_max >= max(kind.lengths)
        for tokens in kind.prompts:
            if tokens + n <= SMALL.max_batched_tokens:
                assert sum(step.n_decode == n and step.prefill_tokens == tokens for step in steps) == 3


@virtual_time
async def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    """After a cancellation, the next run measures the remaining batches and nothing twice."""
    path = tmp_path / "x.samples.jsonl"
    subject = await started(capacity=SMALL, max_model_tokens=1024)
    watch = Watch(8)
    task = asyncio.ensure_future(measured(path, subject, watch=watch))
    await watch.enough.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await subject.engine.stop(1.0)
    again = await started(capacity=SMALL, max_model_tokens=1024)
    profiler = await measured(path, again)
    await again.engine.stop(1.0)
    log = SampleLog(path)
    log.open(header_of(again))
    log.close()
    names = [(run.kind, run.round) for run in log.runs]
    assert len(set(names)) == len(names) == 2 * len(profiler.kinds)


@virtual_time
async def test_the_time_is_kept(tmp_path: Path) -> None:
    """In less time, fewer and cheaper batches are measured, still twice, and the profile counts what it left out."""
    path = tmp_path / "x.samples.jsonl"
    subject = await started()
    watch = Watch(1)
    profiler = await measured(path, subject, budget_s=10.0, watch=watch)
    await subject.engine.stop(1.0)
    assert 5.0 < profiler.spent_s < 11.0
    found = found_in(path, subject, len(profiler.kinds))
    profile = found.profile
    assert profile.measurement is not None
    assert 8 < profile.measurement.batches < len(profiler.kinds)
    assert profile.measurement.left_out == len(profiler.kinds) - profile.measurement.batches
    told = " ".join(judge(profile, found.fit.samples).unmeasured)
    assert f"{profile.measurement.left_out} of {len(profiler.kinds)} kinds of batch" in told
    assert profile.measurement.rounds == 2
    assert [p.done_s for p in watch.told] == sorted(p.done_s for p in watch.told)
    assert all(p.done_s + p.left_s <= 10.0 + 1e-6 for p in watch.told)


@virtual_time
async def test_too_little_time_makes_no_profile(tmp_path: Path) -> None:
    """A few batches do not determine the model; the error says what to do."""
    path = tmp_path / "x.samples.jsonl"
    subject = await started()
    profiler = await measured(path, subject, budget_s=0.4)
    await subject.engine.stop(1.0)
    with pytest.raises(ProfileError, match="--minutes"):
        found_in(path, subject, len(profiler.kinds))


@virtual_time
async def test_a_dead_engine_ends_the_measurement(tmp_path: Path) -> None:
    """When the engine dies, the profiler says so at once and keeps the samples so far."""
    path = tmp_path / "x.samples.jsonl"
    subject = await started()
    watch = Watch(5)
    task = asyncio.ensure_future(measured(path, subject, watch=watch))
    await watch.enough.wait()
    subject.engine.kill()
    with pytest.raises(EngineError, match="died"):
        await task
    await subject.engine.stop(1.0)
    assert path.read_bytes().count(b"\n") >= 5


@virtual_time
async def test_transfers_between_two_engines(tmp_path: Path) -> None:
    """With two connected engines, pulls are measured at several lengths; all moved the KV cache, and none is left."""
    path = tmp_path / "x.samples.jsonl"
    one, other = await started("0"), await started("1")
    await one.engine.connect([other.engine])
    with SampleLog(path) as log:
        log.open(header_of(one))
        await measure_pulls(one, other, log, lambda _: None)
        pulls = list(log.pulls)
    for subject in (one, other):
        assert isinstance(subject.engine, SimulatedEngine)
        report, counters = await subject.engine.report()
        assert (report.kv_blocks_used, counters.pinned, counters.failed_pulls) == (0, 0, 0)
        assert counters.pulls == len(pulls) // 2 + 1
        await subject.engine.stop(1.0)
    assert len({run.pulled_tokens // 100 for run in pulls}) == 4
    assert max(run.pulled_tokens for run in pulls) > 3_900
    times = {round(run.pull_s, 3) for run in pulls}
    assert all(0.0 < pull_s < 0.05 for pull_s in times)
