"""
The chat requests of `cascadeinfer demo`: their texts, how one is sent, and what is observed of it.

Their lengths differ on purpose. Short questions end inside the first stage, stories and explanations outgrow it, and
the text to be summarised enters the second stage directly. They are sent with the official `openai` client, streamed
and greedy.

A `ChatState` has two sources: tokens, text and times come from the request's own stream, and its instance comes from
the server's `/admin/instances`. The two are matched by the request id that the client sends in the header
`X-Request-Id`.
"""

import itertools
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from openai import AsyncOpenAI

STAYS: Final = {"bad_words": ["xqzvwkj"]}
"""
Parameters that keep a request on its instance and change nothing else. State for forbidden words would not survive a
move, so the server pins such a request; this word never occurs.
"""

DOCUMENT: Final = (
    "The harbour of the old town had been built for ships with sails. When steam came, the quays were too short and "
    "the water was not deep enough, and for thirty years the larger ships went elsewhere. Then the council borrowed "
    "money, moved the fish market to the north side, and had the basin dug out. It took six years and two companies, "
    "the first of which went out of business. On the day of the opening it rained so hard that the speeches were held "
    "in a warehouse. Today the warehouse is a museum. Its largest room shows the plans of the harbour, a model of the "
    "dredger, and the umbrella of the mayor."
)


@dataclass(frozen=True, slots=True)
class ChatTask:
    """
    One chat request to send.

    Attributes:
        title: A word or two for the table.
        prompt: The user's message.
        max_tokens: Maximum length of the answer.
    """

    title: str
    prompt: str
    max_tokens: int


TASKS: Final = (
    ChatTask("capital", "What is the capital of France?", 40),
    ChatTask("story", "Write a story about a dog who gets lost in a big city.", 150),
    ChatTask("summary", f"Summarise this text in two sentences.\n\n{DOCUMENT}", 60),
    ChatTask("sky", "Explain to a child why the sky is blue.", 130),
    ChatTask("fruits", "Name three fruits.", 40),
    ChatTask("soup", "Give me a recipe for tomato soup, step by step.", 140),
    ChatTask("letter", "Write a letter to a friend about a week at the sea.", 150),
    ChatTask("spider", "How many legs does a spider have?", 40),
)
"""Ordered so that kinds are mixed: the first two are a short answer and one that outgrows its stage."""


@dataclass(slots=True)
class ChatState:
    """
    One request as seen by the client and by the server's operator.

    Attributes:
        number: From 1, in the order of sending.
        chunks: Arrival time (on this process's monotonic clock) and answer tokens so far, per streamed chunk.
        places: Instances it was seen on, in order, each with its length in tokens at that moment.
        attempts: How often it was placed on an instance; each move adds one.
        error: Why it failed; empty if it did not.
    """

    number: int
    task: ChatTask
    request_id: str
    sent_s: float | None = None
    ended_s: float | None = None
    chunks: list[tuple[float, int]] = field(default_factory=list)
    prompt_tokens: int = 0
    text: str = ""
    places: list[tuple[str, int]] = field(default_factory=list)
    attempts: int = 0
    finish_reason: str = ""
    error: str = ""

    @property
    def output_tokens(self) -> int:
        """Answer tokens so far."""
        return self.chunks[-1][1] if self.chunks else 0

    @property
    def instance_id(self) -> str | None:
        """The instance it was last seen on; None before the first time."""
        return self.places[-1][0] if self.places else None

    @property
    def moves(self) -> int:
        """Number of moves observed."""
        return max(0, self.attempts - 1)

    @property
    def ttft_s(self) -> float | None:
        """Time to first token; None before it."""
        if self.sent_s is None or not self.chunks:
            return None
        return self.chunks[0][0] - self.sent_s

    @property
    def mean_itl_s(self) -> float | None:
        """Mean time between tokens after the first; None with fewer than two chunks."""
        if len(self.chunks) < 2 or self.chunks[-1][1] == self.chunks[0][1]:
            return None
        (first_s, first_tokens), (last_s, last_tokens) = self.chunks[0], self.chunks[-1]
        return (last_s - first_s) / (last_tokens - first_tokens)

    @property
    def longest_gap_s(self) -> float | None:
        """The longest time between two chunks; None with fewer than two."""
        times = [time_s for time_s, _ in self.chunks]
        return max((b - a for a, b in itertools.pairwise(times)), default=None)


def make_states(n_requests: int, run_id: str) -> list[ChatState]:
    """
    The first requests to send, starting over if there are more than tasks.

    Args:
        n_requests: Number of requests.
        run_id: Distinguishes the request ids from those of other runs.
    """
    return [ChatState(i + 1, TASKS[i % len(TASKS)], f"{run_id}-{i + 1}.") for i in range(n_requests)]


async def run_chat(client: "AsyncOpenAI", model: str, state: ChatState, extra: dict[str, Any] | None = None) -> None:
    """
    Send one request and update its state as the answer arrives. A failure of the server is recorded in the state, not
    raised.

    Args:
        client: The official client, connected to our server.
        model: Name of the served model.
        state: The request; must be fresh.
        extra: Further parameters of the request's body.
    """
    from openai import OpenAIError  # noqa: PLC0415 - an extra; the help works without it

    state.sent_s = time.monotonic()
    try:
        stream = await client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": state.task.prompt}],
            max_tokens=state.task.max_tokens,
            temperature=0.0,
            stream=True,
            extra_headers={"X-Request-Id": state.request_id},
            # vLLM's extension: each chunk carries the number of tokens so far.
            extra_body={"stream_options": {"include_usage": True, "continuous_usage_stats": True}, **(extra or {})},
        )
        async for chunk in stream:
            _take(chunk, state)
    except OpenAIError as error:
        state.error = " ".join(str(error).split()) or type(error).__name__
    state.ended_s = time.monotonic()


def _take(chunk: Any, state: ChatState) -> None:
    """Record one chunk."""
    if chunk.usage is not None:
        state.prompt_tokens = chunk.usage.prompt_tokens
        if chunk.usage.completion_tokens > state.output_tokens:
            state.chunks.append((time.monotonic(), chunk.usage.completion_tokens))
    for choice in chunk.choices:
        state.text += choice.delta.content or ""
        state.finish_reason = choice.finish_reason or state.finish_reason


def take_placements(snapshot: dict[str, Any], states: list[ChatState]) -> list[str]:
    """
    Record where the requests are, from the JSON of `/admin/instances`.

    Returns:
        A sentence for each request that was placed or moved since the last call.
    """
    stage_of = {instance["id"]: instance["stage"] for instance in snapshot["instances"]}
    news = []
    for state in states:
        # The server adds a prefix and a random suffix to the id; the dot ends ours.
        seen = next((r for r in snapshot["requests"]["oldest"] if state.request_id in r["id"]), None)
        if seen is None or seen["instance"] is None:
            continue
        instance_id = seen["instance"]
        if instance_id != state.instance_id:
            place = f"stage {stage_of[instance_id]} (instance {instance_id})"
            news.append(
                f"request {state.number} ({state.task.title}) "
                + (f"runs in {place}" if state.instance_id is None else f"moved to {place} at {seen['tokens']} tokens")
            )
            state.places.append((instance_id, seen["tokens"]))
        state.attempts = seen["attempts"]
    return news
