"""The models that share the device, as folders in the cache: SmolLM2, a cut of it, and a small random one.

All three have the tokenizer of SmolLM2, so that every server can load them. `python -m benchmarks.shared_device.models`
makes the folders and prints them.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from benchmarks.gpu.random_model import SAFETENSORS, RandomModel, write_random_model
from muxmesh.cli.common import cache_dir
from muxmesh.config.schema import DEFAULT_MODEL
from muxmesh.models.catalog import CATALOG
from muxmesh.models.model_download import ensure_model

KEPT_LAYERS = (*range(12), 15, 16, *range(18, 30))
"""Of the 30 layers of SmolLM2. Without the others its outputs are weaker, but still English."""
SMALL = RandomModel(
    num_layers=8, hidden_size=384, num_heads=6, num_kv_heads=2, head_dim=64, intermediate_size=1024, vocab_size=49152,
    tied=False,
)  # fmt: skip
"""Random weights: about a fifth of the cost of SmolLM2 for each token."""
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def full_model() -> Path:
    """SmolLM2-135M-Instruct."""
    return ensure_model(CATALOG[DEFAULT_MODEL], cache_dir(), lambda what, done, total: None)


def cut_model() -> Path:
    """SmolLM2-135M-Instruct pruned to 26 layers."""
    source = full_model()
    return _made(f"{source.name}-26-layers", lambda folder: write_cut(source, folder, KEPT_LAYERS))


def small_model() -> Path:
    """A random model, whose outputs do not end by themselves."""
    source = full_model()
    return _made(f"{source.name}-tokenizer-random-8-layers", lambda folder: _write_small(source, folder))


def write_cut(source: Path, folder: Path, kept_layers: Sequence[int]) -> None:
    """Writes the model in the folder ``source`` with only ``kept_layers``, renumbered in this order."""
    numbers = {str(layer): str(index) for index, layer in enumerate(kept_layers)}
    tensors: dict[str, np.ndarray] = {}
    for name, tensor in load_file(source / SAFETENSORS).items():
        layer = _LAYER.match(name)
        if layer is None:
            tensors[name] = tensor
        elif layer[1] in numbers:
            tensors[f"model.layers.{numbers[layer[1]]}.{name[layer.end() :]}"] = tensor
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / SAFETENSORS, {"format": "pt"})
    config = json.loads((source / "config.json").read_text()) | {"num_hidden_layers": len(kept_layers)}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    _copy_tokenizer(source, folder)


def _write_small(source: Path, folder: Path) -> None:
    write_random_model(folder, SMALL, "float16")
    _copy_tokenizer(source, folder)


def _copy_tokenizer(source: Path, folder: Path) -> None:
    for name in _TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)


def _made(name: str, write: Callable[[Path], None]) -> Path:
    """The folder ``name`` of the cache; written first if it is not there."""
    folder = cache_dir() / "models" / name
    if not folder.is_dir():
        partial = folder.with_name(f".{name}-partial")
        shutil.rmtree(partial, ignore_errors=True)
        write(partial)
        partial.rename(folder)
    return folder


def main() -> int:
    """Makes all folders."""
    for make in (full_model, cut_model, small_model):
        print(make())
    return 0


if __name__ == "__main__":
    sys.exit(main())
