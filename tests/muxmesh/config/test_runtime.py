"""Names and addresses of the processes of a mesh, and the runtime file."""

import re
import resource
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxmesh.config.runtime import MAX_SOCKET_PATH, Endpoint, MeshRuntime, PreparedModel, ProcessKey
from muxmesh.config.schema import MeshConfig
from muxmesh.errors import ConfigError
from muxmesh.models.prepared_model import kv_identity
from muxmesh.types import Role


def runtime_of(units: Mapping[str, Sequence[str]], run_dir: Path = Path("/run"), **config: Any) -> MeshRuntime:
    """A mesh with these models in each unit."""
    listed = [{"name": unit, "models": [{"name": model} for model in models]} for unit, models in units.items()]
    parsed = MeshConfig.model_validate({"units": listed, **config})
    return MeshRuntime(config=parsed, run_dir=run_dir, cache_dir=Path("/cache"), redis_url="unix:///x", prepared={})


def addresses(runtime: MeshRuntime) -> dict[str, str]:
    """Socket by display name, without the folder."""
    return {
        endpoint.name: endpoint.address.removeprefix(f"unix:{runtime.run_dir}/")
        for endpoint in runtime.endpoints().values()
    }


@pytest.mark.parametrize(
    ("key", "name"),
    [
        (ProcessKey("router"), "router"),
        (ProcessKey("kvstore", "cpu0"), "kvstore/cpu0"),
        (ProcessKey(Role.PREFILL, "cpu0", "chat"), "prefill/cpu0/chat"),
        (ProcessKey(Role.DECODE, "cpu0", "chat", 2), "decode/cpu0/chat#2"),
        (ProcessKey("router", replica=1), "router-2"),
    ],
)
def test_the_name_of_a_process_has_its_role_unit_model_and_replica(key: ProcessKey, name: str) -> None:
    assert key.name == name


def test_a_mesh_has_a_kvstore_for_each_unit_two_workers_for_each_placement_and_a_router() -> None:
    assert list(runtime_of({"u": ["a", "b"], "v": ["c"]}).endpoints()) == [
        ProcessKey("kvstore", "u"),
        ProcessKey(Role.PREFILL, "u", "a"),
        ProcessKey(Role.DECODE, "u", "a"),
        ProcessKey(Role.PREFILL, "u", "b"),
        ProcessKey(Role.DECODE, "u", "b"),
        ProcessKey("kvstore", "v"),
        ProcessKey(Role.PREFILL, "v", "c"),
        ProcessKey(Role.DECODE, "v", "c"),
        ProcessKey("router"),
    ]


def test_only_workers_of_a_model_in_several_units_are_named_by_unit() -> None:
    assert addresses(runtime_of({"u": ["both", "one"], "v": ["both"]})) == {
        "kvstore/u": "kvstore-u.sock",
        "prefill/u/both": "prefill-u-both.sock",
        "decode/u/both": "decode-u-both.sock",
        "prefill/one": "prefill-one.sock",
        "decode/one": "decode-one.sock",
        "kvstore/v": "kvstore-v.sock",
        "prefill/v/both": "prefill-v-both.sock",
        "decode/v/both": "decode-v-both.sock",
        "router": "router.sock",
    }


NAMES = st.text("ab-", min_size=1, max_size=4).filter(lambda name: not name.startswith("-"))


@given(st.dictionaries(NAMES, st.lists(NAMES, min_size=1, max_size=2, unique=True), min_size=1, max_size=3))
def test_display_names_are_unique_and_shared_sockets_are_refused(units: dict[str, list[str]]) -> None:
    runtime = runtime_of(units)
    endpoints = runtime.endpoints().values()
    assert len({endpoint.name for endpoint in endpoints}) == len(endpoints)
    if len({endpoint.address for endpoint in endpoints}) == len(endpoints):
        runtime.check_socket_paths()
    else:
        with pytest.raises(ConfigError, match="have the same socket"):
            runtime.check_socket_paths()


def test_two_processes_with_the_same_socket_are_both_named() -> None:
    runtime = runtime_of({"a": ["b-c"], "a-b": ["c"], "z": ["b-c", "c"]})
    message = "prefill/a/b-c and prefill/a-b/c have the same socket /run/prefill-a-b-c.sock; rename a unit or a model"
    with pytest.raises(ConfigError, match=re.escape(message)):
        runtime.check_socket_paths()


@pytest.mark.parametrize(("num_bytes", "is_valid"), [(MAX_SOCKET_PATH, True), (MAX_SOCKET_PATH + 1, False)])
def test_the_longest_socket_path_is_that_of_the_kernel(num_bytes: int, is_valid: bool) -> None:
    folder = Path("/" + "x" * (num_bytes - len("//prefill-mm.sock")))
    runtime = runtime_of({"u": ["mm"]}, folder)
    if is_valid:
        runtime.check_socket_paths()
    else:
        path = f"{folder}/prefill-mm.sock"
        with pytest.raises(ConfigError, match=re.escape(f"socket path is longer than 107 bytes: {path}; use shorter")):
            runtime.check_socket_paths()


def test_the_length_of_a_socket_path_is_counted_in_bytes() -> None:
    folder = Path("/" + "ä" * 46)
    assert len(f"{folder}/prefill-mm.sock") < MAX_SOCKET_PATH
    with pytest.raises(ConfigError, match="longer than 107 bytes"):
        runtime_of({"u": ["mm"]}, folder).check_socket_paths()


def test_units_have_different_attach_sockets() -> None:
    runtime = runtime_of({"u": ["m"], "v": ["m"]})
    assert runtime.attach_path("u") == Path("/run/kv-u.attach") != runtime.attach_path("v")


def test_a_unit_and_a_model_are_found_by_name() -> None:
    runtime = runtime_of({"u": ["a"], "v": ["b", "a"]})
    assert runtime.unit("v").name == "v"
    unit, model = runtime.model("v", "a")
    assert (unit.name, model.name) == ("v", "a")


def test_an_unknown_unit_or_model_is_refused_with_the_known_names() -> None:
    runtime = runtime_of({"u": ["a"], "v": ["c", "b"]})
    with pytest.raises(ConfigError, match="no unit has the name 'x'; units: u, v"):
        runtime.unit("x")
    with pytest.raises(ConfigError, match="no unit has the name 'x'"):
        runtime.model("x", "a")
    with pytest.raises(ConfigError, match="unit v has no model 'a'; models: b, c"):
        runtime.model("v", "a")


def test_the_runtime_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    models = {
        "a": PreparedModel(folder=tmp_path / "a", image=tmp_path / "a.image", weights_fingerprint="w"),
        "b": PreparedModel(folder=None, image=None, weights_fingerprint="sim:{}"),
    }
    prepared = {"u": models}
    runtime = runtime_of({"u": ["a", "b"]}, order={"longest_lead_s": 3}, redis_url="redis://h")
    runtime = runtime.model_copy(update={"prepared": prepared, "run_dir": tmp_path})
    runtime.write(tmp_path / "runtime.json")
    assert MeshRuntime.read(tmp_path / "runtime.json") == runtime


def test_the_runtime_file_keeps_which_fields_are_set(tmp_path: Path) -> None:
    runtime = runtime_of({"u": ["a"]}, order={"longest_lead": 100})
    runtime.write(tmp_path / "runtime.json")
    assert MeshRuntime.read(tmp_path / "runtime.json").config.order.model_fields_set == {"longest_lead"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "{path}: the runtime file cannot be read: No such file or directory; `muxmesh prepare` writes it"),
        (b"{", "{path}: is no runtime file of this version of MuxMesh; write it again with `muxmesh prepare`"),
        (b"\xff", "{path}: is no runtime file of this version of MuxMesh; write it again with `muxmesh prepare`"),
        (b"{}", "{path}: is no runtime file of this version of MuxMesh; write it again with `muxmesh prepare`"),
    ],
)
def test_a_runtime_file_that_is_missing_or_damaged_is_refused(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "runtime.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        MeshRuntime.read(path)
    assert str(refused.value) == message.format(path=path)


def test_routers_beside_each_other_have_names_and_sockets_of_their_own() -> None:
    runtime = runtime_of({"u": ["m"]})
    assert runtime.router_endpoint("router") == runtime.endpoints()[ProcessKey("router")]
    socket = "unix:/run/router-host.1.sock"
    assert runtime.router_endpoint("router-host.1") == Endpoint("router-host.1", socket, socket, (socket,))


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("", "the name of a router is ''; needed are letters, digits, `.`, `_` and `-`"),
        ("a/b", "the name of a router is 'a/b'; needed are letters, digits, `.`, `_` and `-`"),
        ("decode-m", "a router with the name decode-m would have the socket of decode/m; rename it"),
        ("supervisor", "a router with the name supervisor would have the control socket of the supervisor; rename it"),
        ("r" * 99, "socket path is longer than 107 bytes: /run/{name}.sock; use a shorter name of the router (--name)"),
    ],
)
def test_a_name_that_no_router_can_have_is_refused(name: str, problem: str) -> None:
    with pytest.raises(ConfigError) as refused:
        runtime_of({"u": ["m"]}).router_endpoint(name)
    assert str(refused.value) == problem.format(name=name)


def test_models_with_different_weights_share_no_kv() -> None:
    unit, model = runtime_of({"u": ["a"]}).model("u", "a")
    roots = {
        kv_identity(unit, model, PreparedModel(folder=None, image=None, weights_fingerprint=fingerprint)).root()
        for fingerprint in ("one", "two")
    }
    assert len(roots) == 2


def test_a_runtime_file_that_cannot_be_written_is_not_there_in_part(tmp_path: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, limit[1]))
        with pytest.raises(OSError, match="File too large"):
            runtime_of({"u": ["a"]}).write(tmp_path / "runtime.json")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not (tmp_path / "runtime.json").exists()
