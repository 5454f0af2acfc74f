import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch_file

from muxmesh.errors import ModelUnsupported
from muxmesh.models.safetensors_folder import FolderWeights, weight_files, write_safetensors
from muxmesh.models.stored_dtypes import STORED_AS
from muxmesh.types import Dtype

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
A = np.arange(6, dtype=np.float32).reshape(2, 3)
B = np.array([0.5, -2.0], dtype=np.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file({"a": A, "b": B}, tmp_path / SINGLE, metadata={"format": "pt"})
    return tmp_path


def write_sharded(folder: Path) -> None:
    save_file({"a": A}, folder / "2.safetensors")
    save_file({"b": B}, folder / "1.safetensors")
    weight_map = {"a": "2.safetensors", "b": "1.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def write_header(folder: Path, header: object, data: bytes = b"") -> None:
    """A safetensors file with any header."""
    text = json.dumps(header).encode()
    (folder / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_a_single_file_holds_the_weights(folder: Path) -> None:
    assert weight_files(folder) == [folder / SINGLE]


def test_an_index_names_each_shard_once_in_order(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    assert weight_files(tmp_path) == [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]


def test_an_index_has_precedence_over_a_single_file(folder: Path) -> None:
    write_sharded(folder)
    assert folder / SINGLE not in weight_files(folder)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    (tmp_path / "1.safetensors").unlink()
    with pytest.raises(ModelUnsupported, match=r"weights are missing: 1\.safetensors$"):
        weight_files(tmp_path)


def test_a_folder_with_other_formats_only_names_one_to_convert(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ModelUnsupported, match=r"missing: model\.safetensors; pytorch_model\.bin is not supported"):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "not JSON"),
        ("[]", "is a list, not a JSON object"),
        ("{}", "weight_map: is missing or empty"),
        ('{"weight_map": []}', "weight_map: is a list; must be an object"),
        ('{"weight_map": {"a": ["x"]}}', "weight_map.a: is a list; must be the name of a file beside it"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "weight_map.a: is '../x.safetensors'; must be the name"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "weight_map.a: is '/etc/passwd'; must be the name"),
        ('{"weight_map": {"a": ""}}', "weight_map.a: is ''; must be the name"),
    ],
)
def test_a_damaged_index_is_named(tmp_path: Path, content: str, problem: str) -> None:
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(ModelUnsupported, match=rf"index\.json(:1)?: {re.escape(problem)}"):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.float32, "F32"), (torch.float16, "F16"), (torch.bfloat16, "BF16")], ids=str
)
def test_every_supported_dtype_is_read_exactly_as_f32(tmp_path: Path, dtype: torch.dtype, name: str) -> None:
    tensor = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    save_torch_file({"w": tensor}, tmp_path / SINGLE)
    weights = FolderWeights(tmp_path)
    values = weights.read("w", 5, 7)
    assert values.dtype == np.float32 and np.array_equal(values, tensor.float().numpy())
    assert weights.dtypes() == [name]


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", get_args(Dtype))
def test_pieces_of_a_large_weight_are_the_weight_in_another_dtype(
    tmp_path: Path, stored: torch.dtype, dtype: Dtype
) -> None:
    rows = (1 << 22) // 3 + 5
    tensor = torch.randn(rows, 3, generator=torch.Generator().manual_seed(0)).to(stored)
    save_torch_file({"w": tensor}, tmp_path / SINGLE)
    pieces = list(FolderWeights(tmp_path).pieces("w", dtype, rows, 3))
    assert [len(piece) for piece in pieces] == [1 << 22, rows * 3 - (1 << 22)]
    expected = tensor.float().to(getattr(torch, dtype)).view(torch.int32 if dtype == "float32" else torch.int16)
    values = np.concatenate(pieces)
    assert values.dtype == STORED_AS[dtype]
    assert np.array_equal(values.view(expected.numpy().dtype), expected.numpy().ravel())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_pieces_with_nan_or_infinity_are_rejected(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    save_torch_file({"w": torch.tensor([1.0, value], dtype=dtype)}, tmp_path / SINGLE)
    for wanted in get_args(Dtype):
        with pytest.raises(ModelUnsupported, match="weight w contains NaN or infinity"):
            list(FolderWeights(tmp_path).pieces("w", wanted, 2))


def test_tensors_are_found_in_every_shard(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    weights = FolderWeights(tmp_path)
    assert np.array_equal(weights.read("a", 2, 3), A)
    assert np.array_equal(weights.read("b", 2), B)


def test_f32_is_a_view_of_the_mapped_file(folder: Path) -> None:
    values = FolderWeights(folder).read("a", 2, 3)
    assert not values.flags.writeable and not values.flags.owndata


def test_mixed_dtypes_are_listed_once_each(tmp_path: Path) -> None:
    half = B.astype(np.float16)
    save_file({"a": A, "b": half, "c": half}, tmp_path / SINGLE)
    assert FolderWeights(tmp_path).dtypes() == ["F16", "F32"]


def test_a_missing_weight_is_named(folder: Path) -> None:
    with pytest.raises(ModelUnsupported, match="weight c is missing"):
        FolderWeights(folder).read("c", 2)


@pytest.mark.parametrize("shape", [(3, 2), (6,), (2, 3, 1)])
def test_a_weight_of_another_shape_is_rejected(folder: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(ModelUnsupported, match=r"weight a has shape \(2, 3\), but config\.json requires \("):
        FolderWeights(folder).read("a", *shape)


def test_an_unsupported_dtype_is_rejected_with_the_supported_ones(tmp_path: Path) -> None:
    save_file({"w": np.ones(2, dtype=np.float64)}, tmp_path / SINGLE)
    with pytest.raises(ModelUnsupported, match="weight w is F64; supported: F32, F16, BF16"):
        FolderWeights(tmp_path).read("w", 2)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_weight_with_nan_or_infinity_is_rejected(tmp_path: Path, value: float, dtype: type) -> None:
    save_file({"w": np.array([1.0, value], dtype=dtype)}, tmp_path / SINGLE)
    with pytest.raises(ModelUnsupported, match="weight w contains NaN or infinity"):
        FolderWeights(tmp_path).read("w", 2)


def test_a_truncated_file_is_named(folder: Path) -> None:
    path = folder / SINGLE
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelUnsupported, match=r"model\.safetensors: .* damaged: .* it is truncated"):
        FolderWeights(folder)


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: (folder / SINGLE).write_bytes(b""),
        lambda folder: (folder / SINGLE).write_bytes(b"no safetensors"),
        lambda folder: (folder / SINGLE).write_bytes((1 << 40).to_bytes(8, "little") + b'{"a": '),
        lambda folder: write_header(folder, ["a"]),
        lambda folder: write_header(folder, {"a": 3}),
        lambda folder: write_header(folder, {"a": {"dtype": "F32", "shape": [1]}}),
    ],
    ids=["empty", "text", "header too long", "header is a list", "entry is a number", "entry without offsets"],
)
def test_a_damaged_file_is_named(tmp_path: Path, write: Callable[[Path], None]) -> None:
    write(tmp_path)
    with pytest.raises(ModelUnsupported, match=r"model\.safetensors: not a safetensors file, or damaged"):
        FolderWeights(tmp_path)


def test_every_dtype_can_be_checked_without_reading(tmp_path: Path) -> None:
    save_file({"a": A, "w": np.ones(2, dtype=np.float64)}, tmp_path / SINGLE)
    weights = FolderWeights(tmp_path)
    assert weights.shapes() == {"a": (2, 3), "w": (2,)}
    with pytest.raises(ModelUnsupported, match="weight w is F64; supported: F32, F16, BF16"):
        weights.check_dtypes()


def write(path: Path, tensors: dict[str, np.ndarray], values: Iterator[np.ndarray] | None = None) -> None:
    shapes: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
        name: (array.dtype, array.shape) for name, array in tensors.items()
    }
    write_safetensors(path, shapes, iter(tensors.values()) if values is None else values)


@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from([np.float32, np.float16]), st.lists(st.integers(1, 4), min_size=1, max_size=3)),
        max_size=4,
    )
)
def test_written_tensors_are_those_that_safetensors_loads(
    tmp_path_factory: pytest.TempPathFactory, kinds: dict[str, tuple[type, list[int]]]
) -> None:
    rng = np.random.default_rng(0)
    tensors: dict[str, np.ndarray] = {
        name: rng.standard_normal(shape).astype(dtype) for name, (dtype, shape) in kinds.items()
    }
    path = tmp_path_factory.getbasetemp() / "written.safetensors"
    write(path, tensors)
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    assert all(loaded[name].dtype == array.dtype for name, array in tensors.items())
    assert all(np.array_equal(loaded[name], array) for name, array in tensors.items())


def test_a_written_file_is_read_back(tmp_path: Path) -> None:
    write(tmp_path / SINGLE, {"a": A, "half": B.astype(np.float16)})
    weights = FolderWeights(tmp_path)
    assert np.array_equal(weights.read("a", 2, 3), A)
    assert np.array_equal(weights.read("half", 2), B)


def test_an_array_that_is_not_contiguous_is_written_in_row_order(tmp_path: Path) -> None:
    write(tmp_path / SINGLE, {"a": A.T})
    assert np.array_equal(load_file(tmp_path / SINGLE)["a"], A.T)


def test_values_are_computed_while_the_file_is_written(tmp_path: Path) -> None:
    path = tmp_path / SINGLE

    def values() -> Iterator[np.ndarray]:
        assert path.exists(), "the file is open before the first value is computed"
        yield A

    write(path, {"a": A}, values())
    assert np.array_equal(load_file(path)["a"], A)


@pytest.mark.parametrize("wrong", [A.astype(np.float16), A.reshape(3, 2)])
def test_a_tensor_that_differs_from_its_announced_shape_is_a_bug(tmp_path: Path, wrong: np.ndarray) -> None:
    with pytest.raises(AssertionError):
        write(tmp_path / SINGLE, {"a": A}, iter([wrong]))


def test_a_missing_tensor_is_a_bug(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shorter"):
        write(tmp_path / SINGLE, {"a": A, "b": B}, iter([A]))
