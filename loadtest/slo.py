"""The latency of a request on an idle server, and SLO attainment at multiples of it and of the configured SLO. Pure.

As in MuxServe (ICML'24, section 4.1), the SLO of a request is ``scale`` times its unloaded latency, so it grows with
the request's own length. Each model has an unloaded latency of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from loadtest.record import INTERRUPTED, Record
from muxmesh.errors import ConfigError
from muxmesh.slo import FAILED, Objective, RequestSlo, UnloadedLatency, Verdict

SCALES = tuple(range(1, 17))
_SHORTEST_S = 1e-6
"""Shorter latencies count as this, as their error is relative."""


@dataclass(frozen=True, slots=True)
class Unloaded:
    """An `UnloadedLatency`, in s. The end to end one is ``base_s + per_input_s * prompt tokens + per_output_s * output
    tokens``, TTFT is ``ttft_base_s + ttft_per_input_s * prompt tokens``, and TPOT ``mean_tpot_s``.

    They are fitted apart, since the part of the prompt is small in most latencies from end to end. None, as in reports
    of earlier versions: as from end to end.
    """

    base_s: float
    per_input_s: float
    per_output_s: float
    ttft_base_s: float | None = None
    ttft_per_input_s: float | None = None
    mean_tpot_s: float | None = None

    def ttft_s(self, num_prompt: int) -> float:
        if self.ttft_base_s is None or self.ttft_per_input_s is None:
            return self.base_s + self.per_input_s * num_prompt
        return self.ttft_base_s + self.ttft_per_input_s * num_prompt

    def tpot_s(self, num_prompt: int, num_output: int = 1) -> float:
        return self.per_output_s if self.mean_tpot_s is None else self.mean_tpot_s

    def e2el_s(self, num_prompt: int, num_output: int) -> float:
        return self.base_s + self.per_input_s * num_prompt + self.per_output_s * num_output


def fit_unloaded(records: Sequence[Record]) -> Unloaded:
    """Fits the latency to requests that ran one at a time. Raises ConfigError if none of them succeeded.

    Least squares on the relative error with no coefficient below 0. Fewer than four requests do not determine three
    coefficients; then only ``per_output_s`` is fitted, and of the TTFT only ``ttft_base_s``.
    """
    done = [record for record in records if record.is_ok]
    if not done:
        raise ConfigError("calibration: no request succeeded on the idle server")
    is_determined = len(done) > 3
    base_s, per_input_s, per_output_s = _fit(
        [[1.0, r.num_input, r.num_output] for r in done],
        [r.e2el_s for r in done],
        [0, 1, 2] if is_determined else [2],
    )
    ttft_base_s, ttft_per_input_s = _fit(
        [[1.0, r.num_input] for r in done], [r.ttft_s for r in done], [0, 1] if is_determined else [0]
    )
    tpots_s = [record.tpot_s for record in done if record.tpot_s is not None]
    mean_tpot_s = float(np.mean(tpots_s)) if tpots_s else None
    return Unloaded(base_s, per_input_s, per_output_s, ttft_base_s, ttft_per_input_s, mean_tpot_s)


def _fit(rows: Sequence[Sequence[float]], measured_s: Sequence[float], in_use: list[int]) -> list[float]:
    """Least squares on the relative error over the columns ``in_use``; no coefficient is negative, the others are 0."""
    seconds = np.maximum(measured_s, _SHORTEST_S)
    columns = np.array(rows) / seconds[:, None]
    in_use = list(in_use)
    while True:
        solution, *_ = np.linalg.lstsq(columns[:, in_use], np.ones(len(rows)), rcond=None)
        if (solution >= 0).all() or len(in_use) == 1:
            break
        del in_use[int(np.argmin(solution))]
    coefficients = np.zeros(columns.shape[1])
    coefficients[in_use] = solution
    return [float(coefficient) for coefficient in coefficients]


@dataclass(frozen=True, slots=True)
class Objectives:
    """What the requests of each model are judged by, by the name of the model.

    ``unloaded``: the latency of the idle server; ``slos``: the configured SLOs. ``default``: the model of requests that
    name none.
    """

    unloaded: Mapping[str, UnloadedLatency] = field(default_factory=dict)
    slos: Mapping[str, Objective] = field(default_factory=dict)
    default: str = ""

    def verdict(self, record: Record) -> Verdict | None:
        """Whether a request met the SLO of its model. One that failed missed it.

        None: the model has none, its unloaded latency is not known, or the request was interrupted.
        """
        model = record.model or self.default
        slo = RequestSlo.of(self.slos.get(model), self.unloaded.get(model))
        if slo is None or record.status == INTERRUPTED:
            return None
        if not record.is_ok:
            return FAILED
        return slo.verdict(record.num_input, record.num_output, record.ttft_s, record.tpot_s, record.e2el_s)

    @property
    def limits(self) -> dict[str, dict[str, float]]:
        """The limits that each configured SLO sets."""
        fields = ("ttft_s", "tpot_s", "scale")
        return {
            name: {field: getattr(slo, field) for field in fields if getattr(slo, field) is not None}
            for name, slo in sorted(self.slos.items())
        }

    def by_scale(self, records: Sequence[Record]) -> dict[str, Any]:
        """The unloaded latency, and the attainment at multiples of it, of one model or of all models and of each."""
        counted = [record for record in records if record.status != INTERRUPTED]
        models = {name: _of_model(counted, name, self.default) for name in sorted(self.unloaded)}
        if len(models) == 1:
            ((name, own),) = models.items()
            return _scales(own, self.unloaded[name])
        by_model = {name: _scales(own, self.unloaded[name]) for name, own in models.items()}
        num_counted = max(1, sum(map(len, models.values())))
        return {
            "attainment": {
                scale: sum(by_model[name]["attainment"][scale] * len(own) for name, own in models.items()) / num_counted
                for scale in SCALES
            },
            "by_model": by_model,
        }


def _of_model(records: Sequence[Record], model: str, default: str) -> list[Record]:
    return [record for record in records if (record.model or default) == model]


def _scales(records: Sequence[Record], unloaded: UnloadedLatency) -> dict[str, Any]:
    coefficients = asdict(unloaded) if isinstance(unloaded, Unloaded) else None
    return {"unloaded": coefficients, "attainment": attainment(records, unloaded)}


def attainment_figures(verdicts: Sequence[Verdict | None]) -> dict[str, float | None]:
    """Shares of the requests with an SLO that met it, its two targets, and the end-to-end rule; None without any."""
    counted = [verdict for verdict in verdicts if verdict is not None]

    def share(num_met: int) -> float | None:
        return num_met / len(counted) if counted else None

    return {
        "slo_attainment": share(sum(one.met for one in counted)),
        "slo_ttft_attainment": share(sum(one.ttft for one in counted)),
        "slo_tpot_attainment": share(sum(one.tpot for one in counted)),
        "slo_e2el_attainment": share(sum(one.e2el for one in counted)),
    }


def attainment(records: Sequence[Record], unloaded: UnloadedLatency) -> dict[int, float]:
    """Scale → share of the requests that took at most ``scale`` times the unloaded latency; failed requests miss it."""
    if not records:
        return dict.fromkeys(SCALES, 0.0)
    pairs = [(r.e2el_s, unloaded.e2el_s(r.num_input, r.num_output)) for r in records if r.is_ok]
    return {
        scale: sum(measured_s <= scale * unloaded_s for measured_s, unloaded_s in pairs) / len(records)
        for scale in SCALES
    }
