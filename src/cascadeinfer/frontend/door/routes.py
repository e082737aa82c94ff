"""
Which key a route requires. Routes not listed here require the admin key, so one that a later vLLM adds is closed by
default.

`OPEN` is for probes and scrapers; `PAGE` holds no data. `INFERENCE` is what clients of a model need. Everything else
changes the service, or reveals more of it than a client needs: pausing, sleeping, caches, weights, adapters, scaling,
aborting other clients' requests, everything below `/admin`.
"""

import enum
import re
from typing import Final


class Access(enum.Enum):
    """Who may use a route."""

    OPEN = "open"
    INFERENCE = "inference"
    ADMIN = "admin"


OPEN: Final = frozenset({"/health", "/health/live", "/health/ready", "/ping", "/metrics", "/metrics/"})
PAGE: Final = "/admin"
"""The operator's page without its data, which the admin key opens; a browser's address bar cannot send a key."""
DOCUMENTATION: Final = frozenset({"/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json"})
INFERENCE: Final = (
    r"/v1/models",
    r"/v1/(chat/)?completions(/batch|/render|/derender)?",
    r"/v1/responses(/render|/[^/]+|/[^/]+/cancel)?",
    r"/v1/messages(/count_tokens|/render)?",
    r"/v1/(embeddings|score|rerank|systemone|realtime)",
    r"/v1/audio/(transcriptions|translations)",
    r"/v2/(rerank|embed)",
    r"/cohere/v2/chat(/render)?",
    r"/inference/v1/generate",
    r"/(generative_scoring|pooling|classify|score|rerank|invocations)",
    r"/(tokenize|detokenize|tokenizer_info|load|version)",
)
"""Regular expressions over whole paths."""
IMPOSSIBLE: Final = {
    "/scale_elastic_ep": "instances are added and removed with POST and DELETE /admin/instances",
    "/is_scaling_elastic_ep": "instances are added and removed with POST and DELETE /admin/instances",
}
"""vLLM routes that cannot work over several instances, and what to use instead."""
_INFERENCE: Final = re.compile("|".join(f"(?:{pattern})" for pattern in INFERENCE))


def access_of(path: str) -> Access:
    """
    Who may use a path.

    Args:
        path: Decoded, without the prefix under which the service is mounted.
    """
    if path in OPEN or path == PAGE:
        return Access.OPEN
    if path in DOCUMENTATION or _INFERENCE.fullmatch(path):
        return Access.INFERENCE
    return Access.ADMIN
