"""The runtime's object diagram in docs/architecture.md (ownership and references), compared with a running runtime."""

import dataclasses
import enum
import functools
import itertools
import re
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from runtime_cluster import Cluster, ScriptedPolicy

from cascadeinfer.core.events import PinReason
from support.virtual_time import virtual_time

PAGE = Path(__file__).parents[2] / "docs" / "architecture.md"

Edge = tuple[str, str]


def is_object(thing: Any) -> bool:
    """Whether it is an object of `runtime/` other than a plain value."""
    cls = type(thing)
    is_value = isinstance(thing, tuple | enum.Enum) or (
        dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen
    )
    return cls.__module__.startswith("cascadeinfer.runtime.") and not is_value


def fields_of(thing: Any) -> Iterator[Any]:
    """What its attributes hold."""
    names = [name for cls in type(thing).__mro__ for name in getattr(cls, "__slots__", ())]
    yield from (getattr(thing, name) for name in names if hasattr(thing, name))
    yield from vars(thing).values() if hasattr(thing, "__dict__") else ()


def objects_in(held: Any) -> Iterator[Any]:
    """Objects of `runtime/` reachable from this value: itself, in a collection, or behind a bound method."""
    if is_object(held):
        yield held
    elif isinstance(held, functools.partial):
        for part in (held.func, *held.args):
            yield from objects_in(part)
    elif hasattr(held, "__self__"):
        yield from objects_in(held.__self__)
    elif isinstance(held, Mapping):
        for part in held.values():
            yield from objects_in(part)
    elif isinstance(held, list | tuple | set | frozenset | deque):
        for part in held:
            yield from objects_in(part)


def edges_from(start: Any) -> set[Edge]:
    """Pairs of class names, holder and held, for all reachable objects."""
    edges: set[Edge] = set()
    seen, todo = {id(start)}, [start]
    while todo:
        holder = todo.pop()
        for held in [held for field in fields_of(holder) for held in objects_in(field)]:
            edges.add((type(holder).__name__, type(held).__name__))
            if id(held) not in seen:
                seen.add(id(held))
                todo.append(held)
    return edges


def drawn() -> tuple[set[Edge], set[Edge]]:
    """Ownership from the drawing, and references from the table below it."""
    section = PAGE.read_text(encoding="utf-8").partition("## The runtime's objects")[2].partition("\n## ")[0]
    owns: set[Edge] = set()
    path: list[str] = []
    for line in section.split("```")[1].strip().splitlines():
        found = re.match(r"([|` -]*)(\w+)", line)
        assert found is not None
        depth = len(found[1]) // 4
        path[depth:] = [found[2]]
        if depth:
            owns.add((path[depth - 1], found[2]))
    knows = {
        edge
        for cells in re.findall(r"^\| (`.+?) \| (`.+?) \|", section, flags=re.MULTILINE)
        for edge in itertools.product(*(re.findall(r"`(\w+)`", cell) for cell in cells))
    }
    return owns, knows


@virtual_time
async def test_the_drawing_is_of_what_there_is() -> None:
    """With moves, a drain and handshakes under way, objects refer to each other as drawn, and each has one owner."""
    policy = ScriptedPolicy({"r": "a", "s": "b", "t": "c"})
    policy.parks.add("t")
    async with Cluster(policy) as cluster:
        moving = await cluster.submit("r", 40, 400)
        await moving.until_tokens(3)
        cluster["b"].hold_answers("reserve")
        cluster.move("r", "b")
        parked = await (await cluster.submit("t", 40, 400)).until_tokens(1)
        pinned = await cluster.submit("s", 40, 400, pin_reason=PinReason.LORA)
        cluster.runtime.elastic.drain("b", 100.0)
        there = edges_from(cluster.runtime)
        cluster["b"].release_answers("reserve")
        cluster.abort(moving)
        cluster.abort(pinned)
        cluster.abort(parked)
    owns, knows = drawn()
    assert there == owns | knows | {("Migrator", "Commands"), ("Parkings", "Commands")}
    assert not owns & knows
    owned = [owner for _, owner in owns]
    assert len(owned) == len(set(owned))
