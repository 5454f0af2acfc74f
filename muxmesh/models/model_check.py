"""Checks a model on disk and reports what an engine would load. `muxmesh up` and `muxmesh model inspect` share it.

Reads every file of the model but the values of the weights, and writes nothing.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from muxmesh.models.chat_template import ChatTemplate
from muxmesh.models.gguf_import import read_gguf
from muxmesh.models.model_spec import ModelSpec, read_model_spec
from muxmesh.models.safetensors_folder import FolderWeights
from muxmesh.models.sampling_defaults import NO_DEFAULTS, SamplingDefaults, read_sampling_defaults
from muxmesh.models.tokenizer import load_text_model
from muxmesh.models.weight_shapes import check_weights, expected_weights


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """A model whose files are sound. ``weight_dtypes`` are named as the format of the weights names them."""

    spec: ModelSpec
    sampling_defaults: SamplingDefaults
    chat_template: ChatTemplate | None
    weight_files: tuple[Path, ...]
    weight_dtypes: tuple[str, ...]


def is_model(path: Path) -> bool:
    """True for a folder or a .gguf file, the kinds that `check_model` checks. False for a path that cannot be read."""
    return os.path.isdir(path) or (os.path.isfile(path) and path.suffix == ".gguf")


def check_model(path: Path, with_weights: bool = True) -> ModelFacts:
    """Checks a folder in Hugging Face style or a GGUF file.

    Without ``with_weights``, for the sim engine, a folder needs no weights. Raises ModelUnsupported for the first
    problem, in one line: `FILE[:LINE]: field: problem`.
    """
    if path.is_dir():
        return _check_folder(path, with_weights)
    model = read_gguf(path)
    return ModelFacts(model.spec, NO_DEFAULTS, model.chat_template, (path,), tuple(model.tensor_types))


def _check_folder(folder: Path, with_weights: bool) -> ModelFacts:
    spec, defaults, text = read_model_spec(folder), read_sampling_defaults(folder), load_text_model(folder)
    spec = spec.ended_by(text.eos_token_id)
    if not with_weights:
        return ModelFacts(spec, defaults, text.chat_template, (), ())
    weights = FolderWeights(folder)
    check_weights(folder, weights.shapes(), expected_weights(spec))
    weights.check_dtypes()
    return ModelFacts(spec, defaults, text.chat_template, weights.files, tuple(weights.dtypes()))
