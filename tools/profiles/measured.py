"""
Reading ../shared/data/gpu: decode and prefill attention cells, matrix products at any shape, all-reduce. Times in
seconds.
"""

import csv
import gzip
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from catalogue import PCIE_ALLREDUCE_FLOOR_S, PCIE_BYTES_S, Device
from numpy.typing import NDArray

Column = NDArray[np.float64]
DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
KV_HEAD_BYTES = 512.0
"""K and V of one token and KV head at head_dim 128 in 16 bit."""


def rows(name: str) -> list[dict[str, str]]:
    """One table as records."""
    path = DATA / "gpu" / f"{name}.csv.gz"
    if not path.is_file():
        raise SystemExit(
            f"{path} is missing: the shipped profiles are made from published measurements that lie beside the checkout"
        )
    with gzip.open(path, "rt", newline="") as stream:
        return list(csv.DictReader(stream))


@lru_cache(maxsize=8)
def _gemm_table(suffix: str) -> dict[tuple[int, int], dict[int, float]]:
    table: dict[tuple[int, int], dict[int, float]] = defaultdict(dict)
    for row in rows(f"aic_gemm_bf16_{suffix}"):
        table[int(row["n"]), int(row["k"])][int(row["m"])] = float(row["latency_us"]) * 1e-6
    return table


def gemm_tokens(suffix: str) -> NDArray[np.int64]:
    """Numbers of rows at which every shape of a table was measured."""
    common = set.intersection(*(set(curve) for (n, k), curve in _gemm_table(suffix).items() if max(n, k) < 50_000))
    return np.array(sorted(common))


def _neighbours(sizes: list[int], size: int) -> tuple[int, int, float]:
    """The two sizes around one, and its position between them in logarithms."""
    low = max((s for s in sizes if s <= size), default=sizes[0])
    high = min((s for s in sizes if s >= size), default=sizes[-1])
    weight = 0.0 if low == high else float(np.log(size / low) / np.log(high / low))
    return low, high, weight


@lru_cache(maxsize=256)
def _gemm_curve(suffix: str, n: int, k: int) -> tuple[Column, Column]:
    """
    Times of an (m, k) x (k, n) product over m: interpolated in log n and log k; columns above 65,536 are done in equal
    parts.
    """
    parts = -(-n // 65_536)
    if parts > 1:
        m, time_s = _gemm_curve(suffix, n // parts, k)
        return m, parts * time_s
    table = _gemm_table(suffix)
    wide = sorted({a for a, _ in table})
    n_low, n_high, n_weight = _neighbours([s for s in wide if s != 51_200 or n == s], n)
    k_low, k_high, k_weight = _neighbours(sorted({b for _, b in table if b != 51_200}), k)
    corners = [
        (table[a, b], u * v)
        for a, u in ((n_low, 1 - n_weight), (n_high, n_weight))
        for b, v in ((k_low, 1 - k_weight), (k_high, k_weight))
        if u * v > 0
    ]
    m = np.array(sorted(set.intersection(*(set(c) for c, _ in corners))), dtype=np.float64)
    log_s = sum(weight * np.log([curve[int(i)] for i in m]) for curve, weight in corners)
    return m, np.exp(log_s)


def gemm_s(device: Device, source: Device, tokens: Column, n: int, k: int) -> Column:
    """
    Times of matrix products with `tokens` rows.

    A derived device takes the longer of its source's time scaled by bandwidth and the compute time at its source's
    efficiency.
    """
    m, time_s = _gemm_curve(device.tables, n, k)
    time_s = np.interp(tokens, m, time_s)
    if device.scaled_from is None:
        return time_s
    large_m = 4096.0
    rate = 2.0 * large_m * n * k / float(np.interp(large_m, m, _gemm_curve(device.tables, n, k)[1]))
    compute_s = 2.0 * tokens * n * k / (rate * device.flops_s / source.flops_s)
    return np.maximum(time_s * source.bandwidth_bytes_s / device.bandwidth_bytes_s, compute_s)


def gemm_bandwidth_bytes_s(device: Device, source: Device, n: int, k: int) -> float:
    """Weight bytes over time of a product with one row."""
    return 2.0 * n * k / float(gemm_s(device, source, np.array([1.0]), n, k)[0])


def gemm_rate_flops(device: Device, source: Device) -> float:
    """Rate of a large product."""
    return 2.0 * 4096**3 / float(gemm_s(device, source, np.array([4096.0]), 4096, 4096)[0])


@dataclass(frozen=True)
class DecodeCells:
    """One layer's decode attention for one pair of heads per device, equal lengths."""

    batch: Column
    kv_len: Column
    time_s: Column

    def kv_bytes(self, kv_heads: int) -> Column:
        """KV bytes that a call reads."""
        return self.batch * self.kv_len * kv_heads * KV_HEAD_BYTES


@lru_cache(maxsize=8)
def _attention_table(name: str) -> dict[tuple[int, int], list[tuple[float, float, float]]]:
    table: dict[tuple[int, int], list[tuple[float, float, float]]] = defaultdict(list)
    length = "kv_len" if "decode" in name else "isl"
    for row in rows(name):
        heads = int(row["num_heads"]), int(row["num_key_value_heads"])
        table[heads].append((float(row["batch_size"]), float(row[length]), float(row["latency_us"]) * 1e-6))
    return table


def decode_cells(suffix: str, q_heads: int, kv_heads: int) -> DecodeCells:
    """All measured cells of a pair of heads."""
    cells = np.array(_attention_table(f"aic_decode_attn_{suffix}")[q_heads, kv_heads])
    return DecodeCells(cells[:, 0], cells[:, 1], cells[:, 2])


def prefill_cells(suffix: str, q_heads: int, kv_heads: int) -> tuple[Column, Column, Column]:
    """Batch, prompt length and time of one layer's prefill attention."""
    cells = np.array(_attention_table(f"aic_prefill_attn_{suffix}")[q_heads, kv_heads])
    return cells[:, 0], cells[:, 1], cells[:, 2]


@lru_cache(maxsize=8)
def _allreduce_table(suffix: str, devices: int) -> tuple[Column, Column]:
    cells = sorted(
        (float(r["message_size"]), float(r["latency"]) * 1e-3)
        for r in rows(f"aic_allreduce_{suffix}")
        if int(r["num_gpus"]) == devices and r["kernel_source"].endswith("_graph")
    )
    return np.array([c[0] for c in cells]), np.array([c[1] for c in cells])


def allreduce_s(device: Device, devices: int, message_bytes: Column) -> Column:
    """Time of one all-reduce; by table (CUDA graph) or, over PCIe, by the ring formula."""
    if devices == 1:
        return np.zeros_like(message_bytes)
    if device.allreduce is None:
        return PCIE_ALLREDUCE_FLOOR_S + 2.0 * (devices - 1) / devices * message_bytes / PCIE_BYTES_S
    return np.interp(message_bytes, *_allreduce_table(device.allreduce, devices))


def splitwise(hardware: str, tensor_parallel: int) -> dict[tuple[int, int], tuple[float, float]]:
    """Median measured (prompt, token) seconds of Llama-2-70B by (prompt tokens, batch)."""
    found: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    for row in rows("splitwise_perf_model"):
        same = row["model"] == "llama2-70b" and row["hardware"] == hardware
        if same and int(row["tensor_parallel"]) == tensor_parallel:
            times = float(row["prompt_time"]) * 1e-3, float(row["token_time"]) * 1e-3
            found[int(row["prompt_size"]), int(row["batch_size"])].append(times)
    return {key: tuple(np.median(np.array(times), axis=0).tolist()) for key, times in sorted(found.items())}
