"""
Starts a part of the GPU check: `python part.py MODULE --device cuda|cpu --rows FILE ...`.

The environment of engines is set before anything of vLLM is imported: no hub, no usage statistics, warnings only. The
processes of engines import the main program again (spawn). They find nothing here: vLLM's worker looks into every
loaded module, and some that the parts use (numba) would end it.
"""

import importlib
import os
import sys

if __name__ == "__main__":
    os.environ |= {
        "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn", "VLLM_CPU_KVCACHE_SPACE": "1",
    }  # fmt: skip
    importlib.import_module(sys.argv.pop(1)).main()
