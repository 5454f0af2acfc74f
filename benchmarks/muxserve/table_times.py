"""Step times of the simulator's workers from a table of measured times."""

from __future__ import annotations

from dataclasses import dataclass, field

from muxmesh.placement.step_table import StepTable
from muxmesh.step_cost import StepShape
from muxmesh.types import Role

_SHORT, _LONG = 128, 512
"""Context lengths between which a decode step's time is taken to be linear in the context; the table has both."""


@dataclass(frozen=True)
class TableStepTimes:
    """`simulator.step_times.StepTimes` of a smoothed table."""

    table: StepTable
    _prefills: dict[tuple[int, int, float], float] = field(default_factory=dict, repr=False)

    def prefill_s(self, shape: StepShape, share: float) -> float:
        """The time of ``num_seqs`` prompts that have the mean length of those of the step."""
        length = max(1, round(shape.num_tokens / shape.num_seqs))
        key = (shape.num_seqs, length, share)
        if key not in self._prefills:
            self._prefills[key] = self.table.interpolated(Role.PREFILL, 100 * share, shape.num_seqs, length)
        return self._prefills[key]

    def decode_cost(self, num_seqs: int, share: float) -> tuple[float, float]:
        """The line through the times at two context lengths."""
        short_s, long_s = (
            self.table.interpolated(Role.DECODE, 100 * share, num_seqs, length) for length in (_SHORT, _LONG)
        )
        slope_s = max(0.0, long_s - short_s) / (_LONG - _SHORT)
        base_s = max(0.0, short_s - slope_s * _SHORT)
        return base_s, slope_s / num_seqs


def unloaded_latency_s(table: StepTable, num_prompt: int, num_output: int) -> float:
    """The end-to-end latency of one request alone on the whole device, to which scales of SLOs refer."""
    ttft_s, tpot_s = unloaded_targets_s(table, num_prompt, num_output)
    return ttft_s + (num_output - 1) * tpot_s


def unloaded_targets_s(table: StepTable, num_prompt: float, num_output: float) -> tuple[float, float]:
    """TTFT and mean TPOT of one request alone on the whole device, in seconds."""
    times = TableStepTimes(table)
    base_s, per_context_s = times.decode_cost(1, 1.0)
    prefill_s = times.prefill_s(StepShape(max(1, round(num_prompt)), 0, 1), 1.0)
    return prefill_s, base_s + per_context_s * (num_prompt + num_output / 2)
