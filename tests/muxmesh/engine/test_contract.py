"""The contract of `muxmesh.engine.api.Engine`, run on each engine. A further engine is a branch of `opened`."""

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from muxmesh.device.cuda_pool import CudaPool
from muxmesh.device.kv_view import KvView
from muxmesh.device.torch_device import open_torch_device
from muxmesh.engine.api import (
    Engine,
    EngineJob,
    Event,
    Failed,
    Finished,
    FreeGrant,
    JobDone,
    Preempted,
    Tokens,
)
from muxmesh.engine.sequence import SequenceRecord
from muxmesh.engine.step import Runner
from muxmesh.engine.step_limit import StepLimit
from muxmesh.errors import InvalidRequest, WorkerLost
from muxmesh.models.model_spec import KvShape, read_model_spec
from muxmesh.step_cost import StepCost
from muxmesh.types import EngineRequest, FinishReason, Sampling, SchedulingState, Stopping
from tests.support.device_model import MAX_NUM_SEQS, device_runner, nan_pool, tiny_geometry
from tests.support.engines import running_engine, sim_runner
from tests.support.tiny import TinyShape, tiny_runner, tiny_view, write_tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:All-NaN slice")  # the interpreter's maximum of a row of NaN

BLOCKS = {1: (0, 1, 2, 3), 2: (4, 5, 6, 7), 3: (8, 9, 10, 11)}

VOCAB_SIZE = 259


MoveKv = Callable[[Sequence[int], Sequence[int]], None]
"""Moves KV to other blocks, as a swap does, and writes NaN into the old ones, which would show if they were read."""


@dataclass(frozen=True)
class Opened:
    engine: Engine
    move_kv: MoveKv
    grant: FreeGrant


@pytest.fixture(scope="module")
def native_runner(tmp_path_factory: pytest.TempPathFactory) -> tuple[Runner, KvView]:
    folder = write_tiny_model(tmp_path_factory.mktemp("tiny"), TinyShape())
    view = tiny_view(read_model_spec(folder))
    return tiny_runner(folder, tmp_path_factory.mktemp("cache"), view=view)[0], view


@pytest.fixture(scope="module")
def device_runner_and_pool(tmp_path_factory: pytest.TempPathFactory) -> tuple[Runner, CudaPool]:
    """A model of one layer: the kernels are interpreted."""
    folder = write_tiny_model(tmp_path_factory.mktemp("tiny"), TinyShape(num_layers=1, num_heads=2, num_kv_heads=1))
    device, geometry = open_torch_device(), tiny_geometry(read_model_spec(folder), torch.float32)
    pool = CudaPool(nan_pool(geometry, 3, torch.float32).to(device.torch_device), geometry.slab_bytes, None, device)
    memory = pool.elements(torch.uint8)
    return device_runner(folder, tmp_path_factory.mktemp("cache"), device, pool=memory, max_steps=16), pool


@pytest.fixture(params=["sim", "sim in runs of steps", "native", "native on a GPU"])
async def opened(request: pytest.FixtureRequest) -> AsyncIterator[Opened]:
    grant = FreeGrant()
    if request.param == "native on a GPU":
        on_device, pool = request.getfixturevalue("device_runner_and_pool")
        async with running_engine(
            on_device, MAX_NUM_SEQS, token_budget=32, vocab_size=VOCAB_SIZE, grant=grant
        ) as engine:
            yield Opened(engine, functools.partial(move_on_device, pool), grant)
    elif request.param != "native":
        runner = sim_runner(1 if request.param == "sim" else 5)
        async with running_engine(runner, token_budget=32, vocab_size=VOCAB_SIZE, grant=grant) as engine:
            yield Opened(engine, lambda old, new: None, grant)
    else:
        native, view = request.getfixturevalue("native_runner")
        async with running_engine(native, token_budget=32, vocab_size=VOCAB_SIZE, grant=grant) as engine:
            yield Opened(engine, functools.partial(move_in_host_memory, view), grant)


@pytest.fixture
def engine(opened: Opened) -> Engine:
    return opened.engine


def move_in_host_memory(view: KvView, old: Sequence[int], new: Sequence[int]) -> None:
    size = view.shape.token_block_bytes // view.shape.dtype_bytes
    for source, target in zip(view.block_offsets(old), view.block_offsets(new), strict=True):
        view.pool[target : target + size] = view.pool[source : source + size]
        view.pool[source : source + size] = np.nan


def move_on_device(pool: CudaPool, old: Sequence[int], new: Sequence[int]) -> None:
    """The model of `device_runner_and_pool` has one KV head of 16 elements."""
    shape = KvShape(1, 1, 16, 16, 4)
    memory, size = pool.elements(torch.float32), shape.token_block_bytes // shape.dtype_bytes
    offsets = pool.geometry(shape).block_offsets
    for source, target in zip(offsets(old), offsets(new), strict=True):
        memory[target : target + size] = memory[source : source + size]
        memory[source : source + size] = torch.nan


def record(
    job_id: int = 1,
    max_new_tokens: int = 12,
    temperature: float = 0.9,
    resume: tuple[int, ...] = (),
    blocks: tuple[int, ...] | None = None,
    computed: int = 0,
    sampled: tuple[int, ...] = (),
    allowed: tuple[int, ...] | None = None,
    stopping: Stopping | None = None,
) -> SequenceRecord:
    request = EngineRequest(
        request_id=f"r{job_id}",
        model="m",
        prompt_token_ids=tuple(range(40, 60)),
        sampling=Sampling(temperature, seed=42, allowed_token_ids=allowed),
        stopping=stopping or Stopping(max_new_tokens),
        scheduling=SchedulingState(0, float(job_id)),
        resume_token_ids=resume,
    )
    return SequenceRecord(request, 16, b"root", BLOCKS[job_id] if blocks is None else blocks, computed, sampled)


def job(job_id: int = 1, limit: int | None = None, **more: Any) -> EngineJob:
    return EngineJob(job_id, record(job_id, **more), limit)


async def collect(events: AsyncIterator[Event]) -> tuple[tuple[int, ...], list[Event]]:
    """The tokens of a job, each exactly once, and its other events."""
    tokens: dict[int, int] = {}
    others: list[Event] = []
    async with asyncio.timeout(60):
        async for event in events:
            if isinstance(event, Tokens):
                for offset, token in enumerate(event.token_ids):
                    assert event.start_index + offset not in tokens, "a token was sent twice"
                    tokens[event.start_index + offset] = token
            else:
                others.append(event)
    first = min(tokens, default=0)
    assert sorted(tokens) == list(range(first, first + len(tokens))), "a token is missing"
    return tuple(tokens[index] for index in sorted(tokens)), others


async def test_a_job_yields_all_its_tokens_and_a_finish(engine: Engine) -> None:
    tokens, others = await collect(engine.submit(job()))
    assert len(tokens) == 12
    assert [type(event) for event in others] == [Finished]
    assert isinstance(others[0], Finished) and others[0].finish.reason is FinishReason.LENGTH


async def test_the_same_job_samples_the_same_tokens_again(engine: Engine) -> None:
    assert (await collect(engine.submit(job())))[0] == (await collect(engine.submit(job())))[0]


@pytest.mark.parametrize("num_first", [1, 3])
async def test_prefill_then_decode_samples_the_tokens_of_one_engine(engine: Engine, num_first: int) -> None:
    whole, _ = await collect(engine.submit(job()))
    prefill = job(limit=num_first)
    first, others = await collect(engine.submit(prefill))
    assert others == [JobDone()]
    assert len(first) == num_first and prefill.sequence.num_computed_tokens == 20 + num_first - 1
    rest, _ = await collect(engine.submit(job(computed=prefill.sequence.num_computed_tokens, sampled=first)))
    assert first + rest == whole


@pytest.mark.parametrize("temperature", [0.0, 0.9])
async def test_a_resumed_job_continues_like_the_uninterrupted_one(engine: Engine, temperature: float) -> None:
    whole, _ = await collect(engine.submit(job(temperature=temperature)))
    rest, _ = await collect(engine.submit(job(2, temperature=temperature, resume=whole[:5])))
    assert whole[:5] + rest == whole


async def test_jobs_in_one_batch_sample_the_tokens_that_they_sample_alone(engine: Engine) -> None:
    alone = [(await collect(engine.submit(job(number))))[0] for number in (1, 2, 3)]
    together = await asyncio.gather(*(collect(engine.submit(job(number))) for number in (1, 2, 3)))
    assert [tokens for tokens, _ in together] == alone


@pytest.mark.parametrize("longest_s", [0.0, 17.5, 19.5])
async def test_a_prompt_in_chunks_of_any_size_has_the_same_tokens(opened: Opened, longest_s: float) -> None:
    resumed = tuple(range(60, 76))
    whole, _ = await collect(opened.engine.submit(job(max_new_tokens=28, resume=resumed)))
    assert len(whole) == 12
    opened.grant.step_limit = StepLimit(StepCost(0.0, 1.0, 0.0), longest_s)  # 16, 17 or 19 of 36 tokens in a step
    cut, _ = await collect(opened.engine.submit(job(max_new_tokens=28, resume=resumed)))
    assert cut == whole


async def test_the_id_of_a_cancelled_job_may_be_used_again(engine: Engine) -> None:
    events = engine.submit(job(max_new_tokens=40))
    assert isinstance(await anext(events), Tokens)
    await engine.cancel(1)
    await engine.cancel(1)
    tokens, _ = await collect(engine.submit(job()))
    assert len(tokens) == 12


async def test_a_pre_empted_job_waits_and_continues(engine: Engine) -> None:
    whole, _ = await collect(engine.submit(job(max_new_tokens=30)))
    waiting = job(max_new_tokens=30)
    got: list[int] = []
    async with asyncio.timeout(60):
        async for event in engine.submit(waiting):
            if isinstance(event, Tokens):
                got.extend(event.token_ids)
                if len(got) == 3:
                    engine.preempt(1)
            elif isinstance(event, Preempted):
                engine.sequence_changed(1)
                engine.resume(1)
    assert tuple(got) == whole


async def test_a_step_is_in_the_record_before_its_events(engine: Engine) -> None:
    running = job()
    seen = 0
    async for event in engine.submit(running):
        if isinstance(event, Tokens):
            seen += len(event.token_ids)
            assert running.sequence.num_output_tokens >= seen
    assert running.sequence.num_output_tokens == 12
    assert running.sequence.num_computed_tokens == 20 + 11, "the KV of the last sampled token is not computed"
    assert running.sequence.finish is not None


async def test_no_token_outside_the_bitmask_is_sampled(engine: Engine) -> None:
    allowed = {40, 63, 64, 90}
    bitmask = np.zeros(9, dtype=np.uint32)
    for token in allowed:
        bitmask[token // 32] |= np.uint32(1 << token % 32)
    running = job()
    running.sequence.token_bitmask = bitmask
    tokens, _ = await collect(engine.submit(running))
    assert set(tokens) <= allowed and len(set(tokens)) > 1


async def test_a_pre_empted_job_continues_in_other_blocks(opened: Opened) -> None:
    engine = opened.engine
    whole, _ = await collect(engine.submit(job(max_new_tokens=30)))
    moved = job(max_new_tokens=30)
    got: list[int] = []
    async with asyncio.timeout(60):
        async for event in engine.submit(moved):
            if isinstance(event, Tokens):
                got.extend(event.token_ids)
                if len(got) == 3:
                    engine.preempt(1)
            elif isinstance(event, Preempted):
                opened.move_kv(BLOCKS[1], BLOCKS[3])
                moved.sequence.swap_out()
                moved.sequence.swap_in(BLOCKS[3], is_exact=True)
                engine.resume(1)
    assert tuple(got) == whole


async def test_a_job_whose_blocks_are_full_waits_for_more(engine: Engine) -> None:
    whole, _ = await collect(engine.submit(job(max_new_tokens=30)))
    narrow = job(max_new_tokens=30, blocks=BLOCKS[1][:2])
    got: list[int] = []
    async with asyncio.timeout(60):
        async for event in engine.submit(narrow):
            if isinstance(event, Tokens):
                got.extend(event.token_ids)
                if len(got) == 2 * 16 - 20 + 1:  # there is no slot for the KV of the last one
                    for _ in range(5):
                        await asyncio.sleep(0)
                    assert narrow.sequence.num_output_tokens == len(got)
                    narrow.sequence.add_blocks(BLOCKS[1][2:])
                    engine.sequence_changed(1)
    assert tuple(got) == whole


async def test_only_allowed_tokens_are_sampled_and_no_end_before_the_minimum(engine: Engine) -> None:
    stopping = Stopping(12, min_new_tokens=6, eos_token_ids=frozenset({40}), stop_token_ids=frozenset({63}))
    running = job(allowed=(40, 63, 64, 90), stopping=stopping)
    tokens, _ = await collect(engine.submit(running))
    assert set(tokens) <= {40, 63, 64, 90}
    assert len(tokens) >= 6 and not {40, 63} & set(tokens[:5])


async def test_calls_for_a_job_that_is_not_known_do_nothing(engine: Engine) -> None:
    engine.preempt(99)
    engine.resume(99)
    engine.sequence_changed(99)
    await engine.cancel(99)
    tokens, _ = await collect(engine.submit(job()))
    assert len(tokens) == 12


async def test_a_paused_job_that_is_cancelled_yields_nothing_more(engine: Engine) -> None:
    cancelled = job(max_new_tokens=40)
    events = engine.submit(cancelled)
    await anext(events)
    engine.preempt(1)
    while not isinstance(await anext(events), Preempted):
        pass
    await engine.cancel(1)
    num_tokens = cancelled.sequence.num_output_tokens
    engine.resume(1)
    await collect(engine.submit(job(2)))
    assert cancelled.sequence.num_output_tokens == num_tokens, "it took part in the steps of the other job"
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await anext(events)


async def test_stopping_ends_every_job(engine: Engine) -> None:
    events = [engine.submit(job(job_id, max_new_tokens=40)) for job_id in (1, 2)]
    await anext(events[0])
    stopping = asyncio.create_task(engine.stop())
    for one in events:
        _, others = await collect(one)
        assert [type(event) for event in others] == [Failed]
    await stopping


UNKNOWN: dict[str, dict[str, Any]] = {
    "resumed": {"resume": (41, VOCAB_SIZE)},
    "sampled by another engine": {"computed": 20, "sampled": (2**32 - 1,)},
    "negative": {"resume": (-1,)},
    "allowed": {"allowed": (41, VOCAB_SIZE)},
    "stop": {"stopping": Stopping(4, stop_token_ids=frozenset({VOCAB_SIZE}))},
    "eos": {"stopping": Stopping(4, eos_token_ids=frozenset({29_106}))},
}


@pytest.mark.parametrize("more", UNKNOWN.values(), ids=UNKNOWN.keys())
async def test_a_token_id_that_the_model_does_not_have_is_refused_before_anything_is_computed(
    engine: Engine, more: dict[str, Any]
) -> None:
    with pytest.raises(InvalidRequest, match=f"is unknown; the model has {VOCAB_SIZE} tokens"):
        engine.submit(job(1, **more))
    tokens, _ = await collect(engine.submit(job(1)))
    assert len(tokens) == 12, "the id of the job is free"


async def test_the_last_token_id_of_the_model_is_computed(engine: Engine) -> None:
    tokens, _ = await collect(engine.submit(job(1, resume=(VOCAB_SIZE - 1, 0))))
    assert len(tokens) == 10


@pytest.mark.parametrize("drop_weights", [False, True])
async def test_an_engine_that_has_slept_samples_the_same_tokens(engine: Engine, drop_weights: bool) -> None:
    whole, _ = await collect(engine.submit(job()))
    await engine.sleep(drop_weights)
    await engine.sleep(drop_weights=True)
    with pytest.raises(WorkerLost, match="sleeps"):
        engine.submit(job())
    await engine.wake()
    await engine.wake()
    assert (await collect(engine.submit(job())))[0] == whole


async def test_an_engine_with_a_job_does_not_fall_asleep(engine: Engine) -> None:
    events = engine.submit(job(max_new_tokens=40))
    with pytest.raises(ValueError, match="1 jobs have not ended"):
        await engine.sleep(drop_weights=False)
    await collect(events)
    await engine.sleep(drop_weights=False)
