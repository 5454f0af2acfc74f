"""What a decode worker reports of one of its sequences. Pure.

It travels in shared memory (`kvstore.progress_page`); the simulator's workers report the same.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SequenceProgress:
    """The state of one sequence.

    ``is_batched``: whether the batch has it. ``decode_s``: remaining decode work in seconds; None: as in its request.
    ``served_s``: work done in seconds. ``is_protected``: see
    `muxmesh.batch_choice.is_protected`. ``num_preemptions``: how often it was displaced from the batch.
    """

    is_batched: bool
    decode_s: float | None = None
    served_s: float = 0.0
    is_protected: bool = False
    num_preemptions: int = 0
