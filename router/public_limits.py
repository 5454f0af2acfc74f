"""The limits of the router's public server, from its configuration and the served models. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from muxmesh.config.schema import RouterConfig
from muxmesh.rpc.client_limits import PublicLimits
from router import request_validation as valid
from router.served_models import ServedModel

RESERVED_FILES = 256
"""File descriptors kept for the router's own files and its connections to other processes."""
_MIN_CONNECTIONS = 16
_TOKEN_ID_BYTES = 5
_UTF8_BYTES = 4
_TURN_BYTES = 32
"""Role and framing of a turn of a conversation."""
_OTHER_BYTES = 4096
_BOUNDED_BYTES = (
    valid.MAX_MESSAGES * _TURN_BYTES
    + valid.MAX_STOP_STRINGS * (valid.MAX_STOP_STRING * _UTF8_BYTES + _TOKEN_ID_BYTES)
    + valid.MAX_STOP_TOKEN_IDS * _TOKEN_ID_BYTES
    + valid.MAX_LOGIT_BIAS * 4 * _TOKEN_ID_BYTES
    + valid.MAX_CACHE_SALT * _UTF8_BYTES
    + valid.MAX_REQUEST_ID
    + _OTHER_BYTES
)
"""All fields of a request but its prompt and `allowed_token_ids`, each as long as it may be."""


def public_limits(config: RouterConfig, models: Iterable[ServedModel], max_open_files: int) -> PublicLimits:
    """A message holds the longest prompt text, the longest context in token ids and every token as an allowed one."""
    served = list(models)
    context = max(model.limits.max_model_len for model in served)
    vocabulary = max(model.spec.vocab_size for model in served)
    return PublicLimits(
        max_message_bytes=config.max_prompt_bytes + _TOKEN_ID_BYTES * (context + vocabulary) + _BOUNDED_BYTES,
        max_connections=max(_MIN_CONNECTIONS, min(config.max_connections, max_open_files - RESERVED_FILES)),
        max_calls=config.max_calls_per_client,
        max_idle_s=config.max_idle_connection_s,
        slow_client_s=config.slow_client_s,
        exempt=config.exempt_clients,
    )
