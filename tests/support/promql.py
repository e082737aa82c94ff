"""
What a PromQL expression refers to: its series with their labels, and the labels it groups by.

No parser of the language: it knows strings, numbers and durations, names, brackets and the words around groupings,
which is enough to say which names must exist. Syntax is `promtool`'s to check.
"""

import re
from dataclasses import dataclass, field

TOKEN = re.compile(
    r"""\s+ | (?P<string>"[^"]*") | (?P<variable>\$\w+) | (?P<number>\d[\w.]*) | (?P<name>[a-zA-Z_:][\w:]*)
    | (?P<mark>=~|!~|!=|==|>=|<=|[-+*/%^=<>(){}\[\],])""",
    re.VERBOSE,
)
GROUPINGS = {"by", "without", "on", "ignoring", "group_left", "group_right"}
AGGREGATIONS = {"by", "without"}
"""Words that follow the name of an aggregation."""
WORDS = {"and", "or", "unless", "bool", "offset"}


@dataclass
class Use:
    """One series of an expression; `labels` are those that it is selected by."""

    name: str
    labels: set[str] = field(default_factory=set)


@dataclass
class Uses:
    """
    What an expression refers to.

    Attributes:
        series: The series it reads.
        groups: Labels it groups by or matches on.
    """

    series: list[Use] = field(default_factory=list)
    groups: set[str] = field(default_factory=set)


def tokens_of(expression: str) -> list[tuple[str, str]]:
    """Kind and text of each token; raises ValueError at what is none."""
    found, at = [], 0
    while at < len(expression):
        match = TOKEN.match(expression, at)
        if match is None:
            raise ValueError(f"what is {expression[at : at + 20]!r} in {expression!r}?")
        if match.lastgroup is not None:
            found.append((match.lastgroup, match.group()))
        at = match.end()
    return found


def uses_of(expression: str) -> Uses:
    """What the expression refers to."""
    tokens, uses, at = [*tokens_of(expression), ("end", "")], Uses(), 0
    while at < len(tokens):
        kind, text = tokens[at]
        at += 1
        follows = tokens[at][1] if at < len(tokens) else ""
        if kind != "name" or text in WORDS or follows in AGGREGATIONS:
            continue
        if text in GROUPINGS:
            if follows == "(":
                end = tokens.index(("mark", ")"), at)
                uses.groups |= {name for label, name in tokens[at:end] if label == "name"}
                at = end
        elif follows == "{":
            end = tokens.index(("mark", "}"), at)
            uses.series.append(Use(text, {name for label, name in tokens[at:end] if label == "name"}))
            at = end
        elif follows != "(":
            uses.series.append(Use(text))
    return uses
