"""`muxmesh prepare`: the runtime file that it writes, and what it refuses."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from muxmesh.cli.main import main
from muxmesh.config.runtime import MeshRuntime, PreparedModel
from muxmesh.config.tls_config import InternalTlsConfig, TlsConfig
from tests.support.processes import without_privileges
from tests.support.tiny import TinyShape, write_tiny_model
from tests.support.tls import Authority

UNIT = "units:\n  - {name: u, kv_pool: 64MiB, models: [{name: m, engine: sim}]}\n"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "mesh.yaml"
    path.write_text(UNIT)
    return path


def prepare(config: Path, redis_url: str | None, *more: str) -> int:
    redis = () if redis_url is None else ("--redis-url", redis_url)
    return main(["prepare", "-c", str(config), "--run-dir", str(config.parent / "run"), *redis, *more])


def test_the_runtime_file_names_models_folders_and_redis_and_only_its_owner_can_read_it(
    config: Path, redis_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny_model(config.parent / "tiny", TinyShape())
    config.write_text("units:\n  - {name: u, kv_pool: 64MiB, models: [{name: m, source: ./tiny}]}\n")
    assert prepare(config, redis_url) == 0
    run_dir = config.parent / "run"
    path = run_dir / "runtime.json"
    assert capsys.readouterr().out == f"muxmesh: prepared {path}\n"
    runtime = MeshRuntime.read(path)
    assert (runtime.run_dir, runtime.redis_url) == (run_dir, redis_url)
    assert runtime.cache_dir == Path(os.environ["MUXMESH_CACHE_DIR"])
    image = runtime.prepared_model("u", "m").image
    assert image is not None and image.is_file()
    assert len(bytes.fromhex(runtime.tenant_secret)) == 32
    assert (run_dir.stat().st_mode & 0o777, path.stat().st_mode & 0o777) == (0o700, 0o600)


def test_a_second_run_changes_nothing_and_keeps_the_secret(
    config: Path, redis_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config.parent / "run" / "runtime.json"
    assert prepare(config, redis_url) == 0
    before = path.read_bytes()
    assert prepare(config, redis_url, "--quiet") == 0
    assert path.read_bytes() == before
    assert capsys.readouterr().out.endswith(f"muxmesh: prepared {path}; nothing has changed\n")


def test_a_changed_file_names_the_processes_that_have_to_restart(
    config: Path, redis_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare(config, redis_url) == 0
    config.write_text(UNIT.replace("64MiB", "32MiB"))
    assert prepare(config, redis_url) == 0
    assert capsys.readouterr().out.endswith(
        "; it has changed: restart kvstore/u, prefill/m, decode/m, every router, if they run\n"
    )


def test_a_runtime_file_that_cannot_be_read_is_replaced(config: Path, redis_url: str) -> None:
    path = config.parent / "run" / "runtime.json"
    path.parent.mkdir()
    path.write_text("{")
    assert prepare(config, redis_url) == 0
    assert MeshRuntime.read(path).config.units[0].name == "u"


def test_the_folder_of_another_mesh_is_refused(
    config: Path, redis_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare(config, redis_url) == 0
    config.write_text(f"mesh_id: other\n{UNIT}")
    assert prepare(config, redis_url) == 1
    assert capsys.readouterr().err == (
        f"muxmesh: {config.parent}/run/runtime.json is of the mesh default, not of other; "
        "give each mesh a folder of its own, or delete this file\n"
    )


def test_a_folder_that_exists_keeps_its_mode(config: Path, redis_url: str) -> None:
    """An orchestrator's volume, which may belong to another user."""
    folder = config.parent / "run"
    folder.mkdir(mode=0o750)
    assert prepare(config, redis_url) == 0
    assert folder.stat().st_mode & 0o777 == 0o750


def test_an_address_that_is_published_to_this_machine_only_is_not_warned_about(
    config: Path, redis_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text(f"listen: 0.0.0.0:50051\n{UNIT}")
    assert prepare(config, redis_url, "--published-at", "127.0.0.1:7000") == 0
    assert capsys.readouterr().err == ""
    assert prepare(config, redis_url) == 1
    assert "listen: other machines may connect to 0.0.0.0:50051" in capsys.readouterr().err
    config.write_text(f"listen: 0.0.0.0:50051\naccess: {{open_on_network: true}}\n{UNIT}")
    assert prepare(config, redis_url) == 0
    assert "WARNING: listen: 0.0.0.0:50051 can be reached from other machines" in capsys.readouterr().err


def test_redis_has_to_be_named(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare(config, None) == 1
    expected = "muxmesh: redis_url: is not set; name a Redis in mesh.yaml or with --redis-url\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("http://h", "--redis-url: is 'http://h'; needed is redis://HOST:PORT, rediss://, unix://PATH, "),
        ("redis://:secret@h:x", "--redis-url: is 'redis://h:x', which cannot be opened: "),
        ("unix://", "--redis-url: is 'unix://', which has no path; needed is a URL such as unix:///run/redis.sock"),
    ],
)
def test_a_url_that_is_none_is_refused(
    config: Path, capsys: pytest.CaptureFixture[str], url: str, problem: str
) -> None:
    assert prepare(config, url) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"muxmesh: {problem}") and "secret" not in error


def test_a_free_port_is_for_a_supervisor_only(config: Path, redis_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    config.write_text(f"listen: 127.0.0.1:0\n{UNIT}")
    assert prepare(config, redis_url) == 1
    expected = "muxmesh: listen: is 127.0.0.1:0; a free port is for `muxmesh up` only, name one\n"
    assert capsys.readouterr().err == expected


def test_a_wrong_configuration_is_reported_with_its_line(
    config: Path, redis_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text("units:\n  - models: [{name: a, source: ./nowhere}]")
    assert prepare(config, redis_url) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"muxmesh: {config}:2: units[0].models[0].source: './nowhere' is neither a folder")
    assert not (config.parent / "run").exists()


def test_a_folder_whose_sockets_would_have_too_long_paths_is_refused(
    config: Path, redis_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["prepare", "-c", str(config), "--redis-url", redis_url]
    assert main([*arguments, "--run-dir", str(config.parent / ("x" * 100))]) == 1
    assert "socket path is longer than 107 bytes" in capsys.readouterr().err


def test_a_path_that_is_no_folder_is_refused(config: Path, redis_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    (config.parent / "run").touch()
    assert prepare(config, redis_url) == 1
    assert capsys.readouterr().err == f"muxmesh: {config.parent}/run: cannot be written: File exists\n"


def prepare_without_privileges(config: Path, redis_url: str) -> tuple[int, str]:
    """Exit code and error output as root without the privileges of root, like in a container."""
    command = ["prepare", "-c", str(config), "--run-dir", str(config.parent / "run"), "--redis-url", redis_url]
    done = subprocess.run(without_privileges("-m", "muxmesh", *command), capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


def not_owned(run_dir: Path, mode: str) -> str:
    """The message about a run folder of uid 10001."""
    return (
        f"muxmesh: {run_dir}: permission denied: it is of uid 10001, mode {mode}, this process runs as uid 0; "
        "all processes of a mesh on one run folder have to run as one user\n"
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
def test_a_folder_of_another_user_is_named_with_both_users(config: Path, redis_url: str) -> None:
    run_dir = config.parent / "run"
    run_dir.mkdir(mode=0o700)
    os.chown(run_dir, 10001, 10001)
    assert prepare_without_privileges(config, redis_url) == (1, not_owned(run_dir, "0700"))


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a folder to another user, which needs root")
def test_a_run_folder_that_cannot_be_written_is_named_alone_and_before_a_model_is_prepared(
    config: Path, redis_url: str
) -> None:
    config.write_text("units:\n  - {name: u, kv_pool: 64MiB, models: [{name: m, source: ./tiny}]}\n")
    write_tiny_model(config.parent / "tiny", TinyShape())
    run_dir = config.parent / "run"
    run_dir.mkdir(mode=0o755)
    os.chown(run_dir, 10001, 10001)
    assert prepare_without_privileges(config, redis_url) == (1, not_owned(run_dir, "0755"))


def test_the_file_has_no_field_that_a_service_cannot_read(config: Path, redis_url: str) -> None:
    assert prepare(config, redis_url) == 0
    content = json.loads((config.parent / "run" / "runtime.json").read_bytes())
    assert set(content) <= set(MeshRuntime.model_fields)


def two_units(folder: Path) -> Path:
    """A mesh with a unit on this machine and one on a GPU of another, each with weights that only its machine has."""
    write_tiny_model(folder / "tiny", TinyShape())
    path = folder / "mesh.yaml"
    path.write_text(
        """
units:
  - name: here
    kv_pool: 64MiB
    network: {host: here.example, allow_unencrypted: true}
    models: [{name: m, source: ./tiny}]
  - name: there
    device: cuda:7
    mps: on
    kv_pool: 64MiB
    network: {host: there.example, allow_unencrypted: true}
    models: [{name: n, source: ./other}]
"""
    )
    return path


def test_a_unit_is_prepared_without_the_machines_and_models_of_others(
    tmp_path: Path, redis_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = two_units(tmp_path)
    assert prepare(config, redis_url, "--unit", "here") == 0
    runtime = MeshRuntime.read(tmp_path / "run" / "runtime.json")
    assert list(runtime.prepared) == ["here"] and runtime.prepared_model("here", "m").image is not None
    assert [unit.name for unit in runtime.config.units] == ["here", "there"]
    capsys.readouterr()
    assert prepare(config, redis_url, "--unit", "there") == 1
    errors = capsys.readouterr().err
    assert "units[1].device: is cuda:7" in errors and "units[1].models[0].source: './other' is neither" in errors


def test_a_unit_that_does_not_exist_is_refused(
    tmp_path: Path, redis_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare(two_units(tmp_path), redis_url, "--unit", "where") == 1
    assert capsys.readouterr().err.endswith("muxmesh: no unit has the name 'where'; units: here, there\n")


def test_a_router_is_prepared_without_weights_and_devices(tmp_path: Path, redis_url: str) -> None:
    config = two_units(tmp_path)
    shutil.copytree(tmp_path / "tiny", tmp_path / "other")
    for name in ("tiny", "other"):
        (tmp_path / name / "model.safetensors").unlink()
    assert prepare(config, redis_url, "--router") == 0
    runtime = MeshRuntime.read(tmp_path / "run" / "runtime.json")
    assert runtime.prepared_model("there", "n") == PreparedModel(
        folder=tmp_path / "other", image=None, weights_fingerprint=""
    )


def test_routers_on_several_hosts_share_the_secret_of_the_environment(
    config: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MUXMESH_TENANT_SECRET", "ab" * 32)
    assert prepare(config, redis_url, "--router") == 0
    assert MeshRuntime.read(config.parent / "run" / "runtime.json").tenant_secret == "ab" * 32
    for wrong in ("ab" * 31, "x" * 64):
        monkeypatch.setenv("MUXMESH_TENANT_SECRET", wrong)
        assert prepare(config, redis_url, "--router") == 1
        assert capsys.readouterr().err == (
            "muxmesh: MUXMESH_TENANT_SECRET: must be 32 bytes in hexadecimal (`openssl rand -hex 32`)\n"
        )


def test_with_json_the_result_and_an_error_are_objects(
    config: Path, redis_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text(f"log_format: json\n{UNIT}")
    assert prepare(config, redis_url) == 0
    output = capsys.readouterr()
    (line,) = output.out.splitlines()
    assert json.loads(line)["message"] == f"muxmesh: prepared {config.parent / 'run' / 'runtime.json'}"
    assert prepare(config, None) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert (json.loads(line)["level"], json.loads(line)["process"]) == ("ERROR", "prepare")


def test_certificates_are_named_by_their_absolute_paths(config: Path, redis_url: str) -> None:
    """Routers may start in another folder than that of mesh.yaml."""
    files = Authority(config.parent).issue("a")
    config.write_text(f"tls: {{cert: ca-a.pem, key: ./ca-a.key}}\n{UNIT}")
    assert prepare(config, redis_url) == 0
    runtime = MeshRuntime.read(config.parent / "run" / "runtime.json")
    assert runtime.config.tls == TlsConfig(cert=str(files.cert), key=str(files.key))


def test_certificates_between_hosts_are_checked_for_every_part_of_a_mesh(
    config: Path, redis_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    authority = Authority(config.parent)
    files = authority.issue("a")
    unit = UNIT.replace("{name: u,", "{name: u, network: {host: 10.0.0.1},")
    config.write_text(f"mesh_id: m\ninternal_tls: {{cert: ca-a.pem, key: none.key, ca: ca.pem}}\n{unit}")
    for part in ((), ("--router",), ("--unit", "u")):
        assert prepare(config, redis_url, *part) == 1
        expected = f"internal_tls.key: {config.parent}/none.key: cannot be read: No such file or directory\n"
        assert capsys.readouterr().err == f"muxmesh: {config}:2: {expected}"
    files.key.rename(config.parent / "none.key")
    assert prepare(config, redis_url, "--unit", "u") == 0
    runtime = MeshRuntime.read(config.parent / "run" / "runtime.json")
    tls = InternalTlsConfig(cert=str(files.cert), key=f"{config.parent}/none.key", ca=str(authority.pem))
    assert runtime.config.internal_tls == tls


def test_only_what_serves_the_public_api_needs_the_certificates(
    config: Path, redis_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text(f"mesh_id: m\ntls: {{cert: a.pem, key: a.key}}\n{UNIT}")
    expected = (
        f"muxmesh: {config}:2: tls.cert: {config.parent}/a.pem: cannot be read: No such file or directory\n"
    )  # fmt: skip
    for part in ((), ("--router",)):
        assert prepare(config, redis_url, *part) == 1
        assert capsys.readouterr().err == expected
    assert prepare(config, redis_url, "--unit", "u") == 0


@pytest.mark.parametrize(
    ("section", "line", "problem"),
    [
        ("{cert: ca-late.pem, key: ca-late.key}", "tls.cert: {}/ca-late.pem: has expired on 2020-01-06", "renew it"),
        (
            "{cert: ca-a.pem, key: ca-late.key}",
            "tls.key: {}/ca-late.key: is not the key of the certificate",
            "ca-a.pem",
        ),
        (
            "{cert: ca-a.pem, key: ca-a.key, client_ca: ca-a.key}",
            "tls.client_ca: {}/ca-a.key: has no certificate",
            "PEM",
        ),
    ],
)
def test_certificates_that_no_client_could_use_are_refused(
    config: Path, redis_url: str, capsys: pytest.CaptureFixture[str], section: str, line: str, problem: str
) -> None:
    authority = Authority(config.parent)
    authority.issue("a")
    authority.issue_expired("late")
    config.write_text(f"tls: {section}\n{UNIT}")
    assert prepare(config, redis_url) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"muxmesh: {config}:1: {line.format(config.parent)}")
    assert problem in error
    assert len(error.splitlines()) == 1
