"""
Words of a request that are reserved for the service: what instances tell each other about a moving request.

vLLM accepts them from clients on every API, for deployments in which another router sets them. Here the service does,
and a client that could set them could have an engine connect anywhere, read other clients' KV caches, or fill the
prefix cache with foreign content.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

FORBIDDEN: Final = ("kv_transfer_params", "ec_transfer_params")
WHY_REFUSED: Final = "is not for clients: this service moves requests between its instances by itself"
CONTAINERS: Final = ("vllm_xargs", "extra_args", "extra_kwargs", "extra_body", "sampling_params", "pooling_params")
"""Fields whose content vLLM hands to the engine unchanged; they may be nested in one another."""


def forbidden_words(body: Any) -> Iterator[tuple[str, ...]]:
    """
    Paths to the forbidden words of a decoded body, wherever vLLM would read them; message texts and tool schemas are
    not searched.

    Args:
        body: An object, or, as in batches, a list of objects.
    """
    if isinstance(body, Mapping):
        for name, value in body.items():
            if name in FORBIDDEN and value is not None:
                yield (name,)
            elif name in CONTAINERS:
                yield from ((name, *path) for path in forbidden_words(value))
    elif isinstance(body, Sequence) and not isinstance(body, str | bytes):
        for index, part in enumerate(body):
            yield from ((str(index), *path) for path in forbidden_words(part))


def without_words(body: Any) -> Any:
    """The same body without those words."""
    if isinstance(body, Mapping):
        return {
            name: without_words(value) if name in CONTAINERS else value
            for name, value in body.items()
            if name not in FORBIDDEN
        }
    if isinstance(body, Sequence) and not isinstance(body, str | bytes):
        return [without_words(part) for part in body]
    return body
