from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxmesh.residency_format import (
    ResidencyBatch,
    ResidencySnapshot,
    block_key,
    block_keys,
    decode_batch,
    decode_snapshot,
    encode_batch,
    encode_snapshot,
    model_salt,
)

NUMBERS = st.integers(0, 2**64 - 1)
KEYS = st.lists(NUMBERS, max_size=20).map(tuple)


@given(NUMBERS, NUMBERS, KEYS, KEYS)
def test_a_batch_is_what_was_encoded(
    incarnation: int, first: int, added: tuple[int, ...], removed: tuple[int, ...]
) -> None:
    batch = ResidencyBatch(incarnation, first, added, removed)
    assert decode_batch(encode_batch(batch)) == batch
    assert batch.end == first + len(added) + len(removed)


@given(NUMBERS, NUMBERS, KEYS)
def test_a_snapshot_is_what_was_encoded(incarnation: int, number: int, keys: tuple[int, ...]) -> None:
    snapshot = ResidencySnapshot(incarnation, number, keys)
    assert decode_snapshot(encode_snapshot(snapshot)) == snapshot


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:-1],
        lambda data: data + b"x",
        lambda data: b"\x09" + data[1:],
        lambda _: b"",
        lambda _: b"text",
    ],
)
def test_other_bytes_are_refused(change: object) -> None:
    assert callable(change)
    with pytest.raises(ValueError, match=r"version|bytes"):
        decode_batch(change(encode_batch(ResidencyBatch(1, 2, (3,), (4,)))))
    with pytest.raises(ValueError, match=r"version|bytes"):
        decode_snapshot(change(encode_snapshot(ResidencySnapshot(1, 2, (3,)))))


@given(st.lists(st.binary(min_size=16, max_size=16), max_size=9), st.text(max_size=5))
def test_the_keys_of_a_chain_are_those_of_its_blocks(hashes: list[bytes], model: str) -> None:
    assert block_keys(model, hashes) == tuple(block_key(model_salt(model), one) for one in hashes)


def test_two_models_of_equal_weights_have_different_blocks() -> None:
    assert block_keys("a", [bytes(16)]) != block_keys("b", [bytes(16)])
