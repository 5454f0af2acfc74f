"""The weight image: one file with all tensors of a model in f32, which every worker maps.

An image is written once for each pair of model files and packing. Workers share one copy of it in the page cache. Two
packings exist: `panels` for the CPU kernels, `rows` for the torch reference. A file holds the header length in 8 bytes,
the header as JSON, then the tensors, aligned to cache lines. The header contains a fingerprint of all values, which
keeps KV apart that was computed with other weights. The module knows the tensors of the supported architectures, and
nothing of what is computed with them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from muxmesh.models.matrix_packing import pack_gated, pack_panels, padded
from muxmesh.models.model_spec import ModelSpec
from muxmesh.models.safetensors_folder import FolderWeights, weight_files
from muxmesh.models.weight_shapes import check_weights, expected_weights

Packing = Literal["panels", "rows"]
_VERSION = 3
"""Part of the file name. Raise it with every change of the file layout."""
_ALIGNMENT_BYTES = 64
_HEADER_BYTES_PER_TENSOR = 128
_FINGERPRINT = "fingerprint"
_FINGERPRINT_BYTES = 16


def ensure_image(
    folder: Path, spec: ModelSpec, packing: Packing, cache_dir: Path, progress: Callable[[int, int], None]
) -> Path:
    """Returns the image of the model in ``folder``; writes it first if it does not exist.

    Blocks; a lock file lets only one process write an image. ``progress`` gets (layers done, layers in total). Raises
    ModelUnsupported if a weight is missing, superfluous, damaged or of another shape.
    """
    path = cache_dir / "images" / f"{folder.name}-{_file_stamp(folder)}-{packing}-v{_VERSION}.f32"
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.is_file():
            partial = path.with_suffix(".partial")
            try:
                with partial.open("wb") as file:
                    weights = FolderWeights(folder)
                    check_weights(folder, weights.shapes(), expected_weights(spec))
                    _write(file, spec, _tensors(weights, spec, packing, progress))
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)  # a full disk needs the space
    return path


@dataclass(frozen=True, slots=True)
class Image:
    """A mapped image. ``flat`` is the whole file as f32; ``parts`` maps a tensor name to its (offset, length) in it."""

    flat: np.ndarray
    parts: Mapping[str, tuple[int, int]]
    shapes: Mapping[str, tuple[int, ...]]
    fingerprint: str

    def get(self, name: str) -> np.ndarray:
        """Returns a view of one tensor in its shape. Raises KeyError."""
        offset, length = self.parts[name]
        return self.flat[offset : offset + length].reshape(self.shapes[name])


def map_image(path: Path) -> Image:
    """Maps an image that `ensure_image` returned.

    The mapping is private and writable, because torch warns about read-only arrays. No caller writes to it, so the
    kernel copies no page.
    """
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    header_bytes = int.from_bytes(mapped[:8], "little")
    header = json.loads(mapped[8 : 8 + header_bytes])
    fingerprint = header.pop(_FINGERPRINT)
    return Image(
        flat=np.frombuffer(mapped, dtype=np.float32),
        parts={name: (entry["at"], int(np.prod(entry["shape"]))) for name, entry in header.items()},
        shapes={name: tuple(entry["shape"]) for name, entry in header.items()},
        fingerprint=fingerprint,
    )


def _write(file: BinaryIO, spec: ModelSpec, tensors: Iterator[tuple[str, np.ndarray]]) -> None:
    header_bytes = padded(8 + _HEADER_BYTES_PER_TENSOR * (9 * spec.num_layers + 4), 4096)
    file.seek(header_bytes)
    header: dict[str, Any] = {}
    digest = hashlib.blake2b(digest_size=_FINGERPRINT_BYTES)
    for name, array in tensors:
        file.seek(padded(file.tell(), _ALIGNMENT_BYTES))
        header[name] = {"at": file.tell() // 4, "shape": array.shape}
        data = np.ascontiguousarray(array, dtype=np.float32).data
        digest.update(f"{name}:{array.shape}:".encode())
        digest.update(data)
        file.write(data)
    file.truncate(padded(file.tell(), _ALIGNMENT_BYTES))
    text = json.dumps({**header, _FINGERPRINT: digest.hexdigest()}).encode()
    assert len(text) + 8 <= header_bytes, "the header fits into the space reserved for it"
    file.seek(0)
    file.write(len(text).to_bytes(8, "little") + text)


def _tensors(
    weights: FolderWeights, spec: ModelSpec, packing: Packing, progress: Callable[[int, int], None]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields every tensor of the image. Q, K and V form one matrix, gate and up another."""
    pack, gated = (pack_panels, pack_gated) if packing == "panels" else (_unpacked, _stacked)
    hidden, inner = spec.hidden_size, spec.intermediate_size
    q_rows, kv_rows = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    qkv_rows = {"q": q_rows, "k": kv_rows, "v": kv_rows}
    embed = weights.read("model.embed_tokens.weight", spec.vocab_size, hidden)
    if spec.tied_embeddings:
        yield "lm_head", pack(embed)
    else:
        yield "embed", embed
        yield "lm_head", pack(weights.read("lm_head.weight", spec.vocab_size, hidden))
    yield "norm", weights.read("model.norm.weight", hidden)
    for layer in range(spec.num_layers):
        prefix = f"model.layers.{layer}."
        attention = f"{prefix}self_attn."
        qkv = [weights.read(f"{attention}{part}_proj.weight", rows, hidden) for part, rows in qkv_rows.items()]
        yield f"{layer}.input_norm", weights.read(f"{prefix}input_layernorm.weight", hidden)
        yield f"{layer}.qkv", pack(np.concatenate(qkv))
        if spec.qkv_bias:
            bias = [weights.read(f"{attention}{part}_proj.bias", rows) for part, rows in qkv_rows.items()]
            yield f"{layer}.qkv_bias", np.concatenate(bias)
        if spec.qk_norm:
            yield f"{layer}.q_norm", weights.read(f"{attention}q_norm.weight", spec.head_dim)
            yield f"{layer}.k_norm", weights.read(f"{attention}k_norm.weight", spec.head_dim)
        yield f"{layer}.o", pack(weights.read(f"{attention}o_proj.weight", hidden, q_rows))
        yield f"{layer}.post_norm", weights.read(f"{prefix}post_attention_layernorm.weight", hidden)
        gate, up = (weights.read(f"{prefix}mlp.{part}_proj.weight", inner, hidden) for part in ("gate", "up"))
        yield f"{layer}.gate_up", gated(gate, up)
        yield f"{layer}.down", pack(weights.read(f"{prefix}mlp.down_proj.weight", hidden, inner))
        progress(layer + 1, spec.num_layers)


def _unpacked(matrix: np.ndarray) -> np.ndarray:
    return matrix


def _stacked(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    return np.concatenate([gate, up])


def _file_stamp(folder: Path) -> str:
    """Digest of the sizes and times of weight files and config; changes when one is replaced. Reads no weights."""
    digest = hashlib.sha256(str(folder.resolve()).encode())
    for path in sorted([*weight_files(folder), folder / "config.json"]):
        status = path.stat()
        digest.update(f"{path.name}:{status.st_size}:{status.st_mtime_ns}".encode())
    return digest.hexdigest()[:12]
