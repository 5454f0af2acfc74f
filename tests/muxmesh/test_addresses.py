"""Addresses that a client takes, those that it refuses with what would be right, and those of this machine."""

from typing import Any

import pytest

from muxmesh.addresses import check_address, is_loopback
from muxmesh.client import MeshClient, SyncMeshClient
from muxmesh.errors import InvalidRequest

LOCAL = [
    "127.0.0.1:50051", "127.1.2.3:1", "localhost:65535", "mesh.localhost:1", "[::1]:50051", "ipv4:127.0.0.1:1",
    "ipv4:127.0.0.1:1,127.0.0.1:2", "ipv6:[::1]:1", "dns:localhost:1", "dns:///localhost:1", "unix:/run/mesh.sock",
    "unix:mesh.sock", "unix:///run/mesh.sock", "unix-abstract:mesh",
]  # fmt: skip
REMOTE = [
    "10.0.0.1:50051", "0.0.0.0:50051", "mesh.example.org:50051", "gpu_box:1", "[2001:db8::1]:50051", "ipv4:10.0.0.1:1",
    "ipv4:127.0.0.1:1,10.0.0.2:1", "dns:mesh:1", "dns://8.8.8.8/mesh:1", "localhost.example.org:1",
]  # fmt: skip


@pytest.mark.parametrize("address", [*LOCAL, *REMOTE])
def test_an_address_of_grpc_with_a_port_is_taken_as_it_is(address: str) -> None:
    assert check_address(address) == address
    assert is_loopback(address) is (address in LOCAL)


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("host", "is 'host'; the port is missing, such as host:50051"),
        ("host:", "is 'host:'; the port is missing, such as host:50051"),
        ("[::1]", "is '[::1]'; the port is missing, such as [::1]:50051"),
        ("dns:host", "is 'dns:host'; the port is missing, such as host:50051"),
        ("ipv4:10.0.0.1:1,10.0.0.2", "is 'ipv4:10.0.0.1:1,10.0.0.2'; the port is missing, such as 10.0.0.2:50051"),
        ("http://host:1", "is 'http://host:1'; a URL does not fit, HOST:PORT is needed: host:1"),
        ("https://host:1/", "is 'https://host:1/'; a URL does not fit, HOST:PORT is needed: host:1"),
        ("grpc://host", "is 'grpc://host'; a URL does not fit, HOST:PORT is needed, such as 127.0.0.1:50051"),
        ("http://[", "is 'http://['; a URL does not fit, HOST:PORT is needed, such as 127.0.0.1:50051"),
        ("host:1/", "is 'host:1/'; without the / at its end it fits: host:1"),
        ("host:0", "is 'host:0'; the port must be from 1 to 65535"),
        ("host:65536", "is 'host:65536'; the port must be from 1 to 65535"),
        ("host:x", "is 'host:x'; HOST:PORT is needed, such as 127.0.0.1:50051"),
        ("host:-1", "is 'host:-1'; HOST:PORT is needed, such as 127.0.0.1:50051"),
        ("host:\u0661", "is 'host:\u0661'; HOST:PORT is needed, such as 127.0.0.1:50051"),
        ("", "is ''; HOST:PORT is needed, such as 127.0.0.1:50051"),
        (":1", "is ':1'; HOST:PORT is needed, such as 127.0.0.1:50051"),
        (" host:1", "is ' host:1'; HOST:PORT is needed, such as 127.0.0.1:50051"),
        ("host:1\n", "is 'host:1\\n'; HOST:PORT is needed, such as 127.0.0.1:50051"),
        ("unix:", "is 'unix:'; HOST:PORT is needed, such as 127.0.0.1:50051"),
        ("h1:1,h2:2", "is 'h1:1,h2:2'; several addresses are written ipv4:10.0.0.1:50051,10.0.0.2:50051"),
        ("::1", "is '::1'; an IPv6 address stands in brackets, such as [::1]:50051"),
        ("::1:50051", "is '::1:50051'; an IPv6 address stands in brackets, such as [::1]:50051"),
        (None, "is None; HOST:PORT is needed, such as 127.0.0.1:50051"),
        (50051, "is 50051; HOST:PORT is needed, such as 127.0.0.1:50051"),
        (("host", 1), "is ('host', 1); HOST:PORT is needed, such as 127.0.0.1:50051"),
    ],
)
def test_what_is_no_address_is_refused_with_what_would_be_right(address: Any, problem: str) -> None:
    for kind in (MeshClient, SyncMeshClient):
        with pytest.raises(InvalidRequest) as caught:
            kind(address)
        assert (caught.value.field, caught.value.problem) == ("address", problem)
