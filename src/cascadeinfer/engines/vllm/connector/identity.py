"""
The identity of an instance for cost profiles: the model's sizes, the device, the attention backend actually used.

Backend and device are asked of the worker, because vLLM chooses the backend there, layer by layer.
"""

from pathlib import Path
from typing import Any, Final

import torch
import vllm
from vllm.config import ModelConfig, VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.platforms import current_platform
from vllm.v1.engine.core import EngineCore
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, UniformTypeKVCacheSpecs

CPU_INFO: Final = Path("/proc/cpuinfo")


def worker_identity(worker: Any) -> dict[str, Any]:
    """On a worker, by collective RPC: device, attention backend, threads."""
    layers = get_layers_from_vllm_config(worker.vllm_config, AttentionLayerBase)
    backends = sorted({_backend_of(layer) for layer in layers.values()})
    on_cpu = current_platform.is_cpu()
    return {
        "attention_backend": "+".join(backends) or "none",
        "device": _processor() if on_cpu else current_platform.get_device_name(),
        "threads": torch.get_num_threads() if on_cpu else 0,
        "multiprocessors": None if on_cpu else current_platform.num_compute_units(),
    }


def identity_of(core: EngineCore) -> dict[str, Any]:
    """In an EngineCore: the fields of `EngineIdentity`, and what else a profile needs."""
    config: VllmConfig = core.vllm_config
    model, parallel = config.model_config, config.parallel_config
    worker = core.model_executor.collective_rpc(worker_identity)[0]
    return {
        "identity": {
            "engine": "vllm",
            "engine_version": vllm.__version__,
            "model": Path(model.model).name if Path(model.model).is_dir() else model.model,
            **model_sizes(model),
            "kv_cache_dtype": config.cache_config.cache_dtype,
            "tensor_parallel": parallel.tensor_parallel_size,
            "pipeline_parallel": parallel.pipeline_parallel_size,
            "device": worker["device"],
            "threads": worker["threads"],
            "attention_backend": worker["attention_backend"],
            "eager": bool(model.enforce_eager),
            "asynchronous": core.async_scheduling,  # as created; it completes its configuration again later
        },
        "multiprocessors": worker["multiprocessors"],
        "graph_tokens": _graph_tokens(config),
    }


def model_sizes(model: ModelConfig) -> dict[str, Any]:
    """Of `EngineIdentity`: what two engines of the same model have in common, wherever and however they run."""
    return {
        "architecture": model.architecture,
        "layers": model.get_total_num_hidden_layers(),
        "hidden_size": model.get_hidden_size(),
        "query_heads": model.model_arch_config.total_num_attention_heads,
        "kv_heads": model.get_total_num_kv_heads(),
        "head_size": model.get_head_size(),
        "vocabulary": model.get_vocab_size(),
        "experts": model.get_num_experts(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": model.quantization or "none",
    }


def kv_bytes_per_token(kv_cache_config: KVCacheConfig, config: VllmConfig) -> int:
    """KV bytes of a token in all layers, all devices together."""
    a_rank = sum(_block_bytes(group) / group.kv_cache_spec.block_size for group in kv_cache_config.kv_cache_groups)
    return round(a_rank * config.parallel_config.tensor_parallel_size)


def _graph_tokens(config: VllmConfig) -> int:
    """Tokens of a step up to which FlashAttention gets its bound on splits (`v1/attention/backends/flash_attn.py`)."""
    compilation = config.compilation_config
    full = compilation.cudagraph_mode is not None and compilation.cudagraph_mode.has_full_cudagraphs()
    return int(compilation.max_cudagraph_capture_size or 0) if full else 0


def _block_bytes(group: KVCacheGroupSpec) -> int:
    """Bytes of a block in all layers of a group; layers that differ in size come with their sum."""
    spec = group.kv_cache_spec
    in_all = isinstance(spec, UniformTypeKVCacheSpecs)
    return int(spec.page_size_bytes) * (1 if in_all else len(group.layer_names))


def _backend_of(layer: Any) -> str:
    """A backend's name, with FlashAttention's version: each version has its own split rule."""
    name: str = layer.get_attn_backend().get_name()
    version = getattr(getattr(layer, "impl", None), "vllm_flash_attn_version", None)
    return f"{name}_{version}" if version else name


def _processor() -> str:
    """The processor's name as the kernel reports it."""
    lines = CPU_INFO.read_text(encoding="utf-8").splitlines() if CPU_INFO.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or "cpu"
