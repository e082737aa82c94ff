"""
What a call that goes to every instance answers, when the instances answer differently.

An instance that has been restarted is not paused, has no adapter that was loaded at run time, and one that is busy
cannot clear its cache while another can. With one instance, vLLM's server answers such calls with that instance's word;
with several it should mean the same: it is done when it is done everywhere, and what is listed can be used everywhere.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, Final


def _in_all(answers: Sequence[Any]) -> set[Any]:
    """What every answer contains."""
    return set.intersection(*(set(answer) for answer in answers))


def _one_after_another(answers: Sequence[Any]) -> list[Any]:
    """The workers of every instance, in order."""
    return list(chain.from_iterable(answers))


COMBINED: Final[Mapping[str, Callable[[Sequence[Any]], Any]]] = {
    "reset_prefix_cache_async": all,
    "is_scheduler_paused_async": all,
    "is_sleeping_async": all,
    "wake_up_async": all,
    "add_lora_async": all,
    "pin_lora_async": all,
    "remove_lora_async": any,
    "list_loras_async": _in_all,
    "collective_rpc_async": _one_after_another,
    "compute_weight_checksums_async": _one_after_another,
}
"""By method; the answers to all other methods must be equal."""


class DisagreementError(RuntimeError):
    """Instances answer a call differently, and no single answer would be true."""

    def __init__(self, method: str, answers: Mapping[str, Any]) -> None:
        """
        Args:
            method: The call.
            answers: By instance.
        """
        self.method = method
        self.answers = answers
        said = "; ".join(f"instance {instance_id}: {answer!r}" for instance_id, answer in answers.items())
        super().__init__(f"the instances disagree on {method.removesuffix('_async')}: {said}")


def combined(method: str, answers: Mapping[str, Any]) -> Any:
    """
    One answer for all instances.

    Args:
        method: The call.
        answers: By instance; at least one.

    Raises:
        DisagreementError: They differ, and for this call that has no meaning.
    """
    every = list(answers.values())
    if (combine := COMBINED.get(method)) is not None and len(every) > 1:
        return combine(every)
    if any(answer != every[0] for answer in every):
        raise DisagreementError(method, answers)
    return every[0]
