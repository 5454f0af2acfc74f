"""The section `tls` of mesh.yaml, without its files."""

from pathlib import Path

import pytest

from muxmesh.config.load import parse_mesh_config
from muxmesh.config.schema import MeshConfig
from muxmesh.config.tls_config import TlsConfig
from muxmesh.errors import ConfigError


def problem(section: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_mesh_config(f"mesh_id: m\ntls: {section}\n", "f")
    return str(caught.value)


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ("{client_ca: ca.pem}", "f:2: tls: has `client_ca`; a TLS server needs `cert` and `key` too"),
        ("{cert: a.pem}", "f:2: tls: has `cert`; a TLS server needs `key` too"),
        ("{key: a.key, client_ca: ca.pem}", "f:2: tls: has `key`, `client_ca`; a TLS server needs `cert` too"),
        ("{}", "f:2: tls: has nothing; a TLS server needs `cert` and `key` too"),
        ("{cert: a.pem, key: }", "f:2: tls: has `cert`; a TLS server needs `key` too"),
        ("{cert: a.pem, key: ''}", "f:2: tls.key: must not be empty"),
        ("{cert: 7, key: a.key}", "f:2: tls.cert: is 7; must be text, in quotes if it looks like a number"),
        ("a.pem", "f:2: tls: is 'a.pem'; must be a mapping with fields like `cert`, `key`, `client_ca`"),
        ("{crt: a.pem, key: a.key}", "f:2: tls.crt: unknown field; did you mean `cert`?"),
    ],
)
def test_what_is_missing_or_wrong_is_named(section: str, expected: str) -> None:
    assert problem(section) == expected


@pytest.mark.parametrize(
    ("field", "ours"), [("ssl_certfile", "cert"), ("ssl_keyfile", "key"), ("ssl_ca_certs", "client_ca")]
)
def test_the_names_of_vllm_lead_to_ours(field: str, ours: str) -> None:
    with pytest.raises(ConfigError, match=f"{field}: unknown field; it is `{ours}` of `tls`"):
        parse_mesh_config(f"{field}: x\n", "f")


def test_a_wrong_section_hides_no_other_problem() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_mesh_config("tls: {cert: a}\nlisten: a:99999\n", "f")
    assert [line.split(": ")[1] for line in str(caught.value).splitlines()] == ["tls", "listen"]


def test_relative_paths_start_at_a_folder_and_links_stay(tmp_path: Path) -> None:
    """Kubernetes and certbot replace certificates by changing a link: its target today is not that of tomorrow."""
    (tmp_path / "today").mkdir()
    (tmp_path / "live").symlink_to("today")
    config = MeshConfig(tls=TlsConfig(cert="live/a.pem", key="/keys/a.key"))
    assert config.with_absolute_paths(tmp_path).tls == TlsConfig(cert=f"{tmp_path}/live/a.pem", key="/keys/a.key")
    whole = TlsConfig(cert="~/a.pem", key="../a.key", client_ca="ca.pem").absolute(tmp_path / "inner")
    assert whole == TlsConfig(
        cert=str(Path.home() / "a.pem"), key=f"{tmp_path}/a.key", client_ca=f"{tmp_path}/inner/ca.pem"
    )


def test_a_mesh_without_tls_has_no_paths(tmp_path: Path) -> None:
    config = MeshConfig()
    assert config.with_absolute_paths(tmp_path) == config


def test_another_listen_address_keeps_tls() -> None:
    tls = TlsConfig(cert="/a.pem", key="/a.key")
    assert MeshConfig(tls=tls).with_listen("127.0.0.1:7").tls == tls
