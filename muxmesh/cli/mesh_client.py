"""The client of a command that calls a mesh at an address: with its options of TLS, and the API key of the caller."""

from __future__ import annotations

import argparse

from muxmesh.cli.common import api_key
from muxmesh.cli.tls_options import tls_of
from muxmesh.client import MeshClient, Retries


def client_of(arguments: argparse.Namespace, address: str, retries: Retries | None = None) -> MeshClient:
    """A client for ``address``. Raises InvalidRequest for files that cannot be used; ``retries`` as in `MeshClient`."""
    return MeshClient(address, retries=retries, tls=tls_of(arguments, address), api_key=api_key())
