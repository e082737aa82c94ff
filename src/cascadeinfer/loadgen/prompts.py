"""
Prompts of given lengths that share nothing but what the trace says they share.

A prompt is a sequence of words drawn from a pool in which each word with its leading space is one token of the
tokenizer at hand. So a prompt of n tokens is n words, as text or as token ids, whatever the model; the server's own
counts are recorded beside it. Where the trace has prefix hashes, equal hashes give equal blocks.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np

from cascadeinfer.core.errors import ConfigError
from cascadeinfer.loadgen.client import OpenAiClient
from cascadeinfer.workload.trace import Trace

PromptKind = Literal["ids", "text", "words"]

COMMON: Final = (
    "the of and to in is that for it as was with be by on not he his but at are this have from or had an they "
    "which one you were all her she there would their we him been has when who will no more if out so up said "
    "what its about than into them can only other time new some could these two may first then do any like my "
    "now over such our man me even most made after also did many off before must well back through years where "
    "much your way down should because long each just state those people too mr how little good world make very "
    "year still see own work men day get here old life both between being under three never know same last "
    "another while us might great go come since against right came take used himself few house use place during "
    "high without again home around small however found part school every sea a river wind hills server request "
    "client answer short stage length water evening stories second third why user system hello today help please "
    "number name value items done"
)
WORDS: Final = tuple(sorted(COMMON.split()))
"""Common English words: most are one token in any vocabulary, and enough of them even in a tiny one."""
FEWEST_WORDS: Final = 16
CHECKED_WORDS: Final = (1, 7, 100)
_RANDOM: Final = 0
_SHARED: Final = 1


@dataclass(frozen=True, slots=True)
class PromptMaker:
    """
    Makes the prompt of each row of a trace.

    Attributes:
        trace: Determines lengths and shared prefixes.
        kind: Token ids or text.
        words: The pool.
        ids: Token ids of the pool.
        extra_tokens: Tokens that the server adds to a text (begin of sequence, chat template).
        seed: Different seeds give different prompts, so that nothing from another run is in a prefix cache.
    """

    trace: Trace
    kind: PromptKind
    words: tuple[str, ...]
    ids: tuple[int, ...]
    extra_tokens: int
    seed: int

    def prompt(self, row: int) -> str | list[int]:
        """The prompt of this row."""
        extra = 0 if self.kind == "ids" else self.extra_tokens
        drawn = self._draw(row, max(1, int(self.trace.prompt_tokens[row]) - extra))
        if self.kind == "ids":
            return [self.ids[number] for number in drawn]
        return " " + " ".join([self.words[number] for number in drawn])

    def _draw(self, row: int, n_words: int) -> list[int]:
        """Indices of words: shared blocks first, then words of this row alone."""
        parts: list[int] = []
        hashes = self.trace.prefix_hashes
        block = self.trace.prefix_block_tokens
        if hashes is not None:
            for value in hashes[row][: n_words // block]:
                parts += self._numbers((self.seed, _SHARED, abs(value), int(value < 0)), block)
        return parts + self._numbers((self.seed, _RANDOM, row), n_words - len(parts))

    def _numbers(self, key: tuple[int, ...], n_words: int) -> list[int]:
        drawn: list[int] = np.random.default_rng(key).integers(0, len(self.words), n_words).tolist()
        return drawn


async def make_prompts(
    client: OpenAiClient, trace: Trace, kind: PromptKind, *, seed: int, tokenize_url: str | None = None
) -> PromptMaker:
    """
    Learn from the server which words are one token, and check that sequences of them add up.

    Raises:
        ConfigError: The server has no `/tokenize`, too few words are one token, or they do not add up.
    """
    if client.api == "chat" and kind == "ids":
        raise ConfigError("a chat has no token ids", option="--prompts", fix="text or words")
    if kind == "words":
        return PromptMaker(trace, kind, WORDS, (), 0, seed)
    one_by_one = await asyncio.gather(
        *(client.tokenize({"prompt": f" {word}", "add_special_tokens": False}, tokenize_url) for word in WORDS)
    )
    pool = [(word, ids[0]) for word, ids in zip(WORDS, one_by_one, strict=True) if len(ids) == 1]
    if len(pool) < FEWEST_WORDS:
        raise ConfigError(
            f"only {len(pool)} common words are one token for this model",
            option="--prompts",
            fix="words (lengths are then approximate)",
        )
    maker = PromptMaker(trace, kind, tuple(word for word, _ in pool), tuple(i for _, i in pool), 0, seed)
    if kind == "ids":
        return maker
    extra = await _extra_tokens(client, maker.words, tokenize_url)
    return PromptMaker(trace, kind, maker.words, maker.ids, extra, seed)


async def _extra_tokens(client: OpenAiClient, words: Sequence[str], tokenize_url: str | None) -> int:
    """Tokens on top of the words; must be the same for any number of them, or prompts cannot be exact."""
    rng = np.random.default_rng(0)
    extras = set()
    for n_words in CHECKED_WORDS:
        text = " " + " ".join(words[i] for i in rng.integers(0, len(words), n_words))
        content: dict[str, Any] = (
            {"messages": [{"role": "user", "content": text}]} if client.api == "chat" else {"prompt": text}
        )
        extras.add(len(await client.tokenize(content, tokenize_url)) - n_words)
    if len(extras) != 1 or min(extras) < 0:
        raise ConfigError(
            "this tokenizer merges words: "
            f"rows of {', '.join(map(str, CHECKED_WORDS))} words have {sorted(extras)} tokens more",
            option="--prompts",
            fix="ids, or words (lengths are then approximate)",
        )
    return extras.pop()
