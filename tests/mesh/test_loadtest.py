"""`muxmesh loadtest` as a process, against a real mesh of sim engines."""

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import pytest_asyncio

from tests.support.mesh import RunningMesh, running_mesh
from tests.support.processes import ended

pytestmark = [pytest.mark.mesh, pytest.mark.asyncio(loop_scope="module")]

MODELS = [
    {"name": "a", "engine": "sim", "sim": {"base_s": 0.002}},
    {"name": "b", "engine": "sim", "sim": {"base_s": 0.001, "output_tokens": 6}},
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningMesh]:
    async with running_mesh(tmp_path_factory.mktemp("mesh"), units=[{"kv_pool": "64MiB", "models": MODELS}]) as running:
        yield running


async def start(*arguments: str, allow_slow_driver: bool = True) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "muxmesh", "loadtest", *["--allow-slow-driver"] * allow_slow_driver, *arguments,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip


async def loadtest(*arguments: str) -> tuple[int, str, str]:
    async with ended(await start(*arguments)) as process:
        out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def test_a_report_is_broken_down_by_model_tenant_and_priority(mesh: RunningMesh, tmp_path: Path) -> None:
    line = "rate=100 lengths=U(5,40)/(3,12) requests=120 models=a:3,b tenants=x,y:2 priorities=0:3,-1 seed=2"
    output, html = tmp_path / "r.json", tmp_path / "r.html"
    code, out, err = await loadtest(
        "--address", mesh.address, "--workload", line, "--goodput", "e2el:10000", "--json", "--quiet",
        "--output", str(output), "--html", str(html), "--name", "the mesh",
    )  # fmt: skip
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report == json.loads(output.read_text())
    assert (report["completed"], report["failed"], report["partial"], report["name"]) == (120, 0, None, "the mesh")
    assert report["finish_reasons"] == {"length": 120}
    assert sum(figures["completed"] for figures in report["by_model"].values()) == 120
    assert report["by_model"].keys() == {"a", "b"}
    assert report["by_tenant"].keys() == {"x", "y"}
    assert report["by_priority"].keys() == {"0", "-1"}
    assert report["request_goodput"] == report["request_throughput"]
    assert report["driver"]["cpu_s"] > 0
    assert report["slo"]["attainment"]["16"] > 0
    assert 0 < report["median_router_ms"] < report["median_ttft_ms"]
    assert report["max_output_tokens_per_s"] > 0
    assert 3 * 120 <= report["total_output_tokens"] <= 12 * 120, "forced outputs of b are longer than its own 6 tokens"
    assert "<svg" in html.read_text()
    await mesh.until_free()


async def test_natural_outputs_of_prompt_texts_are_reported_as_a_table(mesh: RunningMesh, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": f"Question {n}?"}) for n in range(5)))
    code, out, _ = await loadtest(
        "--address", mesh.address, "--calibrate", "0", "--temperature", "0",
        "--workload", f"rate=inf prompts={prompts} chat=yes cap=20 requests=10 models=b", "--max-concurrency", "2",
    )  # fmt: skip
    assert code == 0
    figures = dict(part.rsplit(":", 1) for part in out.splitlines() if ":" in part and "=" not in part)
    assert figures["Successful requests"].strip() == "10"
    assert figures["Total generated tokens"].strip() == "60", "an output of b has 6 tokens"
    assert figures["Peak concurrent requests"].strip() == "2"


async def test_sweeps_are_compared_by_rate(mesh: RunningMesh, tmp_path: Path) -> None:
    line = "lengths=D(10,5) requests=20 models=a"
    paths = [tmp_path / "one.json", tmp_path / "two.json"]
    for path in paths:
        code, out, err = await loadtest(
            "--address", mesh.address, "--workload", line, "--sweep", "50,20", "--slo-scale", "16",
            "--output", str(path), "--name", path.stem, "--quiet",
        )  # fmt: skip
        assert (code, err) == (0, "")
        assert "Highest rate within the SLO" in out
    code, out, _ = await loadtest("compare", *map(str, paths), "--html", str(tmp_path / "c.html"))
    assert code == 0
    assert all(f"{name} at {rate}/s" in out for name in ("one", "two") for rate in (20, 50))
    assert "Latency against load" in (tmp_path / "c.html").read_text()
    code, out, _ = await loadtest("compare", *map(str, paths), "--json")
    assert [report["rate"] for report in json.loads(out)["reports"]] == [20, 50, 20, 50]


async def test_ctrl_c_writes_a_partial_report(mesh: RunningMesh, tmp_path: Path) -> None:
    output = tmp_path / "r.json"
    before = {model.model: model.num_requests_finished for model in (await mesh.client.status()).models}["a"]
    started = await start(
        "--address", mesh.address, "--workload", "rate=20 lengths=D(10,5) duration=600 models=a", "--calibrate", "0",
        "--output", str(output),
    )  # fmt: skip

    async def some_are_finished() -> bool:
        status = {model.model: model.num_requests_finished for model in (await mesh.client.status()).models}
        return status["a"] >= before + 5

    async with ended(started) as process:
        await mesh.until(some_are_finished)
        process.send_signal(signal.SIGINT)
        out, _ = await process.communicate()
    assert process.returncode == 130
    assert "PARTIAL: interrupted by the user" in out.decode()
    report = json.loads(output.read_text())
    assert report["partial"] == "interrupted by the user"
    assert report["completed"] >= 4
    assert report["interrupted"] > 1000
    await mesh.until_free()


async def test_a_mesh_that_stops_during_a_run_leaves_a_partial_report(tmp_path: Path) -> None:
    output = tmp_path / "r.json"
    async with AsyncExitStack() as processes:
        async with running_mesh(tmp_path, units=[{"kv_pool": "64MiB", "models": MODELS[:1]}]) as stopping:
            started = await start(
                "--address", stopping.address, "--workload", "rate=50 lengths=D(10,5) duration=600",
                "--calibrate", "0", "--output", str(output),
            )  # fmt: skip
            process = await processes.enter_async_context(ended(started))

            async def some_are_finished() -> bool:
                return (await stopping.client.status()).models[0].num_requests_finished >= 10

            await stopping.until(some_are_finished)
        out, _ = await process.communicate()
    assert process.returncode == 1
    assert "PARTIAL: the server is gone" in out.decode()
    report = json.loads(output.read_text())
    assert report["completed"] >= 9
    assert report["errors"]["UNAVAILABLE"]["count"] >= 20
    assert report["partial"].startswith("the server is gone")


def bad_arguments(folder: Path) -> dict[str, tuple[list[str], str]]:
    (folder / "trace.jsonl").write_text('{"t": 0, "n_in": "many", "n_out": 1}\n')
    (folder / "empty.jsonl").write_text("")
    (folder / "other.json").write_text("{}")
    line = ["--workload", "rate=1 lengths=D(1,1) requests=1"]
    return {
        "no workload": ([], "needs --workload"),
        "negative rate": (["--workload", "rate=-1 lengths=D(1,1) requests=1"], "rate=-1: must be at least 0"),
        "bad trace": (["--workload", f"trace={folder / 'trace.jsonl'} models=a"], "line 1: n_in is 'many'"),
        "empty trace": (["--workload", f"trace={folder / 'empty.jsonl'} models=a"], "has no requests"),
        "which model": (line, "several models are served; models=... has to name one or more of: a, b"),
        "goodput": ([*line, "--goodput", "speed:3"], "--goodput speed:3: must be ttft:MS, tpot:MS or e2el:MS"),
        "no folder": ([*line, "--output", str(folder / "none" / "r.json")], "does not exist"),
        "no url": ([*line, "--openai", "localhost:80"], "is not a URL, such as"),
        "no report": (["compare", str(folder / "other.json")], "is not a report of"),
        "no file": (["compare", str(folder / "none.json")], "No such file"),
        "trace": (["--workload", f"trace={folder / 'trace.jsonl'}", "--sweep", "1,2"], "--sweep: needs a workload"),
        "slo of nothing": ([*line, "--slo-scale", "3"], "--slo-scale: has no effect without --sweep"),
        "vocabulary of a mesh": ([*line, "--vocabulary", "300"], "--vocabulary: has no effect without --openai"),
    }  # fmt: skip


async def test_wrong_arguments_are_refused_with_a_message(mesh: RunningMesh, tmp_path: Path) -> None:
    cases = bad_arguments(tmp_path)
    results = await asyncio.gather(
        *(loadtest("--address", mesh.address, *arguments) if arguments[:1] != ["compare"] else loadtest(*arguments)
          for arguments, _ in cases.values())
    )  # fmt: skip
    for (name, (_, message)), (code, out, err) in zip(cases.items(), results, strict=True):
        assert (code, out) == (1, ""), name
        assert message in err, (name, err)
        assert "Traceback" not in err, name


@pytest.mark.parametrize("server", [["--address", "127.0.0.1:9"], ["--openai", "http://127.0.0.1:9"]])
async def test_an_unreachable_server_is_reported_by_its_address(server: list[str]) -> None:
    code, out, err = await loadtest(*server, "--workload", "rate=1 lengths=D(1,1) requests=1")
    assert (code, out) == (1, "")
    assert "127.0.0.1:9" in err
    assert "answers at" in err


async def test_a_report_of_a_slow_driver_is_refused(mesh: RunningMesh, tmp_path: Path) -> None:
    """A driver that was stopped for a while sends late, so the latencies would be its own."""
    output = tmp_path / "r.json"
    started = await start(
        "--address", mesh.address, "--calibrate", "0", "--workload", "rate=20 lengths=D(10,5) duration=600 models=a",
        "--output", str(output), allow_slow_driver=False,
    )  # fmt: skip

    async def num_finished() -> int:
        return next(model.num_requests_finished for model in (await mesh.client.status()).models if model.model == "a")

    async def until_more_are_finished() -> None:
        before = await num_finished()

        async def more_are_finished() -> bool:
            return await num_finished() > before

        await mesh.until(more_are_finished)

    async with ended(started) as process:
        await until_more_are_finished()
        for _ in range(3):
            process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(0.7)
            process.send_signal(signal.SIGCONT)
            await until_more_are_finished()
        process.send_signal(signal.SIGINT)
        out, err = await process.communicate()
    assert process.returncode == 130, "it was interrupted"
    assert out == b""
    assert b"no report: the driver was" in err
    assert f"({output} has them, marked as such)" in err.decode()
    assert "ms late" in json.loads(output.read_text())["driver_bottleneck"], "the file is written and marked"


async def test_the_help_lists_the_settings_of_a_workload() -> None:
    code, out, _ = await loadtest("--help")
    assert code == 0
    assert "burstiness=B" in out
    assert "time_scale=X" in out
