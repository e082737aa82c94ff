"""
The scheduler's half of a cut: a request's cap on its output is lowered, so that it ends by length.

A cut takes effect in the next step or two. One that is *armed* when the request comes takes effect with its next token,
after its prompt has been computed; the request then waits, pinned, for somebody to move it (`core/parking.py`).
"""

from dataclasses import dataclass

from vllm.v1.request import Request, RequestStatus

from cascadeinfer.core.refusals import Refusal
from cascadeinfer.engines.vllm.connector.ticket import TransferParams
from cascadeinfer.engines.vllm.connector.words import can_go_on_elsewhere


@dataclass(slots=True)
class PendingCut:
    """
    State of a request before its cut, for undoing it.

    Attributes:
        armed: Whether it was cut when it came.
    """

    max_tokens: int
    kv_transfer_params: TransferParams | None
    armed: bool = False


class Cuts:
    """Cut requests that have not finished yet."""

    def __init__(self, max_model_len: int, *, movable: bool) -> None:
        """
        Args:
            max_model_len: Tokens in the longest sequence.
            movable: Whether running requests can migrate at all.
        """
        self._max_model_len = max_model_len
        self._movable = movable
        self._pending: dict[str, PendingCut] = {}

    def __len__(self) -> int:
        """Number of cut requests."""
        return len(self._pending)

    def cut(self, request: Request) -> Refusal | None:
        """
        End a live request, which may go, at its next token.

        Returns:
            None when the cut is under way, else why not.
        """
        if request.request_id in self._pending:
            return Refusal.ALREADY_CUT
        if request.status != RequestStatus.RUNNING or request.num_stale_output_tokens:
            return Refusal.WAITING
        if request.num_output_tokens == 0 or request.is_prefill_chunk:
            return Refusal.PREFILLING
        last_output_tokens = request.num_output_tokens + max(request.num_output_placeholders, 1)
        if self._ends_by(request, last_output_tokens):
            return Refusal.ENDING
        self._pending[request.request_id] = PendingCut(request.max_tokens, request.kv_transfer_params)
        request.max_tokens = last_output_tokens
        request.kv_transfer_params = {"do_remote_decode": True}
        return None

    def arm(self, request: Request) -> None:
        """End a request that has just come with its next token, unless it ends there anyway or must stay here."""
        last_output_tokens = request.num_output_tokens + 1
        if not self.may_go(request) or self._ends_by(request, last_output_tokens):
            return
        self._pending[request.request_id] = PendingCut(request.max_tokens, request.kv_transfer_params, armed=True)
        request.max_tokens = last_output_tokens
        request.kv_transfer_params = {**(request.kv_transfer_params or {}), "do_remote_decode": True}

    def undo(self, request: Request) -> bool:
        """Let a cut request go on; False when it is not cut."""
        pending = self.take(request.request_id)
        if pending is None:
            return False
        request.max_tokens = pending.max_tokens
        request.kv_transfer_params = pending.kv_transfer_params
        return True

    def take(self, request_id: str) -> PendingCut | None:
        """Forget a request; its state before its cut, or None if it is not cut."""
        return self._pending.pop(request_id, None)

    def n_of_migrations(self) -> int:
        """Cuts of migrations under way, armed ones apart."""
        return sum(not pending.armed for pending in self._pending.values())

    def is_real_end(self, request: Request, max_tokens: int) -> bool:
        """Whether a finished request that was being cut would have ended here anyway; `max_tokens` is its own cap."""
        return (
            request.status != RequestStatus.FINISHED_LENGTH_CAPPED
            or request.num_output_tokens >= max_tokens
            or request.num_tokens >= self._max_model_len
        )

    def may_go(self, request: Request) -> bool:
        """Whether it can continue elsewhere."""
        return self._movable and request.sampling_params is not None and can_go_on_elsewhere(request)

    def _ends_by(self, request: Request, n_output_tokens: int) -> bool:
        return (
            n_output_tokens >= request.max_tokens or request.num_prompt_tokens + n_output_tokens >= self._max_model_len
        )
