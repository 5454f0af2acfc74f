"""Which unit a sequence is sent to. Pure; the router and the simulator use it."""

from __future__ import annotations


def unit_load(*, is_connected: bool, num_assigned: int) -> tuple[bool, int]:
    """Sort key of a unit that serves the model: the least is chosen, the first of equals.

    ``num_assigned``: this router's sequences of the model that wait for a credit there, or have one. A unit that is not
    connected comes last.
    """
    return not is_connected, num_assigned
