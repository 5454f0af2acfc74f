"""Which unit a sequence is sent to. Pure; the router and the simulator use it."""

from __future__ import annotations


def unit_load(*, is_connected: bool, num_queued: int, num_running: int) -> tuple[bool, int]:
    """Sort key of a unit that serves the model: the least is chosen, the first of equals.

    ``num_queued``, ``num_running``: this router's sequences of the model that wait for a credit there, and that have
    one. A unit that is not connected comes last.
    """
    return not is_connected, num_queued + num_running
