"""A policy as a value: its name and options, from which a replay, for example, constructs it again."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cascadeinfer.core.policies import POLICIES
from cascadeinfer.core.policy import Policy


@dataclass(frozen=True, slots=True)
class PolicySpec:
    """
    A policy's name and options.

    Attributes:
        name: A key of `POLICIES`.
        options: Keywords of its constructor.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def make(self) -> Policy:
        """Construct a fresh policy."""
        return POLICIES[self.name].make(**self.options)
