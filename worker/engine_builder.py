"""Builds the engine that a model's configuration names, for the memory that its pool is in.

Imports numba only for the native engine on a CPU, torch and Triton only for that on a GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from muxmesh.clock import SystemClock
from muxmesh.config.runtime import PreparedModel
from muxmesh.config.schema import ModelConfig
from muxmesh.device.device_pool import DevicePool, HostPool
from muxmesh.engine.api import Engine, Grant
from muxmesh.engine.scheduler import Scheduler
from muxmesh.engine.sim_runner import SimRunner
from muxmesh.engine.step import Runner
from muxmesh.engine.step_engine import StepEngine, StepObserver
from muxmesh.machine_limits import num_usable_cores
from muxmesh.models.model_spec import ModelSpec
from muxmesh.models.prepared_model import model_spec
from muxmesh.scheduling_policy import SchedulingPolicy

if TYPE_CHECKING:  # only units on a GPU load torch
    from muxmesh.device.cuda_mapping import MappedWeights


def build_engine(
    config: ModelConfig,
    prepared: PreparedModel,
    pool: DevicePool,
    weights: MappedWeights | None,
    grant: Grant,
    policy: SchedulingPolicy,
    observe: StepObserver,
) -> Engine:
    """Returns the engine of one worker, not started. ``observe`` is called after each of its steps.

    ``weights``: the memory on the GPU for the model's weights; None on a CPU.
    """
    spec = model_spec(prepared.folder)
    runner = _runner(config, prepared, spec, pool, weights)
    scheduler = Scheduler(config.max_num_seqs, config.step_token_budget, spec.vocab_size, policy)
    return StepEngine(scheduler, runner, grant, SystemClock(), observe)


def num_threads(config: ModelConfig) -> int:
    """Returns the threads of each worker of the model: as configured, or one for each core that it may use."""
    return config.threads or num_usable_cores()


def _runner(
    config: ModelConfig, prepared: PreparedModel, spec: ModelSpec, pool: DevicePool, weights: MappedWeights | None
) -> Runner:
    if config.engine == "sim":
        # In the built-in byte tokenizer these are printable characters; in others, what follows the special tokens.
        token_ids = range(35, 93) if prepared.folder is None else range(min(256, spec.vocab_size - 1), spec.vocab_size)
        return SimRunner(config.sim, token_ids, min(spec.eos_token_ids, default=0), max_steps=config.max_decode_steps)
    assert prepared.image is not None, "a native model is prepared with its image"
    max_model_len = config.max_model_len or spec.context_len
    if isinstance(pool, HostPool):
        return _cpu_runner(config, prepared.image, spec, pool, max_model_len)
    assert weights is not None, "a unit on a GPU has memory for the weights of its native models"
    return _cuda_runner(config, prepared.image, spec, pool, weights, max_model_len)


def _cpu_runner(config: ModelConfig, image: Path, spec: ModelSpec, pool: HostPool, max_model_len: int) -> Runner:
    from muxmesh.engine.native.cpu.forward import open_cpu_forward  # noqa: PLC0415 - only this engine needs numba
    from muxmesh.engine.native.cpu.thread_team import Team  # noqa: PLC0415
    from muxmesh.engine.native.logits_runner import LogitsRunner  # noqa: PLC0415

    team = Team(num_threads(config))
    view = pool.view(spec.kv_shape(config.block_size, config.kv_dtype))
    return LogitsRunner(view, lambda pool_view: open_cpu_forward(spec, image, pool_view, max_model_len, team))


def _cuda_runner(
    config: ModelConfig, image: Path, spec: ModelSpec, pool: DevicePool, weights: MappedWeights, max_model_len: int
) -> Runner:
    from muxmesh.device.cuda_pool import CudaPool, kv_dtype  # noqa: PLC0415 - only this engine needs torch
    from muxmesh.engine.native.cuda.runner import CudaRunner, RunnerLimits  # noqa: PLC0415
    from muxmesh.engine.native.cuda.weights import load_weights  # noqa: PLC0415

    assert isinstance(pool, CudaPool), "the engine on a GPU computes in its memory"
    device, shape, clock = pool.device, spec.kv_shape(config.block_size, config.kv_dtype), SystemClock()
    return CudaRunner(
        device,
        spec,
        lambda: load_weights(image, weights.memory, weights.page_fd, device, clock),
        pool.geometry(shape),
        pool.elements(kv_dtype(shape)),
        RunnerLimits(config.max_num_seqs, config.step_token_budget, max_model_len, config.max_decode_steps),
        clock,
        use_graphs=config.cuda_graphs,
    )
