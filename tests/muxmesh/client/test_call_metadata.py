"""What a client sends beside its requests."""

import pytest

from muxmesh.client.call_metadata import key_metadata, ticket_metadata
from muxmesh.errors import InvalidRequest, Overloaded, QuotaExceeded, Unavailable


def test_a_key_is_a_bearer_token_and_none_is_no_metadata() -> None:
    assert key_metadata("mm-1") == (("authorization", "Bearer mm-1"),)
    assert key_metadata(None) == key_metadata("") == ()


@pytest.mark.parametrize("key", ["two words", "line\n", "k\u00e9y", "\x7f"])
def test_a_key_that_no_metadata_can_carry_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        key_metadata(key)
    assert caught.value.field == "api_key" and key not in str(caught.value)


def test_a_refused_call_is_sent_again_with_its_ticket() -> None:
    assert ticket_metadata(Overloaded("full", 1.0, "t-1")) == (("x-muxmesh-ticket", "t-1"),)
    for error in (Overloaded("full"), QuotaExceeded("tokens_per_minute", "x"), Unavailable("gone")):
        assert ticket_metadata(error) == ()
