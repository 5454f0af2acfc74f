"""The options of every command that calls a mesh at an address, and the TLS settings that follow from them.

It imports little, because the parser is built for every command.
"""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from muxmesh.client.tls import Tls

_FILES = {"tls_ca": "MUXMESH_TLS_CA", "tls_cert": "MUXMESH_TLS_CERT", "tls_key": "MUXMESH_TLS_KEY"}
"""The environment variable that stands in for an option."""


def add_tls(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    group = parser.add_argument_group("TLS", "each option of a file turns TLS on, and so does its variable")
    group.add_argument("--tls", action="store_true", help="use TLS, and trust the CAs that this system trusts")
    group.add_argument(
        "--tls-ca", metavar="FILE",
        help="certificates of the CAs to trust, in PEM format (default: MUXMESH_TLS_CA, else those of the system)",
    )  # fmt: skip
    group.add_argument(
        "--tls-cert", metavar="FILE", help="your own certificate, if the mesh asks for one (default: MUXMESH_TLS_CERT)"
    )
    group.add_argument("--tls-key", metavar="FILE", help="the key of your certificate (default: MUXMESH_TLS_KEY)")
    group.add_argument(
        "--tls-server-name", metavar="NAME",
        help="the name that the certificate of the mesh has to be for (default: the host of the address)",
    )  # fmt: skip


def tls_of(arguments: argparse.Namespace, address: str) -> Tls | bool:
    """What `MeshClient` takes as ``tls`` to call ``address``. Raises InvalidRequest for a certificate without a key.

    The variables are not for unix sockets, at which a mesh serves no TLS.
    """
    environment = {} if address.startswith("unix:") else os.environ
    ca, cert, key = (getattr(arguments, name) or environment.get(_FILES[name]) or None for name in _FILES)
    name = arguments.tls_server_name
    if ca is cert is key is name is None:
        return bool(arguments.tls)
    from muxmesh.client.tls import Tls  # noqa: PLC0415 - takes longer than the rest, and few commands need it

    return Tls(ca, cert, key, name)


def given_tls_option(arguments: argparse.Namespace) -> str | None:
    """One of the options that is given on the command line; None if none is."""
    names = ("tls", *_FILES, "tls_server_name")
    return next((f"--{name.replace('_', '-')}" for name in names if getattr(arguments, name)), None)
