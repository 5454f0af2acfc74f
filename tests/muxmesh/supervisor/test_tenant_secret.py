import subprocess
import sys
from pathlib import Path

import pytest

from muxmesh.supervisor.tenant_secret import SECRET_FILE, tenant_secret


def test_a_state_folder_keeps_its_secret(tmp_path: Path) -> None:
    secret = tenant_secret(tmp_path)
    assert len(bytes.fromhex(secret)) == 32
    assert tenant_secret(tmp_path) == secret
    assert (tmp_path / SECRET_FILE).stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == [SECRET_FILE]


def test_each_state_folder_has_a_secret_of_its_own(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    assert tenant_secret(tmp_path / "a") != tenant_secret(tmp_path / "b")


@pytest.mark.parametrize("content", [b"", b"hello", b"00" * 31, b"\xff\xfe"])
def test_a_damaged_secret_is_replaced(tmp_path: Path, content: bytes) -> None:
    (tmp_path / SECRET_FILE).write_bytes(content)
    secret = tenant_secret(tmp_path)
    assert len(secret) == 64 and tenant_secret(tmp_path) == secret


def test_a_secret_that_cannot_be_kept_is_logged_and_still_given(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    missing = tmp_path / "missing"
    assert tenant_secret(missing) != tenant_secret(missing)
    assert "cannot be kept" in caplog.text


def test_a_secret_that_cannot_be_written_leaves_no_file(tmp_path: Path) -> None:
    script = (
        "import pathlib, resource, sys\n"
        "from muxmesh.supervisor.tenant_secret import tenant_secret\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))\n"
        "print(len(tenant_secret(pathlib.Path(sys.argv[1]))))"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout == "64\n" and "cannot be kept: [Errno 27] File too large" in done.stderr
    assert not any(tmp_path.iterdir())
