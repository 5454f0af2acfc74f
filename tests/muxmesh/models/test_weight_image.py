import fcntl
import json
import re
import shutil
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from muxmesh.errors import ModelUnsupported
from muxmesh.models.matrix_packing import PARTS, pack_gated, pack_panels
from muxmesh.models.model_spec import read_model_spec
from muxmesh.models.stored_dtypes import from_bfloat16
from muxmesh.models.weight_image import Image, Packing, ensure_image, image_bytes, map_image, read_layout
from muxmesh.types import Dtype
from tests.support.tiny import SHAPES, TinyShape, write_tiny_model

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "model", TinyShape(tied=False))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Writes the model of a shape of `SHAPES` once; tests only read it."""
    root = tmp_path_factory.mktemp("models")

    def folder_of(shape: str) -> Path:
        folder = root / shape.replace(" ", "-")
        return folder if folder.is_dir() else write_tiny_model(folder, SHAPES[shape])

    return folder_of


def ignore_progress(done: int, total: int) -> None:
    pass


def write_image(folder: Path, cache: Path, packing: Packing = "rows", dtype: Dtype = "float32") -> Path:
    return ensure_image(folder, read_model_spec(folder), packing, cache, ignore_progress, dtype)


def image_of(folder: Path, cache: Path, packing: Packing = "rows", dtype: Dtype = "float32") -> Image:
    return map_image(write_image(folder, cache, packing, dtype))


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def change_weights(folder: Path, **changes: np.ndarray | None) -> None:
    """Replaces tensors, whose dots are written as two underscores; None removes one."""
    weights = load_file(folder / WEIGHTS) | {name.replace("__", "."): array for name, array in changes.items()}
    save_file({name: array for name, array in weights.items() if array is not None}, folder / WEIGHTS)


def test_an_image_holds_every_weight_once(folder: Path, tmp_path: Path) -> None:
    image, source = image_of(folder, tmp_path), load_file(folder / WEIGHTS)
    assert sum(length for _, length in image.parts.values()) == sum(array.size for array in source.values())
    assert np.array_equal(image.get("lm_head"), source["lm_head.weight"])
    assert np.array_equal(image.get("embed"), source["model.embed_tokens.weight"])
    assert np.array_equal(image.get("norm"), source["model.norm.weight"])
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        gate_up = [source[f"{prefix}.mlp.{part}_proj.weight"] for part in ("gate", "up")]
        qkv = [source[f"{prefix}.self_attn.{part}_proj.weight"] for part in "qkv"]
        assert np.array_equal(image.get(f"{layer}.gate_up"), np.concatenate(gate_up))
        assert np.array_equal(image.get(f"{layer}.qkv"), np.concatenate(qkv))
        assert np.array_equal(image.get(f"{layer}.o"), source[f"{prefix}.self_attn.o_proj.weight"])
        assert np.array_equal(image.get(f"{layer}.down"), source[f"{prefix}.mlp.down_proj.weight"])
        assert np.array_equal(image.get(f"{layer}.input_norm"), source[f"{prefix}.input_layernorm.weight"])
        assert np.array_equal(image.get(f"{layer}.post_norm"), source[f"{prefix}.post_attention_layernorm.weight"])


def test_biases_are_stored_as_one_vector(folders: Callable[[str], Path], tmp_path: Path) -> None:
    folder = folders("qwen2")
    source = load_file(folder / WEIGHTS)
    bias = np.concatenate([source[f"model.layers.1.self_attn.{part}_proj.bias"] for part in "qkv"])
    assert np.array_equal(image_of(folder, tmp_path).get("1.qkv_bias"), bias)


def test_norms_of_queries_and_keys_are_stored(folders: Callable[[str], Path], tmp_path: Path) -> None:
    folder = folders("qwen3")
    image, source = image_of(folder, tmp_path), load_file(folder / WEIGHTS)
    for part in "qk":
        assert np.array_equal(image.get(f"0.{part}_norm"), source[f"model.layers.0.self_attn.{part}_norm.weight"])


@pytest.mark.parametrize("shape", ["gqa", "untied, wide heads", "qwen2", "qwen3"])
def test_panels_are_the_packed_matrices_of_the_rows(folders: Callable[[str], Path], tmp_path: Path, shape: str) -> None:
    rows, panels = (image_of(folders(shape), tmp_path, packing) for packing in ("rows", "panels"))
    assert rows.parts.keys() == panels.parts.keys()
    for name in rows.parts:
        expected = rows.get(name)
        if name.endswith("gate_up"):
            expected = pack_gated(*np.split(expected, 2))
        elif expected.ndim == 2 and name != "embed":
            expected = pack_panels(expected)
        assert np.array_equal(panels.get(name), expected), name


@pytest.mark.parametrize("shape", ["gqa", "qwen2", "qwen3"])
def test_every_tensor_of_a_layer_has_an_index_for_the_kernels(
    folders: Callable[[str], Path], tmp_path: Path, shape: str
) -> None:
    names = {name.partition(".")[2] for name in image_of(folders(shape), tmp_path).parts if name[0].isdigit()}
    assert names <= set(PARTS)
    assert set(PARTS) - names <= {"qkv_bias", "q_norm", "k_norm"}


def test_a_tied_matrix_is_stored_once(folders: Callable[[str], Path], tmp_path: Path) -> None:
    image = image_of(folders("gqa"), tmp_path)
    assert "embed" not in image.parts
    assert np.array_equal(image.get("lm_head"), load_file(folders("gqa") / WEIGHTS)["model.embed_tokens.weight"])


@pytest.mark.parametrize("packing", ["rows", "panels"])
def test_tensors_start_at_cache_lines_and_do_not_overlap(
    folders: Callable[[str], Path], tmp_path: Path, packing: Packing
) -> None:
    image = image_of(folders("odd head size"), tmp_path, packing)
    assert image.parts["norm"][1] * 4 % 64, "the norm ends inside a cache line"
    end = 0
    for offset, length in sorted(image.parts.values()):
        assert offset * 4 % 64 == 0 and offset >= end
        end = offset + length
    assert end <= image.flat.size


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", ["odd head size", "qwen2", "qwen3"])
def test_tensors_of_rows_start_at_256_bytes_and_the_size_is_known_before(
    folders: Callable[[str], Path], tmp_path: Path, shape: str, dtype: Dtype
) -> None:
    path = write_image(folders(shape), tmp_path, "rows", dtype)
    layout = read_layout(path)
    assert all(offset % 256 == 0 for offset in layout.offsets.values())
    assert layout.num_bytes == path.stat().st_size == image_bytes(read_model_spec(folders(shape)), dtype)
    assert max(layout.bytes_of(name).stop for name in layout.offsets) <= layout.num_bytes


@pytest.mark.parametrize(("stored", "dtype"), [("half precision", "float16"), ("bfloat16", "bfloat16")])
def test_an_image_in_the_dtype_of_the_checkpoint_is_exact(
    folders: Callable[[str], Path], tmp_path: Path, stored: str, dtype: Dtype
) -> None:
    folder = folders(stored)
    in_f32, image = image_of(folder, tmp_path), image_of(folder, tmp_path, "rows", dtype)
    assert image.parts.keys() == in_f32.parts.keys()
    for name in image.parts:
        values = image.get(name)
        assert values.dtype.itemsize == 2
        exact = from_bfloat16(values) if dtype == "bfloat16" else values.astype(np.float32)
        assert np.array_equal(exact, in_f32.get(name)), name


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_values_are_rounded_as_torch_rounds_them(folders: Callable[[str], Path], tmp_path: Path, dtype: Dtype) -> None:
    in_f32, image = (image_of(folders("qwen2"), tmp_path, "rows", one) for one in ("float32", dtype))
    for name in image.parts:
        expected = torch.from_numpy(in_f32.get(name)).to(getattr(torch, dtype)).view(torch.int16)
        assert torch.equal(torch.from_numpy(image.get(name).view(np.int16)), expected), name


def test_dtypes_are_different_files_with_different_fingerprints(folder: Path, tmp_path: Path) -> None:
    zeros = {name: np.zeros_like(array) for name, array in load_file(folder / WEIGHTS).items()}
    save_file(zeros, folder / WEIGHTS)
    paths = [write_image(folder, tmp_path, "rows", dtype) for dtype in get_args(Dtype)]
    assert len(set(paths)) == len({read_layout(path).fingerprint for path in paths}) == 3


def test_a_weight_beyond_float16_is_named(folder: Path, tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    weight = load_file(folder / WEIGHTS)[name]
    weight[3, 5] = -65520
    change_weights(folder, model__layers__1__self_attn__k_proj__weight=weight)
    message = rf"weight {re.escape(name)} contains -65520; float16 ends at 65504\. Use dtype: bfloat16 or float32"
    with pytest.raises(ModelUnsupported, match=message):
        write_image(folder, tmp_path, "rows", "float16")
    assert list((tmp_path / "images").glob("*.f16")) == []
    write_image(folder, tmp_path, "rows", "bfloat16")


def test_memory_while_writing_does_not_grow_with_a_weight(folder: Path, tmp_path: Path) -> None:
    """The embedding is 64 MiB in its file; as f32 at once it would be 128 MiB."""
    rows = (64 << 20) // 2 // 48
    change_config(folder, vocab_size=rows)
    spec = read_model_spec(folder)
    weights: dict[str, np.ndarray] = {
        name: array.astype(np.float16) for name, array in load_file(folder / WEIGHTS).items()
    }
    large = dict.fromkeys(["model.embed_tokens.weight", "lm_head.weight"], np.zeros((rows, 48), dtype=np.float16))
    save_file(weights | large, folder / WEIGHTS)
    tracemalloc.start()
    ensure_image(folder, spec, "rows", tmp_path, ignore_progress, "bfloat16")
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 100 << 20


def test_an_unknown_tensor_is_a_key_error(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        image_of(folder, tmp_path).get("0.qkv_bias")


def test_an_image_is_written_once(folder: Path, tmp_path: Path) -> None:
    path = write_image(folder, tmp_path)
    written_at = path.stat().st_mtime_ns
    assert write_image(folder, tmp_path) == path
    assert path.stat().st_mtime_ns == written_at


def test_progress_counts_layers(folder: Path, tmp_path: Path) -> None:
    reported: list[tuple[int, int]] = []
    ensure_image(folder, read_model_spec(folder), "rows", tmp_path, lambda *counts: reported.append(counts))
    assert reported == [(1, 2), (2, 2)]


def test_of_two_concurrent_callers_one_writes_the_image(folder: Path, tmp_path: Path) -> None:
    spec, reported, others = read_model_spec(folder), [], []

    def ensure(caller: str) -> Path:
        return ensure_image(folder, spec, "rows", tmp_path, lambda done, total: progress(caller, done))

    def progress(caller: str, done: int) -> None:
        reported.append((caller, done))
        if done == 1:
            others.append(pool.submit(ensure, "second"))

    with ThreadPoolExecutor(1) as pool:
        path = ensure("first")
    assert [other.result() for other in others] == [path]
    assert reported == [("first", 1), ("first", 2)]


def test_the_image_is_locked_while_it_is_written(folder: Path, tmp_path: Path) -> None:
    num_calls = 0

    def progress(done: int, total: int) -> None:
        nonlocal num_calls
        num_calls += 1
        (lock,) = (tmp_path / "images").glob("*.lock")
        with lock.open("w") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    ensure_image(folder, read_model_spec(folder), "rows", tmp_path, progress)
    assert num_calls == 2, "once for each layer"


def test_two_packings_are_two_files(folder: Path, tmp_path: Path) -> None:
    assert write_image(folder, tmp_path, "rows") != write_image(folder, tmp_path, "panels")


def test_changed_weights_have_another_image(folder: Path, tmp_path: Path) -> None:
    first = write_image(folder, tmp_path)
    change_weights(folder, model__norm__weight=load_file(folder / WEIGHTS)["model.norm.weight"] * 2)
    second = write_image(folder, tmp_path)
    assert first != second
    assert np.array_equal(map_image(second).get("norm"), map_image(first).get("norm") * 2)
    assert map_image(first).fingerprint != map_image(second).fingerprint


def test_a_changed_config_has_another_image(folder: Path, tmp_path: Path) -> None:
    first = write_image(folder, tmp_path)
    change_config(folder, rms_norm_eps=0.125)
    assert write_image(folder, tmp_path) != first


def test_folders_of_the_same_name_do_not_share_an_image_but_their_fingerprint(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere" / folder.name
    shutil.copytree(folder, copy)
    first, second = write_image(folder, tmp_path), write_image(copy, tmp_path)
    assert first != second
    assert map_image(first).fingerprint == map_image(second).fingerprint


def test_sharded_half_precision_weights_give_the_same_image(folder: Path, tmp_path: Path) -> None:
    halves = {name: array.astype(np.float16) for name, array in load_file(folder / WEIGHTS).items()}
    save_file(halves, folder / WEIGHTS)
    whole = image_of(folder, tmp_path)
    (folder / WEIGHTS).unlink()
    names = sorted(halves)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, members in parts.items():
        save_file({name: halves[name] for name in members}, folder / file)
    index = {"weight_map": {name: file for file, members in parts.items() for name in members}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    sharded = image_of(folder, tmp_path)
    assert whole.parts == sharded.parts and whole.fingerprint == sharded.fingerprint
    assert all(np.array_equal(whole.get(name), sharded.get(name)) for name in whole.parts)


def test_a_write_to_a_mapped_image_stays_in_this_process(folder: Path, tmp_path: Path) -> None:
    path = write_image(folder, tmp_path)
    image = map_image(path)
    before = map_image(path).get("norm").copy()
    image.get("norm")[:] = 0.0
    assert np.array_equal(map_image(path).get("norm"), before)


def test_weights_that_contradict_the_config_are_named(folder: Path, tmp_path: Path) -> None:
    change_config(folder, intermediate_size=100)
    with pytest.raises(
        ModelUnsupported, match=r"gate_proj\.weight has shape \(96, 48\), but the config requires \(100"
    ):
        write_image(folder, tmp_path)


def test_a_failed_image_is_written_again_once_its_weights_are_complete(folder: Path, tmp_path: Path) -> None:
    norm = load_file(folder / WEIGHTS)["model.norm.weight"]
    change_weights(folder, model__norm__weight=None)
    with pytest.raises(ModelUnsupported, match=r"weight model\.norm\.weight is missing"):
        write_image(folder, tmp_path)
    assert list((tmp_path / "images").glob("*.f32")) == []
    change_weights(folder, model__norm__weight=norm)
    assert np.array_equal(image_of(folder, tmp_path).get("norm"), norm)


def test_a_superfluous_weight_is_rejected(folder: Path, tmp_path: Path) -> None:
    change_weights(folder, model__layers__0__extra__weight=np.ones(3, dtype=np.float32))
    with pytest.raises(ModelUnsupported, match=r"1 weights are not part of a supported model: model\.layers\.0\.extra"):
        write_image(folder, tmp_path)


def test_stored_rotary_frequencies_and_a_repeated_tied_matrix_are_ignored(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model", TinyShape())
    plain = image_of(folder, tmp_path)
    embedding = load_file(folder / WEIGHTS)["model.embed_tokens.weight"]
    frequencies = np.ones(8, dtype=np.float32)
    change_weights(folder, lm_head__weight=embedding, model__layers__0__self_attn__rotary_emb__inv_freq=frequencies)
    assert image_of(folder, tmp_path).fingerprint == plain.fingerprint
