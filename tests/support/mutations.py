"""Mutations of files for fuzz tests: of bytes, of the numbers in them, and of parsed JSON."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

Mutation = Callable[[bytes], bytes]
NUMBERS = [0, 1, 2, 7, 255, 256, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 60, (1 << 63) - 1, (1 << 64) - 1]
JSON_LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 2, 10**9, 1 << 31, 1 << 63, 10**40, -(10**40)]),
    st.integers(),
    st.sampled_from([0.5, 1e400, -1e400, float("nan"), 1e-300, 1e300]),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["", "\ud800", "a\nb", "true", "1", "../x", "\0", "<|eos|>"]),
)
JSON_VALUES = st.recursive(
    JSON_LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)


@st.composite
def byte_mutations(draw: st.DrawFn, most: int | None = None) -> Mutation:
    """A few changes of bytes at arbitrary offsets, of the first ``most`` bytes only if that is given."""
    steps = draw(
        st.lists(
            st.tuples(
                st.sampled_from(["flip", "cut", "insert", "delete", "number", "repeat"]),
                st.floats(0, 1, exclude_max=True),
                st.integers(0, 255),
                st.sampled_from(NUMBERS),
                st.binary(max_size=9),
            ),
            min_size=1,
            max_size=4,
        )
    )

    def mutate(content: bytes) -> bytes:
        for kind, place, byte, number, chunk in steps:
            at = int(place * min(len(content), most or len(content)))
            content = content[:at] + _changed(content[at:], kind, byte, number, chunk)
        return content

    return mutate


def _changed(tail: bytes, kind: str, byte: int, number: int, chunk: bytes) -> bytes:
    size = 4 if byte & 1 else 8
    changed = {
        "flip": bytes([byte]) + tail[1:],
        "cut": b"",
        "insert": chunk + tail,
        "delete": tail[1 + byte :],
        "number": struct.pack("<Q", number)[:size] + tail[size:],
        "repeat": tail[:byte] + tail,
    }
    return changed[kind]


@st.composite
def json_mutations(draw: st.DrawFn) -> Mutation:
    """Changes of a few values anywhere in a JSON file: others in their place, missing, added, or nested more deeply."""
    steps = draw(
        st.lists(
            st.tuples(
                st.sampled_from(["replace", "delete", "add", "wrap", "deepen"]),
                st.lists(st.floats(0, 1, exclude_max=True), max_size=5),
                JSON_VALUES,
                st.text(max_size=6),
            ),
            min_size=1,
            max_size=3,
        )
    )

    def mutate(content: bytes) -> bytes:
        root = {"root": json.loads(content or b"{}")}
        for kind, route, value, name in steps:
            _change(root, [0.0, *route], kind, value, name)
        return json.dumps(root["root"]).encode()

    return mutate


def _change(root: Any, route: list[float], kind: str, value: Any, name: str) -> None:
    """Follows ``route`` to a value and changes it; each number chooses among the keys of one level."""
    holder, key = root, "root"
    for place in route[1:]:
        inner = holder[key]
        keys: Any = list(inner) if isinstance(inner, dict) else range(len(inner)) if isinstance(inner, list) else ()
        if not keys:
            break
        holder, key = inner, keys[int(place * len(keys))]
    if kind == "delete" and holder is not root:
        del holder[key]
    elif kind == "add" and isinstance(holder[key], dict):
        holder[key][name] = value
    elif kind == "wrap":
        holder[key] = [holder[key]]
    elif kind == "deepen":
        for _ in range(300):
            value = [value]
        holder[key] = value
    else:
        holder[key] = value
