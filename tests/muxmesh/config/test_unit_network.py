"""Addresses of units with `network`, for routers on other hosts."""

from pathlib import Path
from typing import Any

import pytest

from muxmesh.config.listen_address import listen_warnings
from muxmesh.config.load import parse_mesh_config
from muxmesh.config.runtime import Endpoint, MeshRuntime, ProcessKey
from muxmesh.config.schema import NetworkConfig
from muxmesh.errors import ConfigError
from muxmesh.types import Role

PUBLIC = "allow_unencrypted: true"


def runtime_of(network: str, models: str = "[{name: a, engine: sim}, {name: b, engine: sim}]") -> MeshRuntime:
    """A unit "u" with ``network`` and a unit "v" without one."""
    text = (
        f"units: [{{name: u, cores: [0], network: {network}, models: {models}}}, "
        "{name: v, cores: [1], models: [{name: c, engine: sim}]}]"
    )
    config = parse_mesh_config(text, "mesh.yaml").config
    return MeshRuntime(
        config=config, run_dir=Path("/run"), cache_dir=Path("/cache"), redis_url="unix:///x", prepared={}
    )


def problems(*networks: str) -> list[str]:
    """Problems of a mesh with a unit for each of ``networks``."""
    units = ", ".join(
        f"{{name: u{number}, cores: [{number}], network: {network}, models: [{{name: m, engine: sim}}]}}"
        for number, network in enumerate(networks)
    )
    try:
        parse_mesh_config(f"units: [{units}]", "mesh.yaml")
    except ConfigError as error:
        return [line.removeprefix("mesh.yaml:1: ") for line in str(error).splitlines()]
    return []


def test_each_process_of_the_unit_has_a_port_after_that_of_its_kvstore() -> None:
    remote = {
        key: endpoint.remote_address
        for key, endpoint in runtime_of(f"{{host: unit.example, base_port: 7000, {PUBLIC}}}").endpoints().items()
    }
    assert remote == {
        ProcessKey("kvstore", "u"): "unit.example:7000",
        ProcessKey(Role.PREFILL, "u", "a"): "unit.example:7001",
        ProcessKey(Role.DECODE, "u", "a"): "unit.example:7002",
        ProcessKey(Role.PREFILL, "u", "b"): "unit.example:7003",
        ProcessKey(Role.DECODE, "u", "b"): "unit.example:7004",
        ProcessKey("kvstore", "v"): "unix:/run/kvstore-v.sock",
        ProcessKey(Role.PREFILL, "v", "c"): "unix:/run/prefill-c.sock",
        ProcessKey(Role.DECODE, "v", "c"): "unix:/run/decode-c.sock",
        ProcessKey("router"): "unix:/run/router.sock",
    }


def test_a_process_listens_on_its_socket_and_on_its_port() -> None:
    endpoints = runtime_of("{host: 127.0.0.1, base_port: 7000}").endpoints()
    socket = "unix:/run/kvstore-u.sock"
    assert endpoints[ProcessKey("kvstore", "u")] == Endpoint(
        "kvstore/u", socket, "127.0.0.1:7000", (socket, "127.0.0.1:7000")
    )
    assert endpoints[ProcessKey("kvstore", "u")].is_on_network
    assert not endpoints[ProcessKey("kvstore", "v")].is_on_network


@pytest.mark.parametrize(
    ("host", "called", "listen"),
    [
        ("unit-0.units.mesh.svc", "unit-0.units.mesh.svc", "0.0.0.0"),
        ("10.1.2.3", "10.1.2.3", "10.1.2.3"),
        ("fd00::7", "[fd00::7]", "[fd00::7]"),
        ("localhost", "localhost", "localhost"),
    ],
)
def test_processes_listen_on_an_address_and_on_all_interfaces_for_a_name(host: str, called: str, listen: str) -> None:
    network = f'{{host: "{host}", base_port: 7000, {PUBLIC}}}'
    endpoint = runtime_of(network).endpoints()[ProcessKey("kvstore", "u")]
    assert (endpoint.remote_address, endpoint.listen[1]) == (f"{called}:7000", f"{listen}:7000")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_a_loopback_address_needs_no_permission(host: str) -> None:
    assert problems(f'{{host: "{host}"}}') == []


@pytest.mark.parametrize("host", ["10.0.0.1", "unit-0.units", "fd00::7", "0.0.0.0"])
def test_an_address_that_other_hosts_reach_needs_permission(host: str) -> None:
    assert problems(f'{{host: "{host}"}}') == [
        f"units[0].network.host: {host} may be reached from other hosts, and the unit's services have neither TLS nor "
        "authentication; set internal_tls, or, if a firewall or a NetworkPolicy admits routers only, "
        "allow_unencrypted: true"
    ]
    assert problems(f'{{host: "{host}", {PUBLIC}}}') == []


TLS = "internal_tls: {cert: a.pem, key: a.key, ca: ca.pem}\n"


@pytest.mark.parametrize(
    ("unit", "problem"),
    [
        ("network: {host: 10.0.0.1}, ", None),
        ("network: {host: 127.0.0.1}, ", None),
        (
            f"network: {{host: 10.0.0.1, {PUBLIC}}}, ",
            "2: units[0].network.allow_unencrypted: has no effect with internal_tls: all ports of units have TLS",
        ),
        ("", "1: internal_tls: has no effect: no unit has `network`, and unix sockets need no TLS"),
    ],
)
def test_tls_between_hosts_needs_no_permission_and_a_port(unit: str, problem: str | None) -> None:
    text = f"{TLS}units: [{{{unit}models: [{{name: m, engine: sim}}]}}]"
    if problem is None:
        config = parse_mesh_config(text, "mesh.yaml").config
        assert not [warning for warning in listen_warnings(config) if "unit" in warning]
    else:
        with pytest.raises(ConfigError) as caught:
            parse_mesh_config(text, "mesh.yaml")
        assert str(caught.value) == f"mesh.yaml:{problem}"


@pytest.mark.parametrize("host", ["a:1", "a b", "[::1]", "", "-a", "http://a", "a/b"])
def test_a_host_with_a_port_or_other_parts_is_refused(host: str) -> None:
    (problem,) = problems(f'{{host: "{host}", {PUBLIC}}}')
    assert problem.startswith("units[0].network.host: ") and "allow_unencrypted" not in problem


def test_ports_beyond_the_last_one_are_refused() -> None:
    assert problems("{host: localhost, base_port: 65533}") == []
    assert problems("{host: localhost, base_port: 65534}") == [
        "units[0].network.base_port: the unit needs the ports 65534 to 65536; the last one is 65535"
    ]


def test_units_of_one_host_that_share_a_port_are_refused() -> None:
    first, second = ("{host: localhost, base_port: 7000}", "{host: localhost, base_port: 7002}")
    assert problems(first, second) == [
        "units[1].network.base_port: the unit needs the ports 7002 to 7004; port 7002 of localhost is that of unit u0"
    ]
    assert problems(first, "{host: localhost, base_port: 7003}") == []
    assert problems(first, "{host: 127.0.0.1, base_port: 7003}") == []


def test_units_on_hosts_of_their_own_need_no_disjoint_cores() -> None:
    def units(*hosts: str | None, cores: str = "") -> list[str]:
        parts = (
            f"{{name: u{number}, models: [{{name: m, engine: sim}}]{cores}"
            + (f", network: {{host: {host}, base_port: {7000 + 10 * number}, {PUBLIC}}}" if host else "")
            + "}"
            for number, host in enumerate(hosts)
        )
        try:
            parse_mesh_config(f"units: [{', '.join(parts)}]", "mesh.yaml")
        except ConfigError as error:
            return str(error).splitlines()
        return []

    assert units("unit-0.unit", "unit-1.unit") == units("unit-0.unit", None) == []
    assert units("unit-0.unit", "unit-1.unit", cores=", cores: [0]") == []
    for one_host in (("a", "a"), (None, "localhost"), (None, None)):
        assert len(units(*one_host)) == 2, "cores is required"
        assert len(units(*one_host, cores=", cores: [0]")) == 1, "core 0 is that of another unit"


def fields(**values: Any) -> NetworkConfig:
    return NetworkConfig.model_validate(values)


def test_the_ports_of_a_unit_begin_at_50100_by_default() -> None:
    assert fields(host="localhost").base_port == 50100
