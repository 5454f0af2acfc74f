"""The attention kernel alone: KV bytes read per second over the machine's read bandwidth, and memory growth."""

from __future__ import annotations

import functools
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numba
import numpy as np
import torch

from benchmarks.engine import THREADS, read_bandwidth
from benchmarks.report import Report
from muxmesh.cli.common import cache_dir
from muxmesh.config.schema import DEFAULT_MODEL
from muxmesh.device.kv_view import KvView
from muxmesh.engine.native.cpu.attention import attend, merge
from muxmesh.engine.native.cpu.forward import CpuForward
from muxmesh.engine.native.cpu.thread_team import JIT, Team
from muxmesh.engine.native.step_layout import lay_out
from muxmesh.engine.step import Chunk, SampleSpec, Step
from muxmesh.models.catalog import CATALOG
from muxmesh.models.model_download import ensure_model
from muxmesh.models.model_spec import ModelSpec, read_model_spec
from muxmesh.models.weight_image import ensure_image
from muxmesh.types import Sampling

CONTEXTS = (128, 512, 1024, 2048, 4096)
BATCHES = (1, 4, 16, 32)
ROUNDS = 5
BLOCK_SIZE = 16
SLAB_BYTES = 16 << 20


@numba.njit(**{**JIT, "cache": False})
def _all_layers(shape, pool, batch, buffers, splits):  # type: ignore[no-untyped-def]
    counters = buffers.counters.ctypes.data
    for layer in range(shape.num_layers):
        attend(
            counters,
            2 * layer,
            shape,
            pool.ctypes.data,
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
            merge(counters, 2 * layer + 1, shape, batch.tiles, buffers.partials, buffers.attended)


class Attention:
    """The kernel as the engine calls it, over a pool with the KV of the largest case."""

    def __init__(self, spec: ModelSpec, image: Path) -> None:
        self.shape = spec.kv_shape(BLOCK_SIZE, "float32")
        per_slab = SLAB_BYTES // self.shape.token_block_bytes
        slabs = -(-max(BATCHES) * max(CONTEXTS) // BLOCK_SIZE // per_slab)
        pool = np.empty(slabs * SLAB_BYTES // 4, dtype=np.float32)
        noise = np.random.default_rng(0).standard_normal(SLAB_BYTES // 4, dtype=np.float32)
        pool.reshape(slabs, -1)[:] = noise
        self.view = KvView(self.shape, SLAB_BYTES, pool)
        self.team = Team(THREADS)
        self.forward = CpuForward(spec, image, self.view, max(CONTEXTS) + 1, self.team)

    def prepare(self, batch: int, context: int) -> Callable[[], None]:
        """One decode step's attention over all layers, for ``batch`` sequences of ``context`` tokens."""
        blocks = context // BLOCK_SIZE
        order = np.random.default_rng(1).permutation(
            batch * blocks
        )  # the blocks of a sequence are scattered, as in a used pool
        greedy = SampleSpec(Sampling(temperature=0.0), 0)
        chunks = [
            Chunk(job, context - 1, (7,), tuple(order[job * blocks : (job + 1) * blocks].tolist()), greedy)
            for job in range(batch)
        ]
        step = self.forward._batch(lay_out(Step(tuple(chunks)), self.view))
        buffers = self.forward._buffers(step)
        buffers.qkv[:] = 0.1
        splits = bool((step.tiles[:, 4] > 1).any())
        run = functools.partial(_all_layers, self.forward._shape, self.view.pool, step, buffers, splits)

        def once() -> None:
            buffers.counters.fill(0)
            self.team.run(run)

        return once


def main() -> int:
    """Measures, prints, writes."""
    torch.set_num_threads(THREADS)
    folder = ensure_model(CATALOG[DEFAULT_MODEL], cache_dir(), lambda what, done, total: None)
    spec = read_model_spec(folder)
    attention = Attention(spec, ensure_image(folder, spec, "panels", cache_dir(), lambda done, total: None))
    cases = {(batch, context): attention.prepare(batch, context) for batch in BATCHES for context in CONTEXTS}
    cases[1, min(CONTEXTS)]()  # compiles; its memory is small compared to any other case
    large = torch.ones(1 << 27)
    peak_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    shares: dict[tuple[int, int], list[float]] = {case: [] for case in cases}
    speeds: dict[tuple[int, int], list[float]] = {case: [] for case in cases}
    for _ in range(ROUNDS):
        for (batch, context), once in cases.items():
            bandwidth = read_bandwidth(large)
            started_at_s = time.perf_counter()
            once()
            speed = batch * context * attention.shape.kv_bytes_per_token / (time.perf_counter() - started_at_s)
            speeds[batch, context].append(speed)
            shares[batch, context].append(speed / bandwidth)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_before) * 1024
    report = Report("attention")
    report.figures = {
        f"batch {batch}, context {context}": {
            "kv_bytes_per_s": statistics.median(speeds[batch, context]),
            "share_of_read_bandwidth": statistics.median(shares[batch, context]),
        }
        for batch, context in cases
    }
    for batch, context in cases:
        name = f"share of read bandwidth, batch {batch}, context {context}"
        report.bar(name, statistics.median(shares[batch, context]))
    largest = max(BATCHES) * max(CONTEXTS) * attention.shape.kv_bytes_per_token
    report.bar(
        "peak memory grown while measuring, share of the KV read",
        grown / largest,
        "at most 0.01",
        grown <= largest / 100,
    )
    return 0 if report.write() else 1


if __name__ == "__main__":
    sys.exit(main())
