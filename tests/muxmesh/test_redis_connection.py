"""URLs of a Redis. With servers: tests/muxmesh/tenants/test_redis_kinds.py."""

from __future__ import annotations

import pytest

from muxmesh.redis_connection import open_redis, without_password


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://h:1/0", "redis://h:1/0"),
        ("redis://user:secret@h:1/0", "redis://h:1/0"),
        ("redis://:se/cr@et?x@h:1/0?db=1", "redis://h:1/0?db=1"),
        ("redis+sentinel://u:p@a:1,b:2/s?sentinel_password=x&db=1", "redis+sentinel://a:1,b:2/s?db=1"),
        ("redis://h?password=secret", "redis://h"),
        ("unix:///run/redis.sock", "unix:///run/redis.sock"),
    ],
)
def test_no_message_has_a_password(url: str, shown: str) -> None:
    assert without_password(url) == shown


async def test_options_of_a_url_have_their_types() -> None:
    cluster = open_redis("rediss+cluster://user:secret@a:7000,b?socket_timeout=5&ssl_ca_certs=/ca.pem")
    assert cluster.connection_kwargs["socket_timeout"] == 5.0
    assert cluster.connection_kwargs["username"] == "user" and cluster.connection_kwargs["password"] == "secret"
    await cluster.aclose()
    primary = open_redis("redis+sentinel://:secret@a:1,b/mesh/2?sentinel_password=other")
    kwargs = primary.connection_pool.connection_kwargs
    assert (kwargs["db"], kwargs["password"]) == (2, "secret")
    sentinels = primary.connection_pool.sentinel_manager.sentinels
    assert [one.connection_pool.connection_kwargs["password"] for one in sentinels] == ["other", "other"]
    await primary.aclose()
