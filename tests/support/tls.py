"""Certificate authorities and certificates in files, for tests."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc

HOST = "127.0.0.1"
LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)
NOW_S = datetime(2026, 1, 1, tzinfo=UTC).timestamp()
"""A time at which certificates of `Authority.issue` are valid unless it says otherwise."""


@dataclass(frozen=True)
class PairFiles:
    """A certificate and its key."""

    cert: Path
    key: Path

    def replace_by(self, other: PairFiles) -> None:
        """Each file becomes another one at once, as certbot does it."""
        for mine, new in ((self.cert, other.cert), (self.key, other.key)):
            copied = mine.with_suffix(".new")
            copied.write_bytes(new.read_bytes())
            copied.replace(mine)


class Authority:
    """A certificate authority whose files are in ``folder``."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self._authority = trustme.CA()
        self._folder = folder
        self._name = name
        self.pem = folder / f"{name}.pem"
        self._authority.cert_pem.write_to_path(self.pem)

    def issue(
        self, name: str, *hosts: str, not_before: datetime | None = None, not_after: datetime | None = None
    ) -> PairFiles:
        """A certificate for ``hosts``, by default for `HOST`."""
        issued = self._authority.issue_cert(*(hosts or (HOST,)), not_before=not_before, not_after=not_after)
        files = PairFiles(self._folder / f"{self._name}-{name}.pem", self._folder / f"{self._name}-{name}.key")
        files.cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(files.key)
        return files

    def issue_expired(self, name: str, *hosts: str) -> PairFiles:
        """A certificate that was valid for five days in January 2020."""
        return self.issue(name, *hosts, not_before=LONG_AGO, not_after=LONG_AGO + timedelta(days=5))


async def serves(channel: grpc.aio.Channel) -> bool:
    """Whether a connection comes about and the server at its end is SERVING."""
    try:
        response = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=20)
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.UNAVAILABLE:
            raise
        return False
    return bool(response.status == health_pb2.HealthCheckResponse.SERVING)
