"""
Devices, models and assumptions behind the shipped profiles. Every number has its source beside it.

"K1", "K2", "K3" are sections 1, 2 and 3 of ../shared/data/kernels.md, which names the original sources; "(U)" marks
general knowledge that no source here confirms. Derived devices have no measurements: `scaled_from` names the device
whose tables are scaled, by the ratio of bandwidths where the source is bound by memory and of peak rates where it is
bound by compute.
"""

from dataclasses import dataclass

from cascadeinfer.core.cost.splitkv import AttentionKernel, SplitRule

GPU_MEMORY_UTILIZATION = 0.9
"""Required by the project; vLLM's own default is close to it."""

RESERVED_BYTES = 2_000_000_000
"""(U) CUDA context, communication buffers, activations of a profile run, CUDA graphs: 1.5-3 GB in vLLM's logs."""

BLOCK_SIZE_TOKENS = 16
"""vLLM's default on CUDA."""

LONGEST_SERVED_TOKENS = 32_768
"""A profile is made for the fewest devices whose KV cache holds one such request (otherwise vLLM refuses to start)."""

STEP_OVERHEAD_S = 0.6e-3
"""
(U) Per step outside the layers: scheduling and input preparation that asynchronous scheduling does not hide, sampling,
graph launch. Measure it with `cascadeinfer profile`.
"""

REQUEST_OVERHEAD_S = 2e-6
"""(U) Per decoding request and step: sampling rows, block tables, output bookkeeping."""

ELEMENTWISE_FLOOR_S = 16e-6
"""
Per layer: two norms, rotary embedding, activation at small batch. vidur_*_linear: 15-18 us at TP 4 (A100 8B: 4+4+3+4,
H100 70B: 6+6+2+4), residual additions fused into the norms as vLLM does.
"""

ELEMENTWISE_BANDWIDTH_SHARE = 0.5
"""Of peak bandwidth. vidur_*_linear at 4,096 tokens, TP 1: H100 1.71 of 3.35 TB/s, A100 0.97 of 2.04 TB/s."""

PCIE_ALLREDUCE_FLOOR_S = 20e-6
"""(U) NCCL ring over PCIe; no table for L40S. Bandwidth: 0.8 x 32 GB/s one way (K1)."""

NIC_BYTES_S = 0.8 * 50e9
"""KV transfer between NVLink machines: one 400 Gb/s NIC per device (paper: 400 Gb/s NICs), 80 % of it (U)."""

PCIE_BYTES_S = 0.8 * 32e9
"""KV transfer between PCIe devices: PCIe 4 x16 one way (K1), 80 % of it (U)."""

MOE_COMPUTE_SHARE = 0.6
"""(U) Rate of grouped expert products as a share of a large dense product's: experts see few rows each."""

MOE_FLOOR_S = 25e-6
"""(U) Per layer: routing, top-k, permutation and two grouped launches."""


@dataclass(frozen=True)
class Device:
    """
    A GPU.

    Attributes:
        tables: Suffix of its files in ../shared/data/gpu, or of those of the device it is scaled from.
        kernel: Its decode-attention kernel.
        kernel_measured: Whether the kernel's numbers were fitted to measurements on this device.
        allreduce: File suffix of the all-reduce table, or None for the PCIe formula.
        prefill_from: Device whose prefill-attention table is scaled, if this one has none.
    """

    name: str
    title: str
    memory_bytes: int
    bandwidth_bytes_s: float
    flops_s: float
    l2_bytes: float
    tables: str
    kernel: AttentionKernel
    kernel_measured: bool
    max_num_seqs: int
    max_batched_tokens: int
    transfer_bytes_s: float
    allreduce: str | None
    scaled_from: str | None = None
    prefill_from: str | None = None
    notes: tuple[str, ...] = ()


def _fa3(sms: int, bandwidth_tb_s: float, block_gb_s: float) -> AttentionKernel:
    # K3: floors 11 and 5.5 us, 1.2 us per wave. vLLM 0.24-0.32 pass 32 splits (vllm/config/attention.py,
    # flash_attn_max_num_splits_for_cuda_graph).
    return AttentionKernel(
        SplitRule.FA3, sms, 1, bandwidth_tb_s * 1e12, block_gb_s * 1e9, 11e-6, 5.5e-6, 1.2e-6, split_cap=32
    )


_FA2_BLOCK_BYTES_S = 15.5e9
"""
Rate of a lone thread block of FA2. A100: K3 has 8.7 GB/s, fitted with the rate in full waves; 1.185 waves (256 tiles of
4K-8K tokens on 216 slots) leave 40 blocks alone for 136-264 us, which gives 15.4-15.9, and the simulation's error on
K3's 123 cells falls from 4.5 % (p90 19 %) to 3.2 % (9 %). FlashInfer's CUDA-core kernel on A800 (8,250 cells of
frontier_a800_flashinfer_llama2-7b, another kernel and source) fits best at the same 15.5. L40S: any rate from 10 on
fits its cells equally well (K3: weakly constrained); taken from A100, same kernel and tile, which makes the price of
mixed lengths the smaller one.
"""

_FA2_L40S = AttentionKernel(SplitRule.FA2, 142, 1, 0.73e12, _FA2_BLOCK_BYTES_S, 11e-6, 3e-6, 1e-6)  # K3
_H20_BLOCK_GB_S = 29.6
"""K3: an H20 SM does 148e12 / 78 FLOP/s; a 128-token block costs 4 x 128 x 128 x 64 FLOP for 64 KiB with kBlockM 64
(vllm-project/flash-attention PR 63): tensor bound at 29.6 GB/s per SM, 2.3 TB/s in all."""

_H20_NOTES = (
    "H20: matrix products, prefill attention and elementwise scaled from H200 (bandwidth, peak bf16 rate)",
    (
        "H20: decode attention simulated from FA3's split rule, tensor-bound thread blocks at kBlockM 64 (kernels.md "
        "section 3)"
    ),
    "H20: all-reduce taken from H100 (same NVLink generation and width)",
)

H100 = "h100_sxm_vllm_0.24.0"
A100 = "a100_sxm_vllm_0.14.0"
H200 = "h200_sxm_vllm_0.24.0"
L40S = "l40s_vllm_0.24.0"
B200 = "b200_sxm_vllm_0.24.0"
H100_ALLREDUCE = "h100_sxm_vllm_0.24.0"

# Memory, bandwidth, dense bf16 rate, L2: K1. max_num_seqs and max_batched_tokens: what vLLM 0.32's API server takes by
# device memory (vllm/engine/arg_utils.py): 16384/1024 from 160 GiB, 8192/1024 from 70 GiB except A100, else 2048/256.
DEVICES = (
    Device("h100", "NVIDIA H100 SXM 80 GB", 80 * 10**9, 3.35e12, 989e12, 50e6, H100, _fa3(132, 3.15, 26), True,
           1024, 8192, NIC_BYTES_S, H100_ALLREDUCE),
    Device("h200", "NVIDIA H200 SXM 141 GB", 141 * 10**9, 4.8e12, 989e12, 50e6, H200, _fa3(132, 4.42, 37), True,
           1024, 8192, NIC_BYTES_S, H100_ALLREDUCE, notes=("H200: all-reduce taken from H100 (same NVLink)",)),
    Device("a100", "NVIDIA A100 SXM 80 GB", 80 * 10**9, 2.039e12, 312e12, 40e6, A100,
           AttentionKernel(SplitRule.FA2, 108, 2, 1.62e12, _FA2_BLOCK_BYTES_S, 15e-6, 6e-6, 1.2e-6), True,
           256, 2048, NIC_BYTES_S, A100),
    Device("l40s", "NVIDIA L40S 48 GB", 46_068 * 2**20, 0.864e12, 362e12, 96e6, L40S, _FA2_L40S, True,
           256, 2048, PCIE_BYTES_S, None),
    Device("b200", "NVIDIA B200 SXM 180 GB", 180 * 10**9, 7.7e12, 2250e12, 126e6, B200,
           AttentionKernel(SplitRule.TRTLLM, 148, 2, 7.2e12, 60e9, 10e-6, 0.0, 1e-6), True,
           1024, 16384, NIC_BYTES_S, H100_ALLREDUCE, prefill_from=H200,
           notes=("B200: prefill attention scaled from H200 by peak bf16 rate (no table)",
                  "B200: all-reduce taken from H100, pessimistic (NVLink 5 is twice as fast)",
                  "B200: split rule of trtllm-gen approximate (closed source; kernels.md section 3c)",
                  ("B200: kernel numbers by grid search on 96 cells (median 1.4 %, p90 4.6 %); "
                   "any rate per block from 60 GB/s on fits"))),
    Device("h20", "NVIDIA H20 96 GB", 96 * 10**9, 4.0e12, 148e12, 60e6, H200, _fa3(78, 3.68, _H20_BLOCK_GB_S), False,
           1024, 8192, NIC_BYTES_S, H100_ALLREDUCE, scaled_from="h200", notes=_H20_NOTES),
    Device("h20-141gb", "NVIDIA H20 141 GB (HBM3e)", 141 * 10**9, 4.8e12, 148e12, 60e6, H200,
           _fa3(78, 4.42, _H20_BLOCK_GB_S), False, 1024, 8192, NIC_BYTES_S, H100_ALLREDUCE, scaled_from="h200",
           notes=(*_H20_NOTES, "H20 141 GB: the paper's card; 4.8 TB/s (U), compute as the 96 GB card")),
    Device("l40", "NVIDIA L40 48 GB", 46_068 * 2**20, 0.864e12, 181e12, 96e6, L40S, _FA2_L40S, False,
           256, 2048, PCIE_BYTES_S, None, scaled_from="l40s",
           notes=("L40: matrix products and prefill attention scaled from L40S by peak bf16 rate",
                  ("L40: decode attention is L40S's (same memory and SMs; a 128-token block takes 4.2 us at its rate "
                   "and 3.3 us of compute)"))),
)  # fmt: skip


@dataclass(frozen=True)
class Model:
    """
    A model in 16 bit (K2).

    Attributes:
        parameters: Of the whole model.
        experts: Experts of a layer; 0 for a dense model.
        ffn: Width of the feed-forward layer, or of one expert.
    """

    name: str
    title: str
    layers: int
    hidden: int
    q_heads: int
    kv_heads: int
    ffn: int
    vocabulary: int
    parameters: float
    tensor_parallel: int = 1
    experts: int = 0
    experts_active: int = 0
    head_dim: int = 128

    @property
    def weights_bytes(self) -> int:
        """All weights."""
        return round(self.parameters * 2)

    @property
    def kv_bytes_per_token(self) -> int:
        """Of the whole model."""
        return self.layers * self.kv_heads * self.head_dim * 2 * 2


MODELS = (
    Model("llama-3.1-8b", "meta-llama/Llama-3.1-8B", 32, 4096, 32, 8, 14336, 128256, 8.03e9),
    Model("qwen3-32b", "Qwen/Qwen3-32B", 64, 5120, 64, 8, 25600, 151936, 32.76e9),
    Model("llama-3.1-70b", "meta-llama/Llama-3.1-70B", 80, 8192, 64, 8, 28672, 128256, 70.55e9, tensor_parallel=4),
    Model("qwen3-30b-a3b", "Qwen/Qwen3-30B-A3B", 48, 2048, 32, 4, 768, 151936, 30.5e9, experts=128, experts_active=8),
)

LLAMA_2_70B = Model("llama-2-70b", "Llama-2-70B", 80, 8192, 64, 8, 28672, 32000, 68.98e9)
"""For the check against splitwise_perf_model; shape as Llama-3.1-70B except for the vocabulary."""
