"""
Core values as JSON and back: events, effects, and the options that policies are built with.

Everything is derived from the dataclasses of `core`: for each, the codec makes a `msgspec.Struct` with the same fields,
so a new event or field is logged without a change here. Members of a union (the events, the effects, the bid-ask
messages, the planner's objectives) carry their class name as `type`. A dataclass that is the item of a tuple is written
as an array, including everything in it, because there may be many. Numbers that JSON lacks are written as the strings
`Infinity`, `-Infinity` and `NaN`.
"""

import dataclasses
import functools
import math
import operator
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple

import msgspec

from cascadeinfer.core.plan.objective import BuiltInObjective, Objective

Convert = Callable[[Any], Any]

NonFinite = Literal["Infinity", "-Infinity", "NaN"]
NON_FINITE: Final[Mapping[str, float]] = types.MappingProxyType(
    {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}
)
CLOSED: Final[Mapping[Any, Any]] = types.MappingProxyType({Objective: BuiltInObjective})
"""Protocols used as field types, each with the union of what can be written for it."""


class Wire(NamedTuple):
    """
    How values of one type are written.

    Attributes:
        hint: The type as msgspec sees it.
        out: Converts a value to what msgspec encodes; None where it needs no conversion.
        back: The inverse.
    """

    hint: Any
    out: Convert | None
    back: Convert | None


@functools.cache
def wire_of(hint: Any, *, tagged: bool = False, as_array: bool = False) -> Wire:
    """
    How values of a type are written.

    Args:
        hint: An annotation: a dataclass, a union, a tuple, a mapping, a plain type.
        tagged: Whether a dataclass carries its name.
        as_array: Whether a dataclass is written as an array.

    Raises:
        TypeError: Values of this type cannot be written.
    """
    hint = CLOSED.get(hint, hint)
    if hint is float:
        return Wire(float | NonFinite, _float_out, _float_back)
    if dataclasses.is_dataclass(hint):
        return _wire_of_dataclass(hint, tagged, as_array)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in {types.UnionType, typing.Union}:
        return _wire_of_union(arguments, as_array)
    if origin in {list, Sequence} or (origin is tuple and arguments[1:] == (Ellipsis,)):
        return _wire_of_items(arguments[0])
    if origin in {dict, Mapping}:
        return _wire_of_mapping(*arguments)
    if origin not in {None, Literal, tuple}:
        raise TypeError(f"values of type {hint} cannot be logged")
    return Wire(hint, None, None)  # JSON has its values, or msgspec knows the type


def _float_out(value: float) -> float | str:
    if math.isfinite(value):
        return float(value)  # also of numpy's floats
    return "NaN" if math.isnan(value) else "Infinity" if value > 0.0 else "-Infinity"


def _float_back(value: float | str) -> float:
    return NON_FINITE[value] if isinstance(value, str) else value


def _wire_of_dataclass(cls: Any, tagged: bool, as_array: bool) -> Wire:
    hints = typing.get_type_hints(cls)
    columns = [(field, wire_of(hints[field.name], as_array=as_array)) for field in dataclasses.fields(cls)]
    struct = msgspec.defstruct(
        cls.__name__,
        [_struct_field(field, wire) for field, wire in columns],
        tag=cls.__name__ if tagged else None,
        tag_field="type" if tagged and not as_array else None,
        array_like=as_array,
        omit_defaults=True,
        forbid_unknown_fields=True,
        frozen=True,
    )
    getters = [(field.name, wire.out) for field, wire in columns]
    setters = [(field.name, wire.back) for field, wire in columns]

    def out(value: Any) -> Any:
        return struct(
            *[getattr(value, name) if convert is None else convert(getattr(value, name)) for name, convert in getters]
        )

    def back(value: Any) -> Any:
        return cls(
            **{
                name: getattr(value, name) if convert is None else convert(getattr(value, name))
                for name, convert in setters
            }
        )

    return Wire(struct, out, back)


def _struct_field(field: "dataclasses.Field[Any]", wire: Wire) -> Any:
    if field.default is not dataclasses.MISSING:
        default = field.default
        return (field.name, wire.hint, default if wire.out is None else wire.out(default))
    if field.default_factory is not dataclasses.MISSING:
        made = field.default_factory()
        return (field.name, wire.hint, made if wire.out is None else wire.out(made))
    return (field.name, wire.hint)


def _wire_of_union(members: tuple[Any, ...], as_array: bool) -> Wire:
    classes = [CLOSED.get(m, m) for m in members if dataclasses.is_dataclass(CLOSED.get(m, m))]
    flat = tuple(part for m in members for part in (typing.get_args(CLOSED[m]) if m in CLOSED else (m,)))
    if flat != members:
        return _wire_of_union(flat, as_array)
    wires = {m: wire_of(m, tagged=len(classes) > 1, as_array=as_array) for m in members}
    hint = functools.reduce(operator.or_, [wire.hint for wire in wires.values()])
    if not classes:
        converting = [wire for wire in wires.values() if wire.out is not None]
        if not converting:
            return Wire(hint, None, None)
        assert len(converting) == 1, f"values of {members} cannot be told apart"
        return Wire(hint, _unless_none(converting[0].out), _unless_none(converting[0].back))
    outs = {cls: wires[cls].out for cls in classes}
    backs = {wires[cls].hint: wires[cls].back for cls in classes}
    return Wire(hint, _by_class(outs), _by_class(backs))


def _by_class(converters: Mapping[type, Convert | None]) -> Convert:
    def convert(value: Any) -> Any:
        chosen = converters.get(type(value))
        return value if chosen is None else chosen(value)

    return convert


def _unless_none(convert: Convert | None) -> Convert:
    assert convert is not None
    return lambda value: None if value is None else convert(value)


def _wire_of_items(item: Any) -> Wire:
    wire = wire_of(item, as_array=True)
    out, back = wire.out, wire.back
    return Wire(
        types.GenericAlias(tuple, (wire.hint, ...)),
        tuple if out is None else (lambda values: tuple([out(value) for value in values])),
        None if back is None else (lambda values: tuple([back(value) for value in values])),
    )


def _wire_of_mapping(key: Any, value: Any) -> Wire:
    wire = wire_of(value)
    out, back = wire.out, wire.back
    return Wire(
        types.GenericAlias(dict, (key, wire.hint)),
        dict if out is None else (lambda values: {k: out(v) for k, v in values.items()}),
        None if back is None else (lambda values: {k: back(v) for k, v in values.items()}),
    )


def _options_of(make: Callable[..., Any]) -> Mapping[str, Any]:
    """The keyword options of a policy's constructor or factory, with their types."""
    # `getattr`, because mypy takes `make.__init__` for unsound.
    hints = typing.get_type_hints(getattr(make, "__init__") if isinstance(make, type) else make)  # noqa: B009 - mypy
    return {name: hint for name, hint in hints.items() if name != "return"}


def options_out(make: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """
    A policy's options, as msgspec encodes them.

    Raises:
        TypeError: There is no such option, or its value cannot be written (a function, for example).
    """
    hints = _options_of(make)
    written = {}
    for name, value in options.items():
        if name not in hints:
            raise TypeError(f"there is no option {name}")
        wire = wire_of(hints[name])
        written[name] = value if wire.out is None else wire.out(value)
    return written


def options_back(make: Callable[..., Any], written: Mapping[str, Any]) -> dict[str, Any]:
    """
    The options, from decoded JSON.

    Raises:
        TypeError: There is no such option.
        ValueError: A value does not fit its option.
    """
    hints = _options_of(make)
    options = {}
    for name, value in written.items():
        if name not in hints:
            raise TypeError(f"there is no option {name}")
        wire = wire_of(hints[name])
        try:
            decoded = msgspec.convert(value, wire.hint)
        except msgspec.ValidationError as error:
            raise ValueError(f"option {name}: {error}") from None
        options[name] = decoded if wire.back is None else wire.back(decoded)
    return options
