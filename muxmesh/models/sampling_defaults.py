"""The sampling parameters that a model recommends, from its generation_config.json. Knows no request.

They are read and applied as vLLM does with `--generation-config auto`: `do_sample` is ignored, so a file that has only
`do_sample: false` does not make sampling greedy, and without the file those in config.json count.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from muxmesh.models.file_fields import FileFields
from muxmesh.models.model_files import read_json_object
from muxmesh.types import MAX_REPETITION_PENALTY, MAX_TEMPERATURE, Sampling

_MAX_TOP_K = (1 << 32) - 1
_MAX_TOKENS = (1 << 31) - 1


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What applies where a request leaves a field unset. None: the model recommends nothing."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None

    def sampling(self) -> dict[str, Any]:
        """The recommended fields of `Sampling` by name."""
        named = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "max_new_tokens"}
        return {name: value for name, value in named.items() if value is not None}

    def applied_to(self, sampling: Sampling, unset: Set[str]) -> Sampling:
        """``sampling`` with the defaults for its fields in ``unset``."""
        found = {name: value for name, value in self.sampling().items() if name in unset}
        return replace(sampling, **found) if found else sampling

    def limited(self, max_new_tokens: int) -> int:
        """The configured default ``max_new_tokens``, limited by that of the model."""
        return max_new_tokens if self.max_new_tokens is None else min(max_new_tokens, self.max_new_tokens)


NO_DEFAULTS = SamplingDefaults()
"""Of a model that recommends nothing."""


def read_sampling_defaults(folder: Path) -> SamplingDefaults:
    """Reads the defaults of the model in ``folder``. Raises ModelUnsupported, which names file and field."""
    path = folder / "generation_config.json"
    content = read_json_object(path)
    if content is None:
        path = folder / "config.json"
        content = read_json_object(path) or {}
    found = FileFields(path, content)
    top_k = found.integer("top_k", -1, _MAX_TOP_K)
    return SamplingDefaults(
        temperature=found.number("temperature", 0.0, MAX_TEMPERATURE, or_equal=True),
        top_k=top_k if top_k is None else max(top_k, 0),  # -1 is vLLM's "off"
        top_p=found.number("top_p", 0.0, 1.0),
        min_p=found.number("min_p", 0.0, 1.0, or_equal=True),
        repetition_penalty=found.number("repetition_penalty", 0.0, MAX_REPETITION_PENALTY),
        max_new_tokens=found.integer("max_new_tokens", 1, _MAX_TOKENS),
    )
