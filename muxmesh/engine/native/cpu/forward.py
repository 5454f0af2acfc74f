"""The forward pass of a Llama-family model on a CPU: one call computes a whole step.

Combines the kernels of the sibling modules with the weight image and the KV pool. Does no sampling.
"""

# mypy: disable-error-code="call-arg, misc, no-untyped-call"
from __future__ import annotations

import functools
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import numba
import numpy as np

from muxmesh.device.kv_view import KvView
from muxmesh.engine.native.cpu import attention
from muxmesh.engine.native.cpu.attention import attend, merge
from muxmesh.engine.native.cpu.products import multiply, multiply_add, multiply_gated
from muxmesh.engine.native.cpu.rows import embed, normalize, rotate_and_store
from muxmesh.engine.native.cpu.thread_team import JIT, Team, new_counters
from muxmesh.engine.native.kernel_cache import compile_elsewhere, compile_lock
from muxmesh.engine.native.rope import rope_tables
from muxmesh.engine.native.step_layout import StepLayout, lay_out
from muxmesh.engine.step import Chunk, SampleSpec, Step
from muxmesh.models.matrix_packing import PANEL, PARTS, padded
from muxmesh.models.model_spec import ModelSpec
from muxmesh.models.weight_image import map_image
from muxmesh.types import Sampling

COMPILER = "muxmesh.engine.native.cpu.compile_kernels"
"""The module whose process compiles the kernels."""
_PHASES_PER_LAYER = 9
_SPARE_COLUMNS = 16
"""Extra columns of each buffer. Without them, rows with a power of two of bytes would share cache sets."""


class Shape(NamedTuple):
    """Sizes of the model as the kernels read them."""

    num_layers: int
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    inner: int
    vocab: int
    block_size: int
    eps: float


class Weights(NamedTuple):
    """The weights as the kernels read them.

    flat: the whole image, f32. parts [layers, len(PARTS), 2]: offset and length in ``flat`` of each tensor of a layer;
    length 0 for a tensor that the architecture does not have. cos, sin [positions, head_dim / 2].
    """

    flat: np.ndarray
    parts: np.ndarray
    embed: np.ndarray
    embed_is_packed: bool
    lm_head: np.ndarray
    final_norm: np.ndarray
    cos: np.ndarray
    sin: np.ndarray


class Batch(NamedTuple):
    """A step as the kernels read it: the fields of `StepLayout`, and the tiles and tasks of `attend`."""

    token_ids: np.ndarray
    positions: np.ndarray
    row_blocks: np.ndarray
    tables: np.ndarray
    logit_rows: np.ndarray
    all_rows: np.ndarray
    tiles: np.ndarray
    tasks: np.ndarray


class Buffers(NamedTuple):
    """Activations of a step, each [rows, columns], and the counters of its phases."""

    counters: np.ndarray
    x: np.ndarray
    normed: np.ndarray
    qkv: np.ndarray
    attended: np.ndarray
    inner: np.ndarray
    partials: np.ndarray
    last: np.ndarray
    logits: np.ndarray


@numba.njit(**JIT)
def _part(weights, layer, index):  # type: ignore[no-untyped-def]
    offset, length = weights.parts[layer, index]
    return weights.flat[offset : offset + length]


@numba.njit(**JIT)
def _run(shape, weights, pool, batch, buffers):  # type: ignore[no-untyped-def]
    """Computes one step. Every thread of the team runs it; in each phase, the threads share the tasks."""
    counters = buffers.counters.ctypes.data
    hidden, head_dim = shape.hidden, shape.head_dim
    qkv_columns = (shape.num_heads + 2 * shape.num_kv_heads) * head_dim
    q_columns = shape.num_heads * head_dim
    pool_address = pool.ctypes.data
    splits = batch.tiles[:, 4].max() > 1
    embed(counters, 0, batch.token_ids, weights.embed, weights.embed_is_packed, hidden, buffers.x)
    phase = 1
    for layer in range(shape.num_layers):
        normalize(counters, phase, buffers.x, _part(weights, layer, 0), shape.eps, batch.all_rows, buffers.normed)
        matrix = _part(weights, layer, 1).ctypes.data
        multiply(counters, phase + 1, buffers.normed, matrix, hidden, qkv_columns, buffers.qkv)
        rotate_and_store(
            counters,
            phase + 2,
            shape,
            pool,
            layer,
            buffers.qkv,
            _part(weights, layer, 2),
            _part(weights, layer, 3),
            _part(weights, layer, 4),
            weights.cos,
            weights.sin,
            batch.positions,
            batch.row_blocks,
        )
        attend(
            counters,
            phase + 3,
            shape,
            pool_address,
            layer,
            buffers.qkv,
            batch.positions,
            batch.tables,
            batch.tiles,
            batch.tasks,
            buffers.partials,
            buffers.attended,
        )
        if splits:
            merge(counters, phase + 4, shape, batch.tiles, buffers.partials, buffers.attended)
        matrix = _part(weights, layer, 5).ctypes.data
        multiply_add(counters, phase + 5, buffers.attended, matrix, q_columns, hidden, buffers.x)
        normalize(counters, phase + 6, buffers.x, _part(weights, layer, 6), shape.eps, batch.all_rows, buffers.normed)
        matrix = _part(weights, layer, 7).ctypes.data
        multiply_gated(counters, phase + 7, buffers.normed, matrix, hidden, shape.inner, buffers.inner)
        matrix = _part(weights, layer, 8).ctypes.data
        multiply_add(counters, phase + 8, buffers.inner, matrix, shape.inner, hidden, buffers.x)
        phase += 9
    if batch.logit_rows.shape[0]:
        normalize(counters, phase, buffers.x, weights.final_norm, shape.eps, batch.logit_rows, buffers.last)
        multiply(counters, phase + 1, buffers.last, weights.lm_head.ctypes.data, hidden, shape.vocab, buffers.logits)


class CpuForward:
    """A `Forward` on a CPU. It owns its activations; weights, pool and team are shared. One call at a time."""

    def __init__(self, spec: ModelSpec, image: Path, view: KvView, num_positions: int, team: Team) -> None:
        self._spec = spec
        self._pool = view.pool
        self._team = team
        self._shape = Shape(
            spec.num_layers,
            spec.hidden_size,
            spec.num_heads,
            spec.num_kv_heads,
            spec.head_dim,
            spec.intermediate_size,
            spec.vocab_size,
            view.shape.block_size,
            spec.rms_norm_eps,
        )
        self._weights = _weights(spec, image, num_positions)
        self._group = spec.num_heads // spec.num_kv_heads
        self._tile_rows = max(1, attention.QUERIES_PER_TILE // self._group)
        self._counters = new_counters(_PHASES_PER_LAYER * spec.num_layers + 3)
        self._most_rows = 0
        self._activations: list[np.ndarray] = []

    def rest(self) -> None:
        self._team.rest()
        self._most_rows, self._activations = 0, []

    def logits(self, layout: StepLayout) -> np.ndarray:
        batch = self._batch(layout)
        buffers = self._buffers(batch)
        self._team.run(functools.partial(_run, self._shape, self._weights, self._pool, batch, buffers))
        return buffers.logits[:, : self._spec.vocab_size]

    def _batch(self, layout: StepLayout) -> Batch:
        tiles: list[tuple[int, int, int, int, int]] = []
        tasks: list[tuple[int, int]] = []
        for index, (start, length) in enumerate(zip(layout.starts, layout.lengths, strict=True)):
            for first in reversed(range(0, length, self._tile_rows)):  # longest tasks first, so threads end together
                rows = min(self._tile_rows, length - first)
                splits = int(layout.positions[start + first + rows - 1]) // attention.SPLIT + 1
                tiles.append((start + first, rows, index, len(tasks), splits))
                tasks += [(len(tiles) - 1, split) for split in range(splits)]
        return Batch(
            layout.token_ids,
            layout.positions,
            layout.row_blocks,
            layout.tables,
            layout.logit_rows,
            np.arange(len(layout.token_ids)),
            np.array(tiles, dtype=np.int64),
            np.array(tasks, dtype=np.int64),
        )

    def _buffers(self, batch: Batch) -> Buffers:
        rows, spec = len(batch.token_ids), self._spec
        if rows > self._most_rows:
            self._most_rows = rows
            self._activations = [
                np.zeros((rows, columns + _SPARE_COLUMNS), dtype=np.float32)
                for columns in (
                    padded(spec.hidden_size, PANEL),
                    spec.hidden_size,
                    padded((spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim, PANEL),
                    spec.num_heads * spec.head_dim,
                    padded(spec.intermediate_size, PANEL // 2),
                )
            ]
        self._counters.fill(0)
        splits = bool((batch.tiles[:, 4] > 1).any())
        queries = int(batch.tiles[:, 1].max()) * self._group
        parts = len(batch.tasks) * spec.num_kv_heads if splits else 0
        wanted = len(batch.logit_rows)
        return Buffers(
            self._counters,
            *(buffer[:rows] for buffer in self._activations),
            partials=np.empty((parts, queries, spec.head_dim + 2), dtype=np.float32),
            last=np.empty((wanted, spec.hidden_size + _SPARE_COLUMNS), dtype=np.float32),
            logits=np.empty((wanted, padded(spec.vocab_size, PANEL)), dtype=np.float32),
        )


def open_cpu_forward(spec: ModelSpec, image: Path, view: KvView, num_positions: int, team: Team) -> CpuForward:
    """Opens the forward pass over ``view`` after its kernels are compiled or loaded from numba's cache.

    Blocks, for half a minute if the kernels must be compiled, so that no request waits for it. ``num_positions``: the
    longest sequence.
    """
    cache: str = numba.config.CACHE_DIR  # type: ignore[attr-defined] # from the environment
    if cache:
        with compile_lock(Path(cache)):
            compile_elsewhere(Path(cache), COMPILER, [str(image), spec_to_json(spec)])
            compute_once(spec, image, team)
    else:
        compute_once(spec, image, team)
    return CpuForward(spec, image, view, num_positions, team)


def compute_once(spec: ModelSpec, image: Path, team: Team) -> None:
    """Compiles or loads all kernels: computes one step over a scratch pool of a single block."""
    shape = spec.kv_shape(16, "float32")
    scratch = KvView(shape, shape.token_block_bytes, np.zeros(shape.token_block_bytes // 4, dtype=np.float32))
    step = Step((Chunk(0, 0, (0, 0), (0,), SampleSpec(Sampling(temperature=0.0), 0)),))
    CpuForward(spec, image, scratch, len(step.chunks[0].token_ids), team).logits(lay_out(step, scratch))


def spec_to_json(spec: ModelSpec) -> str:
    """Encodes what the kernels depend on; `spec_from_json` decodes it."""
    return json.dumps(asdict(replace(spec, rope_scaling=None)) | {"eos_token_ids": []})


def spec_from_json(text: str) -> ModelSpec:
    """Decodes a spec that `spec_to_json` encoded."""
    return ModelSpec(**json.loads(text) | {"eos_token_ids": frozenset()})


def _weights(spec: ModelSpec, image: Path, num_positions: int) -> Weights:
    packed = map_image(image)
    parts = np.array(
        [[packed.parts.get(f"{layer}.{name}", (0, 0)) for name in PARTS] for layer in range(spec.num_layers)],
        dtype=np.int64,
    )
    cos, sin = rope_tables(spec, num_positions)
    lm_head = packed.get("lm_head").reshape(-1)
    return Weights(
        packed.flat,
        parts,
        lm_head if spec.tied_embeddings else packed.get("embed").reshape(-1),
        spec.tied_embeddings,
        lm_head,
        packed.get("norm"),
        cos,
        sin,
    )
