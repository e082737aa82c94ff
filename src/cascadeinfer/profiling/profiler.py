"""
Measures the grid within a time budget and makes the profile.

The first round runs the kinds of batch from the cheapest up, leaving out what does not fit into half of the time.
Further rounds repeat them in another order, so that a disturbance, or a machine that slows down, is not mistaken for a
property of some batches.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from cascadeinfer.core.cost.latency import FIELDS
from cascadeinfer.core.cost.profile import CostProfile, FitError, Measurement, Provenance
from cascadeinfer.core.errors import ProfileError
from cascadeinfer.profiling.fitting import ProfileFit, fit_points, graph_tokens_of, mixed_rule_of, split_structure
from cascadeinfer.profiling.grid import BatchKind, Room, make_grid
from cascadeinfer.profiling.log import BatchRun, Header, SampleLog
from cascadeinfer.profiling.measure import Meter
from cascadeinfer.profiling.pace import Pace
from cascadeinfer.profiling.statistics import Points, points_of, step_share
from cascadeinfer.profiling.subject import Subject
from cascadeinfer.profiling.transfer import TransferRate, pull, pull_lengths, rate_of

ROUNDS: Final = 3
FIRST_ROUND_SHARE: Final = 0.5
ASSUMED_BYTES_PER_S: Final = 25e9
"""80 % of a PCIe 4.0 x16 link, as for the shipped profiles of cards without NVLink."""
WHOLE_SHARE: Final = (0.8, 1.1)
"""Bounds on step seconds over wall time between which the steps account for the time."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of the measurement."""

    done_s: float
    left_s: float
    text: str


Watch = Callable[[Progress], None]


def header_of(subject: Subject) -> Header:
    """The header of the log of this engine's steps."""
    return Header(
        log_version=1,
        engine=subject.identity,
        kv_blocks=subject.capacity.kv_blocks,
        max_num_seqs=subject.capacity.max_num_seqs,
        max_batched_tokens=subject.capacity.max_batched_tokens,
        max_model_tokens=subject.max_model_tokens,
    )


class Profiler:
    """Measures one engine into a log."""

    def __init__(
        self, subject: Subject, log: SampleLog, *, budget_s: float, watch: Watch, rounds: int = ROUNDS, seed: int = 0
    ) -> None:
        """
        Args:
            subject: A started engine.
            log: An open log; batches in it are not run again, and their time counts.
            budget_s: Seconds for all rounds.
            watch: Called before every batch.
            rounds: How often each kind of batch is run at most.
            seed: Seed of the prompts and of the order.

        Raises:
            ConfigError: The engine holds too little for a profile.
        """
        self._room = Room(subject.capacity, subject.max_model_tokens)
        self._log = log
        self._budget_s = budget_s
        self._watch = watch
        self._rounds = rounds
        self._seed = seed
        self._pace = Pace(self._room)
        self._meter = Meter(subject, seed=seed + len(log.runs))
        self.kinds = make_grid(self._room)
        self.spent_s = 0.0
        by_name = {kind.name: kind for kind in self.kinds}
        for run in log.runs:
            if run.kind in by_name:
                self._account(run, run.wall_s)

    async def measure(self) -> None:
        """
        Run the rounds; whatever ends this, the measurements are in the log.

        Raises:
            EngineError: The engine died or hangs.
            ConfigError: The log could not be written.
        """
        async with self._meter:
            first = await self._round(self.kinds, 0, FIRST_ROUND_SHARE * self._budget_s)
            rng = np.random.default_rng(self._seed)
            for number in range(1, self._rounds):
                await self._round([first[i] for i in rng.permutation(len(first))], number, self._budget_s)

    async def _round(self, kinds: Sequence[BatchKind], number: int, until_s: float) -> list[BatchKind]:
        """Run the kinds that the time allows; returns those that have been run in this round, now or before."""
        had = {run.kind for run in self._log.runs if run.round == number}
        ran = []
        for position, kind in enumerate(kinds):
            if kind.name not in had:
                if self.spent_s + self._pace.seconds(kind) > until_s:
                    continue
                self._tell(kinds[position:], number, until_s, kind)
                begun_s = self._meter.now_s()
                run = await self._meter.run(kind, number)
                self._log.add(run)
                self._account(run, self._meter.now_s() - begun_s)
            ran.append(kind)
        return ran

    def _account(self, run: BatchRun, taken_s: float) -> None:
        self.spent_s += taken_s
        self._pace.learn(run, taken_s)

    def _tell(self, rest: Sequence[BatchKind], number: int, until_s: float, kind: BatchKind) -> None:
        """Report the time left: the rest of this round and the rounds after it, within the budget."""
        this_s = min(self._pace.total_s(rest), max(0.0, until_s - self.spent_s))
        round_s = this_s + self.spent_s if number == 0 else self._pace.total_s(rest)
        left_s = this_s + (self._rounds - 1 - number) * round_s
        left_s = min(left_s, max(0.0, self._budget_s - self.spent_s))
        self._watch(Progress(self.spent_s, left_s, f"round {number + 1}: {kind.name}"))


async def measure_pulls(source: Subject, target: Subject, log: SampleLog, watch: Watch) -> None:
    """
    Transfer requests between two connected instances, in both directions alternately, except those already in the log.

    Raises:
        EngineError: A transfer failed.
        ConfigError: The log could not be written.
    """
    lengths = pull_lengths(source)
    async with Meter(source, seed=1) as one, Meter(target, seed=2) as other:
        await pull(one, other, lengths[0], "warm-there")  # the first contact costs more
        await pull(other, one, lengths[0], "warm-back")
        for number in range(len(log.pulls), len(lengths)):
            watch(Progress(float(number), float(len(lengths) - number), f"transfer of {lengths[number]} tokens"))
            ends = (one, other) if number % 2 == 0 else (other, one)
            log.add_pull(await pull(*ends, lengths[number], f"pull-{number}"))


@dataclass(frozen=True, slots=True)
class Found:
    """
    A profile and its origin, for tables and figures.

    Attributes:
        step_share: Step seconds over wall time.
    """

    profile: CostProfile
    fit: ProfileFit
    step_share: float


def make_profile(subject: Subject, log: SampleLog, *, n_kinds: int, command: str, date: str) -> Found:
    """
    The profile from the contents of the log.

    Args:
        n_kinds: Kinds of batch in the grid.
        command: The operator's command.
        date: Today (ISO).

    Raises:
        ProfileError: The samples do not determine the model.
    """
    if not log.runs:
        raise ProfileError("nothing has been measured: raise --minutes")
    points = points_of(log.runs)
    attention = subject.identity, subject.multiprocessors, graph_tokens_of(subject.identity, subject.graph_tokens)
    fit = fit_points(points, split_structure(*attention), mixed=mixed_rule_of(*attention))
    share = step_share(log.runs)
    rate = rate_of(log.pulls, subject.kv_bytes_per_token) if log.pulls else None
    identity = subject.identity
    profile = CostProfile(
        name=_slug(f"{identity.model}-{identity.device}"),
        model=identity.model,
        device=identity.device,
        backend=identity.attention_backend,
        tensor_parallel=identity.tensor_parallel,
        step_model=fit.result.model,
        capacity=subject.capacity,
        kv_bytes_per_token=subject.kv_bytes_per_token,
        transfer_bytes_per_s=ASSUMED_BYTES_PER_S if rate is None else rate.bytes_per_s,
        derived=False,
        coefficient_errors={name: error for name, error in fit.result.errors.items() if name in FIELDS},
        fit_errors=_errors(fit, points),
        memory=None,
        provenance=Provenance(
            command=command,
            date=date,
            sources=(f"{log.path.name}: {points.steps} steps measured on this engine",),
            notes=_notes(fit, share, rate),
        ),
        engine=identity,
        measurement=_measurement(log, points, fit, share, n_kinds),
        transfer=None if rate is None else rate.measurement,
    )
    return Found(profile, fit, share)


def _errors(fit: ProfileFit, points: Points) -> tuple[FitError, ...]:
    regions = [*fit.held_out, *([points.repeats] if points.repeats is not None else [])]
    held_out = len(fit.held_out)
    return tuple(
        FitError(
            part=region.name if number >= held_out else f"held out: {region.name}",
            samples=region.samples,
            median=region.median,
            p90=region.p90,
            bias=region.bias,
            measured=True,
        )
        for number, region in enumerate(regions)
    )


def _notes(fit: ProfileFit, share: float, rate: TransferRate | None) -> tuple[str, ...]:
    notes = [
        f"form of the step model: {fit.form}",
        "fit errors: each kind of batch predicted by a fit that had not seen it, five parts in turn",
        f"step seconds are the engine's own; they add up to {share:.0%} of the wall time in which the batches ran",
        "prompts are random tokens: no prefix is shared",
    ]
    if not WHOLE_SHARE[0] <= share <= WHOLE_SHARE[1]:
        notes.append(
            "the steps do not account for the wall time: "
            + ("steps overlap" if share > 1.0 else "the engine waits between steps")
        )
    notes.append(
        rate.note if rate is not None else f"KV transfer at {ASSUMED_BYTES_PER_S / 1e9:g} GB/s: assumed, not measured"
    )
    return tuple(notes)


def _measurement(log: SampleLog, points: Points, fit: ProfileFit, share: float, n_kinds: int) -> Measurement:
    steps = [step for run in log.runs for step in run.steps]
    ran = len({run.kind for run in log.runs})
    return Measurement(
        batches=ran,
        left_out=max(0, n_kinds - ran),
        rounds=1 + max(run.round for run in log.runs),
        steps=points.steps,
        outliers=points.outliers + fit.outliers,
        samples=len(fit.samples),
        measuring_s=math.fsum(run.wall_s for run in log.runs),
        step_share=share,
        max_decodes=max(step.n_decode for step in steps),
        max_kv_tokens=max(step.kv_tokens for step in steps),
        max_length_tokens=max(step.kv_tokens_max for step in steps),
        max_prefill_tokens=max(step.prefill_tokens for step in steps),
    )


def _slug(text: str) -> str:
    """A text in the form of a profile name."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.") or "profile"
