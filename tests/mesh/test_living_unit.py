"""Models of a running mesh that sleep, wake, come and go, with every process real and the sim engine."""

import asyncio
import json
import os
import signal
from pathlib import Path

import pytest

from muxmesh.cli.main import main
from muxmesh.errors import ModelNotFound
from muxmesh.v1 import mesh_pb2
from tests.support.mesh import RunningMesh, running_mesh

NUM_TOKENS = 24
SIM = {"engine": "sim", "sim": {"base_s": 0.002}, "max_num_seqs": 4}


class Operator:
    """The user of a mesh, at the command line."""

    def __init__(self, running: RunningMesh, capsys: pytest.CaptureFixture[str]) -> None:
        self._runtime = str(running.mesh.runtime.path)
        self._capsys = capsys

    async def run(self, *arguments: str, code: int = 0) -> str:
        """What a command prints."""
        self._capsys.readouterr()
        found = await asyncio.to_thread(main, ["model", *arguments, "--runtime", self._runtime])
        printed = self._capsys.readouterr()
        assert found == code, printed
        return printed.out + printed.err


async def tokens(running: RunningMesh, model: str, num: int = NUM_TOKENS) -> list[int]:
    completion = await running.client.generate("The same prompt", model=model, max_new_tokens=num, temperature=0.0)
    return list(completion.token_ids)


async def models(running: RunningMesh) -> dict[str, mesh_pb2.UnitModelStatus]:
    return {model.model: model for model in (await running.unit()).models}


async def test_models_of_a_running_mesh_sleep_wake_come_and_go(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    placed = [{"name": name, **SIM} for name in "ab"]
    unit = {"models": placed, "max_awake_models": 1, "kv_pool": "8MiB", "slab": "256KiB"}
    async with running_mesh(tmp_path, units=[unit]) as running:
        operator = Operator(running, capsys)
        await _all_models_take_turns(running)
        await _workers_are_lost(running)
        await _commands(running, operator)
        await _a_model_comes_and_goes(running, operator)
        await running.until_free()


async def _all_models_take_turns(running: RunningMesh) -> None:
    """More busy models than may be awake: every request gets the tokens of an undisturbed one."""
    expected = await tokens(running, "a")
    assert (await models(running))["b"].state == "asleep"
    found = await asyncio.gather(*(tokens(running, model) for model in "abababab"))
    assert all(one == expected for one in found)
    status = await models(running)
    assert sum(model.state != "asleep" for model in status.values()) <= 1
    assert status["b"].num_wakes >= 1
    assert sum(model.quota_bytes for model in status.values()) == 8 * 2**20
    sleeping = [model for model in status.values() if model.state == "asleep"]
    assert all(model.quota_bytes == model.num_cached_token_blocks == 0 for model in sleeping)


async def _workers_are_lost(running: RunningMesh) -> None:
    """Workers that sleep, fall asleep or wake are killed."""
    expected = await tokens(running, "a")
    os.kill(running.pid("decode/b"), signal.SIGKILL)  # it sleeps
    assert await tokens(running, "b") == expected
    requests = [asyncio.create_task(tokens(running, model)) for model in "bab"]
    for name in ("prefill/b", "decode/a"):  # they wake, fall asleep or compute
        os.kill(running.pid(name), signal.SIGKILL)
        await asyncio.sleep(0)
    assert await asyncio.gather(*requests) == [expected] * 3


async def _commands(running: RunningMesh, operator: Operator) -> None:
    assert await operator.run("wake", "b") == "muxmesh: b is awake\n"
    assert await operator.run("sleep", "b", "--drop-weights") == "muxmesh: b sleeps\n"
    rows = {row["model"]: row for row in json.loads(await operator.run("ps", "--json"))}
    assert (rows["b"]["state"], rows["b"]["weights"]) == ("asleep", "dropped")
    assert "b      unit0  asleep" in await operator.run("ps")
    assert "'x' is not on any unit; there are: a, b" in await operator.run("wake", "x", code=1)


async def _a_model_comes_and_goes(running: RunningMesh, operator: Operator) -> None:
    expected = await tokens(running, "a")
    settings = [f"--set={name}={json.dumps(value)}" for name, value in SIM.items()]
    assert "name of another model" in await operator.run("load", "a", *settings, code=1)
    assert "kv_guaranteed of the models needs" in await operator.run(
        "load", "d", *settings, "--set=kv_guaranteed=1GiB", code=1
    )
    assert "neither a folder" in await operator.run("load", "no/such/model", code=1)
    assert "units[0].models[2].block_size" in await operator.run("load", "d", *settings, "--set=block_size=7", code=1)
    assert sorted(await models(running)) == ["a", "b"]

    assert await operator.run("load", "d", *settings) == "muxmesh: d is loaded on unit unit0\n"
    assert await tokens(running, "d") == expected
    await running.restart("router")
    os.kill(running.pid("decode/d"), signal.SIGKILL)
    assert await tokens(running, "d") == expected, "processes that start again know the model"

    long = asyncio.create_task(tokens(running, "d", 400))
    await running.until(running.num_leases)
    assert await operator.run("unload", "d") == "muxmesh: d is unloaded\n"
    assert len(await long) == 400, "a running sequence finishes"
    with pytest.raises(ModelNotFound, match="'d' is not served; served: a, b"):
        await tokens(running, "d")
    assert "decode/d" not in [process.spec.name for process in running.mesh.processes]
    assert sorted(await models(running)) == ["a", "b"]
    assert "'d' is not in this mesh" in await operator.run("unload", "d", code=1)

    assert await operator.run("load", "d", *settings) == "muxmesh: d is loaded on unit unit0\n"
    assert await tokens(running, "d") == expected

    async def counts_anew() -> bool:
        processes = (await running.client.status()).processes
        return any(process.name == "decode/d" and not process.num_restarts for process in processes)

    await running.until(counts_anew)
