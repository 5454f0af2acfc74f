import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from muxmesh.errors import ModelUnsupported
from muxmesh.models.safetensors_header import read_header


def tensor(first: Any = 0, last: Any = 8, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


def file_of(header: Any, data: bytes = b"\0" * 8, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "has 0 bytes"),
    "a few bytes": (b"\0\0\0", "has 3 bytes"),
    "text": (b"no safetensors file", "its header claims"),
    "a length of 2^63": (file_of({}, length=1 << 63), "its header claims 9223372036854775808"),
    "the largest length": (file_of({}, length=(1 << 64) - 1), "its header claims 18446744073709551615"),
    "a length of 0": (file_of(b""), "its header is not JSON"),
    "no JSON": (file_of(b"{'a': 1}"), "its header is not JSON"),
    "no UTF-8": (file_of(b'{"\xff": 1}'), "its header is not JSON"),
    "deep nesting": (file_of(b"[" * 100_000), "its header is not JSON"),
    "a list": (file_of([]), "its header is a list, not an object"),
    "an entry that is a number": (file_of({"a": 3}), "a: is 3, not an object"),
    "no dtype": (file_of({"a": {"shape": [2], "data_offsets": [0, 8]}}), "a: dtype: is null; must be a string"),
    "no shape": (file_of({"a": {"dtype": "F32", "data_offsets": [0, 8]}}), "a: shape: must be a list"),
    "no offsets": (file_of({"a": {"dtype": "F32", "shape": [2]}}), "a: data_offsets: must be a list"),
    "a dtype that is a number": (file_of({"a": tensor(dtype=4)}), "a: dtype: is 4; must be a string"),
    "a negative size": (file_of({"a": tensor(shape=[-2])}), "a: shape: must be a list"),
    "a size that is true": (file_of({"a": tensor(shape=[2, True])}), "a: shape: must be a list"),
    "a fractional size": (file_of({"a": tensor(shape=[2.0])}), "a: shape: must be a list"),
    "a huge size": (file_of({"a": tensor(shape=[1 << 70])}), "a: shape: must be a list"),
    "a huge product": (file_of({"a": tensor(shape=[1 << 61] * 8)}), "a: data_offsets: span 8 bytes"),
    "many dimensions": (file_of({"a": tensor(shape=[1] * 9)}), "a: shape: must be a list of at most 8"),
    "a negative offset": (file_of({"a": tensor(-8, 0)}), "a: data_offsets: must be a list"),
    "descending offsets": (file_of({"a": tensor(8, 0)}), "a: data_offsets: must be two ascending numbers"),
    "three offsets": (file_of({"a": {**tensor(), "data_offsets": [0, 4, 8]}}), "a: data_offsets: must be two"),
    "another size": (file_of({"a": tensor(0, 4)}), "a: data_offsets: span 4 bytes, the shape needs 8"),
    "outside the file": (file_of({"a": tensor(800, 808)}), "a: data_offsets: leave a gap before them"),
    "overlapping": (file_of({"a": tensor(), "b": tensor()}), "b: data_offsets: overlap those of another tensor"),
    "a gap": (file_of({"a": tensor(), "b": tensor(12, 20)}, b"\0" * 20), "b: data_offsets: leave a gap"),
    "truncated": (file_of({"a": tensor()}, b"\0" * 7), "its tensors end at 77; it is truncated"),
    "longer than its tensors": (file_of({"a": tensor()}, b"\0" * 9), "has 78 bytes, its tensors end at 77"),
    "a long name with line ends": (file_of({"a\n" * 500: 3}), r"a\na\na"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_header_is_one_line_and_the_safetensors_package_refuses_it_too(tmp_path: Path, damage: str) -> None:
    content, problem = DAMAGED[damage]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelUnsupported) as caught:
        read_header(path)
    assert str(caught.value).startswith(f"{path}: not a safetensors file, or damaged: ")
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < len(str(path)) + 200
    if damage != "many dimensions":
        with pytest.raises(SafetensorError), safe_open(path, "np"):
            pass


def test_a_git_lfs_pointer_is_named_as_such(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 538090408\n")
    with pytest.raises(ModelUnsupported, match=r"model\.safetensors: is a git-lfs pointer, not the file itself"):
        read_header(path)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int8", "uint16", "int32", "int64", "bool"])
def test_entries_of_a_valid_file_span_their_bytes(tmp_path: Path, dtype: str) -> None:
    arrays = {"a": np.ones((2, 3), dtype), "b": np.zeros((0,), dtype), "c": np.ones((), dtype)}
    save_file(arrays, tmp_path / "f", {"format": "pt"})
    content = (tmp_path / "f").read_bytes()
    for name, entry in read_header(tmp_path / "f").items():
        assert entry.shape == arrays[name].shape
        assert content[entry.first : entry.last] == arrays[name].tobytes()
