"""
What travels between instances: the fields that the connector adds to NIXL's own.

A *cut* output carries NIXL's remote_* fields (where the pinned blocks are) plus `CUT`. A *resumed* request carries
those fields back, plus `PROMPT_TOKENS`, which says where the original prompt ends in the token ids (`words.py` carries
them). Keys and values are plain: the dict goes through msgpack into another process.
"""

from dataclasses import dataclass
from typing import Any, Final, Self, TypeAlias

TransferParams: TypeAlias = dict[str, Any]

CUT: Final = "cascade_cut"
"""True in the final output of a request that was cut (and did not end by itself)."""
PROMPT_TOKENS: Final = "cascade_prompt_tokens"
"""Length of the original prompt of a resumed request; the ids after it are its output so far."""
PARK: Final = "cascade_park"
"""True for a request that is to be cut with the first token that it gets."""
RESERVATION: Final = "cascade_reservation"
"""Id of the reservation that the resumed request takes over."""

PULL_BEFORE: Final = "cascade_pull_before"
"""Deadline of the pull, on the clock of the instance that pulls."""


@dataclass(frozen=True, slots=True)
class VllmTicket:
    """
    See `cascadeinfer.engines.protocol.KvTicket`.

    Attributes:
        params: The transfer parameters of the cut output.
    """

    params: TransferParams

    @classmethod
    def of(cls, params: TransferParams | None) -> Self | None:
        """The ticket in the transfer parameters of a final output; None when it is no cut."""
        return cls(params) if params is not None and params.get(CUT) else None

    @property
    def n_tokens(self) -> int:
        """See KvTicket."""
        return self.params.get("remote_num_tokens") or 0


def resume_params(
    ticket: VllmTicket | None,
    *,
    prompt_tokens: int,
    reservation_id: str | None = None,
    pull_before_s: float | None = None,
) -> TransferParams:
    """
    Parameters that make a request continue where it was cut.

    Args:
        ticket: Where the KV cache is, or None to recompute it.
        prompt_tokens: Length of the original prompt.
        reservation_id: The reservation at the target that it takes over, if any.
        pull_before_s: Deadline of the pull, on the target's clock; None for no deadline.
    """
    params: TransferParams = {PROMPT_TOKENS: prompt_tokens}
    if reservation_id is not None:
        params[RESERVATION] = reservation_id
    if ticket is not None and ticket.n_tokens > 0:
        params |= {key: value for key, value in ticket.params.items() if key != CUT}
        params["do_remote_prefill"] = True
        params["do_remote_decode"] = False
        if pull_before_s is not None:
            params[PULL_BEFORE] = pull_before_s
    return params


def is_resumed(params: TransferParams | None) -> bool:
    """Whether these parameters belong to a request that has run elsewhere before."""
    return params is not None and PROMPT_TOKENS in params


def reservation_prefix(client_index: int) -> str:
    """Prefix of a front-end process's reservation ids, so that those of two processes never clash."""
    return f"client{client_index}/"
