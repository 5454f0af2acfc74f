import asyncio
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from muxmesh.lifecycle import Stop

SERVICE = """
import asyncio, sys
from muxmesh.lifecycle import run_service

async def main(stop):
    {body}

run_service(main, "kvstore/u")
"""


def python(script: str, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


async def test_a_service_that_serves_shuts_down_by_itself() -> None:
    stop, serving, has_shut_down = Stop(), asyncio.Event(), asyncio.Event()

    async def serve(stop: Stop) -> None:
        serving.set()
        await stop.wait()
        has_shut_down.set()

    running = asyncio.create_task(stop.run(serve))
    await serving.wait()
    stop.set()
    assert await running is True
    assert has_shut_down.is_set()


async def test_a_service_that_is_starting_is_cancelled() -> None:
    stop, starting = Stop(), asyncio.Event()

    async def serve(stop: Stop) -> None:
        starting.set()
        await asyncio.Event().wait()

    running = asyncio.create_task(stop.run(serve))
    await starting.wait()
    stop.set()
    assert await running is False


async def test_a_second_request_to_stop_does_not_interrupt_the_shutdown() -> None:
    stop, serving, shutting_down, may_end = Stop(), asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def serve(stop: Stop) -> None:
        serving.set()
        await stop.wait()
        shutting_down.set()
        await may_end.wait()

    running = asyncio.create_task(stop.run(serve))
    await serving.wait()
    stop.set()
    await shutting_down.wait()
    stop.set()
    may_end.set()
    assert await running is True


async def test_a_stop_that_is_requested_before_the_start_ends_the_service_once_it_serves() -> None:
    stop = Stop()
    stop.set()

    async def serve(stop: Stop) -> None:
        await stop.wait()

    async with asyncio.timeout(20):
        assert await stop.run(serve) is True


async def test_a_service_may_end_without_a_request_to_stop() -> None:
    async def serve(stop: Stop) -> None:
        return

    assert await Stop().run(serve) is True


async def test_a_shutdown_is_slow_only_after_the_time_that_it_may_take() -> None:
    stop = Stop(slow_shutdown_s=1.0)
    stop.allow(60.0)
    assert stop._slow_shutdown_s == 61.0


async def test_a_slow_shutdown_logs_the_stacks_of_pending_tasks() -> None:
    stop, serving, is_logged, lines = Stop(slow_shutdown_s=0.0), asyncio.Event(), asyncio.Event(), []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.extend(record.getMessage().splitlines())
            is_logged.set()

    async def inner() -> None:
        await is_logged.wait()

    async def serve(stop: Stop) -> None:
        serving.set()
        await stop.wait()
        await inner()

    listener = Listener()
    logging.getLogger("muxmesh.lifecycle").addHandler(listener)
    try:
        running = asyncio.create_task(stop.run(serve))
        await serving.wait()
        stop.set()
        stop.set()
        async with asyncio.timeout(30):
            assert await running is True
    finally:
        logging.getLogger("muxmesh.lifecycle").removeHandler(listener)
    assert [line for line in lines if not line.startswith("  ")] == ["shutdown is slow; pending tasks:"]
    assert any(line.count("test_lifecycle.py:") == 2 for line in lines), "serve > inner"


async def test_an_error_of_the_service_is_raised() -> None:
    async def serve(stop: Stop) -> None:
        raise LookupError("no such unit")

    with pytest.raises(LookupError, match="no such unit"):
        await Stop().run(serve)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_shuts_a_serving_process_down(number: signal.Signals) -> None:
    body = "print('up', flush=True); await stop.wait(); print('down')"
    with python(SERVICE.format(body=body)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(number)
        assert process.communicate(timeout=30) == ("down\n", "")
    assert process.returncode == 0


def test_a_signal_ends_a_starting_process_without_waiting_for_its_threads() -> None:
    body = "print('up', flush=True); import time; await asyncio.to_thread(time.sleep, 600)"
    with python(SERVICE.format(body=body)) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.terminate()
        process.communicate(timeout=30)
    assert process.returncode == 0


def test_a_process_whose_service_fails_exits_with_its_error() -> None:
    with python(SERVICE.format(body="raise LookupError('no such unit')")) as process:
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == 1
    assert stderr.endswith("LookupError: no such unit\n")


def test_a_service_logs_to_stderr_from_level_info_on() -> None:
    body = "import logging; log = logging.getLogger('x'); log.debug('no'); log.info('yes')"
    with python(SERVICE.format(body=body)) as process:
        assert process.communicate(timeout=30) == ("", "INFO x: yes\n")


ARGUMENTS = """
from muxmesh.lifecycle import service_arguments
arguments = service_arguments("description", "unit")
print(repr(arguments.runtime), arguments.unit, arguments.parent)
"""


def test_a_service_reads_its_options_from_the_command_line() -> None:
    parent = str(os.getpid())
    with python(ARGUMENTS, "--runtime", "a/b", "--unit", "cpu0", "--parent", parent) as process:
        stdout, _ = process.communicate(timeout=30)
    assert stdout == f"{Path('a/b')!r} cpu0 {parent}\n"


@pytest.mark.parametrize("missing", ["--runtime", "--unit"])
def test_a_service_needs_a_runtime_file_and_its_own_options(missing: str) -> None:
    options = {"--runtime": "x", "--unit": "u"}
    del options[missing]
    with python(ARGUMENTS, *(text for option in options.items() for text in option)) as process:
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == 2
    assert f"required: {missing}" in stderr


def test_a_service_without_a_parent_has_no_tie_to_the_process_that_started_it() -> None:
    script = ARGUMENTS + "import os; print(os.getppid(), flush=True); os.read(0, 1); print('lives', flush=True)"
    command = [sys.executable, "-c", script, "--runtime", "x", "--unit", "u"]
    starter = f"import subprocess; subprocess.Popen({command!r}).stdout; import time; time.sleep(600)"
    pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", starter], **pipe) as process:  # type: ignore[call-overload]
        assert process.stdout.readline() == f"{Path('x')!r} u None\n"
        assert process.stdout.readline() == f"{process.pid}\n"
        process.kill()
        process.wait()
        process.stdin.close()
        assert process.stdout.readline() == "lives\n"


def test_optional_options_are_none_if_they_are_not_given() -> None:
    script = (
        "from muxmesh.lifecycle import service_arguments\n"
        "arguments = service_arguments('description', optional={'name': 'help', 'listen': 'help'})\n"
        "print(arguments.name, arguments.listen)"
    )
    with python(script, "--runtime", "x", "--listen", "here") as process:
        assert process.communicate(timeout=30) == ("None here\n", "")


def test_a_service_with_another_parent_ends_with_one_line() -> None:
    """The pid of this process's own parent is never that of a child's parent."""
    wrong = os.getppid()
    with python(ARGUMENTS, "--runtime", "x", "--unit", "u", "--parent", str(wrong)) as process:
        assert process.communicate(timeout=30) == (
            "",
            f"process {wrong} is not the parent of this one, or has exited; the parent is process {os.getpid()}\n",
        )
    assert process.returncode == 1


@pytest.mark.parametrize(
    "body", ["stop.give_up('no unit'); await stop.wait()", "stop.give_up('no unit'); await asyncio.Event().wait()"],
    ids=["serving", "starting"],
)  # fmt: skip
def test_a_service_that_gives_up_exits_with_code_1_and_its_reason(body: str) -> None:
    with python(SERVICE.format(body=body)) as process:
        assert process.communicate(timeout=30) == ("", "ERROR muxmesh.lifecycle: giving up: no unit\n")
    assert process.returncode == 1


@pytest.mark.parametrize(("soft", "hard"), [(256, 900), (300, 300)])
def test_a_service_raises_its_limit_on_open_files(soft: int, hard: int) -> None:
    body = "import resource; print(resource.getrlimit(resource.RLIMIT_NOFILE))"
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))"
    with python(limit + SERVICE.format(body=body)) as process:
        assert process.communicate(timeout=30)[0] == f"({hard}, {hard})\n"


def test_an_error_of_the_mesh_ends_a_service_with_one_line() -> None:
    body = "from muxmesh.errors import ConfigError; raise ConfigError('/cache: No space left on device')"
    with python(SERVICE.format(body=body)) as process:
        _, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (
        1,
        "ERROR muxmesh.lifecycle: cannot serve: /cache: No space left on device\n",
    )


MEASURED_SERVICE = """
import asyncio, sys
from muxmesh.lifecycle import run_service
from muxmesh.metrics.monitor import Monitor

async def main(stop):
    await stop.wait()

run_service(main, "kvstore/u", Monitor(sys.argv[1]))
"""


def test_a_metrics_port_in_use_ends_a_service_with_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with python(MEASURED_SERVICE, address) as process:
            _, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (
        1,
        f"ERROR muxmesh.lifecycle: cannot serve: metrics cannot listen on {address}: Address already in use\n",
    )


def test_the_metrics_address_is_an_option_or_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    script = "from muxmesh.lifecycle import service_arguments; print(service_arguments('x').metrics)"
    options = ["--runtime", "x", "--parent", str(os.getpid())]
    monkeypatch.delenv("MUXMESH_METRICS", raising=False)
    found = []
    for variable, more in ((None, []), ("", []), ("h:1", []), ("h:1", ["--metrics", "h:2"])):
        if variable is not None:
            monkeypatch.setenv("MUXMESH_METRICS", variable)
        with python(script, *options, *more) as process:
            found.append(process.communicate(timeout=30)[0].strip())
    assert found == ["None", "None", "h:1", "h:2"]


def python_with(environment: dict[str, str], body: str) -> tuple[int, str]:
    """Exit code and stderr of a service with this body."""
    run = subprocess.run(
        [sys.executable, "-c", SERVICE.format(body=body)],
        env={**os.environ, **environment},
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    return run.returncode, run.stderr


def objects(stderr: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in stderr.splitlines()]


def test_a_service_logs_json_if_the_environment_says_so_with_warnings_and_uncaught_exceptions() -> None:
    body = (
        "import logging, warnings; logging.getLogger('x').info('up'); warnings.warn('old'); raise LookupError('gone')"
    )
    code, stderr = python_with({"MUXMESH_LOG_FORMAT": "json"}, body)
    up, warning, error = objects(stderr)
    assert code == 1
    assert (up["message"], up["level"], up["logger"], up["process"]) == ("up", "INFO", "x", "kvstore/u")
    assert "UserWarning: old" in str(warning["message"]) and warning["logger"] == "py.warnings"
    assert error["message"] == "uncaught exception: gone" and error["level"] == "CRITICAL"
    assert str(error["exception"]).endswith("LookupError: gone")


@pytest.mark.parametrize("before", ["text", "json"])
def test_the_format_and_the_name_that_the_service_configures_replace_those_of_its_start(before: str) -> None:
    body = "import logging; from muxmesh.lifecycle import configure_logging\n"
    body += "    configure_logging(logging.INFO, 'json', 'kvstore'); logging.getLogger('x').info('one')\n"
    body += "    configure_logging(logging.INFO, 'text', 'kvstore'); logging.getLogger('x').info('two')"
    code, stderr = python_with({"MUXMESH_LOG_FORMAT": before}, body)
    first, second = stderr.splitlines()
    assert code == 0
    assert json.loads(first)["process"] == "kvstore"
    assert second == "INFO x: two"


def test_an_error_of_the_start_is_one_object() -> None:
    body = "from muxmesh.errors import ConfigError; raise ConfigError('two\\nlines')"
    code, stderr = python_with({"MUXMESH_LOG_FORMAT": "json"}, body)
    (error,) = objects(stderr)
    assert (code, error["message"]) == (1, "cannot serve: two\nlines")


def test_a_format_that_does_not_exist_is_an_error_in_one_line() -> None:
    code, stderr = python_with({"MUXMESH_LOG_FORMAT": "yaml"}, "raise AssertionError('is not run')")
    assert code == 1
    assert stderr == "ERROR muxmesh.lifecycle: cannot serve: MUXMESH_LOG_FORMAT is 'yaml'; must be text or json\n"


def test_an_uncaught_exception_of_a_thread_is_one_object_too() -> None:
    body = "import threading; t = threading.Thread(target=lambda: 1 / 0); t.start(); t.join()"
    code, stderr = python_with({"MUXMESH_LOG_FORMAT": "json"}, body)
    (error,) = objects(stderr)
    assert (code, error["message"]) == (0, "uncaught exception: division by zero")


def test_the_service_manager_is_told_when_a_service_is_ready(tmp_path: Path) -> None:
    script = """
import asyncio, os
from muxmesh.lifecycle import run_service
from muxmesh.metrics.monitor import Monitor

monitor = Monitor()

async def main(stop):
    monitor.report()
    monitor.report("stopping")
    assert "NOTIFY_SOCKET" not in os.environ

run_service(main, "kvstore/u", monitor)
"""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(60)
        environment = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")}
        run = subprocess.run([sys.executable, "-c", script], env=environment, timeout=60, check=False)
        assert [listener.recv(100) for _ in range(2)] == [b"READY=1\nSTATUS=ready", b"STATUS=not ready: stopping"]
    assert run.returncode == 0
