"""Options of vLLM that `cascadeinfer serve` refuses, because they contradict ours or a migration would break them."""

from vllm.engine.arg_utils import AsyncEngineArgs

from cascadeinfer.core.errors import ConfigError


def check_engine_args(engine_args: AsyncEngineArgs) -> None:
    """
    Refuse vLLM options that contradict ours.

    Raises:
        ConfigError: With the option and the fix.
    """
    refused = (
        (
            engine_args.data_parallel_size > 1,
            "--data-parallel-size",
            "is vLLM's own way to run several engines",
            "use --instances instead",
        ),
        (
            engine_args.prefill_context_parallel_size > 1,
            "--prefill-context-parallel-size",
            "does not go with a connector that receives KV caches",
            "remove it",
        ),
        (
            engine_args.kv_transfer_config is not None,
            "--kv-transfer-config",
            "is set by CascadeInfer for live migration",
            "remove it",
        ),
        (
            engine_args.kv_offloading_size is not None,
            "--kv-offloading-size",
            "brings its own KV connector, and an engine has room for one",
            "remove it",
        ),
        (
            engine_args.enable_sleep_mode,
            "--enable-sleep-mode",
            "moves the KV cache to other memory without informing the peers that pull from it",
            "remove it",
        ),
        (
            engine_args.enable_return_routed_experts,
            "--enable-return-routed-experts",
            "would lose the experts of all tokens before a migration",
            "remove it",
        ),
    )
    for is_given, option, why, fix in refused:
        if is_given:
            raise ConfigError(why, option=option, fix=fix)
