"""
Tiny random models of the shapes that people serve, written as Hugging Face folders from their configuration classes.

A random model is a good test model only if its text shows when a part of the KV cache is wrong. Matrices are scaled so
that attention and experts outweigh the token itself; otherwise the text repeats one token. The tokenizer is that of
`engines/models/tiny.py`.
"""

import json
from pathlib import Path
from typing import Any

WINDOW_TOKENS = 64
"""Of models with sliding windows; shorter than the tests' prompts."""
AUDIO_TOKEN = "<|pad|>"  # noqa: S105 - a token of text
AUDIO_RATE_HZ = 16000
AUDIO_MEL_BINS = 32
LORA_RANK = 8
SEED = 5
GAIN = 1.4
"""Of every matrix, for inputs of unit variance."""
EMBEDDING_STD = 0.2

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
WINDOWS = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": WINDOW_TOKENS,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen3": ("Qwen3Config", {}),
    "qwen3_moe": ("Qwen3MoeConfig", {**EXPERTS, "num_experts": 8}),
    "phi3": ("Phi3Config", {"original_max_position_embeddings": 1024}),
    "gemma3": ("Gemma3TextConfig", {**WINDOWS, "query_pre_attn_scalar": 32, "tie_word_embeddings": True}),
    "gpt_oss": ("GptOssConfig", {**WINDOWS, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek": (
        "DeepseekV2Config",
        {
            **EXPERTS,
            "num_key_value_heads": 4,
            "head_dim": 64,
            "kv_lora_rank": 512,  # with 64 rotary dimensions the only size of vLLM's kernel for CPUs
            "q_lora_rank": None,
            "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 64,
            "v_head_dim": 64,
            "n_routed_experts": 8,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
    ),
    "falcon_h1": (
        "FalconH1Config",
        {"mamba_d_ssm": 256, "mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 32, "mamba_chunk_size": 64},
    ),
    "qwen2_audio": ("Qwen2AudioConfig", {"audio_token_index": 0}),
}
"""Configuration class, and what differs from `SIZES`."""


def write_model(folder: Path, name: str) -> Path:
    """Write the model of this name, the same bytes each time; returns the folder."""
    import safetensors.torch
    import torch
    import transformers

    from cascadeinfer.engines.models.tiny import make_tiny_llama

    make_tiny_llama(folder)  # for its tokenizer
    class_name, changes = CONFIGS[name]
    torch.manual_seed(SEED)
    if name == "qwen2_audio":
        config = _audio_config(changes)
        model: Any = transformers.AutoModelForMultimodalLM.from_config(config, dtype=torch.float32)
        _write_audio_processor(folder)
    else:
        config = getattr(transformers, class_name)(**{**SIZES, **changes})
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _spread(model)
    model.save_pretrained(folder)
    if name == "qwen2_audio":  # the names of published checkpoints, which vLLM reads
        file = folder / "model.safetensors"
        weights = safetensors.torch.load_file(file)
        safetensors.torch.save_file({key.replace(".model.model.", ".model."): weights[key] for key in weights}, file)
    return folder


def write_adapter(folder: Path) -> Path:
    """Write a LoRA adapter for the Llama; returns the folder."""
    import safetensors.torch
    import torch

    folder.mkdir()
    generator = torch.Generator().manual_seed(SEED)
    shapes = {"lora_A": (LORA_RANK, SIZES["hidden_size"]), "lora_B": (SIZES["hidden_size"], LORA_RANK)}
    weights = {
        f"base_model.model.model.layers.{layer}.self_attn.q_proj.{part}.weight": torch.randn(shape, generator=generator)
        for layer in range(SIZES["num_hidden_layers"])
        for part, shape in shapes.items()
    }
    safetensors.torch.save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": LORA_RANK, "lora_alpha": LORA_RANK, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def _audio_config(changes: dict[str, Any]) -> Any:
    from transformers import Qwen2AudioConfig, Qwen2AudioEncoderConfig, Qwen2Config

    audio = Qwen2AudioEncoderConfig(
        num_mel_bins=AUDIO_MEL_BINS,
        d_model=64,
        encoder_layers=1,
        encoder_attention_heads=2,
        encoder_ffn_dim=128,
        max_source_positions=1500,
    )
    return Qwen2AudioConfig(audio_config=audio, text_config=Qwen2Config(**SIZES), **changes)


def _write_audio_processor(folder: Path) -> None:
    from transformers import AutoTokenizer, Qwen2AudioProcessor, WhisperFeatureExtractor

    Qwen2AudioProcessor(
        feature_extractor=WhisperFeatureExtractor(AUDIO_MEL_BINS, sampling_rate=AUDIO_RATE_HZ),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        audio_token=AUDIO_TOKEN,
        audio_bos_token="<|im_start|>",  # noqa: S106 - tokens of text
        audio_eos_token="<|im_end|>",  # noqa: S106
    ).save_pretrained(folder)


def _spread(model: Any) -> None:
    """Draw all matrices anew."""
    import torch

    embedding_std = EMBEDDING_STD
    if model.config.get_text_config().tie_word_embeddings:
        embedding_std /= SIZES["hidden_size"] ** 0.5  # Gemma multiplies by this
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_tokens" in name:
                parameter.normal_(0.0, embedding_std)
            elif parameter.ndim >= 2 and "conv" not in name:
                parameter.normal_(0.0, GAIN * parameter.shape[-1] ** -0.5)
            elif name.endswith(("sinks", "bias")):
                parameter.normal_(0.0, 0.5)
