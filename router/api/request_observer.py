"""Observes each request until it has ended, in whatever way: its metrics, and its line in the log."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from types import TracebackType

from muxmesh.clock import Clock
from muxmesh.errors import MeshError
from muxmesh.rpc.status_codes import status_code
from router.request_log import log_request
from router.request_metrics import RequestMetrics
from router.request_record import RequestRecord


@dataclass(frozen=True, slots=True)
class RequestObserver:
    """``logs``: whether each request that ends is logged."""

    metrics: RequestMetrics
    clock: Clock
    logs: bool = True

    def observed(self, record: RequestRecord) -> _Observation:
        """A context manager around all that is done for the request. It passes every exception on."""
        return _Observation(self, record)


@dataclass(frozen=True, slots=True)
class _Observation:
    observer: RequestObserver
    record: RequestRecord

    def __enter__(self) -> RequestRecord:
        return self.record

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        status, now_s = self._status(error), self.observer.clock.monotonic_s()
        self.observer.metrics.of(self.record.model).ended(self.record, status, now_s)
        if self.observer.logs:
            log_request(self.record, status, now_s)

    def _status(self, error: BaseException | None) -> str:
        """The name of the gRPC status code that the client receives, or would if it had stayed."""
        if error is None:
            return "OK"
        if isinstance(error, MeshError):
            return status_code(error).name
        if isinstance(error, GeneratorExit | asyncio.CancelledError):
            return "OK" if self.record.has_finished else "CANCELLED"
        return "INTERNAL"
