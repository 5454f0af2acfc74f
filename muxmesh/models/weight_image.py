"""The weight image: one file with all tensors of a model in one data type, which every worker maps or loads.

An image is written once for each model, packing and data type. Workers on CPUs share one copy of it in the page cache,
workers of a GPU one copy in its memory. Two packings exist: `panels` for the CPU kernels, in float32; `rows` for torch,
whose matrices are [outputs, depth]. A file holds the header length in 8 bytes, the header as JSON, then the tensors,
aligned. The header contains a fingerprint of all values, which keeps KV apart that was computed with other weights. The
module knows the tensors of the supported architectures, and nothing of what is computed with them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from muxmesh.models.matrix_packing import pack_gated, pack_panels, padded
from muxmesh.models.model_spec import ModelSpec
from muxmesh.models.safetensors_folder import FolderWeights, weight_files
from muxmesh.models.stored_dtypes import STORED_AS
from muxmesh.models.weight_shapes import check_weights, expected_weights
from muxmesh.types import Dtype

Packing = Literal["panels", "rows"]
Sources = tuple[tuple[str, tuple[int, ...]], ...]
"""Names and shapes of the weights that one tensor of an image consists of, one below the other."""

_VERSIONS: dict[Packing, int] = {"panels": 3, "rows": 4}
"""Part of the file name. Raise one with every change of the packing's file layout."""
_ALIGNMENT_BYTES: dict[Packing, int] = {"panels": 64, "rows": 256}
"""A cache line; what torch's allocator gives tensors on a GPU."""
_SUFFIXES: dict[Dtype, str] = {"float32": ".f32", "float16": ".f16", "bfloat16": ".bf16"}
_HEADER_BYTES_PER_TENSOR = 128
_FINGERPRINT, _DTYPE = "fingerprint", "dtype"
_FINGERPRINT_BYTES = 16


def ensure_image(
    folder: Path,
    spec: ModelSpec,
    packing: Packing,
    cache_dir: Path,
    progress: Callable[[int, int], None],
    dtype: Dtype = "float32",
) -> Path:
    """Returns the image of the model in ``folder``; writes it first if it does not exist.

    Blocks; a lock file lets only one process write an image. ``progress`` gets (layers done, layers in total). Raises
    ModelUnsupported if a weight is missing, superfluous, damaged, of another shape, or too large for float16.
    """
    assert packing == "rows" or dtype == "float32", "the CPU kernels compute in float32"
    name = f"{folder.name}-{_file_stamp(folder)}-{packing}-v{_VERSIONS[packing]}{_SUFFIXES[dtype]}"
    path = cache_dir / "images" / name
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with Path(f"{path}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.is_file():
            partial = Path(f"{path}.partial")
            try:
                with partial.open("wb") as file:
                    weights = FolderWeights(folder)
                    check_weights(folder, weights.shapes(), expected_weights(spec))
                    _write(file, spec, weights, packing, dtype, progress)
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)  # a full disk needs the space
    return path


@dataclass(frozen=True, slots=True)
class ImageLayout:
    """What the header of an image says. Offsets and sizes are bytes in the file."""

    dtype: Dtype
    num_bytes: int
    """Size of the file."""
    offsets: Mapping[str, int]
    shapes: Mapping[str, tuple[int, ...]]
    fingerprint: str

    def bytes_of(self, name: str) -> slice:
        """The bytes of one tensor in the file. Raises KeyError."""
        first = self.offsets[name]
        return slice(first, first + int(np.prod(self.shapes[name])) * STORED_AS[self.dtype].itemsize)


def read_layout(path: Path) -> ImageLayout:
    """Reads the header of an image that `ensure_image` returned. Raises OSError."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        num_bytes = os.fstat(file.fileno()).st_size
    fingerprint, dtype = header.pop(_FINGERPRINT), header.pop(_DTYPE, "float32")
    item_bytes = STORED_AS[dtype].itemsize
    return ImageLayout(
        dtype=dtype,
        num_bytes=num_bytes,
        offsets={name: entry["at"] * item_bytes for name, entry in header.items()},
        shapes={name: tuple(entry["shape"]) for name, entry in header.items()},
        fingerprint=fingerprint,
    )


@dataclass(frozen=True, slots=True)
class Image:
    """A mapped image. ``flat`` is the whole file in its dtype (bfloat16 as uint16); ``parts`` maps a tensor name to its
    (offset, length) in it.
    """

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
    layout = read_layout(path)
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    stored = STORED_AS[layout.dtype]
    lengths = {name: int(np.prod(shape)) for name, shape in layout.shapes.items()}
    return Image(
        flat=np.frombuffer(mapped, dtype=stored),
        parts={name: (offset // stored.itemsize, lengths[name]) for name, offset in layout.offsets.items()},
        shapes=layout.shapes,
        fingerprint=layout.fingerprint,
    )


def image_bytes(spec: ModelSpec, dtype: Dtype) -> int:
    """Size of an image in packing `rows`, known before it is written."""
    at = _header_bytes(spec)
    for _, sources in _tensors(spec):
        num_values = sum(int(np.prod(shape)) for _, shape in sources)
        at = padded(at + num_values * STORED_AS[dtype].itemsize, _ALIGNMENT_BYTES["rows"])
    return at


def _header_bytes(spec: ModelSpec) -> int:
    return padded(8 + _HEADER_BYTES_PER_TENSOR * (9 * spec.num_layers + 4), 4096)


def _write(
    file: BinaryIO,
    spec: ModelSpec,
    weights: FolderWeights,
    packing: Packing,
    dtype: Dtype,
    progress: Callable[[int, int], None],
) -> None:
    """Writes the tensors and then the header before them. Keeps one tensor (`panels`) or a piece of one in memory."""
    header_bytes, alignment = _header_bytes(spec), _ALIGNMENT_BYTES[packing]
    file.seek(header_bytes)
    header: dict[str, Any] = {} if packing == "panels" else {_DTYPE: dtype}
    digest = hashlib.blake2b(b"" if packing == "panels" else dtype.encode(), digest_size=_FINGERPRINT_BYTES)
    for name, sources in _tensors(spec):
        shape, pieces = _packed(weights, name, sources) if packing == "panels" else _rows(weights, sources, dtype)
        file.seek(padded(file.tell(), alignment))
        header[name] = {"at": file.tell() // STORED_AS[dtype].itemsize, "shape": shape}
        digest.update(f"{name}:{shape}:".encode())
        for piece in pieces:
            digest.update(piece.data)
            file.write(piece.data)
        layer, _, part = name.partition(".")
        if part == "down":
            progress(int(layer) + 1, spec.num_layers)
    file.truncate(padded(file.tell(), alignment))
    text = json.dumps({**header, _FINGERPRINT: digest.hexdigest()}).encode()
    assert len(text) + 8 <= header_bytes, "the header fits into the space reserved for it"
    file.seek(0)
    file.write(len(text).to_bytes(8, "little") + text)


def _tensors(spec: ModelSpec) -> Iterator[tuple[str, Sources]]:
    """Yields every tensor of an image in the order of the file. Q, K and V form one, gate and up another."""
    shapes = expected_weights(spec)

    def tensor(name: str, *weights: str) -> tuple[str, Sources]:
        return name, tuple((weight, shapes[weight]) for weight in weights)

    if spec.tied_embeddings:
        yield tensor("lm_head", "model.embed_tokens.weight")
    else:
        yield tensor("embed", "model.embed_tokens.weight")
        yield tensor("lm_head", "lm_head.weight")
    yield tensor("norm", "model.norm.weight")
    for layer in range(spec.num_layers):
        prefix = f"model.layers.{layer}."
        attention = f"{prefix}self_attn."
        yield tensor(f"{layer}.input_norm", f"{prefix}input_layernorm.weight")
        yield tensor(f"{layer}.qkv", *(f"{attention}{part}_proj.weight" for part in "qkv"))
        if spec.qkv_bias:
            yield tensor(f"{layer}.qkv_bias", *(f"{attention}{part}_proj.bias" for part in "qkv"))
        if spec.qk_norm:
            yield tensor(f"{layer}.q_norm", f"{attention}q_norm.weight")
            yield tensor(f"{layer}.k_norm", f"{attention}k_norm.weight")
        yield tensor(f"{layer}.o", f"{attention}o_proj.weight")
        yield tensor(f"{layer}.post_norm", f"{prefix}post_attention_layernorm.weight")
        yield tensor(f"{layer}.gate_up", f"{prefix}mlp.gate_proj.weight", f"{prefix}mlp.up_proj.weight")
        yield tensor(f"{layer}.down", f"{prefix}mlp.down_proj.weight")


def _packed(weights: FolderWeights, name: str, sources: Sources) -> tuple[tuple[int, ...], Iterable[np.ndarray]]:
    """Shape and values of a tensor as the CPU kernels read it."""
    arrays = [weights.read(weight, *shape) for weight, shape in sources]
    if name.endswith("gate_up"):
        packed = pack_gated(*arrays)
    else:
        whole = np.concatenate(arrays) if len(arrays) > 1 else arrays[0]
        packed = pack_panels(whole) if whole.ndim == 2 and name != "embed" else whole
    return packed.shape, [np.ascontiguousarray(packed)]


def _rows(weights: FolderWeights, sources: Sources, dtype: Dtype) -> tuple[tuple[int, ...], Iterator[np.ndarray]]:
    """Shape and values of a tensor as torch reads it; the values in pieces."""
    num_rows, depth = sum(shape[0] for _, shape in sources), sources[0][1][1:]
    pieces = (piece for weight, shape in sources for piece in weights.pieces(weight, dtype, *shape))
    return (num_rows, *depth), pieces


def _file_stamp(folder: Path) -> str:
    """Digest of the sizes and times of weight files and config; changes when one is replaced. Reads no weights."""
    digest = hashlib.sha256(str(folder.resolve()).encode())
    for path in sorted([*weight_files(folder), folder / "config.json"]):
        status = path.stat()
        digest.update(f"{path.name}:{status.st_size}:{status.st_mtime_ns}".encode())
    return digest.hexdigest()[:12]
