"""
What an instance is as far as decisions depend on it: its capacity, the step model that prices it, its role.

Instances of one kind are interchangeable. A cluster may have several kinds: other devices, another degree of tensor
parallelism, or only KV caches of other sizes. All of them serve the same model, and KV cache can be transferred between
any two, except while a rolling update replaces one version or form of it by another (`runtime/rolling.py`).
"""

import enum
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

from cascadeinfer.core.types import InstanceCapacity

StepModelKey: TypeAlias = str
"""Names the step model of some instances, e.g. `llama-3.1-8b on h100, tp 2`. Opaque: keys are only compared."""
DEFAULT_STEP_MODEL: Final[StepModelKey] = ""
"""The default key: its instances are priced by the one step model that a policy is given."""


class Role(enum.StrEnum):
    """What an instance computes."""

    MIXED = "mixed"
    """Prompts and output tokens alike."""
    PREFILL = "prefill"
    """Prompts and their first token; then requests are parked (`core/parking.py`)."""
    DECODE = "decode"
    """Output tokens, and prompts that are not computed elsewhere."""


@dataclass(frozen=True, slots=True)
class InstanceKind:
    """
    The kind of one instance. Its role and its token budget may change while it lives, nothing else.

    Attributes:
        capacity: What it can hold.
        step_model_key: Key of the step model that predicts its step times.
        role: What it computes.
        model_version: Which version of the model it runs. A request that has output continues with no other.
        kv_group: KV cache can be transferred between instances of one group only; all of a group run one version.
        started_tokens: Tokens of a step at most that it was started with; None: those of its capacity.
    """

    capacity: InstanceCapacity
    step_model_key: StepModelKey = DEFAULT_STEP_MODEL
    role: Role = Role.MIXED
    model_version: str = ""
    kv_group: str = ""
    started_tokens: int | None = None

    @property
    def most_tokens(self) -> int:
        """The largest token budget of a step that it can be given."""
        return self.capacity.max_batched_tokens if self.started_tokens is None else self.started_tokens

    def with_terms(self, terms: "InstanceTerms") -> "InstanceKind":
        """The same instance with another role and token budget."""
        budget = self.most_tokens if terms.budget_tokens is None else terms.budget_tokens
        capacity = replace(self.capacity, max_batched_tokens=budget)
        return replace(self, capacity=capacity, role=terms.role, started_tokens=self.most_tokens)


@dataclass(frozen=True, slots=True)
class InstanceTerms:
    """
    What an operator's stages, or a plan made while serving, say of one instance.

    Attributes:
        role: What it is to compute.
        budget_tokens: Tokens of a step at most; None: as many as it was started with.
    """

    role: Role = Role.MIXED
    budget_tokens: int | None = None


NO_TERMS: Final = InstanceTerms()
"""Those of an instance that no stage names."""
