"""
Turn a Llama-family GGUF file into a Hugging Face folder. Run as a program, in its own process:

    python -m cascadeinfer.engines.models.gguf_convert FILE.gguf FOLDER

It has its own process because the conversion loads torch and needs memory for the weights, neither of which belongs in
a front end that later forks its engines, and because transformers and tqdm write to the terminal.

Weights are stored as bfloat16: SmolLM2 was published so, it halves disk and load time compared with float32, and its
rounding (2^-9 relative) is far below the 4-bit steps of the source. Serve them as float32 where results must not depend
on the batch.

Two things are repaired after transformers' own conversion:

- GGUF names the tokenizer's splitting rule (`tokenizer.ggml.pre`), which transformers ignores. "smollm" splits digits
  one by one before the GPT-2 rule, as in the published tokenizer.
- The tokenizer's configuration lacks the context length, so clients could not learn it.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

from cascadeinfer.core.errors import ConfigError

CHAT_END = "<|im_end|>"


def convert(gguf_file: Path, folder: Path) -> None:
    """
    Write model, tokenizer, chat template and generation configuration to `folder`.

    Raises:
        ConfigError: The file has no chat template, or its end-of-sequence token is not the end of a chat turn.

    """
    source: dict[str, Any] = {"gguf_file": gguf_file.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, **source)
    if tokenizer.chat_template is None or tokenizer.eos_token != CHAT_END:
        raise ConfigError(f"{gguf_file.name} is not a chat model that ends its turns with {CHAT_END}")
    model = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16, **source
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    # Written out rather than derived, so that a server stops at the end of the turn whatever its defaults.
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _split_digits(folder / "tokenizer.json")


def _split_digits(tokenizer_file: Path) -> None:
    """Put the digit rule before the byte-level rule."""
    content = json.loads(tokenizer_file.read_text(encoding="utf-8"))
    byte_level = content["pre_tokenizer"]
    assert byte_level["type"] == "ByteLevel", byte_level
    digits = {"type": "Digits", "individual_digits": True}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, byte_level]}
    tokenizer_file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
