"""Builds the engine that a model's configuration names. Imports numba only for the native engine."""

from __future__ import annotations

import os

from muxmesh.clock import SystemClock
from muxmesh.config.runtime import PreparedModel
from muxmesh.config.schema import ModelConfig
from muxmesh.device.device_pool import DevicePool, HostPool
from muxmesh.engine.api import Engine, Grant
from muxmesh.engine.scheduler import Scheduler
from muxmesh.engine.sim_runner import SimRunner
from muxmesh.engine.step import Runner
from muxmesh.engine.step_engine import StepEngine, StepObserver
from muxmesh.models.model_spec import ModelSpec
from muxmesh.models.prepared_model import model_spec
from muxmesh.scheduling_policy import SchedulingPolicy


def build_engine(
    config: ModelConfig,
    prepared: PreparedModel,
    pool: DevicePool,
    grant: Grant,
    policy: SchedulingPolicy,
    observe: StepObserver,
) -> Engine:
    """Returns the engine of one worker, not started. ``observe`` is called after each of its steps."""
    spec = model_spec(prepared.folder)
    runner = _runner(config, prepared, spec, pool)
    scheduler = Scheduler(config.max_num_seqs, config.step_token_budget, spec.vocab_size, policy)
    return StepEngine(scheduler, runner, grant, SystemClock(), observe)


def num_threads(config: ModelConfig) -> int:
    """Returns the threads of each worker of the model: as configured, or one for each core of this process."""
    return config.threads or len(os.sched_getaffinity(0))


def _runner(config: ModelConfig, prepared: PreparedModel, spec: ModelSpec, pool: DevicePool) -> Runner:
    if config.engine == "sim":
        # In the built-in byte tokenizer these are printable characters; in others, what follows the special tokens.
        token_ids = range(35, 93) if prepared.folder is None else range(min(256, spec.vocab_size - 1), spec.vocab_size)
        return SimRunner(config.sim, token_ids, min(spec.eos_token_ids, default=0), max_steps=config.max_decode_steps)
    from muxmesh.engine.native.cpu.forward import open_cpu_forward  # noqa: PLC0415 - only this engine needs numba
    from muxmesh.engine.native.cpu.thread_team import Team  # noqa: PLC0415
    from muxmesh.engine.native.logits_runner import LogitsRunner  # noqa: PLC0415

    assert prepared.image is not None, "a native model is prepared with its image"
    assert isinstance(pool, HostPool), "the CPU engine computes in host memory"
    image, positions, team = prepared.image, config.max_model_len or spec.context_len, Team(num_threads(config))
    view = pool.view(spec.kv_shape(config.block_size, config.kv_dtype))
    return LogitsRunner(view, lambda pool_view: open_cpu_forward(spec, image, pool_view, positions, team))
