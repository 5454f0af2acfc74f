"""The sections `tls` and `internal_tls` of mesh.yaml. Opens no files: `rpc.server_certificates` checks them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from muxmesh.config.section import Section
from muxmesh.local_path import replaceable_path

_PAIR = ("cert", "key")


class _PemFiles(Section):
    """A section all of whose fields are paths."""

    def absolute(self, base_dir: Path) -> Self:
        """The same with absolute paths. Symbolic links stay, since certificates are replaced by changing them."""
        paths = {field: str(replaceable_path(given, base_dir)) for field, given in self.model_dump().items() if given}
        return self.model_copy(update=paths)


class TlsConfig(_PemFiles):
    """Files of the TLS server at `listen`, in PEM format. Relative paths start at the folder of mesh.yaml.

    A running router loads files that have changed within about two seconds; connections stay as they are.
    """

    cert: str = Field(min_length=1)
    """The server's certificate, followed by those of intermediate CAs, such as `fullchain.pem`."""
    key: str = Field(min_length=1)
    """The private key of `cert`, RSA or ECDSA, without a passphrase."""
    client_ca: str | None = Field(default=None, min_length=1)
    """Certificates of CAs. If set, a client needs a certificate that one of them has signed (mTLS). Unset: clients need
    none."""

    @model_validator(mode="before")
    @classmethod
    def _name_what_is_missing(cls, data: Any) -> Any:
        """One error for both files. Misspelt fields have errors of their own."""
        if not isinstance(data, dict) or not data.keys() <= cls.model_fields.keys():
            return data
        missing = [f"`{field}`" for field in _PAIR if data.get(field) is None]
        if missing:
            given = ", ".join(f"`{field}`" for field in data if data[field] is not None) or "nothing"
            raise ValueError(f"has {given}; a TLS server needs {' and '.join(missing)} too")
        return data


class InternalTlsConfig(_PemFiles):
    """Files of TLS between routers and the ports of units (`network`), in PEM format. Relative paths start at the
    folder of mesh.yaml; each host has its own files there.

    Routers and services of units present the same kind of certificate, and each accepts only what `ca` has signed.
    Services load files that have changed within about two seconds; routers read them when they start.
    """

    cert: str = Field(min_length=1)
    """The certificate of this host, for servers and clients, followed by those of intermediate CAs. That of a unit's
    host has to name the `network.host` of the unit."""
    key: str = Field(min_length=1)
    """The private key of `cert`, RSA or ECDSA, without a passphrase."""
    ca: str = Field(min_length=1)
    """CA certificates. Use a CA for this mesh alone: the holder of any certificate that it has signed can send requests
    to units and cancel those of others."""

    def of_server(self) -> TlsConfig:
        """The same for a server that asks clients for a certificate."""
        return TlsConfig(cert=self.cert, key=self.key, client_ca=self.ca)
