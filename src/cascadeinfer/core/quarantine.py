"""
Which request kills the instances that run it.

The death of an instance does not say what caused it. Its requests continue elsewhere, and one that kills whatever runs
it would end one instance after another. Every request that was in an engine when it died therefore gets a *death* and
becomes *suspected*. An engine runs at most one suspected request at a time; others placed there are held back. Requests
without a death run beside it. If that engine dies too, two deaths point at one request, which is ended; those beside it
have their first death.

Several instances may die of one outside cause, and a dead instance looks alive until somebody notices. A suspected
request is therefore sent only to an instance that has answered a question asked after the last death. Until then it is
held back and has no part in what happens there.

A suspected request proves itself with its first token since its death: it has passed the step in which it died, so
after an ordinary death the others wait only a step or two each. Its death still counts, unless it had no token in the
attempt that died: it then waited there, was sent to an instance that was already dead, or has now passed the very step
in which it would have been the cause. If its instance dies again the request is ended, unless others there have died
before as well. It is then open which of them was the cause, and each needs `PROOF_TOKENS` tokens to prove itself. After
one more inconclusive death, no number of tokens proves any of them.

A request taken away from a hanging instance may be the reason why it hangs. If that instance is given up, the death
counts for this request too, wherever it is by then. If the instance answers again, or the request has a token elsewhere
first, it does not count.

This module knows nothing of time, streams or engines: its caller reports what happens and sends the requests that it
names.
"""

from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Final

from cascadeinfer.core.types import InstanceId, RequestId

DEATHS: Final = 2
PROOF_TOKENS: Final = 16
"""
For a request that is one of several possible culprits: one vLLM block, and a few seconds of waiting with ten requests
on an instance.
"""


@dataclass(slots=True)
class Suspicion:
    """
    Suspicion of one request.

    Attributes:
        deaths: Instances that died with it.
        forgivable: Those of them that are forgiven when it proves itself.
        is_open: Whether it has not proven itself since the last one.
        proof_tokens: Tokens of one attempt that prove it; None when nothing does and it stays open until it ends.
    """

    deaths: int = 0
    forgivable: int = 0
    is_open: bool = False
    proof_tokens: int | None = 1


@dataclass(slots=True)
class _Cell:
    """The suspected request that is in an engine, and those that are held back from it."""

    inside: RequestId | None = None
    held: deque[RequestId] = field(default_factory=deque)


class Quarantine:
    """See the module header."""

    def __init__(self, deaths: int = DEATHS) -> None:
        """
        Start without deaths.

        Args:
            deaths: Number of deaths that identify a culprit.
        """
        self._deaths = deaths
        self.suspicions: dict[RequestId, Suspicion] = {}
        self._cells: dict[InstanceId, _Cell] = {}
        self._cell_of: dict[RequestId, InstanceId] = {}
        #: Instances that have answered a question asked after the last death.
        self._answered: set[InstanceId] = set()
        #: Per silent instance, requests that were in its engine and have been taken away.
        self._taken: dict[InstanceId, set[RequestId]] = {}

    @property
    def is_idle(self) -> bool:
        """Whether no instance has died or may be about to, so that nothing that happens to a request matters here."""
        return not self.suspicions and not self._taken

    def is_suspected(self, request_id: RequestId) -> bool:
        """Whether a request has died and not proven itself since."""
        suspicion = self.suspicions.get(request_id)
        return suspicion is not None and suspicion.is_open

    def is_held(self, request_id: RequestId) -> bool:
        """Whether a request is held back from its instance."""
        instance_id = self._cell_of.get(request_id)
        return instance_id is not None and self._cells[instance_id].inside != request_id

    def may_enter(self, request_id: RequestId, instance_id: InstanceId) -> bool:
        """
        Place a request on an instance.

        Returns:
            Whether it may be sent there now; if not, it is held back until `leave`, `prove` or `answer` names it.
        """
        if not self.is_suspected(request_id):
            return True
        assert request_id not in self._cell_of, f"request {request_id} is somewhere already"
        cell = self._cells.setdefault(instance_id, _Cell())
        self._cell_of[request_id] = instance_id
        cell.held.append(request_id)
        return self._admit(instance_id) == request_id

    def answer(self, instance_id: InstanceId) -> RequestId | None:
        """
        Record that an instance answered a question asked after the last death. Returns the request that may be sent
        there now, if any.
        """
        self._answered.add(instance_id)
        cell = self._cells.get(instance_id)
        return self._admit(instance_id) if cell is not None and cell.inside is None else None

    def _admit(self, instance_id: InstanceId) -> RequestId | None:
        """The first request held back, if it may be sent; the cell must exist."""
        cell = self._cells[instance_id]
        if cell.inside is not None or not cell.held or instance_id not in self._answered:
            return None
        cell.inside = cell.held.popleft()
        return cell.inside

    def leave(self, request_id: RequestId) -> RequestId | None:
        """Record that a request left its instance. Returns the held request that may be sent there now, if any."""
        instance_id = self._cell_of.pop(request_id, None)
        if instance_id is None:
            return None
        cell = self._cells[instance_id]
        if cell.inside == request_id:
            cell.inside = None
        else:
            cell.held.remove(request_id)
        if cell.inside is None and not cell.held:
            del self._cells[instance_id]
            return None
        return self._admit(instance_id)

    def prove(self, request_id: RequestId, n_tokens: int) -> RequestId | None:
        """
        Record tokens of a request.

        Args:
            n_tokens: Tokens of its present attempt.

        Returns:
            The request that may be sent to its instance now, if any.
        """
        self._forget_taken(request_id)
        suspicion = self.suspicions.get(request_id)
        if suspicion is None or not suspicion.is_open:
            return None
        if suspicion.proof_tokens is None or n_tokens < suspicion.proof_tokens:
            return None
        suspicion.is_open = False
        suspicion.deaths -= suspicion.forgivable
        suspicion.forgivable = 0
        if not suspicion.deaths:
            del self.suspicions[request_id]
        return self.leave(request_id)

    def forget(self, request_id: RequestId) -> None:
        """Record the end of a request; `leave` was called before."""
        self.suspicions.pop(request_id, None)
        self._forget_taken(request_id)

    def take_away(self, request_id: RequestId, instance_id: InstanceId) -> None:
        """Record that a request is taken away from a silent instance; call it before `leave`."""
        if not self.is_held(request_id):
            self._taken.setdefault(instance_id, set()).add(request_id)

    def may_be_taken(self, request_id: RequestId) -> bool:
        """
        Whether a request may be taken away from a silent instance.

        A request that could be the reason stays: one that is suspected and in the engine, or was taken away from
        another instance that is still silent and has had no token since.
        """
        if self.is_held(request_id):
            return True
        return not self.is_suspected(request_id) and not any(request_id in taken for taken in self._taken.values())

    def _forget_taken(self, request_id: RequestId) -> None:
        for taken in self._taken.values():
            taken.discard(request_id)

    def trust(self, instance_id: InstanceId) -> None:
        """Record that a silent instance answers again, or has ended for an unrelated reason."""
        self._taken.pop(instance_id, None)

    def die(
        self, instance_id: InstanceId, there: Iterable[RequestId], unstarted: Collection[RequestId] = ()
    ) -> RequestId | None:
        """
        Record the death of an instance.

        Args:
            there: The requests placed there; those that were held back were not in its engine.
            unstarted: Those of them that had no token there.

        Returns:
            The request that caused it, if that is now known. It may be elsewhere by now, if it was taken away.
        """
        self._answered.clear()
        cell = self._cells.pop(instance_id, _Cell())
        for request_id in [r for r, place in self._cell_of.items() if place == instance_id]:
            del self._cell_of[request_id]
        inside = [request_id for request_id in there if request_id not in cell.held]
        taken = sorted(self._taken.pop(instance_id, set()).difference(inside))
        inside += taken
        was_open = {request_id for request_id in inside if self.is_suspected(request_id)}
        for request_id in inside:
            suspicion = self.suspicions.setdefault(request_id, Suspicion())
            suspicion.deaths += 1
            suspicion.forgivable += request_id in unstarted or request_id in taken
            suspicion.is_open = True
            suspicion.proof_tokens = self._proof_tokens(suspicion.deaths)
        guilty = [request_id for request_id in inside if self.suspicions[request_id].deaths >= self._deaths]
        # A request that has proven itself since its last death is less likely than one that has not.
        for likely in ([request_id for request_id in guilty if request_id in was_open], guilty):
            if likely:
                return likely[0] if len(likely) == 1 else None
        return None

    def _proof_tokens(self, deaths: int) -> int | None:
        if deaths < self._deaths:
            return 1
        return PROOF_TOKENS if deaths == self._deaths else None
