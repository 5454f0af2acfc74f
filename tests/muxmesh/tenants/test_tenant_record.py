"""Records of tenants as JSON text."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxmesh.tenants.api_key import hash_of_api_key, new_api_key
from muxmesh.tenants.tenant import NO_LIMITS, TenantLimits
from muxmesh.tenants.tenant_record import ApiKeyRecord, is_tenant_name, record_of
from tests.support.tenants import record


def test_a_record_is_read_as_it_was_written() -> None:
    one = record("acme", "k1", "k2", tokens_per_minute=5, best_priority=-2, weight=0.5, is_operator=True)
    assert record_of(one.to_text().encode()) == one
    limits = TenantLimits(tokens_per_minute=5, best_priority=-2)
    found = one.tenant
    assert (found.name, found.tenant_id, found.weight, found.limits) == ("acme", "0" * 15 + "1", 0.5, limits)
    assert found.is_operator
    assert limits.given() == {"tokens_per_minute": 5, "best_priority": -2}
    assert record().tenant.limits == NO_LIMITS


def test_a_record_has_the_hash_of_a_key_and_not_the_key() -> None:
    key = new_api_key(random.Random(1))
    text = record("acme", key).to_text()
    assert key not in text and hash_of_api_key(key) in text


@pytest.mark.parametrize(
    "text",
    [
        b"", b"{", b"[]", b"\xff", b'{"name": "a"}', b"[" * 100_000,
        record().to_text().encode().replace(b'"name":"acme"', b'"name":"a b"'),
        record(weight=2.0).to_text().encode().replace(b"2.0", b"0"),
        record(tokens_per_minute=7).to_text().encode().replace(b"7", b"-7"),
        record(tokens_per_minute=7).to_text().encode().replace(b"7", b'"7"'),
        record("acme", "k").to_text().encode().replace(hash_of_api_key("k").encode(), b"short"),
        record().to_text().encode().replace(b"}", b', "unknown": 1}', 1),
    ],
)  # fmt: skip
def test_what_is_no_record_is_none(text: bytes) -> None:
    assert record_of(text) is None


@given(st.binary())
def test_no_bytes_raise(text: bytes) -> None:
    assert record_of(text) is None


def test_keys_are_random_and_long() -> None:
    rng = random.Random(1)
    keys = {new_api_key(rng) for _ in range(100)}
    assert len(keys) == 100
    assert {len(key) for key in keys} == {3 + 48}


def test_a_key_is_valid_until_it_expires() -> None:
    key = ApiKeyRecord(hash="0" * 64, created_at_unix_s=1.0, expires_at_unix_s=10.0)
    assert key.is_valid(9.9) and not key.is_valid(10.0)
    assert ApiKeyRecord(hash="0" * 64, created_at_unix_s=1.0).is_valid(1e11)


@pytest.mark.parametrize(
    ("name", "fits"),
    [("a", True), ("a.b-c_1", True), ("a" * 65, False), ("", False), ("a b", False), ("-a", False), ("a\n", False)],
)
def test_names(name: str, fits: bool) -> None:
    assert is_tenant_name(name) is fits
