"""The API key of a client, as metadata of its calls."""

from __future__ import annotations

import os

from muxmesh.errors import InvalidRequest

API_KEY_VARIABLE = "MUXMESH_API_KEY"


def key_metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    """The metadata to send with each call; None: the key in the environment, if there is one.

    Raises InvalidRequest for a key that no metadata can carry. The error does not quote it.
    """
    source = "api_key" if api_key is not None else API_KEY_VARIABLE
    key = os.environ.get(API_KEY_VARIABLE) if api_key is None else api_key
    if not key:
        return ()
    if not isinstance(key, str) or not all("!" <= character <= "~" for character in key):
        raise InvalidRequest(source, "has characters that no API key has: spaces, line ends or others than ASCII")
    return (("authorization", f"Bearer {key}"),)
