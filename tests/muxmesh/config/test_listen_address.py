"""Which addresses are public."""

import socket
from typing import Any

import pytest

from muxmesh.config.listen_address import check_open_access, listen_warnings, public_listen_warning
from muxmesh.config.schema import MeshConfig
from muxmesh.errors import ConfigError

TLS = {"cert": "/a.pem", "key": "/a.key"}


def warning_of(listen: str, published_at: str | None = None, **config: object) -> str | None:
    return public_listen_warning(MeshConfig.model_validate({"listen": listen, **config}), published_at)


@pytest.mark.parametrize(
    "listen", ["127.0.0.1:1", "127.9.9.9:50051", "[::1]:1", "::1:1", "localhost:1", "[::ffff:127.0.0.1]:1"]
)
def test_an_address_of_this_machine_only_has_no_warning(listen: str) -> None:
    assert warning_of(listen) is None


@pytest.mark.parametrize(
    "listen",
    ["0.0.0.0:50051", "[::]:50051", "192.0.2.1:1", "[2001:db8::1]:1", "[fe80::1]:1", "[::ffff:192.0.2.1]:1", "0:1"],
)
def test_an_address_that_others_reach_has_a_warning_with_what_to_do(listen: str) -> None:
    warning = warning_of(listen)
    assert warning is not None
    assert warning.startswith(f"WARNING: listen: {listen} can be reached from other machines")
    assert "`tls`" in warning and "access: {mode: keys}" in warning
    assert "\n" not in warning


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({}, ", without encryption and without a password: everyone who can connect"),
        ({"tls": TLS}, ", without a password: everyone who can connect"),
        ({"access": {"mode": "keys"}}, ", without encryption: API keys, prompts and outputs cross the network"),
        ({"tls": TLS, "access": {"mode": "keys"}}, None),
        ({"tls": {**TLS, "client_ca": "/ca.pem"}}, None),
    ],
)
def test_the_warning_names_what_is_missing(config: dict[str, Any], problem: str | None) -> None:
    warning = warning_of("0.0.0.0:50051", **config)
    if problem is None:
        assert warning is None
    else:
        assert warning is not None
        assert warning.startswith(f"WARNING: listen: 0.0.0.0:50051 can be reached from other machines{problem}")
    mesh = MeshConfig.model_validate({"listen": "0.0.0.0:50051", **config})
    assert list(listen_warnings(mesh)) == ([] if warning is None else [warning])


@pytest.mark.parametrize("host", ["no-such-host.invalid", "x" * 300, "*"])
def test_a_name_without_an_address_counts_as_public(host: str) -> None:
    assert warning_of(f"{host}:1") is not None


def test_the_name_of_this_machine_counts_by_its_addresses() -> None:
    try:
        addresses = {str(found[4][0]) for found in socket.getaddrinfo(socket.gethostname(), None)}
    except OSError as error:
        pytest.skip(f"the name of this machine has no address: {error}")
    is_public = any(not address.startswith("127.") and address != "::1" for address in addresses)
    assert (warning_of(f"{socket.gethostname()}:1") is not None) is is_public


def test_where_a_listen_address_is_published_decides_who_reaches_it() -> None:
    assert warning_of("0.0.0.0:50051", "127.0.0.1:7000") is None
    warning = warning_of("0.0.0.0:50051", "0.0.0.0:7000")
    assert warning is not None
    assert warning.startswith("WARNING: listen: 0.0.0.0:50051, published at 0.0.0.0:7000, can be reached from other")


def test_a_unit_on_the_network_is_warned_about() -> None:
    def warnings(network: dict[str, object] | None) -> list[str]:
        unit = {"name": "u", "network": network, "models": [{"name": "m", "engine": "sim"}]}
        return list(listen_warnings(MeshConfig.model_validate({"listen": "127.0.0.1:1", "units": [unit]})))

    assert warnings(None) == warnings({"host": "localhost"}) == []
    (warning,) = warnings({"host": "unit-0.units", "base_port": 7000, "allow_unencrypted": True})
    assert warning.startswith("WARNING: unit u can be reached from other machines on the ports 7000 to 7002")


def test_metrics_that_others_can_read_are_warned_about() -> None:
    def warnings(listen: str) -> list[str]:
        return list(listen_warnings(MeshConfig.model_validate({"metrics": {"listen": listen}})))

    assert warnings("127.0.0.1:9464") == []
    (warning,) = warnings("0.0.0.0:9464")
    assert warning.startswith("WARNING: metrics.listen: 0.0.0.0:9464 can be reached from other machines")


@pytest.mark.parametrize(
    ("listen", "published_at", "access", "is_refused"),
    [
        ("127.0.0.1:1", None, {}, False),
        ("0.0.0.0:1", None, {}, True),
        ("0.0.0.0:1", "127.0.0.1:1", {}, False),
        ("127.0.0.1:1", "0.0.0.0:1", {}, True),
        ("0.0.0.0:1", None, {"open_on_network": True}, False),
        ("0.0.0.0:1", None, {"mode": "keys"}, False),
    ],
)
def test_a_mesh_without_keys_is_open_to_other_machines_only_if_the_file_says_so(
    listen: str, published_at: str | None, access: dict[str, object], is_refused: bool
) -> None:
    config = MeshConfig.model_validate({"listen": listen, "access": access})
    with_certificates = {"listen": listen, "access": access, "tls": {**TLS, "client_ca": "/ca.pem"}}
    check_open_access(MeshConfig.model_validate(with_certificates), published_at)
    if not is_refused:
        check_open_access(config, published_at)
        return
    with pytest.raises(ConfigError, match=r"access: \{mode: keys\}.*access: \{open_on_network: true\}"):
        check_open_access(config, published_at)
