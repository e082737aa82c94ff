"""
One plan for everything: which instances compute prompts, which decode which lengths, and in chunks of which size.

A plan has stages of three kinds (`StageKind`), each with a range, a number of instances and a chunk budget (the tokens
of a step), and a threshold: longer prompts are computed in prefill stages, shorter ones where they decode. One mixed
stage, the cascade, plain prefill/decode splitting and every hybrid are points of this one space. With x the threshold
and K the instances of prefill stages out of N,

    cost = min over x, K of  prefill(x, K) + push(x) + decode(x, N - K)

where `prefill(x, .)` and `decode(x, .)` are dynamic programs over partitions (`dynamic_program.py`) of tables that are
made for x (`role_tables.py`), and the cost of a range on k instances is that of its best budget. Without a threshold
there is no prefill stage, and `decode` is the cascade's program. The search is exact over its candidates (a test
compares it with exhaustive search); they are two:

1. All thresholds, with one boundary per doubling of length.
2. The best threshold, and none, with the problem's own boundaries and the budgets that the first pass used. No local
   refinement follows.

Of the plans within `stage_tolerance` of the best, the one with the fewest stages is taken; prefill stages only if they
gain the margin over the best plan without any, because pushes cost more than is modelled. Above `MAX_UNITS` instances,
units are fractions of them, as for stages, and the rounded plan is improved by moving single instances.

Source: DistServe (arXiv 2401.09670) for prefill instances, Sarathi-Serve (arXiv 2403.02310) for chunk budgets.
"""

from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from cascadeinfer.core.cost.histogram import Column
from cascadeinfer.core.cost.qoe import ServiceInputs, StageService, range_service
from cascadeinfer.core.errors import PlanError
from cascadeinfer.core.layout import StageKind
from cascadeinfer.core.plan.dynamic_program import MAX_UNITS, Partitions, stage_costs, straddling_costs
from cascadeinfer.core.plan.planner import solve, whole_instances
from cascadeinfer.core.plan.problem import PlanProblem
from cascadeinfer.core.plan.role_plan import PushCost, RolePlan, RoleStage
from cascadeinfer.core.plan.role_tables import decode_table, prefill_table, push_cost
from cascadeinfer.core.types import UNBOUNDED_TOKENS, LengthRange

DEFAULT_BUDGETS: Final = (512, 1024, 2048, 8192)
"""Chunk budgets that are tried for each stage, in tokens of a step."""
MAX_PREFILL_STAGES: Final = 3
PREFILL_BUDGETS: Final = 2
"""Budgets tried for prefill stages, the largest: small chunks are for those whose tokens wait for them."""
_FEW: Final = 0.02
"""A threshold that leaves a smaller share of the prompt work on either side is not tried."""


@dataclass(frozen=True, slots=True, eq=False)
class _Side:
    """Partitions of one table over the candidates: costs of the best budget per range, and the program's tables."""

    tables: tuple[ServiceInputs, ...]
    candidates: NDArray[np.int64]
    which: NDArray[np.int64]
    partitions: Partitions


@dataclass(frozen=True, slots=True)
class _Choice:
    """A point of the search: threshold (number of a candidate, or None), stages and units, and its cost."""

    cost: float
    threshold: int | None
    prefill_stages: int
    prefill_units: int
    stages: int


class RoleSearcher:
    """The search over candidates of one problem, with one set of boundaries."""

    def __init__(
        self,
        problem: PlanProblem,
        budgets: tuple[int, ...],
        push: PushCost,
        *,
        max_stages: int,
        max_prefill: int,
        max_units: int = MAX_UNITS,
    ) -> None:
        """
        Args:
            problem: What to plan for; its own token budget is not used.
            budgets: Chunk budgets to choose from.
            push: Cost of a push.
            max_stages: Maximum number of stages that decode.
            max_prefill: Maximum number of prefill stages.
            max_units: Units that are placed at most; with more instances, a unit is a fraction of them.
        """
        self.problem = problem
        self.candidates = problem.candidates()
        self.n_units = min(problem.n_instances, max_units)
        self.per_unit = problem.n_instances / self.n_units
        self.predictions = 0
        self._push = push
        self._max_stages = max(1, min(max_stages, self.n_units, len(self.candidates) - 1))
        self._max_prefill = max_prefill
        self.budgets = budgets
        self._inputs = tuple(
            replace(problem, capacity=problem.capacity.with_token_budget(budget)).inputs for budget in budgets
        )
        self._prefill_tables: tuple[ServiceInputs, ...] = ()
        self._prefill_costs: tuple[NDArray[np.float64], NDArray[np.int64]] | None = None
        self._mixed: tuple[NDArray[np.float64], NDArray[np.int64]] | None = None
        self._pure: tuple[ServiceInputs, NDArray[np.float64]] | None = None

    def thresholds(self) -> list[int]:
        """Candidates (their numbers) that leave prompt work on both sides, and 0: all prompts."""
        work = self.problem.histogram.prefix[Column.PROMPT]
        below = work[self.candidates] / work[-1]
        return [0, *(int(n) for n in np.flatnonzero((below > _FEW) & (below < 1.0 - _FEW)) if n)]

    def choices(self, threshold: int | None) -> list[_Choice]:
        """The best plan for each number of stages on either side, at one threshold (number of a candidate) or none."""
        decode = self.decode_side(threshold).partitions
        if threshold is None:
            return [_Choice(float(decode.cost(s, self.n_units)), None, 0, 0, s) for s in range(1, self._max_stages + 1)]
        prefill = self.prefill_side(threshold).partitions
        push = self.push_cost(threshold)
        found = []
        for p in range(1, prefill.max_stages + 1):
            for s in range(1, self._max_stages + 1):
                costs = prefill.best[p, -1, 1 : self.n_units] + decode.best[s, -1, self.n_units - 1 : 0 : -1]
                if len(costs):
                    k = int(np.argmin(costs))
                    found.append(_Choice(float(costs[k]) + push, threshold, p, k + 1, s))
        return found

    def push_cost(self, threshold: int) -> float:
        """See `role_tables.push_cost`."""
        push = self._push
        return push_cost(self._inputs[0].table, int(self.candidates[threshold]), push.pause_s, push.pause_per_token_s)

    def decode_side(self, threshold: int | None) -> _Side:
        """
        Stages that decode, and compute the prompts below the threshold.

        A range below the threshold is that of a mixed stage, and one above it decodes only, whatever the threshold:
        only ranges around it are predicted for each threshold.
        """
        costs, which = self._mixed_costs()
        if threshold is None:
            return _Side(self._inputs, self.candidates, which, Partitions.of(costs, self._max_stages))
        tables, costs, which = self._inputs, costs.copy(), which.copy()
        around = tuple(
            inputs._replace(table=decode_table(inputs.table, int(self.candidates[threshold])))
            for inputs in self._inputs
        )
        n = len(self.candidates)
        costs[:threshold, threshold + 1 :] = np.inf
        for number, inputs in enumerate(around if threshold else ()):
            more = straddling_costs(inputs, self.candidates, threshold, self.n_units, self.per_unit)
            self.predictions += threshold * (n - 1 - threshold) * self.n_units
            cheaper = more < costs
            costs[cheaper] = more[cheaper]
            which[cheaper] = len(tables) + number
        only_decodes, pure = self._decode_costs()
        costs[threshold:] = pure[threshold:]
        which[threshold:] = len(tables) + len(around)
        return _Side((*tables, *around, only_decodes), self.candidates, which, Partitions.of(costs, self._max_stages))

    def prefill_side(self, threshold: int) -> _Side:
        """Stages for the prompts from the threshold on."""
        if self._prefill_costs is None:
            self._prefill_tables = tuple(
                inputs._replace(table=prefill_table(inputs.table))
                for budget, inputs in zip(self.budgets, self._inputs, strict=True)
                if budget in sorted(self.budgets)[-PREFILL_BUDGETS:]
            )
            self._prefill_costs = self._costs(self._prefill_tables)
        costs, which = self._prefill_costs[0][threshold:, threshold:], self._prefill_costs[1][threshold:, threshold:]
        n = len(self.candidates) - threshold
        stages = max(1, min(self._max_prefill, n - 1, self.n_units - 1))
        partitions = Partitions.of(np.ascontiguousarray(costs), stages)
        return _Side(self._prefill_tables, self.candidates[threshold:], which, partitions)

    def _mixed_costs(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        if self._mixed is None:
            self._mixed = self._costs(self._inputs)
        return self._mixed

    def _decode_costs(self) -> tuple[ServiceInputs, NDArray[np.float64]]:
        """Stages that only decode: the budget makes no difference, so the largest, which leaves the most slots."""
        if self._pure is None:
            inputs = self._inputs[int(np.argmax(self.budgets))]
            inputs = inputs._replace(table=decode_table(inputs.table, 0))
            self._pure = inputs, self._costs((inputs,))[0]
        return self._pure

    def _costs(self, tables: tuple[ServiceInputs, ...]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """The cost of each range on each number of units at its best budget, and which one that is."""
        best: NDArray[np.float64] | None = None
        which = np.zeros(0, dtype=np.int64)
        for number, inputs in enumerate(tables):
            costs = stage_costs(inputs, self.candidates, self.n_units, self.per_unit)
            n = len(self.candidates)
            self.predictions += n * (n - 1) // 2 * self.n_units
            if best is None:
                best, which = costs, np.zeros(costs.shape, dtype=np.int64)
            else:
                cheaper = costs < best
                best[cheaper] = costs[cheaper]
                which[cheaper] = number
        assert best is not None  # there is a budget
        return best, which

    def plan(self, choice: _Choice, without_prefill_cost: float) -> RolePlan:
        """The plan of a choice, in whole instances."""
        sides: list[tuple[_Side, int, int, bool]] = []
        if choice.threshold is not None:
            sides.append((self.prefill_side(choice.threshold), choice.prefill_stages, choice.prefill_units, True))
        decode = self.decode_side(choice.threshold)
        sides.append((decode, choice.stages, self.n_units - choice.prefill_units, False))
        parts: list[tuple[ServiceInputs, int, int, int, bool]] = []
        for side, stages, units, is_prefill in sides:
            bounds, placed = side.partitions.trace(stages, units)
            for a, b, k in zip(bounds[:-1], bounds[1:], placed, strict=True):
                inputs = side.tables[int(side.which[a, b, k])]
                parts.append((inputs, int(side.candidates[a]), int(side.candidates[b]), int(k), is_prefill))
        shares = np.array([part[3] * self.per_unit for part in parts], dtype=np.float64)
        sizes = whole_instances(shares, self.problem.n_instances)
        if self.per_unit > 1.0:
            _improve(parts, sizes)
        threshold = None if choice.threshold is None else int(self.candidates[choice.threshold])
        return self._described(parts, sizes, threshold, choice, without_prefill_cost)

    def _described(
        self,
        parts: list[tuple[ServiceInputs, int, int, int, bool]],
        sizes: NDArray[np.int64],
        threshold_edge: int | None,
        choice: _Choice,
        without_prefill_cost: float,
    ) -> RolePlan:
        edges = self.problem.histogram.edges_tokens
        last = len(edges) - 1
        stages = []
        for (inputs, low, high, _, is_prefill), size in zip(parts, sizes, strict=True):
            lengths = LengthRange(int(edges[low]), UNBOUNDED_TOKENS if high == last else int(edges[high]))
            decodes_only = threshold_edge is not None and low >= threshold_edge
            kind = StageKind.PREFILL if is_prefill else StageKind.DECODE if decodes_only else StageKind.MIXED
            service: StageService = range_service(inputs, low, high, float(size))
            stages.append(RoleStage(kind, lengths, int(size), int(inputs.limits.max_batched_tokens), service))
        push = 0.0 if choice.threshold is None else self.push_cost(choice.threshold)
        return RolePlan(
            tuple(stage for stage in stages if stage.kind is StageKind.PREFILL),
            tuple(stage for stage in stages if stage.kind is not StageKind.PREFILL),
            float(sum(stage.service.cost for stage in stages)) + push,
            without_prefill_cost,
            push,
            self.problem,
        )


def solve_roles(
    problem: PlanProblem,
    budgets: tuple[int, ...] = DEFAULT_BUDGETS,
    push: PushCost | None = None,
    *,
    split: bool = False,
    n_prefill: int | None = None,
    may_push: bool = True,
    max_units: int = MAX_UNITS,
) -> RolePlan:
    """
    The best plan with roles.

    Args:
        problem: Workload, rate, instances, objective; its token budget is not used.
        budgets: Chunk budgets to choose from, at least one.
        push: Cost of a push.
        split: Only one prefill stage for all prompts and one stage that decodes (plain prefill/decode splitting).
        n_prefill: With `split`: the instances of the prefill stage; None: the best number.
        may_push: Whether there may be prefill stages, from which every request is pushed.
        max_units: See `RoleSearcher`; fewer make a quicker and coarser search.

    Raises:
        PlanError: Fewer than two instances are to be split, or the demand is above the capacity of every plan.
    """
    push = push or PushCost(pause_per_token_s=problem.hand_over.pause_per_token_s)
    if split:
        return _split(RoleSearcher(problem, budgets, push, max_stages=1, max_prefill=1), n_prefill)
    coarse = RoleSearcher(
        replace(problem, boundaries_per_octave=1),
        budgets,
        push,
        max_stages=problem.max_stages,
        max_prefill=1,
        max_units=max_units,
    )
    thresholds = coarse.thresholds() if may_push and problem.n_instances > 1 else []
    tried = {n: choices for n in thresholds if (choices := coarse.choices(n))}
    chosen = min(tried, key=lambda n: min(c.cost for c in tried[n]), default=None)
    plain = _simplest(coarse.choices(None), problem.stage_tolerance)
    rough = [plain] if chosen is None else [plain, _simplest(tried[chosen], problem.stage_tolerance)]
    used = {stage.budget_tokens for c in rough if np.isfinite(c.cost) for stage in coarse.plan(c, np.inf).every}
    few = tuple(budget for budget in budgets if budget in used) or budgets
    fine = RoleSearcher(
        problem, few, push, max_stages=problem.max_stages, max_prefill=MAX_PREFILL_STAGES, max_units=max_units
    )
    without = _simplest(fine.choices(None), problem.stage_tolerance)
    best = without
    if chosen is not None and np.isfinite(rough[-1].cost):
        near = int(np.argmin(np.abs(fine.candidates - coarse.candidates[chosen])))
        with_prefill = _simplest(fine.choices(near), problem.stage_tolerance)
        if problem.objective.gain(without.cost, with_prefill.cost) >= max(problem.margin, 1e-12):
            best = with_prefill
    if not np.isfinite(best.cost):
        solve(problem)  # raises and says what could be served
        raise PlanError(f"no plan with roles carries {problem.rate_per_s:g} requests/s")
    return fine.plan(best, without.cost)


def _split(searcher: RoleSearcher, n_prefill: int | None) -> RolePlan:
    """Plain prefill/decode splitting, at the best ratio or at this one."""
    problem = searcher.problem
    if problem.n_instances < 2:
        raise PlanError("prefill/decode splitting needs at least two instances")
    best = min(searcher.choices(0), key=lambda choice: choice.cost)
    if n_prefill is not None:
        if not 0 < n_prefill < problem.n_instances:
            raise PlanError(f"{n_prefill} of {problem.n_instances} instances for prompts leave none to decode, or none")
        units = max(1, round(n_prefill / searcher.per_unit))
        cost = searcher.prefill_side(0).partitions.cost(1, units)
        cost += searcher.decode_side(0).partitions.cost(1, searcher.n_units - units)
        best = replace(best, prefill_units=units, cost=cost + searcher.push_cost(0))
    if not np.isfinite(best.cost):
        which = "no prefill/decode ratio" if n_prefill is None else f"no ratio with {n_prefill} prefill instances"
        raise PlanError(f"{which} carries {problem.rate_per_s:g} requests/s")
    return searcher.plan(best, np.inf)


def _simplest(choices: list[_Choice], tolerance: float) -> _Choice:
    """Of the choices within the tolerance of the best, that with the fewest stages; of those the cheapest."""
    least = min(choice.cost for choice in choices)
    near = [choice for choice in choices if choice.cost <= (1.0 + tolerance) * least]
    return min(near or choices, key=lambda choice: (choice.prefill_stages + choice.stages, choice.cost))


def _improve(parts: list[tuple[ServiceInputs, int, int, int, bool]], sizes: NDArray[np.int64]) -> None:
    """Move single instances between stages while that helps; in place."""

    def cost(n: int, size: int) -> float:
        inputs, low, high, _, _ = parts[n]
        predicted: StageService = range_service(inputs, low, high, float(size))
        return predicted.cost if np.isfinite(predicted.cost) else 1e30 * (1.0 + 1.0 / size)

    now = [cost(n, int(size)) for n, size in enumerate(sizes)]
    for _ in range(20):
        more = [cost(n, int(size) + 1) - now[n] for n, size in enumerate(sizes)]
        less = [cost(n, int(size) - 1) - now[n] if size > 1 else np.inf for n, size in enumerate(sizes)]
        taker, giver = int(np.argmin(more)), int(np.argmin(less))
        if taker == giver or more[taker] + less[giver] >= -1e-12 * abs(sum(now)):
            return
        sizes[taker] += 1
        sizes[giver] -= 1
        now[taker] += more[taker]
        now[giver] += less[giver]
