"""
What the cost model says about a pair of batches, for the devices that it knows.

The kernel numbers are those behind the shipped profiles (`tools/profiles/catalogue.py`), the prompt chunk's attention
is the profile's. Two predictions: the fast form, which planner and simulator use, and the thread-block simulation
behind it.
"""

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from cascadeinfer.config.profiles import load_profile
from cascadeinfer.core.cost.heterogeneity import MixedStep, decode_features, reduce_kernel
from cascadeinfer.core.cost.splitkv import AttentionKernel, SplitRule, kernel_s
from cascadeinfer.core.cost.varlen import Chunk, Heads, mixed_kernel_s
from cascadeinfer.profiling.kernels.calls import GRAPH_TOKENS

sys.path.insert(0, str(Path(__file__).parents[1] / "profiles"))

from catalogue import DEVICES

LAYERS: Final = 32
Q_HEADS: Final = 32
"""Of the profile's model, Llama-3.1-8B."""
DEVICE_NAMES: Final = {
    "h100": r"H100 80GB HBM3", "h200": r"H200", "a100": r"A100-SXM4-80GB", "l40s": r"L40S", "b200": r"B200",
    "h20": r"H20", "h20-141gb": r"H20-3e", "l40": r"L40",
}  # fmt: skip
"""The catalogue's name: how torch calls the device, after NVIDIA."""
FLASHINFER_BLOCK_SHARE: Final = 14 / 26
"""Rate of one of two thread blocks per SM over that of one alone (`tools/profiles/build_profiles.py`, assumed)."""


def device_known(title: str, multiprocessors: int) -> str | None:
    """The catalogue's name of a device, or None; a slice of a device (MIG) is another one."""
    for device in DEVICES:
        if re.fullmatch(rf"NVIDIA {DEVICE_NAMES[device.name]}", title) and device.kernel.sms == multiprocessors:
            return device.name
    return None


def kernel_model(device: str, kernel: str) -> AttentionKernel | None:
    """The cost model of a kernel on a device; None if it has no rule for it."""
    known = next(d.kernel for d in DEVICES if d.name == device)
    match kernel:
        case "FA2" | "FA3" | "FA3 graphs":
            if known.rule.value != kernel[:3].lower():
                return None
            return replace(known, split_cap=None) if kernel == "FA3" else known
        case "FlashInfer" | "FlashInfer tensor-core":
            tensor = kernel != "FlashInfer"
            two = known.blocks_per_sm == 2
            return replace(
                known,
                rule=SplitRule.FLASHINFER_TENSOR_CORE if tensor else SplitRule.FLASHINFER_CUDA_CORE,
                blocks_per_sm=2,
                block_bandwidth_bytes_s=known.block_bandwidth_bytes_s * (1.0 if two else FLASHINFER_BLOCK_SHARE),
                split_cap=None,
            )
        case _:
            return None


def predicted(device: str | None, kernel: str, shape: Any, pair: Any, prompt_tokens: int) -> dict[str, float | None]:
    """
    Predicted times of a pair in microseconds, and their ratio.

    Args:
        device: The catalogue's name; None for an unknown one.
        kernel: Name from `profiling/kernels/calls.py`.
        shape: A `calls.Shape`.
        pair: A `pairs.Pair`.
        prompt_tokens: Of the chunk beside the decodes.

    Returns:
        `predicted_mixed_us`, `predicted_equal_us`, `predicted` (their ratio) and `simulated` (that of the simulation);
        None without a rule.
    """
    names = ("predicted_mixed_us", "predicted_equal_us", "predicted", "simulated")
    if kernel == "FA3 graphs" and len(pair.mixed) + prompt_tokens > GRAPH_TOKENS:
        kernel = "FA3"  # such a step runs without a full graph
    model = None if device is None else kernel_model(device, kernel)
    if model is None:
        return dict.fromkeys(names)
    pair_s = load_profile(f"{device}-llama-3.1-8b").step_model.per_prefill_attention_s / LAYERS / Q_HEADS
    heads, graph_tokens = Heads(shape.q_heads, shape.kv_heads), GRAPH_TOKENS if kernel == "FA3 graphs" else 0
    fast = reduce_kernel(model, kv_heads=heads.kv, layers=1, query_heads=heads.query, graph_tokens=graph_tokens)
    fast = replace(fast, per_prefill_attention_s=pair_s * heads.query)
    fast_s, simulated_s = [], []
    for lengths in (np.array(pair.mixed, dtype=np.int64), np.array(pair.equal, dtype=np.int64)):
        if prompt_tokens:
            step = MixedStep(lengths, (Chunk(prompt_tokens),))
            fast_s.append(fast.step_s(step.features))
            simulated_s.append(
                mixed_kernel_s(lengths, step.chunks, heads, model, pair_s=pair_s, graph_tokens=graph_tokens)
            )
        else:
            fast_s.append(fast.step_s(decode_features(lengths)))
            simulated_s.append(kernel_s(lengths, heads.kv, model))
    values = (1e6 * fast_s[0], 1e6 * fast_s[1], fast_s[0] / fast_s[1], simulated_s[0] / simulated_s[1])
    return dict(zip(names, values, strict=True))
