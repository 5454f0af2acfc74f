"""The command line: arguments, exit codes, messages."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import ModuleType
from typing import cast

import pytest

from muxmesh import __version__
from muxmesh.cli.common import ProgressBar
from muxmesh.cli.generate import stream_answer
from muxmesh.cli.main import main
from muxmesh.cli.status import show
from muxmesh.client.aio import Delta, Finish, MeshClient, Prompt, PromptFacts, Scheduling, Timings
from muxmesh.errors import RequestAborted, Unavailable
from muxmesh.v1 import mesh_pb2


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"muxmesh {__version__}\n"


@pytest.mark.parametrize(
    "arguments", [[], ["nothing"], ["generate"], ["generate", "--temperature", "warm", "x"], ["model"]]
)
def test_wrong_arguments_end_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "usage: muxmesh" in capsys.readouterr().err


def test_an_unreachable_mesh_is_an_error_with_its_address(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--address", "127.0.0.1:1", "--timeout", "5", "hi"]) == 1
    assert "muxmesh: no mesh answers at 127.0.0.1:1; start one with `muxmesh up`" in capsys.readouterr().err
    assert main(["status", "--address", "127.0.0.1:1", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["error"] == "Unavailable"


def test_another_server_that_is_not_there_is_not_taken_for_the_mesh(capsys: pytest.CaptureFixture[str]) -> None:
    load = ["--workload", "rate=2 lengths=D(5,5) requests=2"]
    assert main(["loadtest", "--openai", "http://127.0.0.1:1", *load]) == 1
    told = capsys.readouterr().err
    assert "http://127.0.0.1:1" in told and "muxmesh up" not in told


@pytest.mark.parametrize(("module", "extra"), [("aiohttp", "loadtest"), ("torch", "serve")])
def test_a_missing_package_is_told_with_the_extra_that_has_it(
    module: str, extra: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def is_missing(name: str) -> ModuleType:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr("muxmesh.cli.main.importlib.import_module", is_missing)
    assert main(["status"]) == 1
    assert f"its extra `{extra}`" in capsys.readouterr().err


class LostRouter:
    """A client whose router is lost after some parts of the answer."""

    def __init__(self, *parts: str) -> None:
        self._parts = parts

    async def stream(self, prompt: Prompt, **options: object) -> AsyncIterator[Delta]:
        """See `MeshClient`."""
        for index, text in enumerate(self._parts):
            facts = PromptFacts(1, 0, 7) if index == 0 else None
            yield Delta(0, text, (1,), 1, prompt=facts)
        raise Unavailable("Stream removed")


async def test_a_router_that_is_lost_in_the_middle_leaves_a_line_and_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(RequestAborted, match="in the middle of the answer; ask again"):
        await stream_answer(cast(MeshClient, LostRouter("Once upon ", "a time")), "x")
    assert capsys.readouterr().out == "Once upon a time\n"
    with pytest.raises(Unavailable):
        await stream_answer(cast(MeshClient, LostRouter()), "x")
    assert capsys.readouterr().out == ""


class Explaining:
    """A client whose mesh tells why."""

    async def stream(self, prompt: Prompt, **options: object) -> AsyncIterator[Delta]:
        """See `MeshClient`."""
        told = Scheduling("srtf", "srtf, priority 0: 2 s of work left", 40.0, 90.0, "hint", 0.5, 1.5, 0.25, 7, 3)
        facts = PromptFacts(1, 0, 7, scheduling=told)
        yield Delta(0, "Paris", (1,), 1, prompt=facts, finish=Finish("stop", 1), timings=Timings(0.25, 0.3, 0.3, 0))


async def test_an_explanation_is_told_beside_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    assert await stream_answer(cast(MeshClient, Explaining()), "x") == "Paris"
    printed = capsys.readouterr()
    assert printed.out == "Paris\n"
    for part in (
        "expected 40 output tokens (hint), 90 at most",
        "waited 0.25 s",
        "number 7, before 3 that",
        "srtf, pri",
    ):
        assert part in printed.err


def test_several_answers_are_explained_in_json_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--address", "127.0.0.1:1", "--explain", "-n", "2", "hi"]) == 1
    assert "explain: several answers are explained with --json only" in capsys.readouterr().err


def test_status_tells_of_the_order_and_how_well_lengths_are_predicted(capsys: pytest.CaptureFixture[str]) -> None:
    models = [
        mesh_pb2.RouterModelStatus(model="new", predictions_used=True),
        mesh_pb2.RouterModelStatus(model="good", predictions_used=True, prediction_tau=0.612),
        mesh_pb2.RouterModelStatus(model="bad", predictions_used=False, prediction_tau=-0.02),
    ]
    show(mesh_pb2.GetStatusResponse(version="1", models=models, redis_connected=True, order_policy="hrrn"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "muxmesh 1, Redis connected, order hrrn"
    shown = {line.split()[0]: line.split(maxsplit=8)[-1] for line in lines[3:6]}
    assert shown == {"new": "-", "good": "0.61", "bad": "-0.02, not used"}


@pytest.mark.parametrize("option", [["--max-new-tokens", "-1"], ["--seed", "-1"], ["--top-k", "99999999999"]])
def test_a_number_that_cannot_be_sent_is_an_error(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--address", "127.0.0.1:1", "--model", "m", *option, "hi"]) == 1
    assert f"muxmesh: {option[0][2:].replace('-', '_')}: is {option[1]}; a whole number" in capsys.readouterr().err


def test_models_are_listed_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "list", "--json"]) == 0
    (model,) = json.loads(capsys.readouterr().out)
    assert model["name"] == "smollm2-135m-instruct"
    assert model["present"] is False


def test_pulling_an_unknown_model_names_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "pull", "gpt"]) == 1
    assert "there are: smollm2-135m-instruct" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("listen: 5", "mesh.yaml:1: listen: "),
        (
            "units:\n  - models:\n    - {name: a, source: ./nowhere}\n    - {name: b, source: ./nothing}",
            "mesh.yaml:4: units[0].models[1].source: './nothing' is neither a folder",
        ),
        (
            "units:\n  - models: [{name: a, engine: sim, max_model_len: 99999}]",
            "mesh.yaml:2: units[0].models[0].max_model_len: is 99999; the model's context holds 8192 tokens",
        ),
        (
            "units:\n  - {kv_pool: 1MiB, slab: 64KiB, models: [{name: a, engine: sim, max_model_len: 8000}]}",
            "mesh.yaml:2: units[0].models[0].max_model_len: is 8000; the unit's kv_pool holds 2048 tokens",
        ),
        (
            "units:\n  - {kv_pool: 1MiB, slab: 64KiB, kv_swap: 900TiB, models: [{name: a, engine: sim}]}",
            "mesh.yaml:2: units[0].kv_pool: with kv_swap it is 989",
        ),
        (
            "units:\n  - {slab: 4096, models: [{name: a, engine: sim, block_size: 32}]}",
            "mesh.yaml:2: units[0].models[0].block_size: a token block of 32 tokens is 16384 bytes, a slab of the",
        ),
    ],
)
def test_a_wrong_configuration_is_told_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], config: str, expected: str
) -> None:
    (tmp_path / "mesh.yaml").write_text(config)
    assert main(["up", "-c", str(tmp_path / "mesh.yaml"), "--listen", "127.0.0.1:0"]) == 1
    captured = capsys.readouterr()
    assert expected in captured.err
    assert "ready" not in captured.out


@pytest.mark.parametrize("listen", ["somewhere", ":50051", "127.0.0.1:x"])
def test_a_listen_address_that_is_none_is_told(listen: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["up", "--listen", listen]) == 1
    assert "HOST:PORT is needed" in capsys.readouterr().err


def test_progress_off_a_terminal_is_a_line_for_each_quarter(capsys: pytest.CaptureFixture[str]) -> None:
    bar = ProgressBar("model")
    for done in range(101):
        bar("converting", done, 100)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5
    assert lines[-1] == "model: converting 100/100"


@pytest.mark.mesh
@pytest.mark.parametrize("when", ["while it starts", "when it serves"])
async def test_up_serves_until_ctrl_c_and_leaves_no_process(tmp_path: Path, when: str) -> None:
    (tmp_path / "mesh.yaml").write_text("units:\n  - models: [{name: load, engine: sim}]")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "muxmesh", "up", "-c", str(tmp_path / "mesh.yaml"), "--listen", "127.0.0.1:0",
        "--state-dir", str(tmp_path / "state"), "--hello", stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    if when == "when it serves":
        said = await process.stdout.readuntil(b"Ctrl-C stops the mesh.")
        assert said.startswith(b"muxmesh ready on 127.0.0.1:")
    else:
        await process.stderr.readuntil(b"attached")
    started = _processes_of(str(tmp_path))
    assert len(started) >= 4
    process.send_signal(signal.SIGINT)
    _, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    assert _processes_of(str(tmp_path)) == set()
    assert list((tmp_path / "state").glob("run-*")) == []


@pytest.mark.mesh
async def test_a_killed_supervisor_takes_its_processes_along(tmp_path: Path) -> None:
    (tmp_path / "mesh.yaml").write_text("units:\n  - models: [{name: load, engine: sim}]")
    command = [sys.executable, "-m", "muxmesh", "up", "-c", str(tmp_path / "mesh.yaml"), "--listen", "127.0.0.1:0"]
    process = await asyncio.create_subprocess_exec(
        *command, "--state-dir", str(tmp_path / "state"), stdout=asyncio.subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    await process.stdout.readuntil(b"ready on")
    pidfds = [os.pidfd_open(pid) for pid in _processes_of(str(tmp_path)) - {process.pid}]
    assert len(pidfds) >= 4
    process.kill()
    await process.wait()
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(20):
        for pidfd in pidfds:
            ended = asyncio.Event()
            loop.add_reader(pidfd, ended.set)
            await ended.wait()
            loop.remove_reader(pidfd)
            os.close(pidfd)


def _processes_of(mark: str) -> set[int]:
    """Processes whose command line names this test's directory."""
    found = set()
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                if mark in (path / "cmdline").read_text():
                    found.add(int(path.name))
            except OSError:
                continue
    return found
