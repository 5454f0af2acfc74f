"""What a client sends beside its requests, as metadata: its API key, and the ticket of an earlier refusal."""

from __future__ import annotations

from muxmesh.errors import InvalidRequest, MeshError, Overloaded


def key_metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    """The metadata to send with each call. Raises InvalidRequest, without the key, if no metadata can carry it."""
    if not api_key:
        return ()
    if not isinstance(api_key, str) or not all("!" <= character <= "~" for character in api_key):
        raise InvalidRequest("api_key", "has characters that no API key has: spaces, line ends or others than ASCII")
    return (("authorization", f"Bearer {api_key}"),)


def ticket_metadata(error: MeshError) -> tuple[tuple[str, str], ...]:
    """The metadata with which a call that ended with ``error`` is sent again."""
    ticket = error.ticket if isinstance(error, Overloaded) else ""
    return (("x-muxmesh-ticket", ticket),) if ticket else ()
