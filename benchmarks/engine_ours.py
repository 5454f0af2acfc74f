"""Our engine in a process of its own, driven step by step like `benchmarks.engine_vllm`: scheduler and runner only."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.engine_vllm import serve
from muxmesh.device.kv_view import KvView
from muxmesh.engine.api import EngineJob
from muxmesh.engine.native.cpu.forward import open_cpu_forward
from muxmesh.engine.native.cpu.thread_team import Team
from muxmesh.engine.native.logits_runner import LogitsRunner
from muxmesh.engine.scheduler import Scheduler
from muxmesh.engine.sequence import SequenceRecord
from muxmesh.models.model_spec import read_model_spec
from muxmesh.types import EngineRequest, Sampling, SchedulingState, Stopping, blocks_for

_BLOCK_SIZE = 16
_SLAB_BYTES = 16 << 20
_POOL_BYTES = 1 << 30
_TOKEN_BUDGET = 512
"""Activations of more rows exceed the caches; fewer rows read the weights more often."""


class OurEngine:
    """The loop of a worker without its messages: schedule, run, apply."""

    def __init__(self, folder: Path, image: Path, max_num_seqs: int, num_threads: int) -> None:
        spec, team = read_model_spec(folder), Team(num_threads)
        shape = spec.kv_shape(_BLOCK_SIZE, "float32")
        view = KvView(shape, _SLAB_BYTES, np.zeros(_POOL_BYTES // 4, dtype=np.float32))
        self._runner = LogitsRunner(view, lambda pool: open_cpu_forward(spec, image, pool, 2048, team))
        self._runner.load()
        self._scheduler = Scheduler(max_num_seqs, _TOKEN_BUDGET, spec.vocab_size)
        self._count = 0

    def _add(self, prompts: list[list[int]], max_new_tokens: int) -> None:
        for index, prompt in enumerate(prompts):
            self._count += 1
            needed = blocks_for(len(prompt) + max_new_tokens, _BLOCK_SIZE)
            request = EngineRequest(
                str(self._count), "m", tuple(prompt), Sampling(temperature=0.0), Stopping(max_new_tokens),
                SchedulingState(0, float(self._count)),
            )  # fmt: skip
            blocks = tuple(range(index * needed, (index + 1) * needed))
            self._scheduler.add(EngineJob(self._count, SequenceRecord(request, _BLOCK_SIZE, b"", blocks)))

    def _step(self) -> int:
        step = self._scheduler.next_step(0.0)
        assert step is not None
        outcome = self._runner.run(step)
        self._scheduler.apply(outcome)
        self._scheduler.drain_events()
        return len(outcome.sampled)

    def prefill(self, prompts: list[list[int]]) -> float:
        """Seconds until each prompt has its first token."""
        started_at_s = time.perf_counter()
        self._add(prompts, 1)
        while self._scheduler.has_work():
            self._step()
        return time.perf_counter() - started_at_s

    def decode(self, prompts: list[list[int]], steps: int) -> list[float]:
        """Seconds of each decode step of all prompts together."""
        self._add(prompts, steps + 64)
        while self._step() < len(prompts):
            pass
        seconds = []
        for _ in range(steps):
            started_at_s = time.perf_counter()
            self._step()
            seconds.append(time.perf_counter() - started_at_s)
        while self._scheduler.has_work():
            self._step()
        return seconds


if __name__ == "__main__":
    folder, image, max_num_seqs, num_threads = sys.argv[1:]
    serve(lambda: OurEngine(Path(folder), Path(image), int(max_num_seqs), int(num_threads)))
