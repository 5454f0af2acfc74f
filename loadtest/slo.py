"""The latency of a request on an idle server, and SLO attainment at multiples of it. Pure.

As in MuxServe (ICML'24, section 4.1), the SLO of a request is ``scale`` times its unloaded latency, so it grows with
the request's own length.
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
    """Latency on an idle server, in s: ``base_s + per_input_s * prompt tokens + per_output_s * output tokens``."""

    base_s: float
    per_input_s: float
    per_output_s: float

    def e2el_s(self, num_input: int, num_output: int) -> float:
        return self.base_s + self.per_input_s * num_input + self.per_output_s * num_output


def fit_unloaded(records: Sequence[Record]) -> Unloaded:
    """Fits the latency to requests that ran one at a time. Raises ConfigError if none of them succeeded.

    Least squares on the relative error with no coefficient below 0. Fewer than four requests do not determine three
    coefficients; then only ``per_output_s`` is fitted.
    """
    done = [record for record in records if record.is_ok]
    if not done:
        raise ConfigError("calibration: no request succeeded on the idle server")
    seconds = np.array([record.e2el_s for record in done])
    columns = np.array([[1.0, record.num_input, record.num_output] for record in done]) / seconds[:, None]
    columns_in_use = [0, 1, 2] if len(done) > 3 else [2]
    while True:
        solution, *_ = np.linalg.lstsq(columns[:, columns_in_use], np.ones(len(done)), rcond=None)
        if (solution >= 0).all() or len(columns_in_use) == 1:
            break
        del columns_in_use[int(np.argmin(solution))]
    coefficients = np.zeros(3)
    coefficients[columns_in_use] = solution
    return Unloaded(*(float(coefficient) for coefficient in coefficients))


def attainment(records: Sequence[Record], unloaded: Unloaded) -> dict[int, float]:
    """Scale → share of the requests that took at most ``scale`` times the unloaded latency; failed requests miss it."""
    if not records:
        return dict.fromkeys(SCALES, 0.0)
    pairs = [(r.e2el_s, unloaded.e2el_s(r.num_input, r.num_output)) for r in records if r.is_ok]
    return {
        scale: sum(measured_s <= scale * unloaded_s for measured_s, unloaded_s in pairs) / len(records)
        for scale in SCALES
    }
