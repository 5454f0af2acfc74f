"""The prepared weight image: one safetensors file of fused f32 matrices that every worker maps.

Written once per (model files, dtype, packing); the pages are the page cache's, so any number of workers
share one copy. Reads and writes with numpy alone.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from muxmesh.errors import ModelUnsupported
from muxmesh.models.spec import ModelSpec

PACKING = "fused-v1"
"""Named in the file, so that a new layout is a new file."""


def ensure_image(
    folder: Path, spec: ModelSpec, dtype: str, cache_dir: Path, progress: Callable[[int, int], None]
) -> Path:
    """The image of the model in ``folder``, prepared if it is not there yet.

    ``progress`` gets (layers done, layers). Raises ModelUnsupported if a weight is missing or has another shape.
    """
    path = cache_dir / "images" / f"{folder.name}-{_fingerprint(folder)}-{dtype}-{PACKING}.safetensors"
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.is_file():
            partial = path.with_suffix(".partial")
            save_file(dict(_fused(_Weights(folder), spec, progress)), partial)
            os.replace(partial, path)
    return path


def map_image(path: Path) -> dict[str, np.ndarray]:
    """Tensor name → f32 array over the mapped file.

    The mapping is private and writable, as array libraries ask for; nothing writes, so no page is ever copied.
    """
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    header_bytes = int.from_bytes(mapped[:8], "little")
    header = json.loads(mapped[8 : 8 + header_bytes])
    whole = np.frombuffer(mapped, dtype=np.uint8)[8 + header_bytes :]
    return {
        name: whole[slice(*entry["data_offsets"])].view(np.float32).reshape(entry["shape"])
        for name, entry in header.items()
        if name != "__metadata__"
    }


class _Weights:
    """The source tensors of a folder, whichever file they are in, read as f32."""

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        names = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
        missing = sorted(name for name in names if not (folder / name).is_file())
        if missing:
            raise ModelUnsupported(f"{folder}: weights are missing: {', '.join(missing)}")
        self._folder = folder
        self._files: list[Any] = [safe_open(folder / name, framework="numpy") for name in sorted(names)]
        self._owner = {key: file for file in self._files for key in file.keys()}  # noqa: SIM118 - not a dict

    def read(self, name: str, *shape: int) -> np.ndarray:
        if name not in self._owner:
            raise ModelUnsupported(f"{self._folder}: weight {name} is missing")
        if self._owner[name].get_slice(name).get_dtype() == "BF16":
            raise ModelUnsupported(
                f"{self._folder}: weight {name} is bfloat16; convert the model to float16 or float32"
            )
        tensor = self._owner[name].get_tensor(name)
        if tensor.shape != shape:
            raise ModelUnsupported(f"{self._folder}: weight {name} has shape {tensor.shape}, config.json says {shape}")
        return np.asarray(tensor, dtype=np.float32)


def _fused(
    weights: _Weights, spec: ModelSpec, progress: Callable[[int, int], None]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields every tensor of the image: Q, K and V in one matrix, gate and up in one."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    q_rows, kv_rows = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    yield "embed", weights.read("model.embed_tokens.weight", spec.vocab_size, hidden)
    if not spec.tied_embeddings:
        yield "lm_head", weights.read("lm_head.weight", spec.vocab_size, hidden)
    yield "norm", weights.read("model.norm.weight", hidden)
    for layer in range(spec.num_layers):
        prefix = f"model.layers.{layer}."
        qkv = [weights.read(f"{prefix}self_attn.q_proj.weight", q_rows, hidden)]
        qkv += [weights.read(f"{prefix}self_attn.{part}_proj.weight", kv_rows, hidden) for part in "kv"]
        gate_up = [weights.read(f"{prefix}mlp.{part}_proj.weight", inner, hidden) for part in ("gate", "up")]
        yield f"{layer}.input_norm", weights.read(f"{prefix}input_layernorm.weight", hidden)
        yield f"{layer}.qkv", np.concatenate(qkv)
        yield f"{layer}.o", weights.read(f"{prefix}self_attn.o_proj.weight", hidden, q_rows)
        yield f"{layer}.post_norm", weights.read(f"{prefix}post_attention_layernorm.weight", hidden)
        yield f"{layer}.gate_up", np.concatenate(gate_up)
        yield f"{layer}.down", weights.read(f"{prefix}mlp.down_proj.weight", hidden, inner)
        progress(layer + 1, spec.num_layers)


def _fingerprint(folder: Path) -> str:
    """Changes when a weight file or the config is replaced; costs no reading of the weights."""
    digest = hashlib.sha256(str(folder.resolve()).encode())
    for path in sorted([*folder.glob("*.safetensors"), folder / "config.json"]):
        status = path.stat()
        digest.update(f"{path.name}:{status.st_size}:{status.st_mtime_ns}".encode())
    return digest.hexdigest()[:12]
