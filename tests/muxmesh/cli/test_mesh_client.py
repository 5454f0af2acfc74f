"""The client of a command has the options of TLS and the API key of the environment."""

from __future__ import annotations

import asyncio

import pytest

from muxmesh.cli.command_parser import command_parser
from muxmesh.cli.mesh_client import client_of
from muxmesh.client import NO_RETRIES
from muxmesh.errors import InvalidRequest, Unavailable

ADDRESS = "127.0.0.1:1"


def test_its_address_and_retries_are_those_it_is_given() -> None:
    client = client_of(command_parser().parse_args(["status"]), ADDRESS, NO_RETRIES)
    with pytest.raises(Unavailable, match=f"no mesh answers at {ADDRESS}"):
        asyncio.run(client.status())


def test_it_uses_the_options_of_tls() -> None:
    arguments = command_parser().parse_args(["status", "--tls-ca", "/nowhere/ca.pem"])
    with pytest.raises(InvalidRequest) as refused:
        client_of(arguments, ADDRESS)
    assert refused.value.field == "tls.ca"


def test_it_sends_the_api_key_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = command_parser().parse_args(["status"])
    monkeypatch.setenv("MUXMESH_API_KEY", "a b")
    with pytest.raises(InvalidRequest) as refused:
        client_of(arguments, ADDRESS)
    assert refused.value.field == "api_key"
