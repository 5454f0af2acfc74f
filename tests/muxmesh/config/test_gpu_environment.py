"""The environment of processes on GPUs, by settings: a table."""

from pathlib import Path
from typing import Any

import pytest

from muxmesh.config.runtime import MAX_SOCKET_PATH, MeshRuntime, MpsDaemons, ProcessKey
from muxmesh.config.schema import MeshConfig
from muxmesh.errors import ConfigError
from muxmesh.types import Role

UUID = "GPU-5f4df884-095b-d388-4934-d4853eca3833"
KVSTORE = ProcessKey("kvstore", "u")
PREFILL, DECODE = (ProcessKey(role, "u", "m") for role in Role)
OUTSIDE_MPS = {"CUDA_VISIBLE_DEVICES": UUID, "CUDA_MPS_PIPE_DIRECTORY": "/run/outside-mps"}


def runtime_of(has_mps: bool = True, run_dir: Path = Path("/run"), share: object = 100, **unit: Any) -> MeshRuntime:
    model = {"name": "m", "compute_share": share} if unit.get("device") != "cpu" else {"name": "m"}
    config = MeshConfig.model_validate({"units": [{"name": "u", "device": "cuda:0", "models": [model], **unit}]})
    return MeshRuntime(
        config=config,
        run_dir=run_dir,
        cache_dir=Path("/cache"),
        redis_url="unix:///x",
        prepared={},
        device_uuids={"u": UUID} if config.units[0].is_cuda else {},
        mps=MpsDaemons(program=Path("/bin/control"), log_dir=Path("/logs")) if has_mps else None,
    )


def inside_mps(share: int) -> dict[str, str]:
    return {
        "CUDA_VISIBLE_DEVICES": UUID,
        "CUDA_MPS_PIPE_DIRECTORY": "/run/mps-5f4df884",
        "CUDA_MPS_LOG_DIRECTORY": "/logs/mps-5f4df884",
        "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": str(share),
    }


SHARES = {"prefill": 60, "decode": 40}


@pytest.mark.parametrize(
    ("settings", "prefill", "decode"),
    [
        ({}, inside_mps(100), inside_mps(100)),
        ({"mps": "on", "share": SHARES}, inside_mps(60), inside_mps(40)),
        ({"share": 30}, inside_mps(30), inside_mps(30)),
        ({"share": SHARES, "green_contexts": True}, inside_mps(100), inside_mps(100)),
        ({"share": SHARES, "mps": "off"}, OUTSIDE_MPS, OUTSIDE_MPS),
        ({"share": SHARES, "has_mps": False}, OUTSIDE_MPS, OUTSIDE_MPS),
        ({"device": "cpu"}, {}, {}),
    ],
)
def test_workers_get_their_gpu_and_their_share(
    settings: dict[str, Any], prefill: dict[str, str], decode: dict[str, str]
) -> None:
    runtime = runtime_of(**settings)
    assert runtime.environment(PREFILL) == prefill
    assert runtime.environment(DECODE) == decode


def test_green_contexts_get_the_shares_of_all_workers_of_the_unit() -> None:
    runtime = runtime_of(share=SHARES, green_contexts=True)
    unit, model = runtime.model(DECODE.unit, DECODE.model)
    one, other = (unit.green_share(model, role) for role in Role)
    assert one is not None and (one.shares, one.index, one.percent) == ((60, 40), 0, 60)
    assert other is not None and (other.shares, other.index, other.percent) == ((60, 40), 1, 40)


@pytest.mark.parametrize("settings", [{"share": 100, "green_contexts": True}, {"share": SHARES}])
def test_without_a_limit_by_green_contexts_a_worker_has_none(settings: dict[str, Any]) -> None:
    unit, model = runtime_of(**settings).model(DECODE.unit, DECODE.model)
    assert unit.green_share(model, Role.DECODE) is None


def test_a_unit_that_must_use_mps_gets_no_environment_without_it() -> None:
    """Its workers would not be limited."""
    with pytest.raises(ConfigError, match="unit u has mps: on, but the runtime file names no control program"):
        runtime_of(mps="on", has_mps=False).environment(DECODE)


@pytest.mark.parametrize("settings", [{}, {"mps": "off"}, {"has_mps": False}])
def test_a_kvstore_on_a_gpu_is_outside_mps(settings: dict[str, Any]) -> None:
    assert runtime_of(**settings).environment(KVSTORE) == OUTSIDE_MPS


def test_a_router_and_a_kvstore_on_a_cpu_need_nothing() -> None:
    assert runtime_of().environment(ProcessKey("router")) == {}
    assert runtime_of(device="cpu").environment(KVSTORE) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"CUDA_VISIBLE_DEVICES": "1"}, f"CUDA_VISIBLE_DEVICES is '1'; must be {UUID}"),
        ({"CUDA_MPS_PIPE_DIRECTORY": None}, "CUDA_MPS_PIPE_DIRECTORY is not set; must be /run/mps-5f4df884"),
        ({"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "100"}, "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE is '100'; must be 40"),
    ],
)
def test_a_process_with_another_environment_is_refused(change: dict[str, str | None], message: str) -> None:
    runtime = runtime_of(share=SHARES)
    environment = {**runtime.environment(DECODE), "HOME": "/root"}
    runtime.check_environment(DECODE, environment)
    changed = {name: value for name, value in {**environment, **change}.items() if value is not None}
    with pytest.raises(ConfigError) as refused:
        runtime.check_environment(DECODE, changed)
    assert str(refused.value) == f"decode/m: {message}"


def test_a_process_without_a_supervisor_sets_its_environment_itself() -> None:
    runtime, environment = runtime_of(share=SHARES), {"CUDA_VISIBLE_DEVICES": "0", "HOME": "/root"}
    runtime.set_environment(DECODE, environment, has_supervisor=False)
    assert environment == {**inside_mps(40), "HOME": "/root"}


def test_a_process_with_a_supervisor_only_checks_its_environment() -> None:
    runtime, environment = runtime_of(share=SHARES), {"CUDA_VISIBLE_DEVICES": "0"}
    with pytest.raises(ConfigError, match=f"CUDA_VISIBLE_DEVICES is '0'; must be {UUID}"):
        runtime.set_environment(DECODE, environment, has_supervisor=True)
    assert environment == {"CUDA_VISIBLE_DEVICES": "0"}


def test_the_sockets_of_a_daemon_count_for_the_longest_path() -> None:
    """A control program does not report that a path is too long."""
    name = "/mps-5f4df884/control_privileged"
    longest = Path("/" + "d" * (MAX_SOCKET_PATH - len(name) - 1))
    runtime_of(run_dir=longest).check_socket_paths()
    too_long = longest.with_name(longest.name + "d")
    with pytest.raises(ConfigError, match=r"longer than 107 bytes: .*control_privileged; use shorter names"):
        runtime_of(run_dir=too_long).check_socket_paths()
    runtime_of(run_dir=too_long, mps="off").check_socket_paths()
