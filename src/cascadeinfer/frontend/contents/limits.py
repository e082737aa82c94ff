"""What the operator allows requests to contain."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SchemaLimits:
    """
    Bounds on a structured output, beyond which compiling its grammar could take minutes of CPU time and gigabytes.

    The yardstick: of the 1,532 operations of GitHub's API (npm `@octokit/openapi` 23.0.2) and the 34 of Notion's MCP
    server (2.5.2), each taken as one tool, the largest has 10,527 bytes, 12 levels, 226 parts and 110 alternatives. A
    request may offer about a hundred tools, and when one of them has to be called they form one schema.

    Attributes:
        max_bytes: Size of the schema, grammar or choices as text.
        max_depth: Nesting of schemas; a reference is one level.
        max_parts: Schemas in total, each reference counted as what it refers to.
        max_alternatives: Values of `enum`, branches of `anyOf` and the like, and choices, in total.
        max_regex_characters: Length of one regular expression.
        max_lengths: Distinct bounds of a text's length: pairs of `minLength` and `maxLength`, counted repetitions in
            regular expressions. GitHub's whole API has 22, its operations 7 at most.
    """

    max_bytes: int = 512 << 10
    max_depth: int = 32
    max_parts: int = 10_000
    max_alternatives: int = 5000
    max_regex_characters: int = 4096
    max_lengths: int = 32


@dataclass(frozen=True, slots=True)
class ContentLimits:
    """
    All limits on the contents of requests.

    Attributes:
        ignores_words: Whether forbidden words are removed from a request instead of refusing it; they are never obeyed.
    """

    ignores_words: bool = False
    schemas: SchemaLimits = SchemaLimits()
