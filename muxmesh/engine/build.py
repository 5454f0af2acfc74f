"""From a model's configuration to its engine. The one place that chooses; imports torch only for the torch engine."""

from __future__ import annotations

import os

from muxmesh.clock import SystemClock
from muxmesh.config.runtime import PreparedModel
from muxmesh.config.schema import ModelConfig
from muxmesh.engine.api import Engine, Grant
from muxmesh.engine.kv_view import KvView
from muxmesh.engine.scheduler import Scheduler
from muxmesh.engine.sim import SimRunner
from muxmesh.engine.step import Runner
from muxmesh.engine.step_engine import StepEngine, StepObserver
from muxmesh.models.prepare import model_spec
from muxmesh.models.spec import ModelSpec
from muxmesh.order import Order


def build_engine(
    config: ModelConfig, prepared: PreparedModel, view: KvView, grant: Grant, order: Order, observe: StepObserver
) -> Engine:
    """The engine of one worker, not started yet."""
    spec = model_spec(prepared.folder)
    runner = _runner(config, prepared, spec, view)
    budget = max(config.prefill_token_budget, config.max_num_seqs)
    scheduler = Scheduler(config.max_num_seqs, budget, config.block_size, order)
    return StepEngine(scheduler, runner, grant, SystemClock(), observe)


def num_threads(config: ModelConfig) -> int:
    """Threads of each worker of the model."""
    return config.threads or len(os.sched_getaffinity(0))


def _runner(config: ModelConfig, prepared: PreparedModel, spec: ModelSpec, view: KvView) -> Runner:
    if config.engine == "sim":
        # Letters and the space in the built-in byte tokenizer; past the special tokens in any other.
        token_ids = range(35, 93) if prepared.folder is None else range(min(256, spec.vocab_size - 1), spec.vocab_size)
        return SimRunner(config.sim, token_ids, min(spec.eos_token_ids, default=0))
    from muxmesh.engine.torch_engine.cpu.forward import open_cpu_forward  # noqa: PLC0415 - only this engine needs numba
    from muxmesh.engine.torch_engine.cpu.team import Team  # noqa: PLC0415
    from muxmesh.engine.torch_engine.runner import TorchRunner  # noqa: PLC0415

    assert prepared.image is not None, "a torch model is prepared with its image"
    image, positions, team = prepared.image, config.max_model_len or spec.context_len, Team(num_threads(config))
    return TorchRunner(view, lambda pool: open_cpu_forward(spec, image, pool, positions, team))
