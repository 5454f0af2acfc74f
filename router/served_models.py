"""The models that a router serves: limits, tokenizer, chat template and units. Reads no weights."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from muxmesh.config.model_config import ModelConfig
from muxmesh.config.runtime import MeshRuntime
from muxmesh.config.schema import UnitConfig
from muxmesh.errors import InvalidRequest, ModelNotFound
from muxmesh.models.model_spec import ModelSpec
from muxmesh.models.prepared_model import model_spec, sampling_defaults
from muxmesh.models.sampling_defaults import NO_DEFAULTS, SamplingDefaults
from muxmesh.models.tokenizer import TextModel, load_text_model
from muxmesh.quoting import quoted

_MAX_LISTED = 20


_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """Limits on requests for a model, in tokens. ``capacity_tokens``: what the KV pool of each of its units holds."""

    max_model_len: int
    capacity_tokens: int
    default_max_new_tokens: int
    eos_token_ids: frozenset[int]

    @staticmethod
    def of(
        model: ModelConfig,
        spec: ModelSpec,
        units: Sequence[tuple[UnitConfig, ModelConfig]],
        defaults: SamplingDefaults = NO_DEFAULTS,
    ) -> ModelLimits:
        """``units``: the units that serve the model, each with the model's configuration there."""
        capacity = min(
            unit.capacity_tokens(placed, spec.kv_shape(placed.block_size, placed.kv_dtype).token_block_bytes)
            for unit, placed in units
        )
        max_model_len = model.max_model_len or spec.context_len
        longest = defaults.limited(model.default_max_new_tokens)
        return ModelLimits(max_model_len, capacity, longest, spec.eos_token_ids)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A served model. ``config`` is that of its first unit; the fields that clients see are equal in all units."""

    name: str
    units: tuple[str, ...]
    config: ModelConfig
    spec: ModelSpec
    text: TextModel
    limits: ModelLimits
    sampling_defaults: SamplingDefaults = NO_DEFAULTS


class ServedModels:
    """Owns the set of served models. A change does not affect running requests."""

    def __init__(self) -> None:
        self._models: dict[str, ServedModel] = {}

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models.values())

    def add(self, model: ServedModel) -> None:
        """Adds a model, or replaces the one of the same name."""
        self._models[model.name] = model

    def remove(self, name: str) -> None:
        """Removes a model. Raises ModelNotFound."""
        del self._models[self.find(name).name]

    def find(self, name: str) -> ServedModel:
        """The model ``name``; an empty name is the only model. Raises ModelNotFound and InvalidRequest (`model`)."""
        if not name and len(self._models) == 1:
            return next(iter(self._models.values()))
        if not name and self._models:
            raise InvalidRequest("model", f"is needed, because the mesh serves several; one of: {self._listed()}")
        if name not in self._models:
            raise ModelNotFound(f"model: {quoted(name)} is not served; served: {self._listed()}")
        return self._models[name]

    def _listed(self) -> str:
        """The first of the names, for an error: a status message has a limit."""
        names = sorted(self._models)
        others = len(names) - _MAX_LISTED
        return ", ".join(names[:_MAX_LISTED]) + (f" and {others} others" if others > 0 else "")


def load_models(runtime: MeshRuntime) -> ServedModels:
    """Loads the tokenizer and limits of every model of the mesh. Raises ModelUnsupported for an unusable folder."""
    served = ServedModels()
    for name in runtime.config.models():
        served.add(load_model(runtime, name))
    for model in served:
        warn_of_chat(model)
    return served


def load_model(runtime: MeshRuntime, name: str) -> ServedModel:
    """Loads the tokenizer and limits of a model. Raises ModelUnsupported for an unusable folder."""
    config = runtime.config.models()[name]
    units = [runtime.model(unit.name, name) for unit in runtime.config.units_of(name)]
    folder = runtime.prepared_model(units[0][0].name, name).folder
    text = load_text_model(folder)
    spec = model_spec(folder).ended_by(text.eos_token_id)
    defaults = sampling_defaults(config, folder)
    limits = ModelLimits.of(config, spec, units, defaults)
    text.start_chat()  # in a process: the templates of all models are compiled at the same time
    return ServedModel(name, tuple(unit.name for unit, _ in units), config, spec, text, limits, defaults)


def warn_of_chat(model: ServedModel) -> None:
    """Logs why the model refuses chat, if its template is the reason."""
    if model.text.chat_template is not None and not model.text.has_chat_template:
        _log.warning("%s: chat is refused: %s", model.name, model.text.chat_template.problem)
