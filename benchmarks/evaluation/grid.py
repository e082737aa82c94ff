"""
The cells of the evaluation.

- The paper's two clusters, 16 H20 and 16 L40: every trace, loads from light to above what plain load balancing carries.
  16 H100 and 16 A100 at two loads.
- Llama-3.1-70B with tensor parallel 4 on four instances of H20 (the paper's large model).
- The cascade with parts switched off.
- With `--tuned`: everybody at each token budget of a step, so that each rival can be compared at its best.
"""

from itertools import product
from typing import Final

from cells import Cell

TRACES: Final = (
    "sharegpt_v3_firstturn_llama3",
    "sharegpt_8k_llama2",
    "azure_2023_conv",
    "servegen_deepseek_r1_1h",
    "mooncake_synthetic",
    "arxiv_summarization_llama2",
    "bwb_llama2",
)
PAPER_GPUS: Final = ("h20-141gb-llama-3.1-8b", "l40-llama-3.1-8b")
OTHER_GPUS: Final = ("h100-llama-3.1-8b", "a100-llama-3.1-8b")
LARGE: Final = ("h20-141gb-llama-3.1-70b-tp4", 4)
PROFILES: Final = (*PAPER_GPUS, *OTHER_GPUS)

LOADS: Final = (0.3, 0.6, 0.85, 0.95)
OVERLOAD: Final = 1.15
FEWER_LOADS: Final = (0.6, 0.85)
CASCADE: Final = "cascade"
BASELINES: Final = ("round_robin", "least_loaded", "vllm_dp", "llumnix", "prefix_aware", "static_length")
POOLS: Final = "static_length"
POOLS_LOADS: Final = (0.3, 0.6)
"""Above this load, fixed pools overflow: at 85 % they are several times slower than anything else."""
FEWER_BASELINES: Final = ("round_robin", "least_loaded", "vllm_dp", "llumnix")
SEEDS: Final = (0, 1)

TUNED_PROFILES: Final = ("h100-llama-3.1-8b", "a100-llama-3.1-8b", "h100-llama-3.1-70b-tp4")
TUNED_TRACES: Final = ("azure_2023_conv", "sharegpt_8k_llama2", "mooncake_synthetic")
TUNED_LOAD: Final = 0.85
RIVALS: Final = ("least_loaded", "vllm_dp", "llumnix", "prefix_aware", "bucket", "power_of_two")
NOT_SHARING: Final = "cascade-no-share"
BUDGETS: Final = (512, 1024, 2048, 8192)
TUNED_SEEDS: Final = (0, 1, 2)

ABLATIONS: Final = (
    "cascade-no-refine",
    "cascade-no-rebalance",
    "cascade-no-replan",
    "cascade-static",
    "cascade-no-migrate",
    "cascade-cold",
)
ABLATION_TRACES: Final = ("sharegpt_v3_firstturn_llama3", "sharegpt_8k_llama2", "servegen_deepseek_r1_1h")
ABLATION_LOADS: Final = (0.6, 0.85)


def tuned_cells() -> list[Cell]:
    """Cells of the comparison with tuned rivals, seed by seed."""
    return [
        Cell(profile, trace, TUNED_LOAD, policy, seed, max_batched_tokens=budget)
        for seed, profile, trace, budget, policy in product(
            TUNED_SEEDS, TUNED_PROFILES, TUNED_TRACES, BUDGETS, (CASCADE, NOT_SHARING, *RIVALS)
        )
    ]


def cells() -> list[Cell]:
    """All cells, in the order in which they are run: those that most tables need come first."""
    main = product(PAPER_GPUS, TRACES, (*LOADS, OVERLOAD), (CASCADE, *BASELINES))
    other = product(OTHER_GPUS, TRACES, FEWER_LOADS, (CASCADE, *FEWER_BASELINES))
    ablations = product(PAPER_GPUS, ABLATION_TRACES, ABLATION_LOADS, ABLATIONS)
    found = [
        Cell(profile, trace, load, policy, seed)
        for part in (main, ablations, other)
        for profile, trace, load, policy in part
        if policy != POOLS or load in POOLS_LOADS
        for seed in SEEDS
    ]
    profile, instances = LARGE
    large = product((profile,), TRACES[:2], (*FEWER_LOADS, OVERLOAD), (CASCADE, *FEWER_BASELINES))
    return found + [Cell(*what, seed, instances) for what in large for seed in SEEDS]
