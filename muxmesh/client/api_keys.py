"""The API key of a client, as metadata of its calls."""

from __future__ import annotations

from muxmesh.errors import InvalidRequest


def key_metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    """The metadata to send with each call. Raises InvalidRequest, without the key, if no metadata can carry it."""
    if not api_key:
        return ()
    if not isinstance(api_key, str) or not all("!" <= character <= "~" for character in api_key):
        raise InvalidRequest("api_key", "has characters that no API key has: spaces, line ends or others than ASCII")
    return (("authorization", f"Bearer {api_key}"),)
