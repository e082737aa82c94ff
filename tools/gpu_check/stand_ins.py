"""
Models without weights: the shape of a known model, random weights that vLLM makes itself (`--load-format dummy`).

Step times do not depend on the weights' values. The tokenizer is that of the tiny test model; prompts are token ids. On
a processor, the tiny model stands in.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cascadeinfer.engines.models.tiny import VOCAB_SIZE, make_tiny_llama

BENCHMARKS: Final = Path(__file__).parents[2] / "benchmarks"
MAX_POSITIONS: Final = 131_072


@dataclass(frozen=True, slots=True)
class ModelShape:
    """
    Sizes of a model, as in its published `config.json`.

    Attributes:
        needs_bytes: Memory of a device from which it is used, so that 200K tokens of KV fit beside the weights.
    """

    name: str
    layers: int
    hidden: int
    q_heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int
    tied: bool
    needs_bytes: float


SHAPES: Final = (
    ModelShape("llama-3.1-8b", 32, 4096, 32, 8, 128, 14336, 128_256, tied=False, needs_bytes=55e9),
    ModelShape("llama-3.2-3b", 28, 3072, 24, 8, 128, 8192, 128_256, tied=True, needs_bytes=30e9),
    ModelShape("llama-3.2-1b", 16, 2048, 32, 8, 64, 8192, 128_256, tied=True, needs_bytes=0.0),
)
"""Llama-3.1-8B and Llama-3.2 (huggingface.co/meta-llama), the largest first."""
SMALL: Final = SHAPES[-1]


def largest_for(memory_bytes: float) -> ModelShape:
    """The largest shape for a device with this memory."""
    return next(shape for shape in SHAPES if memory_bytes >= shape.needs_bytes)


def device_memory_bytes() -> int:
    """Memory of the GPU."""
    import torch  # noqa: PLC0415 - only where there is a GPU

    memory: int = torch.cuda.get_device_properties(0).total_memory
    return memory


def write_model(folder: Path, shape: ModelShape, *, own_tokens: bool = True) -> Path:
    """
    Write a model folder without weights.

    Args:
        folder: Made if missing.
        shape: Of the model.
        own_tokens: Keep the shape's vocabulary. Otherwise that of the tokenizer, so that answers are text.
    """
    make_tiny_llama(folder, max_positions=MAX_POSITIONS)
    (folder / "model.safetensors").unlink()
    file = folder / "config.json"
    config: dict[str, Any] = json.loads(file.read_text())
    config |= {
        "dtype": "bfloat16", "head_dim": shape.head_dim, "hidden_size": shape.hidden, "intermediate_size": shape.ffn,
        "num_attention_heads": shape.q_heads, "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads, "tie_word_embeddings": shape.tied,
        "vocab_size": shape.vocabulary if own_tokens else VOCAB_SIZE,
    }  # fmt: skip
    file.write_text(json.dumps(config, indent=2) + "\n")
    return folder


def benchmarks_importable() -> None:
    """Let the modules of `benchmarks/` and `benchmarks/peers/` be imported."""
    sys.path += [str(BENCHMARKS), str(BENCHMARKS / "peers")]
