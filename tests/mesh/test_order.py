"""The order in which requests are admitted, in a real mesh of sim engines and in the simulator."""

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from loadtest.workload import Body, Sketch
from muxmesh.config.schema import MeshConfig
from muxmesh.models.model_spec import SIM_SPEC
from simulator.forecasts import TrueLengths
from simulator.run import simulate
from tests.support.bad_router import BAD
from tests.support.mesh import RunningMesh, running_mesh

pytestmark = [pytest.mark.mesh, pytest.mark.asyncio]

STEP_S = 0.02
NUM_WARM_UP, MEAN_TOKENS = 4, 40
NUM_BLOCKERS = 30
"""Requests of the mean length, of better priority, that run until the others are queued."""
LENGTHS = (45, 21, 60, 12, 90, 6, 75, 3, 15)
"""Output tokens of the requests that wait while another one runs, in order of arrival.

In this order the mean work stays almost constant. `srtf-aged` treats all lengths from 1.4 of the mean on, 52 to 60
tokens, as equal when 30 requests wait for a slot."""
ORDERS: dict[str, list[int]] = {
    "fcfs": list(range(len(LENGTHS))),
    "srtf": sorted(range(len(LENGTHS)), key=LENGTHS.__getitem__),
    "srtf-aged": sorted(range(len(LENGTHS)), key=lambda index: min(LENGTHS[index], 60)),
}


def config(policy: str) -> dict[str, Any]:
    model = {"name": "sim", "engine": "sim", "sim": {"base_s": STEP_S}, "max_num_seqs": 1, "max_paused_seqs": 0}
    return {"order": {"policy": policy}, "units": [{"kv_pool": "16MiB", "models": [model]}]}


async def scheduling_of(mesh: RunningMesh, num_tokens: int, **options: Any) -> Any:
    completion = await mesh.client.generate(
        "a prompt", max_new_tokens=num_tokens, ignore_eos=True, explain_scheduling=True, **options
    )
    return completion.prompt.scheduling


async def decisions_of_mesh(mesh: RunningMesh) -> list[int]:
    """Indices of the waiting requests, in the order of their admission."""
    for _ in range(NUM_WARM_UP):  # the router measures step times
        await scheduling_of(mesh, MEAN_TOKENS)
    sent = [asyncio.create_task(scheduling_of(mesh, MEAN_TOKENS, priority=-1)) for _ in range(NUM_BLOCKERS)]

    async def all_but_one_are_queued() -> bool:
        (model,) = (await mesh.client.status()).models
        num_ended = model.num_requests_finished + model.num_requests_aborted - NUM_WARM_UP
        return model.num_requests_running == 1 and model.num_requests_waiting == len(sent) - num_ended - 1

    await mesh.until(all_but_one_are_queued)
    for count in LENGTHS:
        sent.append(asyncio.create_task(scheduling_of(mesh, count)))
        await mesh.until(all_but_one_are_queued)
    blockers, waiting = sent[:NUM_BLOCKERS], sent[NUM_BLOCKERS:]
    assert not blockers[-1].done(), "it blocks until every request is queued"
    for blocker in blockers:
        blocker.cancel()
    scheduled = await asyncio.gather(*waiting)
    assert all(info.source == "fixed" for info in scheduled)
    numbers = [info.decision for info in scheduled]
    return sorted(range(len(LENGTHS)), key=numbers.__getitem__)


def decisions_of_simulator(policy: str) -> list[int]:
    def sketch(index: int, at_s: float, count: int) -> Sketch:
        return Sketch(index, at_s, Body(None, 8, count), count, True, 0, None, None, 0)

    num_before = NUM_WARM_UP + 1
    sketches = [sketch(index, 2.0 * index, MEAN_TOKENS) for index in range(num_before)]
    at_s = sketches[-1].at_s + 0.3
    sketches += [sketch(num_before + index, at_s + 0.01 * index, count) for index, count in enumerate(LENGTHS)]
    decided: list[int] = []
    parsed = MeshConfig.model_validate(config(policy))
    simulate(
        parsed,
        {"sim": SIM_SPEC},
        sketches,
        TrueLengths(),
        on_decision=lambda one: decided.append(one.index - num_before),
    )
    return decided[num_before:]


@pytest.mark.parametrize(
    "policy", [*(pytest.param(one, marks=pytest.mark.long) for one in ("fcfs", "srtf")), "srtf-aged"]
)
async def test_the_simulator_admits_in_the_order_of_the_mesh(tmp_path: Path, policy: str) -> None:
    simulated = decisions_of_simulator(policy)
    assert simulated == ORDERS[policy]
    async with running_mesh(tmp_path, **config(policy)) as mesh:
        assert await decisions_of_mesh(mesh) == simulated


async def test_scheduling_is_reported_on_request_and_traced_in_the_log(tmp_path: Path) -> None:
    traced = config("hrrn")
    traced["order"]["trace"] = True
    async with running_mesh(tmp_path, **traced) as mesh:
        info = await scheduling_of(mesh, 30)
        assert (info.policy, info.source, info.p50_output_tokens) == ("hrrn", "fixed", 30)
        assert info.reason.startswith("hrrn, priority 0: ") and info.decision == 1 and info.num_overtaken == 0
        without = await mesh.client.generate("a prompt", max_new_tokens=3)
        assert without.prompt.scheduling is None and without.prompt.predicted_output_tokens is not None

        async def traced_twice() -> bool:
            log = (tmp_path / "logs" / "kvstore-unit0.log").read_text()
            return "decision 1: " in log and "decision 2: " in log and log.count("overtakes 0: hrrn, priority 0: ") == 2

        await mesh.until(traced_twice)


@pytest.mark.parametrize(
    "kind", [one if one in ("crash", "hang", "random") else pytest.param(one, marks=pytest.mark.long) for one in BAD]
)
async def test_no_request_fails_because_of_a_bad_predictor(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BAD_PREDICTOR", kind)
    model = {"name": "sim", "engine": "sim", "sim": {"base_s": 0.001, "output_tokens": 5}, "max_num_seqs": 4}
    options, router = {"router": "tests.support.bad_router"}, {"predictor_budget_s": 0.05 if kind == "hang" else 60}
    async with running_mesh(
        tmp_path, modules=options, router=router, units=[{"kv_pool": "16MiB", "models": [model]}]
    ) as mesh:
        completions = await asyncio.gather(
            *(mesh.client.generate(f"prompt {n}", max_new_tokens=40) for n in range(160))
        )
        assert {completion.finish.num_output_tokens for completion in completions} == {5}
        info = (await mesh.client.generate("x", max_new_tokens=40, explain_scheduling=True)).prompt.scheduling
        assert info is not None
        sources = {"hang": "late", "crash": "failed", "nan": "failed"}
        assert info.source == sources.get(kind, "floor")


async def test_what_a_request_waited_for_is_reported(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, **config("fcfs")) as mesh:
        at_once = await scheduling_of(mesh, 2)
        assert max(dataclasses.astuple(at_once.waited_for)) < 1
        running = asyncio.create_task(scheduling_of(mesh, 100))
        await mesh.until(lambda: num_running(mesh, 1))
        second = asyncio.create_task(scheduling_of(mesh, 50))
        await mesh.until(lambda: num_running(mesh, 2))
        third = asyncio.create_task(scheduling_of(mesh, 2))
        await running
        behind_one, behind_two = await second, await third
    for info in (behind_one, behind_two):
        waits = info.waited_for
        assert waits.slot_s > 0 and waits.kv_s == waits.worker_s == 0
        assert waits.slot_s + waits.order_s == pytest.approx(info.waited_s, abs=0.5)
    assert behind_one.waited_for.order_s < behind_two.waited_for.order_s


async def num_running(mesh: RunningMesh, count: int) -> bool:
    """Whether this many requests are running or waiting."""
    (model,) = (await mesh.client.status()).models
    return model.num_requests_running + model.num_requests_waiting == count


async def test_a_tenant_does_not_see_what_only_another_one_asked_also_after_a_restart(tmp_path: Path) -> None:
    model = {"name": "sim", "engine": "sim", "sim": {"base_s": 0.001, "output_tokens": 7}, "max_num_seqs": 8}
    async with running_mesh(tmp_path, units=[{"kv_pool": "16MiB", "models": [model]}]) as mesh:

        async def source(tenant: str) -> str:
            completion = await mesh.client.generate(
                "the prompt of acme", max_new_tokens=50, cache_salt=tenant, explain_scheduling=True
            )
            assert completion.prompt.scheduling is not None
            return completion.prompt.scheduling.source

        sources = [await source("acme") for _ in range(4)]
        assert sources == ["cold", "retrieved", "retrieved", "retrieved"]
        assert await source("b") == "cold"
        await mesh.restart("router")
        assert await source("acme") == "retrieved" and await source("c") == "cold"


async def test_a_restarted_router_loads_its_predictor(tmp_path: Path) -> None:
    model = {"name": "sim", "engine": "sim", "sim": {"base_s": 0.001, "output_tokens": 7}, "max_num_seqs": 8}
    async with running_mesh(tmp_path, units=[{"kv_pool": "16MiB", "models": [model]}]) as mesh:
        for _ in range(3):
            await asyncio.gather(*(mesh.client.generate(f"say {n}", max_new_tokens=50) for n in range(16)))

        async def source() -> str:
            completion = await mesh.client.generate("say 3", max_new_tokens=50, explain_scheduling=True)
            assert completion.prompt.scheduling is not None
            return completion.prompt.scheduling.source

        assert await source() == "retrieved"
        await mesh.restart("router")
        assert await source() == "retrieved"


async def test_a_client_s_estimate_is_used_once_earlier_ones_were_accurate(tmp_path: Path) -> None:
    model = {"name": "sim", "engine": "sim", "sim": {"base_s": 0.001, "output_tokens": 7}, "max_num_seqs": 8}
    async with running_mesh(tmp_path, units=[{"kv_pool": "16MiB", "models": [model]}]) as mesh:

        async def source(hint: int) -> str:
            completion = await mesh.client.generate(
                "a prompt", max_new_tokens=50, expected_output_tokens=hint, explain_scheduling=True
            )
            assert completion.prompt.scheduling is not None
            return completion.prompt.scheduling.source

        sources = [await source(7) for _ in range(8)]
        assert sources[0] != "hint" and sources[-1] == "hint"
