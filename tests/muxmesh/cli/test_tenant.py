"""`muxmesh tenant`, with a real Redis and the runtime file of a mesh that does not run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from muxmesh.cli.main import main
from muxmesh.config.runtime import MeshRuntime
from muxmesh.config.schema import MeshConfig
from tests.support.redis_process import running_redis

Tenant = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_redis(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture
def runtime_file(redis_url: str, tmp_path: Path) -> Path:
    return written(tmp_path, redis_url, "keys")


@pytest.fixture
def tenant(runtime_file: Path, capsys: pytest.CaptureFixture[str]) -> Tenant:
    """Runs a command; returns its exit code, standard output and standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(["tenant", *arguments, "--runtime", str(runtime_file)])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def written(folder: Path, redis_url: str, mode: str) -> Path:
    """A runtime file. Its mesh id is that of the folder, so that tests share no tenants."""
    config = MeshConfig.model_validate({"mesh_id": folder.name[-40:], "access": {"mode": mode}})
    runtime = MeshRuntime(config=config, run_dir=folder, cache_dir=folder, redis_url=redis_url, prepared={})
    path = folder / "runtime.json"
    runtime.write(path)
    return path


def found(tenant: Tenant, *arguments: str) -> Any:
    code, out, _ = tenant(*arguments, "--json")
    assert code == 0
    return json.loads(out)


def test_a_key_is_the_only_thing_on_standard_output(tenant: Tenant) -> None:
    code, out, err = tenant("add", "acme")
    assert code == 0
    assert out.startswith("mm-") and len(out) == 3 + 48 + 1
    assert err == "muxmesh: tenant acme is added. Its API key, which is shown only now:\n"
    key = out.strip()
    _, listing, _ = tenant("list")
    assert key not in listing and "acme" in listing


def test_all_settings_are_kept_changed_and_unset(tenant: Tenant) -> None:
    tenant(
        "add", "acme", "--requests-per-minute", "60", "--tokens-per-minute", "6000", "--max-concurrent-requests", "4",
        "--max-request-tokens", "512", "--best-priority", "-1", "--weight", "2.5", "--operator",
    )  # fmt: skip
    (facts,) = found(tenant, "list")
    expected = {
        "name": "acme", "requests_per_minute": 60, "tokens_per_minute": 6000, "max_concurrent_requests": 4,
        "max_request_tokens": 512, "best_priority": -1, "weight": 2.5, "is_operator": True, "num_valid_keys": 1,
        "key_expiries_unix_s": [None],
    }  # fmt: skip
    assert facts.items() >= expected.items()
    code, out, _ = tenant("set", "acme", "--tokens-per-minute", "none", "--best-priority", "none", "--no-operator")
    assert (code, out) == (
        0,
        "muxmesh: tenant acme: --requests-per-minute 60, --max-concurrent-requests 4, --max-request-tokens 512, "
        "--weight 2.5, --no-operator\n",
    )
    assert found(tenant, "set", "acme", "--best-priority", "0")["best_priority"] == 0


def test_usage_shows_what_is_left(tenant: Tenant) -> None:
    tenant("add", "acme", "--requests-per-minute", "60")
    tenant("add", "beta")
    usages = found(tenant, "usage")
    assert [(one["name"], one["requests"], one["requests_left"]) for one in usages] == [
        ("acme", 0, 60), ("beta", 0, None),
    ]  # fmt: skip
    _, out, _ = tenant("usage", "acme")
    assert out.splitlines()[1].split() == ["acme", "0", "0", "0", "0", "0", "0", "60", "-", "never"]


def test_a_rotation_adds_a_key_and_lets_earlier_ones_expire(tenant: Tenant) -> None:
    first = found(tenant, "add", "acme")["api_key"]
    second = found(tenant, "rotate", "acme")["api_key"]
    assert first != second
    newest, old = found(tenant, "list")[0]["key_expiries_unix_s"]
    assert newest is None and old is not None
    code, _, err = tenant("rotate", "acme", "--grace", "0", "--expires-in", "60")
    assert code == 0 and "earlier keys are refused" in err
    (expiry,) = found(tenant, "list")[0]["key_expiries_unix_s"]
    assert expiry is not None


def test_more_rotations_than_a_tenant_may_have_keys_keep_the_newest(tenant: Tenant) -> None:
    tenant("add", "acme")
    for _ in range(20):
        assert tenant("rotate", "acme")[0] == 0
    assert found(tenant, "list")[0]["num_valid_keys"] == 16


def test_a_removed_tenant_is_gone(tenant: Tenant) -> None:
    tenant("add", "acme")
    assert found(tenant, "remove", "acme") == {"name": "acme", "removed": True}
    assert found(tenant, "list") == []
    assert tenant("list")[1] == "muxmesh: there are no tenants; `muxmesh tenant add NAME` adds one\n"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("add", "two words"), "name: is 'two words'; at most 64 of the characters"),
        (("set", "none", "--weight", "2"), "name: there is no tenant 'none'"),
        (("rotate", "none"), "name: there is no tenant 'none'"),
        (("remove", "none"), "name: there is no tenant 'none'"),
        (("usage", "none"), "name: there is no tenant 'none'"),
        (("set", "acme"), "set: changes nothing: name a limit, --weight or --operator"),
    ],
)
def test_wrong_names_are_refused(tenant: Tenant, arguments: tuple[str, ...], problem: str) -> None:
    tenant("add", "acme")
    code, _, err = tenant(*arguments)
    assert code == 1
    assert problem in err
    assert tenant("add", "acme")[2].startswith("muxmesh: name: a tenant 'acme' exists")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--tokens-per-minute", "0"), "a whole number from 1 to 2147483647, or none"),
        (("--tokens-per-minute", "1.5"), "a whole number from 1 to 2147483647, or none"),
        (("--max-request-tokens", "²"), "a whole number from 1 to 2147483647, or none"),
        (("--best-priority", "x"), "a whole number, or none"),
        (("--best-priority", "99999999999"), "a whole number, or none"),
        (("--weight", "0"), "a number from 0.001 to 1000"),
        (("--weight", "nan"), "a number from 0.001 to 1000"),
        (("--expires-in", "-1"), "seconds, from 0 to 1e9"),
    ],
)
def test_wrong_settings_are_refused(tenant: Tenant, arguments: tuple[str, ...], problem: str) -> None:
    code, _, err = tenant("add", "acme", *arguments)
    assert code == 2
    assert problem in err


def test_of_a_mesh_without_keys_it_is_said(redis_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tenant", "list", "--runtime", str(written(tmp_path, redis_url, "open"))]) == 0
    assert "access.mode: open, so no request needs an API key" in capsys.readouterr().err


def test_a_mesh_that_does_not_run_or_has_lost_its_redis_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tenant", "list", "--state-dir", str(tmp_path)]) == 1
    assert f"no mesh runs with the state directory {tmp_path}" in capsys.readouterr().err
    path = written(tmp_path, f"unix://{tmp_path}/none.sock", "keys")
    assert main(["tenant", "list", "--runtime", str(path)]) == 1
    assert "Redis does not respond" in capsys.readouterr().err
