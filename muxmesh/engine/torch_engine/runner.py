"""The torch runner: maps the weight image, computes steps over the pool, draws tokens."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from numba import config as numba_config_module
from torch import Tensor

from muxmesh.engine.kv_view import KvView
from muxmesh.engine.sampling import draw_token
from muxmesh.engine.step import Chunk, Draw, Step, StepOutcome
from muxmesh.engine.torch_engine.attention_cpu import StepLayout, kernels_for, lay_out
from muxmesh.engine.torch_engine.model import Llama, rope_tables
from muxmesh.models.image import map_image
from muxmesh.models.spec import ModelSpec
from muxmesh.types import Sampling

_log = logging.getLogger(__name__)
numba_config: Any = numba_config_module  # its settings are attributes made at import


@contextlib.contextmanager
def _compile_lock() -> Iterator[None]:
    """Two workers that start with an empty cache compile once: the second waits, then reads what the first wrote."""
    folder = Path(numba_config.CACHE_DIR or tempfile.gettempdir())
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "muxmesh-compile.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not any(folder.rglob("attention_cpu.*.nbi")):
            _log.info("compiling the attention kernels for this machine, once; this takes a while")
        yield


class CpuAttention:
    """`Attention` on a CPU: the numba kernels over one model's view of the pool."""

    def __init__(self, spec: ModelSpec, view: KvView, num_positions: int) -> None:
        self._view = view
        self._out_columns = spec.num_heads * spec.head_dim
        self._kernels = kernels_for(spec.num_heads, spec.num_kv_heads, spec.head_dim, view.shape.block_size)
        self._cos, self._sin = rope_tables(spec, num_positions)
        self.kv_bytes_written = 0

    def __call__(self, qkv: Tensor, layer: int, layout: StepLayout) -> Tensor:
        """See `Attention`."""
        pool, shape, rows = self._view.pool, self._view.shape, qkv.numpy()
        self._kernels.rotate_and_store(pool, rows, self._cos, self._sin, layout.positions, layout.row_blocks, layer)
        self.kv_bytes_written += 2 * len(rows) * shape.num_kv_heads * shape.head_dim * pool.itemsize
        out = np.empty((len(rows), self._out_columns), dtype=np.float32)
        self._kernels.attend(pool, rows, out, layout.positions, layout.tables, layout.tiles, layer)
        return torch.from_numpy(out)


class TorchRunner:
    """A `Runner` that computes a Llama model in f32 on a CPU."""

    def __init__(self, spec: ModelSpec, image: Path, view: KvView, max_model_len: int, num_threads: int) -> None:
        self._spec = spec
        self._image = image
        self._view = view
        self._max_model_len = max_model_len
        self._num_threads = num_threads

    def load(self) -> None:
        """See `Runner`. Compiles the kernels, once on a machine, or loads them from numba's cache."""
        torch.set_num_threads(self._num_threads)
        numba.set_num_threads(min(self._num_threads, numba_config.NUMBA_NUM_THREADS))
        self._model = Llama(self._spec, map_image(self._image))
        self._attention = CpuAttention(self._spec, self._view, self._max_model_len)
        with _compile_lock():
            self._warm_up()

    def run(self, step: Step) -> StepOutcome:
        """See `Runner`."""
        written_before = self._attention.kv_bytes_written
        layout = lay_out(step, self._view)
        logits = self._model.logits(layout, self._attention)
        drawing = [chunk for chunk in step.chunks if chunk.draw]
        drawn = {chunk.job_id: self._draw(logits[row], chunk) for row, chunk in enumerate(drawing)}
        return StepOutcome(drawn, self._attention.kv_bytes_written - written_before)

    @staticmethod
    def _draw(logits: np.ndarray, chunk: Chunk) -> int:
        assert chunk.draw is not None
        return draw_token(logits, chunk.draw)

    def _warm_up(self) -> None:
        """One step over a scratch pool of a single block, so that no request pays for compilation."""
        scratch = KvView(
            np.zeros(self._view.shape.token_block_bytes // 4, dtype=np.float32),
            self._view.shape,
            self._view.shape.token_block_bytes,
        )
        attention = CpuAttention(self._spec, scratch, scratch.shape.block_size)
        chunk = Chunk(0, 0, (0, 0), (0,), Draw(Sampling(temperature=0.0), 0))
        layout = lay_out(Step((chunk,)), scratch)
        self._model.logits(layout, attention)
