"""Where the CAs of the system are looked for."""

from pathlib import Path

import pytest

from muxmesh.client.system_roots import first_bundle, system_roots
from tests.support.tls import Authority


def test_a_file_in_the_variable_of_openssl_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pem = Authority(tmp_path).pem
    monkeypatch.setenv("SSL_CERT_FILE", str(pem))
    assert system_roots({}) == pem.read_bytes()


def test_a_file_in_the_variable_of_grpc_is_left_to_grpc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(Authority(tmp_path).pem))
    assert system_roots({"GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": "/roots.pem"}) is None


def test_the_first_file_with_certificates_is_used(tmp_path: Path) -> None:
    pem, empty = Authority(tmp_path).pem, tmp_path / "empty.pem"
    empty.write_bytes(b"")
    paths = (None, str(tmp_path / "none.pem"), str(empty), str(tmp_path), str(pem))
    assert first_bundle(*paths) == pem.read_bytes()
    assert first_bundle(*paths[:-1]) is None
