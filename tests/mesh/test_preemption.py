"""Sequences that displace others from a full batch, in a real mesh of sim engines."""

import asyncio
import signal
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from muxmesh.execution import NO_EXECUTION, Execution, PreemptionReason
from tests.support.mesh import RunningMesh, running_mesh

pytestmark = [pytest.mark.mesh, pytest.mark.asyncio(loop_scope="module")]

NUM_SLOTS = 2
LONG: dict[str, Any] = {"max_new_tokens": 200, "ignore_eos": True, "temperature": 1.0}
SHORT: dict[str, Any] = {"max_new_tokens": 5, "ignore_eos": True, "temperature": 1.0}


@dataclass
class Served:
    """An output of `full_batch`, and what became of it."""

    token_ids: tuple[int, ...] = ()
    execution: Execution = NO_EXECUTION
    e2e_s: float = 0.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("preemption")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(folder: Path) -> AsyncIterator[RunningMesh]:
    model = {"name": "sim", "engine": "sim", "sim": {"base_s": 0.02}, "max_num_seqs": NUM_SLOTS}
    units, order = [{"kv_pool": "16MiB", "models": [model]}], {"trace": True}
    async with running_mesh(folder, units=units, order=order, metrics={"listen": "127.0.0.1:0"}) as running:
        yield running


async def full_batch(
    mesh: RunningMesh, seed: int, outputs: Sequence[Served] | None = None
) -> list[asyncio.Task[Served]]:
    """Long outputs that take all slots, and have begun. ``outputs``: where they are while they grow."""
    begun = [asyncio.Event() for _ in range(NUM_SLOTS)]

    async def generate(number: int) -> Served:
        served = Served() if outputs is None else outputs[number]
        async for delta in mesh.client.stream("Hello", seed=seed + number, explain_scheduling=True, **LONG):
            served.token_ids += delta.token_ids
            if len(served.token_ids) > 2:
                begun[number].set()
            if delta.execution is not None and delta.timings is not None:
                served.execution, served.e2e_s = delta.execution, delta.timings.e2e_s
        return served

    tasks = [asyncio.create_task(generate(number)) for number in range(NUM_SLOTS)]
    await asyncio.gather(*(one.wait() for one in begun))
    return tasks


async def preemptions(mesh: RunningMesh) -> dict[PreemptionReason, float]:
    metrics = await mesh.metrics()
    return {one: metrics.value("muxmesh_preemptions_total", reason=one) for one in PreemptionReason}


@pytest.mark.parametrize(
    ("options", "reason"),
    [(SHORT | {"priority": -1}, PreemptionReason.PRIORITY), (SHORT, PreemptionReason.ORDER)],
    ids=["a better class", "less work"],
)
async def test_a_request_pre_empts_a_full_batch_and_the_victim_loses_no_token_and_is_told_why(
    mesh: RunningMesh, folder: Path, options: dict[str, Any], reason: PreemptionReason
) -> None:
    undisturbed = [(await mesh.client.generate("Hello", seed=7 + number, **LONG)).token_ids for number in range(2)]
    before = await preemptions(mesh)
    long = await full_batch(mesh, seed=7)
    short = await mesh.client.generate("Hello", **options)
    assert len(short.token_ids) == 5
    assert not any(task.done() for task in long), "it did not wait for a slot"
    served = [await task for task in long]
    assert [one.token_ids for one in served] == undisturbed
    await mesh.until_free()
    after = await preemptions(mesh)
    counted = {one: after[one] - before[one] for one in PreemptionReason if after[one] > before[one]}
    total = served[0].execution.plus(served[1].execution)
    assert total.preemptions == counted == {reason: 1}, "the other one kept its slot"
    for one in served:
        execution = one.execution
        assert (execution.paused_s > 0) is (execution.num_preemptions == 1)
        assert 0 < execution.batched_s + execution.paused_s < one.e2e_s
        assert (execution.swapped_s, execution.recomputed_s, execution.num_recomputed) == (0, 0, 0)
        assert execution.num_repredictions >= 2, "its length was predicted again while it decoded"

    async def is_logged() -> bool:
        return f"tokens: {reason}" in (folder / "logs" / "decode-sim.log").read_text()

    await mesh.until(is_logged)


async def test_a_stream_of_better_requests_does_not_starve_the_others(mesh: RunningMesh) -> None:
    long = await full_batch(mesh, seed=7)
    better = [asyncio.create_task(mesh.client.generate("Hello", priority=-1, **SHORT)) for _ in range(60)]
    await asyncio.gather(*better)
    assert [len((await one).token_ids) for one in long] == [200] * NUM_SLOTS
    await mesh.until_free()


async def test_a_request_is_served_while_better_ones_never_stop(tmp_path: Path) -> None:
    """Six clients of a better class keep a batch of two full until the others are served, or 1,000 times each."""
    model = {"name": "sim", "engine": "sim", "sim": {"base_s": 0.002}, "max_num_seqs": NUM_SLOTS}
    units = [{"kv_pool": "16MiB", "models": [model]}]
    async with running_mesh(tmp_path, units=units, order={"max_wait_s": 0.5}) as mesh:
        is_served, has_begun = asyncio.Event(), asyncio.Event()

        async def better() -> None:
            for _ in range(1000):
                if is_served.is_set():
                    return
                await mesh.client.generate("Hello", priority=-1, **SHORT)
                has_begun.set()

        clients = [asyncio.create_task(better()) for _ in range(6)]
        await has_begun.wait()
        starving = [mesh.client.generate("Hello", priority=1, **SHORT) for _ in range(3)]
        assert [len(one.token_ids) for one in await asyncio.gather(*starving)] == [5] * 3
        assert not any(client.done() for client in clients), "better ones waited all the time"
        is_served.set()
        await asyncio.gather(*clients)


async def test_requests_that_do_not_precede_wait_for_a_slot(mesh: RunningMesh) -> None:
    before = await preemptions(mesh)
    long = await full_batch(mesh, seed=7)
    more = [asyncio.create_task(mesh.client.generate("Hello", priority=1, **SHORT)) for _ in range(3)]
    done = await asyncio.gather(*long, *more)
    assert len(done) == 5 and await preemptions(mesh) == before
    await mesh.until_free()


async def test_what_a_lost_worker_had_reported_remains_in_the_report_of_the_request(mesh: RunningMesh) -> None:
    growing = [Served() for _ in range(NUM_SLOTS)]
    long = await full_batch(mesh, seed=7, outputs=growing)
    await mesh.client.generate("Hello", priority=-1, **SHORT)
    num_before = [len(one.token_ids) for one in growing]

    async def both_go_on() -> bool:
        return all(len(one.token_ids) > before for one, before in zip(growing, num_before, strict=True))

    await mesh.until(both_go_on)
    mesh.process("decode/sim").signal(signal.SIGKILL)
    first, second = [await task for task in long]
    total = first.execution.plus(second.execution)
    assert total.preemptions == {PreemptionReason.PRIORITY: 1} and total.paused_s > 0
    assert first.execution.recomputed_s > 0 and second.execution.recomputed_s > 0
    assert total.num_recomputed == 0, "it counts pre-emptions"
    await mesh.until_free()
