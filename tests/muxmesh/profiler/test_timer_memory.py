import os
from pathlib import Path

import numpy as np
import torch

from muxmesh.clock import SystemClock
from muxmesh.config.runtime import PreparedModel
from muxmesh.config.schema import MeshConfig
from muxmesh.device.torch_device import open_torch_device
from muxmesh.models.model_spec import read_model_spec
from muxmesh.models.weight_image import ensure_image
from muxmesh.profiler.step_timer import StepTimer
from muxmesh.profiler.timer_memory import HostTimerMemory, cuda_timer_memory
from muxmesh.scheduling_policy import FCFS
from muxmesh.types import Role
from tests.support.profiles import sim_model
from tests.support.tiny import TinyShape, write_tiny_model
from worker.engine_builder import build_runner, build_scheduler


def test_only_the_blocks_that_are_needed_are_filled_in_whole_slabs() -> None:
    model = sim_model()
    memory, per_slab = HostTimerMemory(model.unit), model.unit.slab // model.shape.token_block_bytes
    elements, of_slab = memory.pool.view(model.shape).pool, model.unit.slab // 4
    assert memory.fill(model.shape, per_slab + 1)
    assert not memory.fill(model.shape, 1)
    assert np.count_nonzero(elements[: 2 * of_slab]) > 1.99 * of_slab
    assert not elements[2 * of_slab : 3 * of_slab].any()
    memory.fill(model.shape, 2 * per_slab + 1)
    assert np.isfinite(elements[: 3 * of_slab]).all() and elements[3 * of_slab - 1] != 0


def test_a_model_on_a_gpu_is_timed_in_its_own_memory(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny", TinyShape())
    spec = read_model_spec(folder)
    model = {"name": "tiny", "max_num_seqs": 1, "max_model_len": 32, "cuda_graphs": False, "continuous_decode_steps": 1}
    config = MeshConfig.model_validate(
        {"units": [{"device": "cuda:0", "kv_pool": "1MiB", "slab": "64KiB", "models": [model]}]}
    )
    unit = config.units[0]
    image = ensure_image(folder, spec, "rows", tmp_path, lambda done, total: None)
    prepared = PreparedModel(folder=folder, image=image, weights_fingerprint="w")
    shape = spec.kv_shape(16, "float32")
    pool, weights = cuda_timer_memory(unit, unit.models[0], prepared, shape, open_torch_device())
    assert torch.isfinite(pool.elements(torch.float32)).all() and weights is not None
    runner = build_runner(unit.models[0], prepared, pool, weights, Role.DECODE)
    runner.load()
    timer = StepTimer(build_scheduler(unit.models[0], prepared, FCFS), runner, 16, 32, SystemClock())
    assert timer.samples(Role.DECODE, 1, 20, repeats=1, longest_s=1e-6)[0] > 0
    os.close(weights.page_fd)
