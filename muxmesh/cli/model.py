"""`muxmesh model list|pull|inspect`: the catalog, and what an engine would load from a folder or a GGUF file."""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path
from typing import Any

from muxmesh.cli.common import ProgressBar, cache_dir, current_dir, print_json
from muxmesh.config.model_config import ModelConfig
from muxmesh.errors import ConfigError
from muxmesh.local_path import local_path
from muxmesh.models.catalog import CATALOG, find_catalog_model, hub_hint
from muxmesh.models.model_check import check_model, is_model
from muxmesh.models.model_download import model_folder
from muxmesh.models.model_spec import DTYPE_BYTES, ModelSpec
from muxmesh.models.prepared_model import prepare_model
from muxmesh.models.sampling_defaults import SamplingDefaults
from muxmesh.models.weight_image import Packing
from muxmesh.quoting import quoted
from muxmesh.types import Dtype


def run(arguments: argparse.Namespace) -> int:
    """Runs the subcommand in ``arguments.action``; returns the exit code. Raises ConfigError, ModelUnsupported."""
    actions = {"list": _list, "pull": _pull, "inspect": _inspect}
    return actions[arguments.action](arguments)


def _list(arguments: argparse.Namespace) -> int:
    rows = [
        {
            "name": model.name,
            "description": model.description,
            "license": model.license,
            "download_bytes": model.download_bytes,
            "present": model_folder(model, cache_dir()).is_dir(),
        }
        for model in CATALOG.values()
    ]
    if arguments.json:
        print_json(rows)
    else:
        for row in rows:
            state = "downloaded" if row["present"] else f"{int(str(row['download_bytes'])) / 1e6:.0f} MB"
            print(f"{row['name']}  [{state}]  {row['description']}; {row['license']}")
    return 0


def _pull(arguments: argparse.Namespace) -> int:
    if arguments.name not in CATALOG and os.path.lexists(local_path(arguments.name, current_dir())):
        raise ConfigError(
            f"{quoted(arguments.name)} is on this machine, so there is nothing to download: name it as `source` in "
            "mesh.yaml; `muxmesh model inspect` shows it"
        )
    model = ModelConfig(name=find_catalog_model(arguments.name).name, dtype=arguments.dtype or "float32")
    packing: Packing = "panels" if arguments.dtype is None else "rows"
    prepared = prepare_model(model, packing, cache_dir(), cache_dir(), ProgressBar(arguments.name))
    if arguments.json:
        print_json({"name": arguments.name, "folder": str(prepared.folder), "image": str(prepared.image)})
    else:
        print(f"{arguments.name} is in {prepared.folder}")
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    path = local_path(arguments.path, current_dir())
    if not os.path.lexists(path) and arguments.path in CATALOG:
        path = model_folder(CATALOG[arguments.path], cache_dir())
    if is_model(path):
        facts = _facts(path, arguments.dtype or "float32")
    elif not os.path.lexists(path):
        raise ConfigError(_why_absent(arguments.path))
    else:
        raise ConfigError(f"{quoted(arguments.path)} is neither a folder nor a .gguf file")
    if arguments.json:
        print_json(facts)
    else:
        width = max(map(len, facts))
        for name, value in facts.items():
            print(f"{name.replace('_', ' ').ljust(width)}  {_format(value)}")
    return 0


def _why_absent(name: str) -> str:
    if name in CATALOG:
        return f"{name} is in the catalog and not downloaded yet; `muxmesh model pull {name}` downloads it"
    available = ", ".join(sorted(CATALOG))
    return f"{quoted(name)} is neither a folder, nor a .gguf file, nor in the catalog ({available}){hub_hint(name)}"


def _facts(path: Path, dtype: Dtype) -> dict[str, Any]:
    """What an engine would load from a folder, or a GGUF file, which is converted first. Raises ModelUnsupported."""
    model = check_model(path)
    problem = None if model.chat_template is None else model.chat_template.problem
    return {
        "folder" if path.is_dir() else "file": str(path),
        **_spec_facts(model.spec, dtype),
        "sampling_defaults": _given(model.sampling_defaults),
        "chat_template": model.chat_template is not None and problem is None,
        "chat_template_problem": problem,
        "weight_files": [file.name for file in model.weight_files],
        "weight_dtypes": list(model.weight_dtypes),
    }


def _spec_facts(spec: ModelSpec, dtype: Dtype) -> dict[str, Any]:
    kv = spec.kv_shape(ModelConfig(name="m").block_size, dtype)
    rope = spec.rope_scaling
    return {
        "architecture": spec.architecture,
        "parameters": spec.num_parameters,
        "layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "heads": spec.num_heads,
        "kv_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab_size,
        "context_len": spec.context_len,
        "tied_embeddings": spec.tied_embeddings,
        "qkv_bias": spec.qkv_bias,
        "qk_norm": spec.qk_norm,
        "rope_theta": spec.rope_theta,
        "rope_scaling": None if rope is None else {"type": type(rope).__name__, **dataclasses.asdict(rope)},
        "eos_token_ids": sorted(spec.eos_token_ids),
        "loaded_as": dtype,
        "image_bytes": DTYPE_BYTES[dtype] * spec.num_parameters,
        "kv_bytes_per_token": kv.kv_bytes_per_token,
    }


def _given(defaults: SamplingDefaults) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(defaults).items() if value is not None}


def _format(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{name} {part}" for name, part in value.items()) or "none"
    return str(value)
