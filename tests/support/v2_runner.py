"""
A pytest plugin that runs the engine tests on vLLM's V2 model runner without a GPU.

Use it with `pytest -p support.v2_runner` or `make test-v2`.

GPUs use the V2 runner. vLLM has a subclass of it for CPUs (`vllm/v1/worker/cpu/model_runner.py`), whose Triton kernels
run in Triton's interpreter. vLLM's CPU build switches Triton off by the name of its version; this plugin switches it on
again before the rest of vLLM is imported. It changes no file of vLLM. It cannot exercise CUDA graphs, streams, or
kernels as they are compiled for a GPU.
"""

import os
from typing import Any, ClassVar

import torch

ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TRITON_INTERPRET": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
}


class GrammarMask:
    """
    vLLM's `_apply_grammar_bitmask_kernel` in torch: the interpreter cannot reshape the values it unpacks.

    The arguments are the kernel's. `bitmask` holds one bit per token of the vocabulary for each mask, 32 bits to a
    word; `logits_indices` names the request and position that each mask is for.
    """

    def __getitem__(self, _grid: tuple[int, ...]) -> Any:
        """Kernels are called with a grid; this one needs none."""
        return self.apply

    @staticmethod
    def apply(
        logits: torch.Tensor,
        _logits_stride: int,
        logits_indices: torch.Tensor,
        cu_num_logits: torch.Tensor,
        bitmask: torch.Tensor,
        _bitmask_stride: int,
        vocab_size: int,
        *,
        MASK_STRIDE: int,  # noqa: N803 - the kernel's name for it
        BLOCK_SIZE: int,  # noqa: ARG004, N803 - the kernel has it
    ) -> None:
        """Set the logits of tokens whose bit is 0 to minus infinity."""
        firsts = cu_num_logits.tolist()
        for words, place in zip(bitmask, logits_indices.tolist(), strict=True):
            request, position = divmod(place, MASK_STRIDE)
            if position < firsts[request + 1] - firsts[request]:
                bits = (words[:, None] >> torch.arange(32, dtype=torch.int32)) & 1
                logits[firsts[request] + position].masked_fill_(bits.flatten()[:vocab_size] == 0, float("-inf"))


def patch_language_once() -> None:
    """
    Leave Triton's language interpreted, once it is.

    The interpreter replaces some three hundred functions of the language at each call of a kernel or device function,
    and puts them back after a kernel. Nothing is compiled here, so they may stay: kernels run twice as fast.
    """
    from triton import language
    from triton.runtime import interpreter

    class Everything:
        """Has the globals of a kernel that sees both modules of the language."""

        __globals__: ClassVar[dict[str, Any]] = {"tl": language, "core": language.core}

    class Stays:
        """Takes the place of the scope that puts things back."""

        def restore(self) -> None:
            """Nothing is put back."""

    interpreter._patch_lang(Everything)
    stays = Stays()
    interpreter._patch_lang = lambda _: stays


def use_v2() -> None:
    """Make engines that this process configures and forks use the V2 runner."""
    os.environ.update(ENVIRONMENT)
    from vllm import platforms

    assert platforms.current_platform.is_cpu()  # selects the platform by the version's name
    platforms.vllm_version_matches_substr = lambda _: False

    import vllm.config.vllm as config
    from vllm import triton_utils
    from vllm.v1.sample.ops import topk_topp_sampler
    from vllm.v1.worker.gpu import structured_outputs

    assert triton_utils.HAS_TRITON
    config.HAS_TRITON = True
    topk_topp_sampler.HAS_TRITON = False  # the interpreter cannot run that kernel; vLLM has the same in torch
    structured_outputs._apply_grammar_bitmask_kernel = GrammarMask()

    patch_language_once()

    from support.v2_states import allow_mutations, record_states

    record_states()
    allow_mutations()


use_v2()
