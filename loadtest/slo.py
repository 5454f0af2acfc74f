"""Latency of a request on an idle server, and how many requests stay within a multiple of it. Pure.

As in MuxServe (ICML'24, section 4.1): the SLO of a request is ``scale`` times what it takes alone, so long requests are
not judged by the measure of short ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loadtest.record import Record
from muxmesh.errors import ConfigError

SCALES = tuple(range(1, 17))


@dataclass(frozen=True, slots=True)
class Unloaded:
    """Seconds of a request alone: ``base_s + per_input_s * prompt tokens + per_output_s * answer tokens``."""

    base_s: float
    per_input_s: float
    per_output_s: float

    def e2el_s(self, num_input: int, num_output: int) -> float:
        """Predicted end-to-end latency."""
        return self.base_s + self.per_input_s * num_input + self.per_output_s * num_output


def fit_unloaded(records: Sequence[Record]) -> Unloaded:
    """Least squares over requests that ran one at a time, on relative error, no coefficient below 0.

    Raises ConfigError if none of them succeeded.
    """
    done = [record for record in records if record.is_ok]
    if not done:
        raise ConfigError("calibration: no request succeeded on the idle server")
    seconds = np.array([record.e2el_s for record in done])
    columns = np.array([[1.0, record.num_input, record.num_output] for record in done]) / seconds[:, None]
    chosen = [0, 1, 2] if len(done) > 3 else [2]
    while True:
        found, *_ = np.linalg.lstsq(columns[:, chosen], np.ones(len(done)), rcond=None)
        if (found >= 0).all() or len(chosen) == 1:
            break
        del chosen[int(np.argmin(found))]
    weights = np.zeros(3)
    weights[chosen] = np.maximum(found, 0)
    return Unloaded(*(float(weight) for weight in weights))


def attainment(records: Sequence[Record], unloaded: Unloaded) -> dict[int, float]:
    """Scale → part of all requests, failed ones too, that took at most ``scale`` times what they take alone."""
    if not records:
        return dict.fromkeys(SCALES, 0.0)
    pairs = [(r.e2el_s, unloaded.e2el_s(r.num_input, r.num_output)) for r in records if r.is_ok]
    return {scale: sum(taken_s <= scale * alone_s for taken_s, alone_s in pairs) / len(records) for scale in SCALES}
