"""Which addresses are public."""

import socket

import pytest

from muxmesh.config.schema import MeshConfig
from muxmesh.config.tls_config import TlsConfig
from muxmesh.supervisor.listen_address import listen_warnings, public_listen_warning


@pytest.mark.parametrize(
    "listen", ["127.0.0.1:1", "127.9.9.9:50051", "[::1]:1", "::1:1", "localhost:1", "[::ffff:127.0.0.1]:1"]
)
def test_an_address_of_this_machine_only_has_no_warning(listen: str) -> None:
    assert public_listen_warning(listen) is None


@pytest.mark.parametrize(
    "listen",
    ["0.0.0.0:50051", "[::]:50051", "192.0.2.1:1", "[2001:db8::1]:1", "[fe80::1]:1", "[::ffff:192.0.2.1]:1", "0:1"],
)
def test_an_address_that_others_reach_has_a_warning_with_what_to_do(listen: str) -> None:
    warning = public_listen_warning(listen)
    assert warning is not None
    assert warning.startswith(f"WARNING: listen: {listen} can be reached from other machines")
    assert "127.0.0.1" in warning and "TLS" in warning
    assert "\n" not in warning


def test_with_tls_the_warning_is_about_who_may_connect_and_with_certificates_of_clients_there_is_none() -> None:
    tls = TlsConfig(cert="/a.pem", key="/a.key")
    warning = public_listen_warning("0.0.0.0:50051", tls=tls)
    assert warning is not None
    assert warning.startswith("WARNING: listen: 0.0.0.0:50051 can be reached from other machines, without a password:")
    assert "unencrypted" not in warning and "tls.client_ca" in warning
    both = tls.model_copy(update={"client_ca": "/ca.pem"})
    assert public_listen_warning("0.0.0.0:50051", tls=both) is None
    assert list(listen_warnings(MeshConfig(listen="0.0.0.0:1", tls=both))) == []
    assert len(list(listen_warnings(MeshConfig(listen="0.0.0.0:1", tls=tls)))) == 1


@pytest.mark.parametrize("host", ["no-such-host.invalid", "x" * 300, "*", "\ud800"])
def test_a_name_without_an_address_counts_as_public(host: str) -> None:
    assert public_listen_warning(f"{host}:1") is not None


def test_the_name_of_this_machine_counts_by_its_addresses() -> None:
    try:
        addresses = {str(found[4][0]) for found in socket.getaddrinfo(socket.gethostname(), None)}
    except OSError as error:
        pytest.skip(f"the name of this machine has no address: {error}")
    is_public = any(not address.startswith("127.") and address != "::1" for address in addresses)
    assert (public_listen_warning(f"{socket.gethostname()}:1") is not None) is is_public


def test_where_a_listen_address_is_published_decides_who_reaches_it() -> None:
    assert public_listen_warning("0.0.0.0:50051", "127.0.0.1:7000") is None
    warning = public_listen_warning("0.0.0.0:50051", "0.0.0.0:7000")
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
