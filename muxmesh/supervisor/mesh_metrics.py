"""One HTTP endpoint for all processes of a supervisor: their metrics with a label ``process``, and whether all serve.

Each service has an endpoint of its own, on a unix socket. A process that does not respond costs a timeout and its own
metrics, not those of others.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus

from muxmesh.errors import Unavailable
from muxmesh.metrics.exposition import CONTENT_TYPE, merge, render
from muxmesh.metrics.family import Family, Labels, counter, gauge
from muxmesh.metrics.http_endpoint import HttpEndpoint, Response
from muxmesh.metrics.monitor import build_info
from muxmesh.metrics.scrape import fetch

_TIMEOUT_S = 2.0
_PROCESS = ("process",)
_OWN = "supervisor"


@dataclass(frozen=True, slots=True)
class ProcessCount:
    """Whether a process runs, and how often it was restarted."""

    name: str
    is_up: bool
    num_restarts: int


class MeshMetrics:
    """The endpoint of a supervisor."""

    def __init__(
        self,
        endpoints: Callable[[], Mapping[str, str]],
        processes: Callable[[], Iterable[ProcessCount]],
        timeout_s: float = _TIMEOUT_S,
    ) -> None:
        """``endpoints``: name of each service → address of its own endpoint, now. ``processes``: all, also others."""
        self._endpoints = endpoints
        self._processes = processes
        self._timeout_s = timeout_s
        self._merging = asyncio.Lock()

    @asynccontextmanager
    async def serving(self, listen: str) -> AsyncIterator[str]:
        """Serves while the block runs; yields the address. Raises ConfigError if it is invalid or in use."""
        endpoint = HttpEndpoint({"/metrics": self._metrics, "/live": self._live, "/ready": self._ready})
        await endpoint.start(listen)
        try:
            yield endpoint.address
        finally:
            await endpoint.close()

    async def _metrics(self) -> Response:
        async with self._merging:
            pages = await self._fetch_all("/metrics")
            texts = {name: body for name, (status, body) in pages.items() if status == HTTPStatus.OK}
            own = [build_info(), *self._families({name: name in texts for name in pages})]
            body = await asyncio.to_thread(lambda: merge({**texts, _OWN: render(own)}))
        return Response(HTTPStatus.OK, body, CONTENT_TYPE)

    async def _ready(self) -> Response:
        pages = await self._fetch_all("/ready")
        problems = [f"{one.name}: does not run" for one in self._processes() if not one.is_up]
        for name, (status, body) in pages.items():
            if status != HTTPStatus.OK and f"{name}: does not run" not in problems:
                problems.append(f"{name}: {body.decode(errors='replace').strip().removeprefix('not ready: ')}")
        if problems:
            return Response(HTTPStatus.SERVICE_UNAVAILABLE, "".join(f"not ready: {problem}\n" for problem in problems))
        return Response(HTTPStatus.OK, "ready\n")

    @staticmethod
    async def _live() -> Response:
        return Response(HTTPStatus.OK, "live\n")

    async def _fetch_all(self, path: str) -> dict[str, tuple[int, bytes]]:
        """Status and body of each service; status 0 and the reason for one that does not respond."""

        async def page(address: str) -> tuple[int, bytes]:
            try:
                return await fetch(address, path, self._timeout_s)
            except Unavailable as error:
                return 0, str(error).encode()

        endpoints = self._endpoints()  # once: a model may be loaded meanwhile
        pages = await asyncio.gather(*map(page, endpoints.values()))
        return dict(zip(endpoints, pages, strict=True))

    def _families(self, responded: Mapping[str, bool]) -> list[Family]:
        """``responded``: whether each service gave its metrics."""
        processes = list(self._processes())
        is_up: dict[Labels, float] = {(one.name,): int(one.is_up) for one in processes}
        num_restarts: dict[Labels, float] = {(one.name,): one.num_restarts for one in processes}
        was_scraped: dict[Labels, float] = {(name,): int(has) for name, has in responded.items()}
        return [
            gauge("muxmesh_process_up", "1 if the process runs.", _PROCESS, is_up),
            counter("muxmesh_process_restarts_total", "Restarts by the supervisor.", _PROCESS, num_restarts),
            gauge("muxmesh_scrape_ok", "1 if the process gave its metrics for this scrape.", _PROCESS, was_scraped),
        ]
