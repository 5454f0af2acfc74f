"""Builds the engine that a model's configuration names, for the memory that its pool is in.

Imports numba only for the native engine on a CPU, torch and Triton only for that on a GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from muxmesh.clock import SystemClock
from muxmesh.config.model_config import ModelConfig
from muxmesh.config.runtime import PreparedModel
from muxmesh.device.device_pool import DevicePool, HostPool
from muxmesh.device.kv_view import KvView
from muxmesh.engine.api import Engine, Grant
from muxmesh.engine.scheduler import Scheduler
from muxmesh.engine.sim_runner import SimRunner, sim_worker_cost
from muxmesh.engine.step import Runner
from muxmesh.engine.step_engine import StepEngine, StepObserver
from muxmesh.machine_limits import num_usable_cores
from muxmesh.models.image_memory import release_image
from muxmesh.models.model_spec import ModelSpec
from muxmesh.models.prepared_model import model_spec
from muxmesh.scheduling_policy import SchedulingPolicy
from muxmesh.types import Role
from worker.share_pacer import SharePacer

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
    role: Role,
) -> Engine:
    """Returns the engine of one worker, not started. ``observe`` is called after each of its steps.

    ``weights``: the memory on the GPU for the model's weights; None on a CPU.
    """
    scheduler, runner = build_scheduler(config, prepared, policy), build_runner(config, prepared, pool, weights, role)
    return StepEngine(scheduler, runner, grant, SystemClock(), observe)


def build_scheduler(config: ModelConfig, prepared: PreparedModel, policy: SchedulingPolicy) -> Scheduler:
    """Returns the scheduler of one worker, without jobs."""
    return Scheduler(config.max_num_seqs, config.step_token_budget, model_spec(prepared.folder).vocab_size, policy)


def num_threads(config: ModelConfig, role: Role | None = None) -> int:
    """Returns the threads of a worker of the model: as configured, or one for each core of its share, rounded up.

    ``role``: None on a GPU, whose share is none of the cores.
    """
    return config.threads or -(-_percent(config, role) * num_usable_cores() // 100)


def build_pacer(config: ModelConfig, role: Role, is_cuda: bool) -> SharePacer | None:
    """Returns what holds a worker to its share of the CPU; None if that is all of it, or not CPU time that it uses."""
    if is_cuda or config.engine == "sim" or _percent(config, role) == 100:
        return None
    return SharePacer(_percent(config, role) / 100 * num_usable_cores())


def _percent(config: ModelConfig, role: Role | None) -> int:
    return 100 if role is None else config.compute_share.of(role)


def build_runner(
    config: ModelConfig,
    prepared: PreparedModel,
    pool: DevicePool,
    weights: MappedWeights | None,
    role: Role,
) -> Runner:
    """Returns the runner of one worker, not loaded. ``weights``: see `build_engine`."""
    spec = model_spec(prepared.folder)
    if config.engine == "sim":
        # In the built-in byte tokenizer these are printable characters; in others, what follows the special tokens.
        token_ids = range(35, 93) if prepared.folder is None else range(min(256, spec.vocab_size - 1), spec.vocab_size)
        eos_token_id, cost = min(spec.eos_token_ids, default=0), sim_worker_cost(config, role)
        return SimRunner(config.sim, token_ids, eos_token_id, max_steps=config.max_decode_steps, cost=cost)
    assert prepared.image is not None, "a native model is prepared with its image"
    max_model_len = config.max_model_len or spec.context_len
    if isinstance(pool, HostPool):
        return _cpu_runner(num_threads(config, role), config, prepared.image, spec, pool, max_model_len)
    assert weights is not None, "a unit on a GPU has memory for the weights of its native models"
    return _cuda_runner(config, prepared.image, spec, pool, weights, max_model_len)


def _cpu_runner(
    threads: int, config: ModelConfig, image: Path, spec: ModelSpec, pool: HostPool, max_model_len: int
) -> Runner:
    from muxmesh.engine.native.logits_runner import Forward, LogitsRunner  # noqa: PLC0415 - only this engine needs it

    def open_forward(view: KvView) -> Forward:
        """Imports numba, which a model that has never been awake does without."""
        from muxmesh.engine.native.cpu.forward import open_cpu_forward  # noqa: PLC0415
        from muxmesh.engine.native.cpu.thread_team import Team  # noqa: PLC0415

        return open_cpu_forward(spec, image, view, max_model_len, Team(threads))

    view = pool.view(spec.kv_shape(config.block_size, config.kv_dtype))
    return LogitsRunner(view, open_forward, lambda: release_image(image))


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
