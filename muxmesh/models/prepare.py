"""From a model's configuration to what is on disk: folder and weight image."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from muxmesh.config.runtime import PreparedModel
from muxmesh.config.schema import ModelConfig, UnitConfig
from muxmesh.errors import ConfigError
from muxmesh.models.catalog import CATALOG
from muxmesh.models.image import ensure_image
from muxmesh.models.pull import Progress, ensure_model
from muxmesh.models.spec import SIM_SPEC, ModelSpec, read_model_spec


def prepare_model(model: ModelConfig, base_dir: Path, cache_dir: Path, progress: Progress) -> PreparedModel:
    """Downloads, converts and prepares what ``model`` needs; relative folders start at ``base_dir``.

    Raises ConfigError (or its child ModelUnsupported) naming the model.
    """
    try:
        folder = _folder(model, base_dir, cache_dir, progress)
        spec = model_spec(folder)
        if model.max_model_len is not None and model.max_model_len > spec.context_len:
            raise ConfigError(f"max_model_len is {model.max_model_len}, its context holds {spec.context_len} tokens")
        if model.engine == "sim" or folder is None:
            return PreparedModel(folder=folder, image=None)
        image = ensure_image(
            folder, spec, model.dtype, cache_dir, lambda done, total: progress("preparing", done, total)
        )
        return PreparedModel(folder=folder, image=image)
    except ConfigError as error:
        raise type(error)(f"model {model.name}: {error}") from error


def check_slabs(units: Iterable[UnitConfig], prepared: Mapping[str, PreparedModel]) -> None:
    """Raises ConfigError if a slab does not hold one token block of a model of its unit."""
    for unit in units:
        for model in unit.models:
            shape = model_spec(prepared[model.name].folder).kv_shape(model.block_size, model.dtype)
            if shape.token_block_bytes > unit.slab:
                raise ConfigError(
                    f"unit {unit.name}: slab is {unit.slab} bytes, a token block of {model.name} needs "
                    f"{shape.token_block_bytes}; use a larger slab or a smaller block_size"
                )


def model_spec(folder: Path | None) -> ModelSpec:
    """The spec of a prepared model; a sim model without a folder has the built-in one."""
    return SIM_SPEC if folder is None else read_model_spec(folder)


def _folder(model: ModelConfig, base_dir: Path, cache_dir: Path, progress: Progress) -> Path | None:
    source = model.source or model.name
    if source in CATALOG and (model.source is not None or model.engine != "sim"):
        return ensure_model(source, cache_dir, progress)
    folder = (base_dir / Path(source).expanduser()).resolve()
    if folder.is_dir():
        return folder
    if model.engine == "sim" and model.source is None:
        return None
    raise ConfigError(f"source {source!r} is neither a folder nor in the catalog ({', '.join(sorted(CATALOG))})")
