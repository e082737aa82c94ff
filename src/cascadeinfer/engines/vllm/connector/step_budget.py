"""The chunk budget of an instance: how many tokens one of its steps may have."""

from vllm.config import VllmConfig


def step_budget_bounds(config: VllmConfig) -> tuple[int, int]:
    """
    The least and the most tokens of a step.

    The least is what all requests that may run at once need in a step in which none waits, the draft tokens of
    speculative decoding included. The most is what vLLM has made its buffers for.
    """
    limits, speculative = config.scheduler_config, config.speculative_config
    each = 1 + (0 if speculative is None else speculative.num_speculative_tokens)
    return limits.max_num_seqs * each, limits.max_num_scheduled_tokens or limits.max_num_batched_tokens
