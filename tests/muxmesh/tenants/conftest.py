"""One real Redis for the tests of this folder; each test has a mesh id of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from muxmesh.redis_connection import open_redis
from tests.support.redis_process import running_redis


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_redis(Path(tmp_path_factory.mktemp("redis"))) as url:
        yield url


@pytest.fixture
async def client(redis_url: str) -> AsyncIterator[Any]:
    opened = open_redis(redis_url)
    yield opened
    await opened.flushall()
    await opened.aclose()
