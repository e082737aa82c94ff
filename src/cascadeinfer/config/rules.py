"""Builds the rules for requests from the options of `serve`: who may send them, how large, with what in them."""

import os
from typing import Final

from cascadeinfer.config.schema import ServeOptions
from cascadeinfer.frontend.contents.limits import ContentLimits, SchemaLimits
from cascadeinfer.frontend.door.settings import DoorSettings
from cascadeinfer.frontend.server import RequestRules

ADMIN_KEY_VARIABLE: Final = "CASCADEINFER_ADMIN_API_KEY"


def rules_of(options: ServeOptions) -> RequestRules:
    """The rules for the server."""
    admin_key = options.admin_api_key or os.environ.get(ADMIN_KEY_VARIABLE)
    door = DoorSettings(
        (admin_key,) if admin_key else (),
        options.max_request_body_mb << 20,
        options.max_connections,
        options.header_timeout_s,
        options.body_timeout_s,
        options.send_timeout_s,
    )
    schemas = SchemaLimits(
        options.structured_max_kb << 10,
        options.structured_max_depth,
        options.structured_max_parts,
        options.structured_max_alternatives,
        options.structured_max_regex,
        options.structured_max_lengths,
    )
    contents = ContentLimits(options.client_kv_transfer_params == "ignore", schemas)
    return RequestRules(door, contents, options.placement_headers)
