"""Limits on structured outputs: bombs are refused before anything compiles them, real schemas are not."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascadeinfer.frontend.contents.limits import SchemaLimits
from cascadeinfer.frontend.contents.schemas import SchemaRefusedError, check_structured_output

LIMITS = SchemaLimits()


def nested(depth: int, width: int) -> dict[str, Any]:
    """Objects within objects."""
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {f"p{i}": schema for i in range(width)}}
    return schema


def fanned_out(levels: int, definitions: str = "$defs") -> dict[str, Any]:
    """References that double at each level: small as text, 2^levels when expanded."""
    defined: dict[str, Any] = {f"l{levels}": {"type": "integer"}}
    for level in range(levels):
        next_level = {"$ref": f"#/{definitions}/l{level + 1}"}
        defined[f"l{level}"] = {"type": "object", "properties": {"a": next_level, "b": next_level}}
    return {definitions: defined, "$ref": f"#/{definitions}/l0"}


def deep_text(opening: str, closing: str, depth: int) -> str:
    """Brackets within brackets, as text."""
    return opening * depth + closing * depth


BOMBS: list[tuple[str, Any, str]] = [
    ("json", {"enum": [f"value {i}" for i in range(50_000)]}, "--structured-max-kb"),
    ("json", {"enum": list(range(10_000))}, "--structured-max-alternatives"),
    ("json", {"properties": {f"p{i}": {"enum": list(range(10))} for i in range(600)}}, "--structured-max-alternatives"),
    ("json", {"anyOf": [{"const": i} for i in range(6000)]}, "--structured-max-alternatives"),
    ("json", nested(14, 1) | {"items": nested(40, 1)}, "--structured-max-depth"),
    ("json", nested(7, 4), "--structured-max-(parts|kb)"),
    ("json", fanned_out(14), "--structured-max-parts"),
    ("json", fanned_out(20, "definitions"), "--structured-max-(parts|depth)"),
    ("json", {"properties": {f"property{i}": {} for i in range(10_001)}}, "--structured-max-(parts|kb)"),
    ("json", {"pattern": "a" * 5000}, "--structured-max-regex"),
    ("json", {"patternProperties": {"a" * 5000: {}}}, "--structured-max-regex"),
    ("json", {"type": "string", "pattern": "((a{1,200}){1,200}){1,200}"}, "repeats"),
    (
        "json",
        json.dumps(nested(40, 1)),
        "--structured-max-depth",
    ),
    ("json", deep_text("[", "]", 100_000), "--structured-max-kb|no JSON"),
    ("json", deep_text("[", "]", 5_000), "no JSON|--structured-max-depth"),
    ("structural_tag", {"structures": [{"schema": fanned_out(14)}]} | fanned_out(14), "--structured-max-parts"),
    ("structural_tag", json.dumps({"structures": [{"schema": {"enum": list(range(9000))}}]}), "alternatives"),
    ("regex", "[ab]" * 2000, "--structured-max-regex"),
    ("regex", "(" * 3 + "a{1,200}" + "){1,200}" * 3, "repeats"),
    ("regex", "a{30000}", "repeats"),
    ("regex", "a{" + "0" * 30 + "30000}", "repeats"),
    ("regex", "(?:(?:[)}]{9}a{99}){99}){99}", "repeats"),
    ("json", {"properties": {f"p{i}": {"maxLength": 100 + i} for i in range(33)}}, "--structured-max-lengths"),
    (
        "json",
        {"properties": {f"p{i}": {"pattern": f"^.{{1,{9 + i}}}$"} for i in range(33)}},
        "--structured-max-lengths",
    ),
    ("json", {"patternProperties": {f"^.{{1,{9 + i}}}$": {} for i in range(33)}}, "--structured-max-lengths"),
    ("regex", "".join(f"[a-{c}]{{1,50}}[A-{c}]{{1,50}}" for c in "cdefghijklmnopqrst"), "--structured-max-lengths"),
    ("regex", "".join(f"(?:x|{i}){{1,50}}" for i in range(33)), "--structured-max-lengths"),
    ("grammar", "root ::= " + " ".join(f".{{1,{i}}}" for i in range(9, 50)), "--structured-max-lengths"),
    ("json", {"type": "string", "pattern": "^[a-z]{19000}$"}, "patterns repeat"),
    ("json", {"properties": {f"p{i}": {"pattern": f"^[a-z]{{{150 + i}}}$"} for i in range(20)}}, "patterns repeat"),
    ("json", {"properties": {f"p{i}": {"minimum": i, "maximum": 10**17 + i} for i in range(2000)}}, "alternatives"),
    ("json", {"enum": [f"{i:0110}" for i in range(1000)]}, "characters"),
    ("regex", "".join(f"[a-z]{{1,{19000 + i}}}" for i in range(20)), "repeats"),
    ("grammar", "root ::= " + " ".join(f"[a-z]{{1,{19000 + i}}}" for i in range(20)), "repeats"),
    ("grammar", 'root ::= "[" ((("a"){1,300}){1,300}){1,300}', "repeats"),
    (
        "structural_tag",
        {"format": {"type": "grammar", "grammar": "root ::= " + '"a" | ' * 6000 + '"b"'}},
        "alternatives",
    ),
    ("structural_tag", {"format": {"type": "any_text", "excludes": [f"w{i}" for i in range(6000)]}}, "alternatives"),
    ("structural_tag", {"format": {"type": "json_schema", "json_schema": fanned_out(14)}}, "--structured-max-parts"),
    ("choice", [f"{i:0104}" for i in range(4800)], "characters"),
    ("choice", [f"choice {i}" for i in range(50_000)], "--structured-max-(kb|alternatives)"),
    ("choice", ["x"] * 6000, "--structured-max-alternatives"),
    ("grammar", "root ::= " + " | ".join(f'"w{i}"' for i in range(6000)), "--structured-max-alternatives"),
    ("grammar", "root ::= " + "x " * 300_000, "--structured-max-kb"),
]


@pytest.mark.parametrize(("kind", "bomb", "measure"), BOMBS, ids=[f"{i}-{b[0]}" for i, b in enumerate(BOMBS)])
def test_bombs_are_refused(kind: str, bomb: Any, measure: str) -> None:
    """The refusal is one sentence that names the measure and its option."""
    with pytest.raises(SchemaRefusedError, match=measure) as refused:
        check_structured_output(kind, bomb, LIMITS)
    assert "\n" not in str(refused.value)


REAL: list[tuple[str, Any]] = [
    ("json", {"type": "string", "enum": [f"Continent/City_{i}" for i in range(600)]}),
    (
        "json",
        {"type": "object", "properties": {f"field_{i}": {"type": "string", "maxLength": 255} for i in range(400)}},
    ),
    ("json", nested(5, 3)),
    ("json", nested(12, 1)),
    (
        "json",
        {"$defs": {"node": {"properties": {"children": {"items": {"$ref": "#/$defs/node"}}}}}, "$ref": "#/$defs/node"},
    ),
    ("json", json.dumps({"properties": {"id": {"pattern": "^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$"}}})),
    ("json", {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 100}),
    ("regex", r"[\w.+-]{1,64}@[\w-]{1,63}(\.[\w-]{1,63}){1,8}"),
    ("regex", "[a-d ]{200,220}"),
    ("regex", "[0-9a-f]{2}:" * 100),
    ("grammar", 'root ::= "page{30000}" [^"]{1,20} "|"'),
    ("json", {"properties": {f"p{i}": {"type": "integer", "minimum": 1, "maximum": 100} for i in range(300)}}),
    (
        "json",
        {"properties": {"grammar": {"type": "string"}, "excludes": {"type": "string"}, "schema": {"enum": ["a"]}}},
    ),
    ("json", {"properties": {f"p{i}": {"minLength": i % 4, "maxLength": 8 << i % 8} for i in range(200)}}),
    ("regex", r"\{1000\}[{]99999}"),
    ("choice", ["positive", "negative", "neutral"]),
    ("grammar", 'root ::= select\nselect ::= "SELECT " column ("," column)*\ncolumn ::= [a-z]+'),
    (
        "structural_tag",
        json.dumps({"structures": [{"begin": "<f>", "schema": nested(3, 3), "end": "</f>"}], "triggers": ["<f>"]}),
    ),
]


@pytest.mark.parametrize(("kind", "value"), REAL, ids=[f"{i}-{r[0]}" for i, r in enumerate(REAL)])
def test_real_ones_pass(kind: str, value: Any) -> None:
    """Time zones, wide records, trees, identifiers, addresses."""
    check_structured_output(kind, value, LIMITS)


def schemas() -> st.SearchStrategy[Any]:
    """Schemas as tools have them: a few levels, a few properties."""
    leaf = st.sampled_from(
        [{"type": "string"}, {"type": "integer", "minimum": 0}, {"enum": ["a", "b", "c"]}, {"const": 1}]
    )
    return st.recursive(
        leaf,
        lambda inner: (
            st.dictionaries(st.sampled_from("abcdefgh"), inner, max_size=4).map(
                lambda properties: {"type": "object", "properties": properties, "required": list(properties)[:2]}
            )
            | inner.map(lambda item: {"type": "array", "items": item})
            | st.lists(inner, min_size=1, max_size=3).map(lambda branches: {"anyOf": branches})
        ),
        max_leaves=40,
    )


@given(schemas())
def test_schemas_of_tools_pass(schema: Any) -> None:
    """Any schema with a few levels and a few properties passes, as an object and as text."""
    check_structured_output("json", schema, LIMITS)
    check_structured_output("json", json.dumps(schema), LIMITS)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=5)
            | st.dictionaries(
                st.sampled_from(["$ref", "enum", "anyOf", "items", "properties", "pattern", "$defs", "x"]), inner
            )
        ),
        max_leaves=30,
    )
)
def test_anything_is_measured(value: Any) -> None:
    """No content makes the measurement itself fail: it passes or is refused."""
    try:
        check_structured_output("json", value, LIMITS)
    except SchemaRefusedError:
        return


def test_references_in_a_circle_end() -> None:
    """Circular references become rules of a grammar, not expansions; a dangling one is the compiler's to refuse."""
    circle = {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
    check_structured_output("json", circle, LIMITS)
    check_structured_output("json", {"$ref": "#"}, LIMITS)
    check_structured_output("json", {"$ref": "#/nothing"}, LIMITS)
    check_structured_output("json", {"$ref": "https://example.com/schema"}, LIMITS)


def test_measuring_costs_what_the_text_says() -> None:
    """References that would expand to 2^200 parts are measured in as many steps as there are definitions."""
    with pytest.raises(SchemaRefusedError, match="levels deep"):
        check_structured_output("json", fanned_out(200), LIMITS)
    with pytest.raises(SchemaRefusedError, match="parts"):  # that this ends at all is the fact
        check_structured_output("json", fanned_out(45), SchemaLimits(max_depth=100))
