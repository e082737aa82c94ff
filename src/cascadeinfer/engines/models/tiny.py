"""
A tiny random Llama with its own tokenizer, generated on the spot: what fast tests serve.

It is written as a Hugging Face folder by numpy, safetensors and tokenizers alone, so it needs neither torch nor a
network, and the same seed gives the same bytes on every machine.

A random model is a good test model only if its greedy text shows when something went wrong. Three properties are built
in:

- *It does not collapse.* Plainly initialised models repeat one token or a short cycle: the residual stream is mostly
  the current token's embedding, so the next token is a function of the current one. Here half of the heads look back a
  fixed distance (`LOOKBACK_TOKENS`), whatever the text, so that the next token depends on the order of the last dozen,
  and the output matrix holds each token's own embedding with a minus sign, so that a token hardly ever follows itself.
- *It reads its whole context.* The other heads attend by content, with scores of standard deviation `SCORE_STD`: each
  step leans on some tokens, the next on others. A lost or exchanged KV block changes the text within some tens of
  tokens.
- *It writes plain text.* Tokens that are not printable ASCII (lone bytes of longer UTF-8 sequences, control characters,
  special tokens) never win: dimension 0 of the residual stream, the *carrier*, is a constant that no layer writes to,
  and so column 0 of the output matrix is a bias. The same constant gives the fixed-distance heads their queries and
  keys. The end-of-sequence token is among the silent ones unless the caller wants a model that ends its text.

Ties: logits are continuous with standard deviation `LOGIT_STD`, and the best is ahead of the second by less than x with
a probability of about 0.9 x per token. The scales are chosen so that rounding is hardly amplified: in float32 this
margin moves by about 6e-6 (mean; at most 5e-5) between kernels that sum in another order, such as prefill and decode.
Serve it in float32; in bfloat16 near ties are common and the text depends on the batch.
"""

import json
from pathlib import Path
from typing import Any, Final

import numpy as np
import safetensors.numpy
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

HIDDEN: Final = 128
N_HEADS: Final = 4
N_KV_HEADS: Final = 2
HEAD_DIM: Final = HIDDEN // N_HEADS
INTERMEDIATE: Final = 256
VOCAB_SIZE: Final = 512

PAD, BOS, EOS = "<|pad|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS: Final = (PAD, BOS, EOS)
"""Ids 0, 1, 2."""

SCORE_STD: Final = 2.0
"""
Standard deviation of content-attention scores. Sharper attention lets fewer tokens decide and amplifies rounding;
flatter attention averages the context away.
"""
LOGIT_STD: Final = 4.0
BRANCH_STD: Final = 0.5
"""What each attention and MLP block adds to the residual stream, whose embeddings have standard deviation 1."""
ATTENDED_TOKENS: Final = 4.0
"""Tokens that attention by content effectively averages over; scales its output."""
LOOKBACK_TOKENS: Final = ((1, 2), (3, 5), (4, 7))
"""Per layer, how far back its two fixed-distance heads look (the heads of KV head 0)."""
LOOKBACK_SHARPNESS: Final = 2.0
"""Least score per rotary frequency at the target distance; the sum over frequencies is 1 to 5 lower one token off."""
REPEAT_PENALTY: Final = 10.0
"""How much the logit of the current token is lowered (before normalisation), compared with `LOGIT_STD`."""
CARRIER: Final = 4.0
"""The constant in dimension 0 of the residual stream; 2 to 4 after normalisation."""
SUPPRESSION: Final = -200.0
"""Output weight on the carrier for tokens that must not be produced: far below any logit."""
ROPE_THETA: Final = 10000.0

CHAT_TEMPLATE: Final = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# What the tokenizer's merges are learned from: enough common words that most text is two to four bytes per token.
CORPUS: Final = (
    "the quick brown fox jumps over the lazy dog while the river runs to the sea and the wind moves over the hills",
    "a server takes a request from a client and sends an answer; a long request waits for more time than a short one",
    "each stage serves requests of one length, and a request that has grown is handed to the next stage with its state",
    (
        "there was once a small house near the water where people came in the evening to tell each other stories of "
        "the day"
    ),
    (
        "one two three four five six seven eight nine ten; first second third last; here there where when what which "
        "who why"
    ),
    (
        "user system assistant: hello, how are you today? I am well, thank you. Can you help me with this question, "
        "please?"
    ),
    '{"name": "value", "items": [1, 2, 3], "done": true, "nothing": null}',
    "def main(number): return number + 1",
)


def make_tiny_llama(path: Path, *, seed: int = 0, max_positions: int = 8192, ends_itself: bool = False) -> Path:
    """
    Write a tiny random Llama and its tokenizer as a Hugging Face folder.

    Args:
        path: Folder to write; created if missing. Files of the same names are replaced.
        seed: The weights are a function of it; the tokenizer is always the same.
        max_positions: `max_position_embeddings` of the configuration, in tokens.
        ends_itself: Let the end-of-sequence token compete like any other (about one token in a hundred) instead of
            never; the model then decides its output lengths.

    Returns:
        `path`.
    """
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = _make_tokenizer()
    tokenizer.save(str(path / "tokenizer.json"))
    weights = _make_weights(np.random.default_rng(seed), _suppressed_ids(tokenizer, ends_itself=ends_itself))
    safetensors.numpy.save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    _write_json(path / "config.json", _model_config(max_positions))
    _write_json(path / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    _write_json(path / "tokenizer_config.json", _tokenizer_config(max_positions))
    (path / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return path


def _make_tokenizer() -> Tokenizer:
    """Byte-level BPE: all 256 bytes, so that any text can be encoded, and merges learned from `CORPUS`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        show_progress=False,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(CORPUS, trainer=trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE, "the corpus is too small for the vocabulary"
    return tokenizer


def _suppressed_ids(tokenizer: Tokenizer, *, ends_itself: bool) -> list[int]:
    """Ids of the tokens that the model must never prefer: all that are not printable ASCII, and special tokens."""
    may_be_said = {EOS} if ends_itself else set()
    suppressed = []
    for token_id in range(VOCAB_SIZE):
        name = tokenizer.id_to_token(token_id)
        text = tokenizer.decode([token_id], skip_special_tokens=False)
        is_plain = text.isascii() and text.isprintable() and name not in SPECIAL_TOKENS
        if not is_plain and name not in may_be_said:
            suppressed.append(token_id)
    return suppressed


def _make_weights(rng: np.random.Generator, suppressed_ids: list[int]) -> dict[str, np.ndarray]:
    """All tensors, scaled as the module header says; drawn in a fixed order."""
    ones = np.ones(HIDDEN, dtype=np.float32)
    embedding = rng.standard_normal((VOCAB_SIZE, HIDDEN)).astype(np.float32)
    embedding[:, 0] = CARRIER
    # An embedding's product with itself is about HIDDEN.
    output = _normal(rng, VOCAB_SIZE, HIDDEN, LOGIT_STD) - embedding * np.float32(REPEAT_PENALTY / HIDDEN)
    output[:, 0] = 0.0
    output[suppressed_ids, 0] = SUPPRESSION
    weights = {"model.embed_tokens.weight": embedding, "model.norm.weight": ones, "lm_head.weight": output}
    for layer, lookbacks_tokens in enumerate(LOOKBACK_TOKENS):
        block = _attention_weights(rng, lookbacks_tokens) | {
            "mlp.gate_proj": _normal(rng, INTERMEDIATE, HIDDEN, 1.0),
            "mlp.up_proj": _normal(rng, INTERMEDIATE, HIDDEN, 1.0),
            "mlp.down_proj": _normal(
                rng, HIDDEN, INTERMEDIATE, BRANCH_STD / 0.6
            ),  # silu(x) y has std 0.6 for unit x, y
            "input_layernorm": ones,
            "post_attention_layernorm": ones,
        }
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            block[name][0, :] = 0.0  # no layer writes to the carrier
        weights |= {f"model.layers.{layer}.{name}.weight": tensor for name, tensor in block.items()}
    return weights


def _normal(rng: np.random.Generator, n_out: int, n_in: int, std: float) -> np.ndarray:
    """A matrix that maps inputs of unit variance to outputs of standard deviation `std` and is blind to the carrier."""
    matrix: np.ndarray = (rng.standard_normal((n_out, n_in)) * (std / np.sqrt(n_in))).astype(np.float32)
    if n_in == HIDDEN:
        matrix[:, 0] = 0.0
    return matrix


def _attention_weights(rng: np.random.Generator, lookbacks_tokens: tuple[int, ...]) -> dict[str, np.ndarray]:
    """
    Projections of one layer: the heads of KV head 0 look back by distance, those of KV head 1 attend by content.

    Rotary embedding rotates pair i (dimensions i and i + HEAD_DIM/2) by the angle position * frequency_i. A constant
    key (1, 0) and a constant query (cos(d f_i), -sin(d f_i)) in every pair therefore give a score that is highest at
    distance d.
    """
    half = HEAD_DIM // 2
    heads_per_kv = N_HEADS // N_KV_HEADS
    frequencies = ROPE_THETA ** (-np.arange(half) / half)  # radians per token
    # A dot product of HEAD_DIM terms, divided by sqrt(HEAD_DIM).
    query = _normal(rng, HIDDEN, HIDDEN, np.sqrt(SCORE_STD))
    key = _normal(rng, N_KV_HEADS * HEAD_DIM, HIDDEN, np.sqrt(SCORE_STD))
    # The carrier is at least about CARRIER / 2 after normalisation, in the query and in the key.
    amplitude = np.sqrt(LOOKBACK_SHARPNESS * np.sqrt(HEAD_DIM)) / (CARRIER / 2)
    key[:HEAD_DIM] = 0.0
    key[:half, 0] = amplitude
    for head, distance_tokens in enumerate(lookbacks_tokens):
        rows = query[head * HEAD_DIM : (head + 1) * HEAD_DIM]
        rows[:] = 0.0
        rows[:half, 0] = amplitude * np.cos(distance_tokens * frequencies)
        rows[half:, 0] = -amplitude * np.sin(distance_tokens * frequencies)
    result = _normal(rng, HIDDEN, HIDDEN, BRANCH_STD)
    # Averaging over n independent values leaves a standard deviation of 1/sqrt(n).
    result[:, heads_per_kv * HEAD_DIM :] *= np.sqrt(ATTENDED_TOKENS)
    return {
        "self_attn.q_proj": query,
        "self_attn.k_proj": key,
        "self_attn.v_proj": _normal(rng, N_KV_HEADS * HEAD_DIM, HIDDEN, 1.0),
        "self_attn.o_proj": result,
    }


def _model_config(max_positions: int) -> dict[str, Any]:
    """`config.json`."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "dtype": "float32",
        "eos_token_id": 2,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "max_position_embeddings": max_positions,
        "mlp_bias": False,
        "num_attention_heads": N_HEADS,
        "num_hidden_layers": len(LOOKBACK_TOKENS),
        "num_key_value_heads": N_KV_HEADS,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": ROPE_THETA, "rope_type": "default"},
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": VOCAB_SIZE,
    }


def _tokenizer_config(max_positions: int) -> dict[str, Any]:
    """`tokenizer_config.json`; the class reads `tokenizer.json` as it is."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_positions,
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    """Write one configuration file."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
