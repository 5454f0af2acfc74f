"""Limits that client and server share. Has no imports, so that the client can use it."""

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
"""Size limit of one message, in either direction."""
