from hypothesis import given
from hypothesis import strategies as st

from router.tenant_key import SECRET_BYTES, tenant_key

ONE, OTHER = bytes(SECRET_BYTES), b"\x01" * SECRET_BYTES


@given(st.text(min_size=1), st.text(min_size=1))
def test_a_key_stands_for_one_tenant_and_does_not_show_it(tenant: str, another: str) -> None:
    key = tenant_key(ONE, tenant)
    assert (key == tenant_key(ONE, another)) is (tenant == another)
    assert len(key) == 32 and set(key) <= set("0123456789abcdef")


def test_who_does_not_have_the_secret_cannot_compute_the_key_of_a_guessed_tenant() -> None:
    assert tenant_key(ONE, "acme") != tenant_key(OTHER, "acme")


def test_the_empty_tenant_has_the_empty_key_under_every_secret() -> None:
    assert tenant_key(ONE, "") == tenant_key(OTHER, "") == ""


def test_a_tenant_that_is_no_valid_unicode_has_a_key() -> None:
    assert tenant_key(ONE, "\ud800") != tenant_key(ONE, "\udfff")
