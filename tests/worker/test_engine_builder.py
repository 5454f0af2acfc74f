"""The engine that a configuration names, run."""

import asyncio
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from kvstore.device_memory import new_memfd
from muxmesh.config.model_config import ModelConfig
from muxmesh.config.runtime import PreparedModel
from muxmesh.device.cuda_mapping import MappedWeights
from muxmesh.device.cuda_pool import CudaPool
from muxmesh.device.device_pool import DevicePool, HostPool
from muxmesh.device.torch_device import open_torch_device
from muxmesh.engine.api import EngineJob, FreeGrant, Tokens
from muxmesh.engine.sequence import SequenceRecord
from muxmesh.engine.sim_runner import sim_worker_cost
from muxmesh.engine.step import Chunk, SampleSpec, Step, StepOutcome
from muxmesh.errors import WorkerLost
from muxmesh.models.model_spec import read_model_spec
from muxmesh.models.tokenizer import byte_tokenizer
from muxmesh.models.weight_image import ensure_image
from muxmesh.scheduling_policy import FCFS
from muxmesh.step_cost import StepCost, at_share
from muxmesh.types import EngineRequest, Role, Sampling, SchedulingState, Stopping
from tests.support.tiny import TinyShape, tiny_runner, tiny_view, write_tiny_model
from tests.support.triton_interpreter import DEVICE
from worker.engine_builder import build_engine, build_pacer, num_threads

PROMPT, BLOCKS = tuple(range(40, 60)), (0, 1, 2)


def record(max_new_tokens: int, sampling: Sampling) -> SequenceRecord:
    request = EngineRequest("r", "m", PROMPT, sampling, Stopping(max_new_tokens), SchedulingState(0, 0.0))
    return SequenceRecord(request, 16, b"root", BLOCKS)


async def run(
    config: ModelConfig,
    prepared: PreparedModel,
    pool: DevicePool,
    sequence: SequenceRecord,
    weights: MappedWeights | None = None,
) -> list[int]:
    """The output of one job on the engine that is built. The job's steps are observed."""
    num_tokens: list[int] = []

    def observe(step: Step, outcome: StepOutcome, seconds: float) -> None:
        num_tokens.append(step.num_tokens * outcome.num_steps)

    engine = build_engine(config, prepared, pool, weights, FreeGrant(), FCFS, observe, Role.DECODE)
    await engine.start()
    async with asyncio.timeout(60):
        events = [event async for event in engine.submit(EngineJob(1, sequence))]
    await engine.stop()
    assert sum(num_tokens) == sequence.num_computed_tokens
    return [token for event in events if isinstance(event, Tokens) for token in event.token_ids]


NO_POOL = HostPool(np.zeros(0, dtype=np.float32), 4096, None)


async def test_a_sim_model_without_a_folder_samples_printable_characters_of_the_byte_tokenizer() -> None:
    prepared = PreparedModel(folder=None, image=None, weights_fingerprint="sim")
    tokens = await run(ModelConfig(name="m", engine="sim"), prepared, NO_POOL, record(28, Sampling(seed=1)))
    text = byte_tokenizer().decode(tokens)
    assert len(tokens) == len(text) == 28 and text.isascii() and text.isprintable()


async def test_a_sim_model_computes_decode_steps_in_a_row_as_configured_and_samples_the_same_tokens() -> None:
    prepared = PreparedModel(folder=None, image=None, weights_fingerprint="sim")
    in_runs = ModelConfig(name="m", engine="sim", continuous_decode_steps=5)
    tokens = await run(in_runs, prepared, NO_POOL, record(28, Sampling(seed=1)))
    assert tokens == await run(ModelConfig(name="m", engine="sim"), prepared, NO_POOL, record(28, Sampling(seed=1)))


async def test_a_sim_model_with_a_folder_samples_tokens_past_the_special_ones(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path, TinyShape())
    prepared = PreparedModel(folder=folder, image=None, weights_fingerprint="sim")
    tokens = await run(ModelConfig(name="m", engine="sim"), prepared, NO_POOL, record(28, Sampling(seed=1)))
    assert set(tokens) <= set(range(256, read_model_spec(folder).vocab_size))


async def test_a_native_model_samples_what_its_runner_samples(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model", TinyShape())
    spec, greedy = read_model_spec(folder), Sampling(temperature=0.0)
    image = ensure_image(folder, spec, "panels", tmp_path, lambda done, total: None)
    view = tiny_view(spec)
    tokens = await run(
        ModelConfig(name="m", threads=2),
        PreparedModel(folder=folder, image=image, weights_fingerprint="w"),
        HostPool(view.pool, view.slab_bytes, None),
        record(6, greedy),
    )
    runner, _ = tiny_runner(folder, tmp_path)
    expected: list[int] = []
    for index in range(6):
        chunk = Chunk(1, 0, (*PROMPT, *expected), BLOCKS, SampleSpec(greedy, index))
        expected.append(runner.run(Step((chunk,))).sampled[1][0].token_id)
    assert tokens == expected
    assert await on_gpu(folder, tmp_path, use_graphs=True) == await on_gpu(folder, tmp_path, use_graphs=False) == tokens


async def on_gpu(folder: Path, cache: Path, use_graphs: bool) -> list[int]:
    """The greedy output of 6 tokens of a model on a GPU, whose kernels are interpreted."""
    spec = read_model_spec(folder)
    image = ensure_image(folder, spec, "rows", cache, lambda done, total: None)
    config = ModelConfig(name="m", max_model_len=48, max_num_seqs=2, prefill_token_budget=32, cuda_graphs=use_graphs)
    slab_bytes = 4 * spec.kv_shape(16, "float32").token_block_bytes
    pool = CudaPool(torch.zeros(slab_bytes, dtype=torch.uint8, device=DEVICE), slab_bytes, None, open_torch_device())
    page_fd = new_memfd("weights page", 4096)
    weights = MappedWeights(torch.zeros(image.stat().st_size, dtype=torch.uint8, device=DEVICE), page_fd)
    prepared = PreparedModel(folder=folder, image=image, weights_fingerprint="w")
    tokens = await run(config, prepared, pool, record(6, Sampling(temperature=0.0)), weights)
    os.close(page_fd)
    return tokens


def test_threads_are_as_configured_or_one_for_each_core_that_the_process_may_use() -> None:
    counted, shares = list[int](), list[float]()

    config = ModelConfig.model_validate({"name": "m", "compute_share": {"prefill": 50, "decode": 51}})

    def count() -> None:
        cores = sorted(os.sched_getaffinity(0))[:2]
        os.sched_setaffinity(0, cores)
        shares.extend(num_threads(config, role) / len(cores) for role in (None, *Role))
        os.sched_setaffinity(0, cores[:1])
        counted.extend([num_threads(ModelConfig(name="m")), num_threads(ModelConfig(name="m", threads=5))])

    thread = threading.Thread(target=count)  # affinity is a thread's own
    thread.start()
    thread.join()
    assert counted == [1, 5]
    assert shares in ([1, 0.5, 1], [1, 1, 1]), "half of two cores is one thread, a little more is two"


def test_only_a_native_worker_on_a_part_of_a_cpu_is_paced() -> None:
    config = ModelConfig.model_validate({"name": "m", "compute_share": {"prefill": 100, "decode": 25}})
    assert build_pacer(config, Role.PREFILL, is_cuda=False) is None
    assert build_pacer(config, Role.DECODE, is_cuda=False) is not None
    assert build_pacer(config, Role.DECODE, is_cuda=True) is None
    assert build_pacer(config.model_copy(update={"engine": "sim"}), Role.DECODE, is_cuda=False) is None


def test_a_sim_worker_takes_longer_on_its_share_of_a_cpu() -> None:
    profile = {"base_s": 0.001, "prefill_scaling": 0.5, "decode_scaling": 0.0}
    config = ModelConfig.model_validate({"name": "m", "engine": "sim", "sim": profile, "compute_share": 25})
    costs = [sim_worker_cost(config, role) for role in Role]
    assert [cost.base_s for cost in costs] == pytest.approx([0.0025, 0.001])
    assert costs[0] == at_share(StepCost(0.001, 0.0, 0.0), 0.25, 0.5)


async def test_a_native_engine_that_starts_asleep_reads_no_weights(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model", TinyShape())
    spec = read_model_spec(folder)
    prepared = PreparedModel(folder=folder, image=tmp_path / "not there", weights_fingerprint="w")
    shape = spec.kv_shape(16, "float32")
    pool = HostPool(np.zeros(8 * shape.token_block_bytes // 4, dtype=np.float32), 4 * shape.token_block_bytes, None)
    config = ModelConfig(name="m", threads=1, max_model_len=64)
    engine = build_engine(
        config, prepared, pool, None, FreeGrant(), FCFS, lambda step, outcome, seconds: None, Role.DECODE
    )
    await engine.start(asleep=True)
    with pytest.raises(WorkerLost, match="sleeps"):
        engine.submit(EngineJob(1, record(3, Sampling())))
    await engine.stop()


def test_a_worker_loads_numba_only_when_its_engine_wakes() -> None:
    code = "import sys, worker.worker_process, decode_svc.service, worker.engine_builder; print('numba' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed == "False\n"
