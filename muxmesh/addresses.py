"""The address of a mesh or a service: which forms are taken, and which of them stay on this machine. Opens nothing."""

from __future__ import annotations

import re
from ipaddress import ip_address

from muxmesh.errors import InvalidRequest
from muxmesh.quoting import quoted

_HOST_PORT = re.compile(r"(?P<host>\[[^\[\]\s/,]+\]|[^\[\]\s/:,]+):(?P<port>[0-9]{1,5})", re.ASCII)
_NEEDED = "HOST:PORT is needed, such as 127.0.0.1:50051"


def check_address(address: object) -> str:
    """Returns the address if it is HOST:PORT or a gRPC target with a port (ipv4:, ipv6:, dns:) or a path (unix:).

    Raises InvalidRequest with what is wrong and what would be right.
    """
    if not isinstance(address, str):
        raise InvalidRequest("address", f"is {quoted(address)}; {_NEEDED}")
    scheme, _, rest = address.partition(":")
    if scheme in ("unix", "unix-abstract", "vsock") and rest.strip("/"):
        return address
    endpoints = (
        rest.split(",") if scheme in ("ipv4", "ipv6") else [rest.rpartition("/")[2] if scheme == "dns" else address]
    )
    problems = [problem for endpoint in endpoints if (problem := _problem(endpoint)) is not None]
    if problems:
        raise InvalidRequest("address", f"is {quoted(address)}; {problems[0]}")
    return address


def is_loopback(address: str) -> bool:
    """True if every endpoint of a checked address is on this machine by its name or number."""
    scheme, _, rest = address.partition(":")
    if scheme in ("unix", "unix-abstract", "vsock"):
        return True
    endpoints = rest.rpartition("/")[2].split(",") if scheme in ("ipv4", "ipv6", "dns") else [address]
    return all(_is_loopback_host(endpoint.rpartition(":")[0].strip("[]")) for endpoint in endpoints)


def _is_loopback_host(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _problem(endpoint: str) -> str | None:
    """Why ``endpoint`` is not HOST:PORT, or None."""
    if match := _HOST_PORT.fullmatch(endpoint):
        return None if 0 < int(match["port"]) < 1 << 16 else "the port must be from 1 to 65535"
    if "://" in endpoint:
        host_port = endpoint.partition("://")[2].partition("/")[0]
        fits = f": {host_port}" if _HOST_PORT.fullmatch(host_port) else ", such as 127.0.0.1:50051"
        return f"a URL does not fit, HOST:PORT is needed{fits}"
    if endpoint.endswith("/") and _HOST_PORT.fullmatch(endpoint[:-1]):
        return f"without the / at its end it fits: {endpoint[:-1]}"
    if all(map(_HOST_PORT.fullmatch, endpoint.split(","))):
        return "several addresses are written ipv4:10.0.0.1:50051,10.0.0.2:50051"
    if endpoint.count(":") > 1 and not endpoint.startswith("["):
        return "an IPv6 address stands in brackets, such as [::1]:50051"
    if endpoint != "unix:" and _HOST_PORT.fullmatch(f"{endpoint.removesuffix(':')}:1"):
        return f"the port is missing, such as {endpoint.removesuffix(':')}:50051"
    return _NEEDED
