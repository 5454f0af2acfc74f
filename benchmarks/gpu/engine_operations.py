"""Operations of a peer with a `CudaRunner` over a model of random weights: decode and prefill steps, timed."""

from __future__ import annotations

import asyncio
import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu import random_model
from benchmarks.gpu.attention_times import AttentionSizes, AttentionTimer
from benchmarks.gpu.torch_operations import TorchOperations
from benchmarks.gpu.whole_engine import LoadedRunner, serve
from muxmesh.clock import SystemClock
from muxmesh.device.kv_view import KvGeometry
from muxmesh.engine.api import EngineJob
from muxmesh.engine.native.cuda.runner import CudaRunner, RunnerLimits
from muxmesh.engine.sequence import SequenceRecord
from muxmesh.engine.step import Chunk, SampleSpec, Step, StepOutcome
from muxmesh.models.model_spec import ModelSpec
from muxmesh.types import EngineRequest, Sampling, SchedulingState, Stopping, blocks_for

MODELS = {
    "tiny": random_model.TINY,
    "small": random_model.SMALL,
    "half billion": random_model.HALF_BILLION,
    "billion": random_model.BILLION,
}
_GREEDY = SampleSpec(Sampling(temperature=0.0), 0)
_SLAB_TOKENS = 256


class EngineOperations(TorchOperations):
    """A loaded runner with a pool of its own, whose KV is random: contexts need no prefill."""

    runner: CudaRunner
    spec: ModelSpec
    num_blocks: int
    weights: dict[str, Tensor]

    def do_attention(self, heads: tuple[int, int, int], pool_tokens: int, cases: list[tuple[int, int]]) -> Any:
        """Decode attention alone for each (batch, context): see `AttentionTimer.measure`."""
        timer = AttentionTimer(self.device, AttentionSizes(*heads, pool_tokens=pool_tokens))
        return [timer.measure(batch, context) for batch, context in cases]

    def do_load(self, **arguments: Any) -> Any:
        """Makes weights and pool on the device and loads the runner. Returns seconds and bytes."""
        return self._load(**arguments)

    def _load(
        self, model: str, dtype: str, pool_tokens: int, max_num_seqs: int, step_tokens: int, max_len: int,
        max_steps: int = 1, graphs: bool = True, block_size: int = 16,
    ) -> Any:  # fmt: skip
        started_at_s = time.perf_counter()
        kind = getattr(torch, dtype)
        self.spec = MODELS[model].spec()
        shape = self.spec.kv_shape(block_size, dtype)
        blocks_per_slab = _SLAB_TOKENS // block_size
        geometry = KvGeometry(shape, blocks_per_slab * shape.token_block_bytes)
        self.num_blocks = pool_tokens // _SLAB_TOKENS * blocks_per_slab
        elements = self.num_blocks * shape.token_block_bytes // kind.itemsize
        pool, weights = self._random_pool(elements, kind), self._random_weights(kind)
        self.weights = weights
        limits = RunnerLimits(max_num_seqs, step_tokens, max_len, max_steps)
        self.runner = CudaRunner(
            self.device, self.spec, lambda: weights, geometry, pool, limits, SystemClock(), use_graphs=graphs
        )
        self.block_size = block_size
        self.runner.load()
        self.device.record().wait()
        weight_bytes = sum(weight.nbytes for name, weight in weights.items() if name != "embed")
        return {
            "load_s": time.perf_counter() - started_at_s, "weight_bytes": weight_bytes,
            "kv_bytes_per_token": shape.kv_bytes_per_token, "parameters": self.spec.num_parameters,
            "spec": {"layers": self.spec.num_layers, "heads": self.spec.num_heads, "head_dim": self.spec.head_dim},
        }  # fmt: skip

    def _random_pool(self, elements: int, dtype: torch.dtype) -> Tensor:
        where = self.device.torch_device
        chance = torch.Generator(where).manual_seed(1)
        return torch.empty(elements, dtype=dtype, device=where).normal_(generator=chance)

    def _random_weights(self, dtype: torch.dtype) -> dict[str, Tensor]:
        where = self.device.torch_device
        chance = torch.Generator(where).manual_seed(0)
        return random_weights(self.spec, dtype, where, lambda target, scale: target.normal_(0, scale, generator=chance))

    def do_decode(self, batch: int, context: int, num_steps: int, count: int) -> Any:
        """Median milliseconds of one decode step of ``batch`` sequences, in runs of ``num_steps``; and the tokens."""
        step = self._decode_step(batch, context, num_steps)
        times, tokens = [], []
        for number in range(count + 2):
            started_at_s = time.perf_counter()
            outcome = self.runner.run(step, lambda: True)
            elapsed_s = (time.perf_counter() - started_at_s) / outcome.num_steps
            assert not outcome.failed, outcome.failed
            tokens = [[one.token_id for one in outcome.sampled[job]] for job in range(batch)]
            if number >= 2:
                times.append(elapsed_s)
        return {"ms": 1e3 * statistics.median(times), "tokens": tokens, "steps": outcome.num_steps}

    def do_prefill(self, num_tokens: int, count: int) -> Any:
        """Median milliseconds of a prompt of ``num_tokens``, computed in one step."""
        step = self._prefill_step(num_tokens)
        times = [self._run_s(step) for _ in range(count + 1)]
        return {"ms": 1e3 * statistics.median(times[1:])}

    def do_generate(self, num_tokens: int, batch: int, prompt_tokens: int) -> Any:
        """Greedy tokens after random prompts: a step of prefill for each, then decode steps of all, one at a time."""
        chance = np.random.default_rng(5)
        prompts = chance.integers(3, self.spec.vocab_size, (batch, prompt_tokens)).tolist()
        tables = self._tables(batch, prompt_tokens + num_tokens)
        outputs: list[list[int]] = []
        for job, prompt in enumerate(prompts):
            chunk = Chunk(job, 0, tuple(prompt), tables[job], _GREEDY)
            outputs.append([self.runner.run(Step((chunk,)), lambda: True).sampled[job][0].token_id])
        for index in range(1, num_tokens):
            spec = dataclasses.replace(_GREEDY, output_index=index)
            chunks = tuple(
                Chunk(job, prompt_tokens + index - 1, (outputs[job][-1],), tables[job], spec) for job in range(batch)
            )
            sampled = self.runner.run(Step(chunks), lambda: True).sampled
            for job in range(batch):
                outputs[job].append(sampled[job][0].token_id)
        return outputs

    def do_serve(self, batch: int, prompt_tokens: int, num_tokens: int, max_steps: int) -> Any:
        """Milliseconds of a decode step in a whole engine that computes runs of ``max_steps``, and in its runner."""
        request = EngineRequest(
            "r", "m", (5,) * prompt_tokens, _GREEDY.sampling, Stopping(num_tokens), SchedulingState(0, 0.0)
        )
        tables = self._tables(batch, prompt_tokens + num_tokens)
        jobs = [
            EngineJob(job, SequenceRecord(request, self.block_size, b"", table, prompt_tokens - 1))
            for job, table in enumerate(tables)
        ]
        runner, vocab_size = LoadedRunner(self.runner, max_steps), self.spec.vocab_size
        runs = asyncio.run(serve(runner, batch, vocab_size, jobs, SystemClock()))
        num_steps = sum(run.num_steps for run in runs[1:])
        engine_s, runner_s = runs[-1].ended_at_s - runs[0].ended_at_s, sum(run.seconds for run in runs[1:])
        return {"ms": 1e3 * engine_s / num_steps, "runner_ms": 1e3 * runner_s / num_steps}

    def do_work_until(self, seconds: float, prompt: int, batch: int, context: int, num_steps: int) -> Any:
        """Tokens/s for ``seconds``: prompts of ``prompt`` tokens or, if that is 0, decoding of ``batch`` sequences.

        A run in which a sequence fails counts too. ``failed_runs`` of ``runs``, and what the first of them reported.
        """
        step = self._prefill_step(prompt) if prompt else self._decode_step(batch, context, num_steps)
        per_run = prompt or batch * num_steps
        reasons = [failed_reason(self.runner.run(step, lambda: True))]
        started_at_s = time.perf_counter()
        while (elapsed_s := time.perf_counter() - started_at_s) < seconds:
            reasons.append(failed_reason(self.runner.run(step, lambda: True)))
        failed = [reason for reason in reasons if reason]
        return {
            "tokens_per_s": (len(reasons) - 1) * per_run / elapsed_s,
            "runs": len(reasons), "failed_runs": len(failed), "first_failure": failed[0] if failed else "",
        }  # fmt: skip

    def _run_s(self, step: Step) -> float:
        started_at_s = time.perf_counter()
        outcome = self.runner.run(step, lambda: True)
        assert not outcome.failed, outcome.failed
        return time.perf_counter() - started_at_s

    def _decode_step(self, batch: int, context: int, num_steps: int) -> Step:
        """The tokens at index ``context - 1``, so that attention reads ``context`` tokens in the first step."""
        tables = self._tables(batch, context + num_steps)
        chunks = (Chunk(job, context - 1, (7 + job,), tables[job], _GREEDY) for job in range(batch))
        return Step(tuple(chunks), num_steps)

    def _prefill_step(self, num_tokens: int) -> Step:
        tokens = np.random.default_rng(1).integers(3, self.spec.vocab_size, num_tokens).tolist()
        (table,) = self._tables(1, num_tokens)
        return Step((Chunk(0, 0, tuple(tokens), table, _GREEDY),))

    def _tables(self, batch: int, num_tokens: int) -> list[tuple[int, ...]]:
        """Different blocks for each sequence, in random order over the pool."""
        count = blocks_for(num_tokens, self.block_size)
        ids = np.random.default_rng(2).permutation(self.num_blocks)[: batch * count].reshape(batch, count)
        return [tuple(int(one) for one in row) for row in ids]


def failed_reason(outcome: StepOutcome) -> str:
    """Why a sequence of a step failed; empty if none did."""
    return next((failure.reason for failure in outcome.failed.values()), "")


def random_weights(
    spec: ModelSpec, dtype: torch.dtype, device: torch.device, normal: Callable[[Tensor, float], Tensor]
) -> dict[str, Tensor]:
    """The tensors of an image with packing `rows`. Rows keep their size from layer to layer.

    ``normal`` fills a tensor with numbers of a standard deviation and returns it.
    """
    hidden, inner = spec.hidden_size, spec.intermediate_size
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim

    def matrix(rows: int, columns: int) -> Tensor:
        return normal(torch.empty(rows, columns, dtype=dtype, device=device), columns**-0.5)

    def norm() -> Tensor:
        return torch.ones(hidden, dtype=dtype, device=device)

    weights = {"lm_head": matrix(spec.vocab_size, hidden), "norm": norm()}
    if not spec.tied_embeddings:
        weights["embed"] = matrix(spec.vocab_size, hidden)
    for layer in range(spec.num_layers):
        weights |= {
            f"{layer}.input_norm": norm(), f"{layer}.post_norm": norm(),
            f"{layer}.qkv": matrix(q + 2 * kv, hidden), f"{layer}.o": matrix(hidden, q),
            f"{layer}.gate_up": matrix(2 * inner, hidden), f"{layer}.down": matrix(hidden, inner),
        }  # fmt: skip
    return weights
