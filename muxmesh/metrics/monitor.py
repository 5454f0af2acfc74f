"""What a service shows of itself to scrapers and probes: `/metrics`, `/live` and `/ready`.

Without an address nothing listens, collectors are never called, and prometheus_client and h11 are not loaded.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING

from muxmesh import __version__
from muxmesh.metrics.family import Family, gauge, merged

if TYPE_CHECKING:
    from muxmesh.metrics.http_endpoint import HttpEndpoint, Response

Collect = Callable[[], Iterable[Family]]
"""Reads the current values. Called on the event loop for each scrape, so it takes far less than a millisecond."""


class Monitor:
    """Owns the HTTP endpoint of one service, and knows why the service is not ready."""

    def __init__(self, address: str | None = None) -> None:
        """``address``: HOST:PORT or unix:PATH of the endpoint. None: there is none."""
        self._address = address
        self._collectors: list[Collect] = [lambda: [build_info()]]
        self._not_ready = "starting"
        self._rendering = asyncio.Lock()
        self._watchers: list[Callable[[str], None]] = []

    def add(self, collect: Collect) -> None:
        """Adds a collector to `/metrics`."""
        self._collectors.append(collect)

    def report(self, not_ready: str = "") -> None:
        """Reports the service as ready or, with a reason, as not ready."""
        self._not_ready = not_ready
        for watcher in self._watchers:
            watcher(not_ready)

    def watch(self, watcher: Callable[[str], None]) -> None:
        """Calls ``watcher`` like `report`, with each later change."""
        self._watchers.append(watcher)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        """Serves the endpoint while the block runs; yields its address, with the port that port 0 became.

        Raises ConfigError if the address is invalid or in use.
        """
        if self._address is None:
            yield ""
            return
        endpoint = self._open()
        await endpoint.start(self._address)
        try:
            yield endpoint.address
        finally:
            await endpoint.close()

    def _open(self) -> HttpEndpoint:
        from muxmesh.metrics import http_endpoint  # noqa: PLC0415 - only where metrics are on
        from muxmesh.metrics.exposition import CONTENT_TYPE, render  # noqa: PLC0415

        async def metrics() -> Response:
            async with self._rendering:  # one thread at a time, however many scrape
                families = merged(family for collect in self._collectors for family in collect())
                body = await asyncio.to_thread(render, families)
            return http_endpoint.Response(HTTPStatus.OK, body, CONTENT_TYPE)

        async def live() -> Response:
            return http_endpoint.Response(HTTPStatus.OK, "live\n")

        async def ready() -> Response:
            if self._not_ready:
                return http_endpoint.Response(HTTPStatus.SERVICE_UNAVAILABLE, f"not ready: {self._not_ready}\n")
            return http_endpoint.Response(HTTPStatus.OK, "ready\n")

        return http_endpoint.HttpEndpoint({"/metrics": metrics, "/live": live, "/ready": ready})


def build_info() -> Family:
    """The version as a label, as is usual."""
    return gauge("muxmesh_build_info", "1; the label has the version of MuxMesh.", ("version",), {(__version__,): 1})
