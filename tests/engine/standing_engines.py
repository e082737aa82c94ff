"""
Two ordinary vLLM servers, as others start them, with our connector.

Arguments: the model, the file with the key, and for each server its HTTP port and its door's. They are forked from one
process that has imported vLLM, to start fast.
"""

import ctypes
import json
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def arguments(model: str, key_file: str, http_port: str, door_port: str) -> list[str]:
    """The command line of `vllm serve`, without the command."""
    transfer = {
        "kv_connector": "CascadeConnector",
        "kv_role": "kv_both",
        "kv_buffer_device": "cpu",
        "kv_connector_module_path": "cascadeinfer.engines.vllm.connector",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"cascade_listen": f"127.0.0.1:{door_port}", "cascade_key_file": key_file},
    }
    words = ["--model", model, "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", http_port]
    words += ["--dtype", "float32", "--block-size", "32", "--enforce-eager", "--num-gpu-blocks-override", "256"]
    words += ["--max-model-len", "1024", "--max-num-seqs", "16", "--distributed-executor-backend", "uni"]
    return [*words, "--kv-transfer-config", json.dumps(transfer)]


def serve(words: list[str], core: int) -> None:
    """Run vLLM's own server in this process until it is told to stop."""
    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from cascadeinfer.cli.vllm_options import make_arg_parser, validate_parsed_serve_args

    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = str(core)
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(words)
    validate_parsed_serve_args(args)
    uvloop.run(run_server(args))


def main() -> None:
    """Fork the servers and wait for them; SIGTERM ends them."""
    import vllm.entrypoints.launchers.api_server.entry  # noqa: F401 - once, for both

    model, key_file, *ports = sys.argv[1:]
    children = []
    for core, (http_port, door_port) in enumerate(zip(ports[::2], ports[1::2], strict=True)):
        if (child := os.fork()) == 0:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            serve(arguments(model, key_file, http_port, door_port), core)
            os._exit(0)
        children.append(child)

    def stop(*_: object) -> None:
        for child in children:
            os.kill(child, signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)
    for child in children:
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
