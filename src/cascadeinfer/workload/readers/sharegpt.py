"""
ShareGPT conversations: `[{"conversations": [{"from": "human", "value": "..."}, ...]}, ...]`, text without times.

As in vLLM's benchmark, the first turn is the prompt and the second the answer, whoever speaks. Token counts need the
tokenizer of the model in question, so it is passed in.
"""

from collections.abc import Callable

import msgspec

from cascadeinfer.core.errors import TraceError
from cascadeinfer.workload.readers.fields import Rows
from cascadeinfer.workload.trace import Trace


class _Turn(msgspec.Struct):
    value: str


class _Conversation(msgspec.Struct):
    conversations: list[_Turn]


def read_sharegpt(document: str | bytes, count_tokens: Callable[[str], int]) -> Trace:
    """
    First turns of all conversations, without arrival times.

    Conversations of fewer than two turns, and turns without tokens, are left out and counted as dropped.

    Args:
        document: The JSON file.
        count_tokens: Number of tokens of a text.

    Raises:
        TraceError: The document is not such JSON, or holds no usable conversation.
    """
    try:
        conversations = msgspec.json.decode(document, type=list[_Conversation])
    except msgspec.DecodeError as error:
        raise TraceError(f"not a ShareGPT document: {error}") from None
    rows = Rows()
    for index, conversation in enumerate(conversations, start=1):
        turns = conversation.conversations[:2]
        counts = [count_tokens(turn.value) for turn in turns]
        if len(counts) < 2 or counts[0] == 0:
            rows.dropped += 1
            continue
        rows.add(None, counts[0], counts[1], index)
    return rows.to_trace()
