"""The service level objective (SLO) of a model, in mesh.yaml. Knows no request and no measured time."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from muxmesh.config.section import Section

_MAX_SLO_S = 86_400.0
NO_OBJECTIVE = "sets no objective; set ttft_s, tpot_s or both, in seconds, or scale, such as scale: 8"
"""The problem of a section that `is_empty`."""


class SloConfig(Section):
    """What latency the requests of a model are to have: limits in seconds, or a multiple of the unloaded latency.

    The mesh counts the requests that meet it, and the arbiter lets a worker that is about to miss it compute first. No
    request is refused for it.
    """

    ttft_s: float | None = Field(default=None, gt=0, le=_MAX_SLO_S)
    """Longest time to first token, in seconds from the arrival at the router. Unset: no limit."""
    tpot_s: float | None = Field(default=None, gt=0, le=_MAX_SLO_S)
    """Longest mean time per output token after the first, in seconds. Unset: no limit."""
    scale: float | None = Field(default=None, ge=1, le=1000)
    """The limits are this multiple of the unloaded latency, so that they grow with the request: TTFT of the time of its
    prefill, TPOT of the time of a decode step, each at batch size 1 (`muxmesh/unloaded_latency.py`). Not together with
    ttft_s or tpot_s."""

    @model_validator(mode="after")
    def _has_limits_or_a_scale_not_both(self) -> Self:
        limits = [name for name in ("ttft_s", "tpot_s") if getattr(self, name) is not None]
        if self.scale is not None and limits:
            raise ValueError(
                f"scale: contradicts {' and '.join(limits)}: set limits in seconds (ttft_s, tpot_s or both) or scale"
            )
        return self

    @property
    def is_empty(self) -> bool:
        """Whether it sets no objective; a file is refused then."""
        return self.ttft_s is None and self.tpot_s is None and self.scale is None
