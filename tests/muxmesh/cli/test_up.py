"""Errors of `muxmesh up` before anything starts, and its life as a process."""

import asyncio
import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from muxmesh.cli.main import main
from muxmesh.supervisor.mesh_supervisor import state_lock
from tests.support.fake_driver import fake_driver_folder
from tests.support.gpu_machine import gpu_machine
from tests.support.processes import ended
from tests.support.tiny import TinyShape, write_tiny_model

SIM_MESH = "units:\n  - models: [{name: load, engine: sim}]"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "mesh.yaml"
    path.write_text(SIM_MESH)
    return path


@pytest.mark.parametrize(
    ("text", "where", "problem"),
    [
        ("listen: 5", "1: listen: ", "is 5; must be text"),
        ("units: [", "1: not YAML: ", "expected the node content, but found '<stream end>'"),
        (
            "units:\n  - models:\n    - {name: a, source: ./nowhere}\n    - {name: b, source: ./nothing}",
            "4: units[0].models[1].source: ",
            "'./nothing' is neither a folder, nor a .gguf file, nor in the catalog",
        ),
        (
            "units:\n  - models: [{name: a, engine: sim, max_model_len: 99999}]",
            "2: units[0].models[0].max_model_len: is 99999;",
            "the model's context holds 8192 tokens",
        ),
        (
            "units:\n  - {kv_pool: 1MiB, slab: 64KiB, models: [{name: a, engine: sim, max_model_len: 8000}]}",
            "2: units[0].models[0].max_model_len: is 8000;",
            "the unit's kv_pool holds 2048 tokens of this model",
        ),
        (
            "units:\n  - {kv_pool: 1MiB, slab: 64KiB, kv_swap: 900TiB, models: [{name: a, engine: sim}]}",
            "2: units[0].kv_pool: ",
            "kv_pool and kv_swap are together 900.0TiB; ",
        ),
        (
            "units:\n  - {slab: 4096, models: [{name: a, engine: sim, block_size: 32}]}",
            "2: units[0].models[0].block_size: ",
            "a token block of 32 tokens is 16384 bytes, a slab of the unit 4096; use a larger slab",
        ),
        (
            f"order:\n  policy: fcfs\n  longest_lead: 5\n{SIM_MESH}",
            "3: order.longest_lead: ",
            "has no effect with policy: fcfs; it is for srtf-aged",
        ),
    ],
)
def test_a_wrong_configuration_is_reported_with_its_line_before_anything_starts(
    config: Path, capsys: pytest.CaptureFixture[str], text: str, where: str, problem: str
) -> None:
    config.write_text(text)
    assert main(["up", "-c", str(config), "--listen", "127.0.0.1:0"]) == 1
    captured = capsys.readouterr()
    (line,) = (line for line in captured.err.splitlines() if f"mesh.yaml:{where}" in line)
    assert problem in line
    assert "ready" not in captured.out


@pytest.mark.parametrize(
    ("unit", "where", "problem"),
    [
        (
            "{device: 'cuda:1', models: [{name: tiny, source: /nonexistent}]}",
            "2: units[0].device: ",
            "cuda:1 is not on this machine, or CUDA_VISIBLE_DEVICES hides it; visible GPUs: cuda:0 (fake device 0)",
        ),
        (
            "{device: 'cuda:0', mps: on, models: [{name: tiny, source: /nonexistent}]}",
            "2: units[0].mps: ",
            "is on, but nvidia-cuda-mps-control is neither on PATH nor in /nowhere; install it, or set mps: off",
        ),
    ],
)
def test_what_a_unit_on_a_gpu_lacks_is_reported_with_its_line_before_anything_starts(
    config: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    unit: str,
    where: str,
    problem: str,
) -> None:
    monkeypatch.setattr("muxmesh.models.gpu_check.CONTROL_FOLDERS", ("/nowhere",))
    monkeypatch.setattr("muxmesh.cuda.mps.CONTROL_FOLDERS", ("/nowhere",))
    config.write_text(f"units:\n  - {unit}")
    with gpu_machine():
        monkeypatch.setenv("PATH", "/nowhere")
        assert main(["up", "-c", str(config), "--listen", "127.0.0.1:0"]) == 1
    (line,) = (line for line in capsys.readouterr().err.splitlines() if f"mesh.yaml:{where}" in line)
    assert problem in line


def test_a_missing_configuration_file_is_reported_by_its_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["up", "-c", str(tmp_path / "none.yaml")]) == 1
    assert f"muxmesh: {tmp_path / 'none.yaml'}: " in capsys.readouterr().err


@pytest.mark.parametrize("listen", ["somewhere", ":50051", "127.0.0.1:x"])
def test_a_malformed_listen_address_is_refused(listen: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["up", "--listen", listen]) == 1
    assert "HOST:PORT is needed" in capsys.readouterr().err


def test_a_listen_address_in_use_is_refused(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        listen = f"127.0.0.1:{other.getsockname()[1]}"
        assert main(["up", "-c", str(config), "--listen", listen]) == 1
    assert f"cannot listen on {listen}" in capsys.readouterr().err


def test_a_metrics_address_in_use_is_refused_before_anything_starts(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        listen = f"127.0.0.1:{other.getsockname()[1]}"
        config.write_text(f"metrics: {{listen: '{listen}'}}\n" + config.read_text())
        assert main(["up", "-c", str(config), "--listen", "127.0.0.1:0"]) == 1
    assert f"cannot listen on {listen}: Address already in use; choose another port" in capsys.readouterr().err


def test_a_state_directory_serves_one_mesh_at_a_time(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["up", "-c", str(config), "--listen", "127.0.0.1:0", "--state-dir", str(tmp_path / "state")]
    with state_lock(tmp_path / "state"):
        assert main(arguments) == 1
    assert f"a mesh is already running with state directory {tmp_path / 'state'}" in capsys.readouterr().err


def test_a_state_directory_that_cannot_be_created_is_an_error(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    state_dir = tmp_path / "file" / "state"
    assert main(["up", "-c", str(config), "--listen", "127.0.0.1:0", "--state-dir", str(state_dir)]) == 1
    assert str(state_dir) in capsys.readouterr().err


def up(config: Path, *arguments: str) -> list[str]:
    command = [sys.executable, "-m", "muxmesh", "up", "-c", str(config), "--listen", "127.0.0.1:0"]
    return [*command, "--state-dir", str(config.parent / "state"), *arguments]


def test_a_limit_on_open_files_that_is_too_low_for_a_mesh_is_named(config: Path) -> None:
    script = 'ulimit -n 40; exec "$@"'
    ended = subprocess.run(
        ["sh", "-c", script, "sh", *up(config)], check=False, capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == "muxmesh: the limit on open files is 40; a mesh needs 256 or more (`ulimit -n`)\n"
    assert not (config.parent / "state").exists()


@pytest.mark.mesh
@pytest.mark.parametrize("when", ["while it starts", "when it serves"])
async def test_up_serves_until_ctrl_c_and_leaves_no_process(config: Path, when: str) -> None:
    started = await asyncio.create_subprocess_exec(
        *up(config, "--hello"), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    async with ended(started) as process:
        assert process.stdout is not None and process.stderr is not None
        if when == "when it serves":
            printed = await process.stdout.readuntil(b"Ctrl-C stops the mesh.")
            assert printed.startswith(b"muxmesh ready on 127.0.0.1:")
            assert b"> What is the capital of France" in printed
            address = printed.split()[3].decode()
            assert f"muxmesh chat --address {address}\n" in printed.decode()
        else:
            await process.stderr.readuntil(b"attached")
        assert len(processes_that_name(config.parent)) >= 4
        process.send_signal(signal.SIGINT)
        _, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    assert b"stopping\n" in errors
    assert b"redis | " not in errors, "redis writes to its log file only"
    assert processes_that_name(config.parent) == set()
    assert list((config.parent / "state").glob("run-*")) == []


@pytest.mark.mesh
async def test_with_json_all_that_up_prints_and_every_log_file_is_one_object_per_line(config: Path) -> None:
    config.write_text(f"log_format: json\n{SIM_MESH}")
    started = await asyncio.create_subprocess_exec(
        *up(config), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    async with ended(started) as process:
        assert process.stdout is not None
        ready = json.loads(await process.stdout.readline())
        (worker,) = processes_that_name(config.parent, "decode_svc")
        os.kill(worker, signal.SIGKILL)
        async with asyncio.timeout(60):
            while processes_that_name(config.parent, "decode_svc") in (set(), {worker}):
                await asyncio.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = await process.communicate()
    assert ready["message"].startswith("muxmesh ready on 127.0.0.1:")
    printed = [json.loads(line) for line in errors.splitlines()]
    assert {one["process"] for one in printed} == {"supervisor", "kvstore/unit0"}
    assert "stopping" in {one["message"] for one in printed}
    for name in ("supervisor", "redis", "kvstore-unit0"):
        lines = (config.parent / "state" / "logs" / f"{name}.log").read_text().splitlines()
        assert {json.loads(line)["process"] for line in lines} == {name.replace("-", "/")}


def test_an_error_before_anything_starts_is_one_object_if_the_environment_says_so(
    config: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MUXMESH_LOG_FORMAT", "json")
    config.write_text("listen: 5\nunits: 3")
    assert main(["up", "-c", str(config)]) == 1
    output = capfd.readouterr()
    (line,) = output.err.splitlines()
    assert json.loads(line)["level"] == "ERROR" and "mesh.yaml:2: units: " in json.loads(line)["message"]
    assert output.out == ""


@pytest.mark.mesh
async def test_a_killed_supervisor_takes_its_processes_along(config: Path) -> None:
    started = await asyncio.create_subprocess_exec(
        *up(config, "--quiet"), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    async with ended(started) as process:
        assert process.stdout is not None and process.stderr is not None
        await process.stdout.readuntil(b"ready on")
        pidfds = [os.pidfd_open(pid) for pid in processes_that_name(config.parent) - {process.pid}]
        assert len(pidfds) >= 4
        for pidfd in pidfds[::2]:
            signal.pidfd_send_signal(pidfd, signal.SIGSTOP)  # a stopped process ends too
        process.kill()
        _, errors = await process.communicate()
    assert b" | " not in errors, "--quiet prints no line of a service"
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(20):
        for pidfd in pidfds:
            has_ended = asyncio.Event()
            loop.add_reader(pidfd, has_ended.set)
            await has_ended.wait()
            loop.remove_reader(pidfd)
            os.close(pidfd)


async def until_ready(process: asyncio.subprocess.Process) -> None:
    assert process.stdout is not None
    async with asyncio.timeout(60):
        await process.stdout.readuntil(b"ready on")


@pytest.mark.mesh
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_a_full_disk_stops_neither_a_restart_nor_the_end(config: Path, number: signal.Signals) -> None:
    """/dev/full stands for the files of a disk that is full."""
    logs = config.parent / "state" / "logs"
    logs.mkdir(parents=True)
    for name in ("supervisor", "redis", "kvstore-unit0", "prefill-load", "decode-load", "router"):
        (logs / f"{name}.log").symlink_to("/dev/full")
    with Path("/dev/full").open("wb") as full:
        started = await asyncio.create_subprocess_exec(*up(config), stdout=asyncio.subprocess.PIPE, stderr=full)
    async with ended(started) as process:
        await until_ready(process)
        (worker,) = processes_that_name(config.parent, "decode_svc")
        os.kill(worker, signal.SIGKILL)
        async with asyncio.timeout(60):
            while processes_that_name(config.parent, "decode_svc") in (set(), {worker}):
                await asyncio.sleep(0.05)
        process.send_signal(number)
        await process.wait()
    assert process.returncode == 0
    assert processes_that_name(config.parent) == set()
    assert list((config.parent / "state").glob("run-*")) == []


@pytest.mark.mesh
async def test_a_reader_of_stderr_that_reads_nothing_holds_no_process_up(config: Path) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"x" * 4096)
    os.set_blocking(writer, True)
    started = await asyncio.create_subprocess_exec(*up(config), stdout=asyncio.subprocess.PIPE, stderr=writer)
    os.close(writer)
    async with ended(started) as process:
        await until_ready(process)
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(60):
            await process.wait()
    os.close(reader)
    assert process.returncode == 0


@pytest.mark.mesh
async def test_a_mesh_without_standard_streams_serves_and_ends(config: Path) -> None:
    command = f"exec {shlex.join(up(config))} <&- >&- 2>&-"
    started = await asyncio.create_subprocess_exec("/bin/sh", "-c", command)
    async with ended(started) as process:
        async with asyncio.timeout(60):
            while not processes_that_name(config.parent, "router"):
                await asyncio.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(60):
            await process.wait()
    assert process.returncode == 0
    assert (config.parent / "state" / "mesh.lock").read_text() == str(process.pid), "no output is in the file"


@pytest.mark.parametrize(
    ("gpu_bytes", "device", "where", "problem"),
    [
        (2 << 30, "cuda:0", "2: units[0].kv_pool: ", "kv_pool is 1.0GiB, weights are "),
        (8 << 30, "cuda:1", "2: units[0].device: ", "cuda:1 is not on this machine, or CUDA_VISIBLE_DEVICES hides "),
    ],
)
def test_a_unit_that_does_not_fit_onto_its_gpu_is_reported_before_anything_starts(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    gpu_bytes: int, device: str, where: str, problem: str,
) -> None:  # fmt: skip
    write_tiny_model(config.parent / "tiny", TinyShape())
    config.write_text(f"units:\n  - {{device: '{device}', models: [{{name: tiny, source: ./tiny, dtype: bfloat16}}]}}")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(fake_driver_folder()))
    monkeypatch.setenv("FAKE_CUDA_BYTES", str(gpu_bytes))
    state = config.parent / "state"
    capsys.readouterr()  # writing the model shows its progress
    assert main(["up", "-c", str(config), "--state-dir", str(state)]) == 1
    output = capsys.readouterr()
    assert output.out == "" and not state.exists()
    assert output.err.startswith(f"muxmesh: {config}:{where}{problem}") and output.err.count("\n") == 1


@pytest.mark.mesh
async def test_nohup_keeps_a_mesh_and_sigint_ends_one_in_the_background_of_a_shell(config: Path) -> None:
    """nohup ignores SIGHUP; a shell ignores SIGINT for what it runs in the background."""
    ignoring = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    )
    started = await asyncio.create_subprocess_exec(
        "nohup", sys.executable, "-c", ignoring, *up(config, "--quiet"), stdout=asyncio.subprocess.PIPE
    )
    async with ended(started) as process:
        await until_ready(process)
        process.send_signal(signal.SIGHUP)
        (worker,) = processes_that_name(config.parent, "decode_svc")
        os.kill(worker, signal.SIGKILL)
        async with asyncio.timeout(60):
            while processes_that_name(config.parent, "decode_svc") in (set(), {worker}):
                await asyncio.sleep(0.05)
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(60):
            await process.wait()
    assert process.returncode == 0


LIMITED = (
    "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)); from muxmesh.cli.main import main"
)


def test_a_state_that_cannot_be_written_is_one_line(config: Path) -> None:
    """The limit on the size of files stands for a disk that is nearly full: the pid fits, the runtime file does not."""
    arguments = up(config)[3:]
    done = subprocess.run(
        [sys.executable, "-c", f"{LIMITED}; sys.exit(main({arguments!r}))"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == f"muxmesh: {config.parent / 'state'}: cannot be written: File too large\n"
    assert list((config.parent / "state").glob("run-*")) == []


def test_a_cache_that_cannot_be_written_is_one_line_and_keeps_no_part_of_a_file(config: Path) -> None:
    write_tiny_model(config.parent / "tiny", TinyShape())
    config.write_text("units:\n  - models: [{name: tiny, source: ./tiny}]")
    arguments = up(config, "--quiet")[3:]
    cache = config.parent / "cache"
    done = subprocess.run(
        [sys.executable, "-c", f"{LIMITED}; sys.exit(main({arguments!r}))"],
        capture_output=True, text=True, timeout=120, check=False, env={**os.environ, "MUXMESH_CACHE_DIR": str(cache)},
    )  # fmt: skip
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last == f"muxmesh: tiny cannot be prepared in {cache}: File too large"
    assert sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()) == 0


def test_an_address_that_others_reach_is_warned_of_even_if_quiet(
    config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with state_lock(tmp_path / "state"):  # so that nothing starts
        arguments = ["--listen", "0.0.0.0:0", "--quiet", "--state-dir", str(tmp_path / "state")]
        assert main(["up", "-c", str(config), *arguments]) == 1
    assert "muxmesh: WARNING: listen: 0.0.0.0:0 can be reached from other machines" in capfd.readouterr().err


def test_a_home_that_is_not_known_is_an_error_that_names_the_remedy(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("MUXMESH_STATE_DIR", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", unknown)
    assert main(["up", "-c", str(config), "--listen", "127.0.0.1:0"]) == 1
    assert "Could not determine home directory. Set HOME or MUXMESH_STATE_DIR" in capsys.readouterr().err


def test_a_link_in_place_of_the_lock_is_not_followed(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "state" / "mesh.lock").symlink_to(tmp_path / "mine")
    arguments = ["--listen", "127.0.0.1:0", "--state-dir", str(tmp_path / "state")]
    assert main(["up", "-c", str(config), *arguments]) == 1
    assert (tmp_path / "mine").read_text() == "mine"
    assert f"state directory {tmp_path / 'state'} cannot be written" in capsys.readouterr().err


def processes_that_name(folder: Path, module: str = "") -> set[int]:
    """Processes whose command line contains ``folder`` and ``module``."""
    found = set()
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                command = (path / "cmdline").read_text()
                if str(folder) in command and module in command:
                    found.add(int(path.name))
            except OSError:
                continue
    return found
