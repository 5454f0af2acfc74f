"""Resolves a configured model to its files on disk: source folder, weight image, and the identity of its KV.

Knows the configuration and the cache. Starts no process and maps no weights for computing.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from muxmesh.block_hashes import KvIdentity
from muxmesh.config.model_config import ModelConfig
from muxmesh.config.runtime import PreparedModel
from muxmesh.config.schema import MeshConfig, UnitConfig
from muxmesh.config.section import Location
from muxmesh.errors import ConfigError
from muxmesh.local_path import local_path
from muxmesh.machine_limits import MemoryLimit
from muxmesh.models.catalog import CATALOG, hub_hint
from muxmesh.models.gguf_import import read_gguf
from muxmesh.models.host_memory import mesh_problems, pool_problems
from muxmesh.models.model_check import check_model, is_model
from muxmesh.models.model_download import Progress, ensure_imported, ensure_model, model_folder, present_folder
from muxmesh.models.model_spec import SIM_SPEC, ModelSpec, read_model_spec
from muxmesh.models.sampling_defaults import NO_DEFAULTS, SamplingDefaults, read_sampling_defaults
from muxmesh.models.weight_image import Packing, ensure_image, read_layout
from muxmesh.quoting import quoted


def machine_problems(config: MeshConfig, limit: MemoryLimit) -> Iterator[tuple[Location, str]]:
    """Yields what the configured units need and this machine lacks, each with the path of its field.

    ``limit``: the memory for all processes of the mesh together.
    """
    cores = os.sched_getaffinity(0)
    for unit_index, unit in enumerate(config.units):
        missing = sorted(set(unit.cores or ()) - cores)
        if missing:
            yield ("units", unit_index, "cores"), f"core {missing[0]} is not available; available: {sorted(cores)}"
    yield from pool_problems(config, limit)


def prepared_problems(
    config: MeshConfig, prepared: Mapping[str, Mapping[str, PreparedModel]], limit: MemoryLimit
) -> Iterator[tuple[Location, str]]:
    """Yields a problem if all processes of the mesh in one container need more memory than ``limit``.

    ``prepared``: each model of each unit. Of the weights only those count that may be in use at the same time: the
    kernel takes the pages of others, which are in their files.
    """
    in_use: dict[Path, int] = {}
    for unit in config.units:
        images = {model.image for model in prepared[unit.name].values() if model.image is not None}
        sizes = {image: image.stat().st_size for image in images}
        in_use |= dict(sorted(sizes.items(), key=lambda one: -one[1])[: unit.max_awake_models])
    return mesh_problems(config, in_use, limit)


def model_problems(
    config: MeshConfig, base_dir: Path, cache_dir: Path, with_weights: bool = True
) -> Iterator[tuple[Location, str]]:
    """Yields the problems of the configured models, each with the path of its field. Writes nothing.

    Relative sources start at ``base_dir``. A catalog model that is not downloaded yet is not checked: call again after
    the download. Without ``with_weights``, for routers, they are neither needed nor checked.
    """
    for unit_index, unit in enumerate(config.units):
        for model_index, model in enumerate(unit.models):
            for field, problem in _problems_of(model, unit, base_dir, cache_dir, with_weights):
                yield ("units", unit_index, "models", model_index, field), problem


def packing_of(unit: UnitConfig) -> Packing:
    """Returns the packing of weight images for the device of ``unit``."""
    return "rows" if unit.is_cuda else "panels"


def prepare_model(
    model: ModelConfig, packing: Packing, base_dir: Path, cache_dir: Path, progress: Progress, with_weights: bool = True
) -> PreparedModel:
    """Downloads, converts and packs the files of ``model`` where they are missing. Blocks.

    The weights get the model's dtype. Without ``with_weights``, for routers, there is no image. Raises
    ConfigError or ModelUnsupported, which names the model.
    """
    try:
        source = _catalog_name(model)
        if source:
            folder: Path | None = ensure_model(CATALOG[source], cache_dir, progress, with_weights)
        else:
            folder = _local_source(model, base_dir)
            if folder is not None and folder.is_file():
                folder = ensure_imported(folder, cache_dir, progress, with_weights)
        if model.engine == "sim" or folder is None:
            return PreparedModel(folder=folder, image=None, weights_fingerprint=model.sim.fingerprint)
        if not with_weights:
            return PreparedModel(folder=folder, image=None, weights_fingerprint="")
        show = functools.partial(progress, "preparing")
        image = ensure_image(folder, model_spec(folder), packing, cache_dir, show, model.dtype)
        return PreparedModel(folder=folder, image=image, weights_fingerprint=read_layout(image).fingerprint)
    except ConfigError as error:
        raise type(error)(f"model {model.name}: {error}") from error


def model_spec(folder: Path | None) -> ModelSpec:
    """Returns the spec of a prepared model; `SIM_SPEC` for a sim model without a folder. Raises ModelUnsupported."""
    return SIM_SPEC if folder is None else read_model_spec(folder)


def sampling_defaults(model: ModelConfig, folder: Path | None) -> SamplingDefaults:
    """Returns the defaults of ``model`` in its prepared ``folder``, as configured. Raises ModelUnsupported."""
    if folder is None or model.generation_config == "ignore":
        return NO_DEFAULTS
    return read_sampling_defaults(folder)


def kv_identity(unit: UnitConfig, model: ModelConfig, prepared: PreparedModel) -> KvIdentity:
    """Returns the identity of the KV of a prepared model on ``unit``: models share KV only if theirs are equal."""
    spec = model_spec(prepared.folder)
    device = " on cuda, K and V as rows" if unit.is_cuda else ""
    return KvIdentity(
        weights=prepared.weights_fingerprint,
        weight_dtype=model.dtype,
        kv_dtype=model.kv_dtype,
        layout=f"{model.engine}{device}: {spec.kv_shape(model.block_size, model.kv_dtype)}",
        rope=f"{spec.rope_theta} {spec.rope_scaling}",
    )


def local_model_spec(model: ModelConfig, base_dir: Path, cache_dir: Path) -> ModelSpec:
    """Returns the spec of a model without preparing it. Raises ConfigError if its files are not on this machine."""
    source = _catalog_name(model)
    path = model_folder(CATALOG[source], cache_dir) if source else _local_source(model, base_dir)
    if path is not None and not path.exists():
        raise ConfigError(f"{model.name}: is not on this machine; `muxmesh model pull {source}` downloads it")
    return read_gguf(path).spec if path is not None and path.is_file() else model_spec(path)


def _problems_of(
    model: ModelConfig, unit: UnitConfig, base_dir: Path, cache_dir: Path, with_weights: bool
) -> Iterator[tuple[str, str]]:
    """Yields (field, problem) of one model."""
    try:
        source = _catalog_name(model)
        folder = model_folder(CATALOG[source], cache_dir) if source else None
        path = present_folder(folder, with_weights) if folder else _local_source(model, base_dir)
        if source and path is not None and not path.is_dir():
            return
        spec = SIM_SPEC if path is None else check_model(path, with_weights=with_weights and model.engine != "sim").spec
    except ConfigError as error:
        yield "source", str(error)
        return
    if model.max_model_len is not None and model.max_model_len > spec.context_len:
        yield "max_model_len", f"is {model.max_model_len}; the model's context holds {spec.context_len} tokens"
    needed = spec.kv_shape(model.block_size, model.kv_dtype).token_block_bytes
    capacity = unit.capacity_tokens(model, needed)
    if model.max_model_len is not None and model.max_model_len > capacity > 0:
        yield "max_model_len", f"is {model.max_model_len}; the unit's kv_pool holds {capacity} tokens of this model"
    if needed > unit.total_slab:
        yield (
            "block_size",
            f"a token block of {model.block_size} tokens is {needed} bytes, a slab of the unit {unit.total_slab}; "
            "use a larger slab or a smaller block_size",
        )


def _catalog_name(model: ModelConfig) -> str | None:
    """Name of the catalog model to use, or None. A sim model uses one only if `source` names it."""
    source = model.source if model.engine == "sim" else model.source or model.name
    return source if source in CATALOG else None


def _local_source(model: ModelConfig, base_dir: Path) -> Path | None:
    """The local folder or GGUF file to use; None for a sim model without a source. Raises ConfigError."""
    if model.engine == "sim" and model.source is None:
        return None
    source = model.source or model.name
    path = local_path(source, base_dir)
    if is_model(path):
        return path
    if os.path.isfile(path) or path.suffix == ".gguf":
        problem = "is not a .gguf file" if os.path.lexists(path) else "does not exist"
        raise ConfigError(f"{quoted(source)} {problem}; a folder in Hugging Face style or a .gguf file is needed")
    given = quoted(source) if model.source is not None else f"is not set, and the model's name {quoted(source)}"
    raise ConfigError(
        f"{given} is neither a folder, nor a .gguf file, nor in the catalog ({', '.join(sorted(CATALOG))})"
        + hub_hint(source)
    )
