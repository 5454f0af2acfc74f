"""What goes wrong at the start: `docker compose up --wait` fails, and one line of the logs names it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.compose.conftest import WRONG_PORT, MakeStack
from tests.compose.docker_engine import DockerEngine
from tests.compose.stack import Stack

pytestmark = pytest.mark.timeout(600)  # the first test also waits for engine and images
LISTEN = f"import socket, sys; s = socket.create_server(('127.0.0.1', {WRONG_PORT})); print('bound', flush=True)"
UP = ("up", "-d", "--wait")


def override(folder: Path, text: str) -> str:
    """A file of services that comes after compose.yaml."""
    file = folder / "override.yaml"
    file.write_text(f"services:\n{text}\n")
    return str(file)


def lines_of(stack: Stack, service: str) -> set[str]:
    """What a service logged, each line once."""
    found = (re.match(rf"{service}-\d+ +\| (.*)", line) for line in stack.logs(service).splitlines())
    return {match[1] for match in found if match}


def test_a_model_that_is_not_there_is_named_with_field_and_line(stack: MakeStack) -> None:
    one = stack({"MODEL": "own", "SOURCE": "/models/own", "MESH_FILE": "./mesh.yaml"})
    assert one.compose(*UP).code != 0
    (line,) = lines_of(one, "prepare")
    assert line.startswith("muxmesh: /etc/muxmesh/mesh.yaml:9: units[0].models[0].source: '/models/own' is neither")


def test_a_volume_of_another_user_is_named_with_both_uids(stack: MakeStack, engine: DockerEngine) -> None:
    one = stack()
    volume = f"{one.name}_run"
    engine.docker("volume", "create", volume)
    # Docker gives a volume that is empty the owner of the image's folder.
    script = "touch /v/not-empty && chown 0:0 /v && chmod 755 /v"
    engine.docker("run", "--rm", "--user", "0", "-v", f"{volume}:/v", "muxmesh-control:dev", "sh", "-c", script)
    try:
        assert one.compose(*UP).code != 0
        (line,) = [line for line in lines_of(one, "prepare") if line.startswith("muxmesh: ")]
        assert "/run/muxmesh" in line and "uid 0" in line and "uid 10001" in line
    finally:
        one.down()
        engine.docker("volume", "rm", "--force", volume)


def test_a_port_that_is_taken_is_named(stack: MakeStack, engine: DockerEngine) -> None:
    one = stack()
    command = engine.command_inside(sys.executable, "-c", f"{LISTEN}; sys.stdin.read()")
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == b"bound\n"
            result = one.compose(*UP)
        finally:
            other.kill()
    assert result.code != 0 and re.search(rf"{WRONG_PORT}.*address already in use", result.output)


def test_a_redis_that_is_away_is_named(stack: MakeStack) -> None:
    one = stack({"REDIS_URL": "redis://nowhere:6379"}, "external-redis.yaml")
    assert one.compose(*UP).code != 0
    (line,) = lines_of(one, "prepare")
    assert line.startswith("muxmesh: no Redis at redis://nowhere:6379 within 10 s: ")


def test_profile_gpu_without_a_gpu_says_so(stack: MakeStack, engine: DockerEngine) -> None:
    engine.docker("tag", "muxmesh-worker:dev", "muxmesh-cuda:none")  # never runs: the engine refuses before
    engine.docker("tag", "muxmesh-control:dev", "muxmesh-control:none")
    result = stack({"TAG": "none"}).compose("--profile", "gpu", *UP)
    assert result.code != 0
    assert 'could not select device driver "nvidia" with capabilities: [[gpu]]' in result.output.splitlines()[-1]


@pytest.mark.parametrize(("service", "what"), [("kvstore", "kv_pool"), ("decode", "a worker needs")])
def test_a_memory_limit_that_is_too_small_is_named(stack: MakeStack, tmp_path: Path, service: str, what: str) -> None:
    one = stack({"START_PERIOD": "5s"}, override(tmp_path, f"  {service}: {{mem_limit: 60m}}"))
    assert one.compose(*UP).code != 0
    (line,) = lines_of(one, service)
    assert what in line and "memory limit" in line and line.endswith(" is 60.0MiB")


def test_a_worker_outside_the_pid_namespace_is_refused_at_once(stack: MakeStack, tmp_path: Path) -> None:
    one = stack({}, override(tmp_path, "  prefill: {pid: !reset null}"))
    assert one.compose(*UP).code != 0
    for service in ("prefill", "kvstore"):
        assert any("pid namespace" in line for line in lines_of(one, service))


def test_a_worker_of_another_user_names_both_uids(stack: MakeStack, tmp_path: Path) -> None:
    one = stack({}, override(tmp_path, "  prefill: {user: '10002:10002'}"))
    assert one.compose(*UP).code != 0
    (line,) = lines_of(one, "prefill")
    assert "uid 10001" in line and "uid 10002" in line
