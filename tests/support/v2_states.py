"""
The state that vLLM's V2 model runner holds for a request at each position, recorded inside real engine processes.

`record_states` wraps the runner's sampler before engines are forked. Each process appends one JSON line per sampled
position of a request whose id begins with `PREFIX` to its own file in the folder named by `FOLDER_VARIABLE`.
`Recording` reads them back.
"""

import itertools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

FOLDER_VARIABLE = "CASCADE_TEST_STATES"
PREFIX = "states-"


@dataclass(frozen=True, slots=True)
class State:
    """
    A request at one position, as the sampler finds it there.

    Attributes:
        input_id: The token at this position.
        seed: Of the request's noise, which V2 derives from seed and position; None: the request has none of its own.
        prompt_tokens: Length of the prompt.
        total_tokens: Length of prompt and output.
        min_total_tokens: Length before which no stop token may come.
        stop_token_ids: Those.
        output_counts: How often each token is in the output, for penalties; None: the request has none.
        prompt_mask: Which tokens are in the prompt, a bit each, for the repetition penalty.
        bad_words: Token ids of each.
        thinking_budget: Tokens, -1 without one.
    """

    input_id: int
    seed: int
    prompt_tokens: int
    total_tokens: int
    min_total_tokens: int
    stop_token_ids: tuple[int, ...]
    output_counts: tuple[tuple[int, int], ...] | None
    prompt_mask: tuple[int, ...] | None
    bad_words: tuple[tuple[int, ...], ...]
    thinking_budget: int


def record_states() -> None:
    """Wrap the sampler of processes forked from now on; they record if the variable is set in their environment."""
    from vllm.v1.worker.gpu.sample.sampler import Sampler

    sample = Sampler.__call__

    def recording(self: Sampler, logits: torch.Tensor, input_batch: Any) -> Any:
        folder = os.environ.get(FOLDER_VARIABLE)
        if folder is not None:
            with (Path(folder) / f"{os.getpid()}.jsonl").open("a") as lines:
                for index, request_id in enumerate(input_batch.req_ids):
                    if request_id.startswith(PREFIX) and _samples(self, input_batch, index):
                        lines.write(json.dumps([request_id, *_row(self, input_batch, index)]) + "\n")
        return sample(self, logits, input_batch)

    Sampler.__call__ = recording


def _samples(sampler: Any, batch: Any, index: int) -> bool:
    """Whether this step samples a token of the request, as it does not in the middle of a chunked prefill."""
    return int(batch.seq_lens[index]) >= int(sampler.req_states.prefill_len.np[batch.idx_mapping_np[index]])


def _row(sampler: Any, batch: Any, index: int) -> list[Any]:
    """Position and state of one request in the batch."""
    slot = int(batch.idx_mapping_np[index])
    row = int(batch.logits_indices[int(batch.cu_num_logits_np[index + 1]) - 1])
    bias, penalties, bad_words = sampler.logits_processors
    counted = bool(penalties.use_penalty[slot])
    counts = penalties.output_bin_counts[slot]
    seen = torch.nonzero(counts).flatten()
    offsets = bad_words.bad_word_offsets.gpu[slot, : int(bad_words.num_bad_words.np[slot]) + 1].tolist()
    ids = bad_words.bad_word_token_ids.gpu[slot].tolist() if len(offsets) > 1 else []
    thinking = sampler.thinking_budget_state
    return [
        int(batch.positions[row]),
        int(batch.input_ids[row]),
        int(sampler.sampling_states.seeds.np[slot]),
        int(sampler.req_states.prompt_len.np[slot]),
        int(sampler.req_states.total_len.gpu[slot]),
        int(bias.min_lens.np[slot]),
        bias.stop_token_ids.gpu[slot, : int(bias.num_stop_token_ids.np[slot])].tolist(),
        [[int(token), int(counts[token])] for token in seen] if counted else None,
        penalties.prompt_bin_mask[slot].tolist() if counted else None,
        [ids[first:last] for first, last in itertools.pairwise(offsets)],
        int(thinking.thinking_token_budget.np[slot]) if thinking.enabled else -1,
    ]


def allow_mutations() -> None:
    """Give engines forked from now on the utility `cascade_test_mutate(name)`; an empty name undoes the mutation."""
    from vllm.v1.engine.core import EngineCore

    def mutate(self: Any, name: str) -> None:
        side = self.scheduler.connector.connector_scheduler
        side.__dict__.pop("_split", None)
        side.model_runner = "V1" if name == "v1_terms" else "V2"
        if name == "no_split":
            split = side._split
            side._split = lambda request, _: split(request, len(request.prompt_token_ids))

    EngineCore.cascade_test_mutate = mutate  # type: ignore[attr-defined]


class Recording:
    """What the engines with this folder have recorded."""

    def __init__(self, folder: Path) -> None:
        """Read from this folder."""
        self._folder = folder

    def rows(self, request_id: str) -> list[tuple[int, State]]:
        """A request's (position, state) pairs over its attempts (`id`, `id~1`, ...), unordered and perhaps repeated."""
        found = []
        for file in self._folder.glob("*.jsonl"):
            for line in file.read_text().splitlines():
                name, position, *values = json.loads(line)
                if name.split("~")[0] == request_id:
                    found.append((position, State(*(_frozen(value) for value in values))))
        return found


def _frozen(value: Any) -> Any:
    """Lists converted to tuples, recursively."""
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value
