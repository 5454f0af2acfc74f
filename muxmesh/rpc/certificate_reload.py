"""Decides which certificates a server uses while their files are replaced. Reads no file and knows no gRPC.

    in the files               used                   logged
    what is in use             that                   an error once, when it has expired
    others, valid              those                  that they are in use
    none that can be used      as before              an error once, if it is seen twice in a row

What replaces certificates may write one file after the other. A mixture of old and new that is gone at the next look is
therefore not an error.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from muxmesh.rpc.pem_files import utc_date
from muxmesh.rpc.server_certificates import ServerCertificates

_REPORTED_AT = 2
"""Looks in a row that see one problem, the last of which reports it."""


@dataclass(frozen=True, slots=True)
class LogLine:
    """A line for the log: a level of `logging`, and the text."""

    level: int
    text: str


class CertificateReload:
    """Invariant: `in_use` are the first certificates, or were valid when they were seen."""

    def __init__(self, in_use: ServerCertificates) -> None:
        self.in_use = in_use
        self._problem: str | None = None
        """That of the last look."""
        self._times_seen = 0
        """Looks in a row that saw it."""

    def observe(self, seen: ServerCertificates | str, now_s: float) -> LogLine | None:
        """Takes what is in the files at ``now_s``, in seconds since 1970, or why that cannot be used.

        Returns what is to be logged. Afterwards `in_use` is what new connections get.
        """
        problem = self._problem_of(seen, now_s)
        self._times_seen = self._times_seen + 1 if problem == self._problem else 1
        self._problem = problem
        if problem is not None:
            return LogLine(logging.ERROR, problem) if self._times_seen == _REPORTED_AT else None
        if isinstance(seen, str) or seen == self.in_use:
            return None
        self.in_use = seen
        return LogLine(logging.INFO, f"new connections get the new certificate, {self._valid_until}")

    def _problem_of(self, seen: ServerCertificates | str, now_s: float) -> str | None:
        problem = seen if isinstance(seen, str) else seen.pair.time_problem(now_s)
        if problem is None:
            return None
        if seen == self.in_use:
            return f"the certificate in use {problem}"
        return f"the new certificate is not used: {problem}; the one before stays in use, {self._valid_until}"

    @property
    def _valid_until(self) -> str:
        return f"valid until {utc_date(self.in_use.pair.not_after_s)}"
