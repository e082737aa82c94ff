"""Random events and effects of every kind, made from the core's own types."""

import dataclasses
import enum
import types
import typing
from typing import Any

from hypothesis import strategies as st

from cascadeinfer.core.effects import Effect
from cascadeinfer.core.events import Event
from cascadeinfer.core.layout import StageLayout
from cascadeinfer.core.types import LengthRange

NAMES = st.text(max_size=12)


def _layouts() -> st.SearchStrategy[StageLayout]:
    cuts = st.lists(st.integers(1, 1 << 20), unique=True, max_size=4).map(lambda cut: tuple(sorted(cut)))
    return cuts.map(lambda c: StageLayout.from_boundaries(c, tuple((f"i{n}", f"j{n}") for n in range(len(c) + 1))))


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a type that occurs in an event or an effect."""
    plain = {
        str: NAMES,
        bool: st.booleans(),
        int: st.integers(0, 1 << 62),
        float: st.floats(allow_nan=False),
        types.NoneType: st.none(),
        StageLayout: _layouts(),
        LengthRange: st.tuples(st.integers(0, 99), st.integers(100, 999)).map(lambda ends: LengthRange(*ends)),
    }
    if hint in plain:
        return plain[hint]
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return st.sampled_from(hint)
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        return st.builds(hint, **{field.name: values_of(hints[field.name]) for field in dataclasses.fields(hint)})
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return st.lists(values_of(arguments[0]), max_size=3).map(tuple)
    return st.one_of([values_of(member) for member in arguments])


EVENTS = values_of(Event)
EFFECTS = values_of(Effect)
