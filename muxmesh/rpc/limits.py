"""Limits that both ends of a call have to know. Needs nothing, so that the client can read it."""

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
