"""
What a rolling update may change of an engine's options, and whether the front end can go on with the result.

The front end made its tokeniser, its defaults and its limits from the options of the start, and goes on with them. So
only options that it does not read may change: those of an engine's batches, memory and caches, and the model for
another version of the same: the same `config.json`, tokeniser and generation defaults, with other weights. Everything
else needs a new server, and is refused by name.

Three sets say what becomes of running requests: between `ALIKE` options they move with their KV cache; with
`OTHER_CACHE` they are recomputed where they cannot finish; with `OTHER_MODEL` they finish with the model that has begun
them.
"""

from argparse import SUPPRESS
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, NoReturn, TypeAlias

from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.tokenizers.registry import get_tokenizer
from vllm.utils.argparse_utils import FlexibleArgumentParser

from cascadeinfer.core.errors import ConfigError
from cascadeinfer.engines.vllm.refused_options import REFUSED_ENGINE_OPTIONS

ALIKE: Final = frozenset(
    {
        "enable_chunked_prefill",
        "enable_prefix_caching",
        "enforce_eager",
        "gpu_memory_utilization",
        "kv_cache_memory_bytes",
        "long_prefill_token_threshold",
        "max_num_batched_tokens",
        "max_num_seqs",
        "num_gpu_blocks_override",
        "safetensors_load_strategy",
        "stream_interval",
        "use_tqdm_on_load",
    }
)
OTHER_CACHE: Final = frozenset({"block_size", "kv_cache_dtype"})
OTHER_MODEL: Final = frozenset({"dtype", "model", "quantization", "revision"})

CHANGEABLE: Final = ALIKE | OTHER_CACHE | OTHER_MODEL

_NEW_SERVER: Final = "start a server with it"
_OF_THE_FRONT_END: Final = "is read by the front end, which goes on with what it was started with"
_OF_THE_PLACE: Final = "changes the cores or devices that an instance takes"
REFUSED_HERE: Final[Mapping[str, str]] = {
    **dict.fromkeys(("tensor_parallel_size", "pipeline_parallel_size", "decode_context_parallel_size"), _OF_THE_PLACE),
    **dict.fromkeys(
        (
            "disable_log_stats",
            "enable_log_requests",
            "generation_config",
            "max_logprobs",
            "max_model_len",
            "override_generation_config",
            "reasoning_parser",
            "served_model_name",
            "structured_outputs_config",
            "tokenizer",
            "tokenizer_mode",
            "tokenizer_revision",
        ),
        _OF_THE_FRONT_END,
    ),
}
"""Why, for options that an operator is likely to try; others are refused, too."""

OF_THE_FILES: Final = frozenset(
    {"_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype", "quantization_config"}
)
"""Entries of a `config.json` in which two versions of a model may differ."""
SAMPLE: Final = "The quick brown fox, 3.14 * 10²: «déjà vu»\n\tif x != y: return {}\n"

Key: TypeAlias = tuple[Any, ...]
"""Values that are equal for equal options, and only compared."""


def changes_in(words: Sequence[str], check: Callable[[str], None] | None = None) -> dict[str, Any]:
    """
    The options among these words, by the name of the argument.

    Args:
        words: Of a command line.
        check: Raises ConfigError if an argument of this name may not be among them; None: `check_name`.

    Raises:
        ConfigError: vLLM does not know one, or its value; or it may not be among them.
    """
    if file := next((word for word in words if word.partition("=")[0] == "--config"), None):
        _refuse(f"{file}: name the options themselves")
    parser = FlexibleArgumentParser(prog="cascadeinfer roll", add_help=False)
    parser.error = _refuse
    AsyncEngineArgs.add_cli_args(parser)
    for action in parser._actions:  # noqa: SLF001 - argparse has no other list
        action.default = SUPPRESS  # what is not said does not change
    try:
        said = vars(parser.parse_args(list(words)))
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(" ".join(str(error).split())) from error
    for name in said:
        (check or check_name)(name)
    return said


def check_code(engine_args: AsyncEngineArgs) -> None:
    """Raises ConfigError if another version of the model would bring code along that nobody has looked at."""
    if engine_args.trust_remote_code:
        raise ConfigError(
            "with --trust-remote-code, the new version's code would run for whoever has the admin key",
            option="--model",
            fix=_NEW_SERVER,
        )


def _refuse(message: str) -> NoReturn:
    raise ConfigError(message, fix="engine options of vLLM are expected")


def check_name(name: str) -> None:
    """Raises ConfigError if this engine argument cannot be changed by a rolling update."""
    if name in CHANGEABLE:
        return
    option = "--" + name.replace("_", "-")
    if (refused := REFUSED_ENGINE_OPTIONS.get(name)) is not None:
        raise ConfigError(refused.why, option=option, fix=refused.fix)
    why = REFUSED_HERE.get(name, "cannot be changed while instances with another value serve")
    raise ConfigError(why, option=option, fix=_NEW_SERVER)


def check_own_name(name: str) -> None:
    """Raises ConfigError if an instance cannot have a value of this engine argument that others do not have."""
    if name not in ALIKE:
        option = "--" + name.replace("_", "-")
        raise ConfigError("is the same for all instances", option=option, fix="give it to the server itself")


def model_key(engine_args: AsyncEngineArgs) -> Key:
    """What makes up the version of the model: its options, and the files of a folder as they are now."""
    return (*_values(engine_args, OTHER_MODEL), _files_of(Path(engine_args.model)))


def cache_key(engine_args: AsyncEngineArgs) -> Key:
    """What makes up the form of the KV cache."""
    return (*model_key(engine_args), *_values(engine_args, OTHER_CACHE))


def mark_of(engine_args: AsyncEngineArgs, keys: tuple[Key, Key]) -> str:
    """
    The same for options between which a rolling update would see no difference, in any process.

    Args:
        engine_args: As the operator has put them.
        keys: Of its model and of its KV cache.
    """
    return sha256(repr((keys, _values(engine_args, ALIKE))).encode()).hexdigest()[:16]


def _values(engine_args: AsyncEngineArgs, names: frozenset[str]) -> Key:
    return tuple(str(getattr(engine_args, name)) for name in sorted(names))


def _files_of(path: Path) -> Key:
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
    stats = [(file.name, file.stat()) for file in files if file.is_file()]
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def differences(before: AsyncEngineArgs, after: AsyncEngineArgs) -> tuple[str, ...]:
    """In which options that may change these differ, as words of a command line."""
    names = [field.name for field in fields(AsyncEngineArgs) if field.name in CHANGEABLE]
    changed = [(name.replace("_", "-"), getattr(after, name)) for name in names]
    return tuple(
        f"--{'' if value else 'no-'}{flag}" if isinstance(value, bool) else f"--{flag} {value}"
        for (flag, value), name in zip(changed, names, strict=True)
        if value != getattr(before, name)
    )


def check_same_service(old: VllmConfig, new: VllmConfig) -> None:
    """
    Refuse another model than another version of the same.

    Raises:
        ConfigError: The front end, made for the old one, would treat requests wrongly.
    """
    before, after = old.model_config.hf_config.to_dict(), new.model_config.hf_config.to_dict()
    for name in sorted((before.keys() | after.keys()) - OF_THE_FILES):
        if before.get(name) != after.get(name):
            _refuse_model(f"its config.json has {name} {after.get(name)}, the served one {before.get(name)}")
    if old.model_config.try_get_generation_config() != new.model_config.try_get_generation_config():
        _refuse_model("its generation_config.json differs")
    if not old.model_config.skip_tokenizer_init and _tokenizer_of(old) != _tokenizer_of(new):
        _refuse_model("its tokeniser differs")


def _refuse_model(why: str) -> NoReturn:
    raise ConfigError(f"is no version of the served model: {why}", option="--model", fix=_NEW_SERVER)


def _tokenizer_of(config: VllmConfig) -> Key:
    """What a tokeniser does, as far as a look can tell; read anew, because the files under a path may have changed."""
    model = config.model_config
    tokenizer = get_tokenizer(
        model.tokenizer,
        tokenizer_mode=model.tokenizer_mode,
        revision=model.tokenizer_revision,
        trust_remote_code=model.trust_remote_code,
    )
    template = getattr(tokenizer, "chat_template", None)
    return tokenizer.get_vocab(), tuple(tokenizer.encode(SAMPLE)), tuple(tokenizer.all_special_ids), template
