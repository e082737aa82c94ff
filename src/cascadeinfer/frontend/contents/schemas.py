"""
Whether a structured output is small enough to compile, measured before anything compiles it, in time linear in its
text.

The cost of compiling a grammar depends on its *expanded* size, not on its text: a reference counts as what it refers
to, and every level of repetition in a regular expression multiplies. An engine compiles in a thread that nobody can
stop, so a bomb outlives its client. Measured with xgrammar 0.2 and a vocabulary of 128,000, one thread: an enum of
2,000 values 0.1 s, of 10,000 14 s; objects of four properties nested five deep (1,365 schemas) 0.3 s, seven deep
(21,845) 19 s; a text of bounded length 4 to 8 s, and again for each different bound (8 of them 61 s).
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from cascadeinfer.frontend.contents.limits import SchemaLimits

MAX_REPETITIONS: Final = 20_000
"""Nested repetitions multiply: `(a{1,200}){1,200}` has 40,000. Adjacent ones add up."""
MAX_PATTERN_REPETITIONS: Final = 2000
"""Limit over all patterns of a JSON schema: they are expanded, in quadratic time, and by the front end too."""
MAX_CHARACTERS: Final = 100_000
"""Total length of all choices or enum values."""
SCHEMA_MAPS: Final = frozenset({"properties", "patternProperties", "dependentSchemas"})
VALUES: Final = frozenset({"enum", "const", "default", "example", "examples", "required", "dependentRequired", "type"})
DEFINITIONS: Final = frozenset({"$defs", "definitions"})
NUMBERS: Final = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
ROOTS: Final = frozenset({"json_schema", "schema"})
"""Keywords of a structural tag that hold complete schemas, to which references inside them are relative."""
LITERAL: Final = re.compile(r"""\[(?:\\.|[^\]\\])*\]|"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'""", re.DOTALL)
COUNT: Final = re.compile(r"\{\s*(\d*)\s*(?:,\s*(\d*)\s*)?\}")


class SchemaRefusedError(ValueError):
    """A structured output exceeds a limit; the message names the measure, the limit and the option that sets it."""


def check_structured_output(kind: str, value: Any, limits: SchemaLimits) -> None:
    """
    Refuse a structured output that might not compile in reasonable time.

    Args:
        kind: `json`, `regex`, `choice`, `grammar` or `structural_tag`: vLLM's names.
        value: The value as the client sent it.
        limits: What is allowed.

    Raises:
        SchemaRefusedError: It exceeds a limit.
    """
    try:
        text = value if isinstance(value, str) else json.dumps(value, default=str)
    except RecursionError as error:
        raise SchemaRefusedError("it is nested too deeply to be written down") from error
    _hold("its text has", len(text.encode(errors="surrogatepass")), "bytes", limits.max_bytes, "--structured-max-kb")
    match kind:
        case "regex":
            _hold_lengths(measure_regex(text, limits)[0], limits)
        case "choice":
            _hold_alternatives(len(value), limits)
            _hold_characters(sum(map(len, value)))
        case "grammar":
            alternatives, lengths = measure_grammar(text)
            _hold_alternatives(alternatives, limits)
            _hold_lengths(lengths, limits)
        case "json" | "structural_tag":
            check_schema(_decoded(value), limits)
        case _:
            raise AssertionError(kind)


def check_schema(schema: Any, limits: SchemaLimits) -> None:
    """
    Refuse an oversized JSON schema, or anything that contains one.

    Raises:
        SchemaRefusedError: It is too deep, has too many parts or alternatives, or a pattern in it is too large.
    """
    _Measure(schema, limits).check()


def measure_regex(pattern: str, limits: SchemaLimits) -> tuple[set[str], int]:
    """
    The distinct counted repetitions in a regular expression, each with what it repeats, and the total number of
    repetitions.

    Raises:
        SchemaRefusedError: It is too long, or repeats too often.
    """
    _hold("a regular expression has", len(pattern), "characters", limits.max_regex_characters, "--structured-max-regex")
    return _repetitions(pattern)


def measure_grammar(text: str) -> tuple[int, set[str]]:
    """
    Alternatives and counted repetitions in an EBNF grammar, ignoring quoted text.

    Raises:
        SchemaRefusedError: Something is repeated too often.
    """
    bare = LITERAL.sub(lambda found: found[0] if found[0].startswith("[") else "a", text)
    return bare.count("|") + 1, _repetitions(bare)[0]


class _Measure:
    """Measures one schema. Parts are counted with references followed, each definition once and then multiplied."""

    def __init__(self, schema: Any, limits: SchemaLimits) -> None:
        self._root = schema
        self._limits = limits
        self._parts_of: dict[str, int] = {}
        self._open: set[str] = set()
        self._alternatives = 0
        #: Distinct bounds of text lengths: of strings, and in regular expressions.
        self._lengths: set[str] = set()
        self._repetitions: dict[str, int] = {}
        self._ranges: set[str] = set()
        self._characters = 0

    def check(self) -> None:
        """Raise SchemaRefusedError if a limit is exceeded."""
        parts = self._parts(self._root, 0)
        _hold("it has", parts, "parts, references followed,", self._limits.max_parts, "--structured-max-parts")
        _hold_lengths(self._lengths, self._limits)
        _hold_characters(self._characters)
        repetitions = sum(self._repetitions.values())
        if repetitions > MAX_PATTERN_REPETITIONS:
            raise SchemaRefusedError(
                f"its patterns repeat parts {repetitions:,} times; the limit is {MAX_PATTERN_REPETITIONS:,}"
            )

    def _parts(self, node: Any, depth: int) -> int:
        """Number of schemas in this one, including itself; counting stops just beyond the limit."""
        _hold("it is", depth, "levels deep", self._limits.max_depth, "--structured-max-depth")
        if isinstance(node, Sequence) and not isinstance(node, str):
            return sum(self._parts(part, depth + isinstance(part, list)) for part in node)
        if not isinstance(node, Mapping):
            return 0
        total = 1
        if (bounds := (node.get("minLength"), node.get("maxLength"))) != (None, None):
            self._lengths.add(repr(bounds))
        self._count_range(node)
        for name, value in node.items():
            total += self._parts_of_keyword(name, value, depth)
            if total > self._limits.max_parts:
                return total
        return total

    def _parts_of_keyword(self, name: str, value: Any, depth: int) -> int:
        if isinstance(value, Sequence) and not isinstance(value, str) and (name == "enum" or name not in VALUES):
            self._count_alternatives(len(value))
            self._characters += sum(len(part) for part in value if isinstance(part, str))
        if isinstance(value, str):
            if name == "pattern":
                self._count_pattern(value)
            elif name == "grammar":
                alternatives, lengths = measure_grammar(value)
                self._count_alternatives(alternatives)
                self._lengths |= lengths
            return self._parts_of_reference(value, depth) if name == "$ref" else 0
        if name in DEFINITIONS | VALUES or not isinstance(value, Mapping | Sequence):
            return 0  # definitions count where they are referred to; the text's size bounds the others
        if name == "patternProperties" and isinstance(value, Mapping):
            for pattern in value:
                self._count_pattern(str(pattern))
        if name in SCHEMA_MAPS and isinstance(value, Mapping):
            return sum(self._parts(part, depth + 1) for part in value.values())
        if name in ROOTS and isinstance(value, Mapping):
            return self._parts_of_root(value, depth)
        return self._parts(value, depth + 1)  # keywords that hold schemas, and everything else that may

    def _parts_of_root(self, schema: Mapping[str, Any], depth: int) -> int:
        """A schema inside a structural tag, with its own references."""
        outside = self._root, self._parts_of, self._open
        self._root, self._parts_of, self._open = schema, {}, set()
        try:
            return self._parts(schema, depth + 1)
        finally:
            self._root, self._parts_of, self._open = outside

    def _count_alternatives(self, n: int) -> None:
        self._alternatives += n
        _hold_alternatives(self._alternatives, self._limits)

    def _count_pattern(self, pattern: str) -> None:
        lengths, self._repetitions[pattern] = measure_regex(pattern, self._limits)
        self._lengths |= lengths

    def _count_range(self, node: Mapping[str, Any]) -> None:
        """A range of numbers becomes a regular expression with a few branches for each digit."""
        bounds = [node[name] for name in NUMBERS if isinstance(node.get(name), int | float)]
        if bounds and (key := repr(bounds)) not in self._ranges:
            self._ranges.add(key)
            self._count_alternatives(sum(len(str(bound)) for bound in bounds))

    def _parts_of_reference(self, reference: str, depth: int) -> int:
        if reference in self._open:
            return 1  # recursion is a rule of the grammar, not an expansion
        if reference not in self._parts_of:
            self._open.add(reference)
            self._parts_of[reference] = self._parts(_resolved(self._root, reference), depth + 1)
            self._open.discard(reference)
        return self._parts_of[reference]


def _resolved(root: Any, reference: str) -> Any:
    """The target of a reference inside the document; None for others, which the compiler refuses."""
    if not reference.startswith("#"):
        return None
    node = root
    for step in reference.removeprefix("#").split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        if not isinstance(node, Mapping) or name not in node:
            return None
        node = node[name]
    return node


def _repetitions(pattern: str) -> tuple[set[str], int]:
    """
    Counted repetitions, each with what it repeats, and the total number of repetitions: adjacent ones add up, nested
    ones multiply. Escapes and character classes are skipped.

    Raises:
        SchemaRefusedError: There are too many.
    """
    found = set()
    # Per open group, its start and its number of repetitions; then the same for the last atom.
    open_groups, atom, repeated, position = [[0, 0]], 0, 0, 0
    while position < len(pattern):
        character = pattern[position]
        if character == "{" and (count := COUNT.match(pattern, position)) is not None:
            times = max(int(number.lstrip("0")[:18] or 0) for number in (count[1] or "1", count[2] or "1"))
            more = times * max(1, repeated)
            open_groups[-1][1] += more - repeated
            repeated, position = more, count.end()
            found.add(pattern[atom:position])
            if open_groups[-1][1] > MAX_REPETITIONS:
                raise SchemaRefusedError(
                    f"it repeats parts {open_groups[-1][1]:,} times in all; the limit is {MAX_REPETITIONS:,}"
                )
            continue
        if character == ")" and len(open_groups) > 1:
            atom, repeated = open_groups.pop()
            open_groups[-1][1] += repeated
            position += 1
            continue
        atom, repeated = position, 0
        if character == "(":
            open_groups.append([position, 0])
        position = _end_of_atom(pattern, position)
    return found, sum(total for _, total in open_groups)


def _end_of_atom(pattern: str, start: int) -> int:
    """The position after an escape, a character class or a character."""
    if pattern[start] == "[":
        return _end_of_class(pattern, start)
    return start + (2 if pattern[start] == "\\" else 1)


def _end_of_class(pattern: str, start: int) -> int:
    """The position after a character class."""
    position = start + 1
    while position < len(pattern) and (pattern[position] != "]" or position == start + 1):
        position += 2 if pattern[position] == "\\" else 1
    return position + 1


def _decoded(value: Any) -> Any:
    """A schema as an object; the compiler refuses text that is not JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise SchemaRefusedError(f"it is no JSON: {type(error).__name__}") from error


def _hold(what: str, found: int, unit: str, limit: int, option: str) -> None:
    if found > limit:
        raise SchemaRefusedError(f"{what} {found:,} {unit}; the limit is {limit:,} ({option})")


def _hold_alternatives(n: int, limits: SchemaLimits) -> None:
    _hold("it has", n, "alternatives", limits.max_alternatives, "--structured-max-alternatives")


def _hold_characters(n: int) -> None:
    if n > MAX_CHARACTERS:
        raise SchemaRefusedError(f"its choices or values have {n:,} characters; the limit is {MAX_CHARACTERS:,}")


def _hold_lengths(lengths: set[str], limits: SchemaLimits) -> None:
    _hold("it has", len(lengths), "different bounds of a length", limits.max_lengths, "--structured-max-lengths")
