import os
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from muxmesh.block_hashes import KvIdentity
from muxmesh.config.model_config import ModelConfig
from muxmesh.config.runtime import PreparedModel
from muxmesh.config.schema import MeshConfig, UnitConfig
from muxmesh.config.section import Location
from muxmesh.errors import ConfigError, ModelUnsupported
from muxmesh.machine_limits import MemoryLimit, size_text
from muxmesh.models.catalog import CATALOG
from muxmesh.models.model_download import model_folder
from muxmesh.models.model_spec import SIM_SPEC, read_model_spec
from muxmesh.models.prepared_model import (
    kv_identity,
    local_model_spec,
    machine_problems,
    model_problems,
    model_spec,
    packing_of,
    prepare_model,
    prepared_problems,
)
from muxmesh.models.weight_image import map_image
from tests.support.gguf_files import write_gguf
from tests.support.tiny import TinyShape, write_tiny_model

CATALOG_NAME = next(iter(CATALOG))
TOKEN_BLOCK_BYTES = 2 * 1 * 2 * 16 * 32 * 4
"""Of the sim spec with a block size of 16."""
MACHINE = MemoryLimit(64 << 30)


def ignore_progress(phase: str, done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model folder and a GGUF file. Tests only read it."""
    folder = tmp_path_factory.mktemp("base")
    write_tiny_model(folder / "llama", TinyShape())
    write_gguf(folder / "tiny.gguf")
    (folder / "notes.txt").touch()
    (folder / "empty").mkdir()
    return folder


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def sim(**more: Any) -> dict[str, Any]:
    return {"name": "m", "engine": "sim", **more}


def mesh(*models: dict[str, Any], **unit: Any) -> MeshConfig:
    return MeshConfig.model_validate({"units": [{"kv_pool": "64MiB", "models": list(models), **unit}]})


def problems(config: MeshConfig, base_dir: Path, cache_dir: Path) -> dict[Location, str]:
    """Field below the unit, or below its model, → problem."""
    found = [*machine_problems(config, MACHINE), *model_problems(config, base_dir, cache_dir)]
    return {location[2:] if location[2] != "models" else location[3:]: problem for location, problem in found}


@pytest.mark.parametrize(
    "model",
    [
        sim(),
        sim(source="llama"),
        sim(source="tiny.gguf"),
        {"name": "m", "source": "llama"},
        {"name": "m", "source": "./llama", "max_model_len": 512},
        {"name": "m", "source": "tiny.gguf", "max_model_len": 128},
        {"name": "llama"},
        {"name": "m", "source": CATALOG_NAME, "max_model_len": 10**9},
        {"name": CATALOG_NAME},
        sim(source=CATALOG_NAME),
    ],
    ids=str,
)
def test_a_valid_model_has_no_problem_and_nothing_is_written(
    base_dir: Path, cache_dir: Path, model: dict[str, Any]
) -> None:
    assert problems(mesh(model), base_dir, cache_dir) == {}
    assert not cache_dir.exists()


def test_an_absolute_source_does_not_depend_on_the_base_directory(base_dir: Path, cache_dir: Path) -> None:
    source = str(base_dir / "llama")
    assert problems(mesh({"name": "m", "source": source}), base_dir / "empty", cache_dir) == {}


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("nothing", f"'nothing' is neither a folder, nor a .gguf file, nor in the catalog ({CATALOG_NAME})"),
        (
            "org/name",
            f"'org/name' is neither a folder, nor a .gguf file, nor in the catalog ({CATALOG_NAME}). Models come from "
            "the catalog or from this machine, not from a hub: fetch the files, and name their folder or GGUF file as "
            "`source`",
        ),
        ("other.gguf", "'other.gguf' does not exist; a folder in Hugging Face style or a .gguf file is needed"),
        ("notes.txt", "'notes.txt' is not a .gguf file; a folder in Hugging Face style or a .gguf file is needed"),
        ("empty", "has no config.json; a model folder in Hugging Face style is needed"),
    ],
)
@pytest.mark.parametrize("engine", ["native", "sim"])
def test_an_unusable_source_is_reported(
    base_dir: Path, cache_dir: Path, engine: str, source: str, problem: str
) -> None:
    found = problems(mesh({"name": "m", "engine": engine, "source": source}), base_dir, cache_dir)
    assert found.keys() == {(0, "source")}
    assert found[0, "source"].endswith(problem)


def test_a_model_without_a_source_is_one_of_the_catalog(base_dir: Path, cache_dir: Path) -> None:
    (problem,) = problems(mesh({"name": "m"}), base_dir, cache_dir).values()
    assert problem.startswith("is not set, and the model's name 'm' is neither a folder, ")


@pytest.mark.parametrize(
    ("file", "content"), [("tokenizer.json", None), ("tokenizer.json", "{"), ("config.json", "[]")]
)
def test_an_incomplete_folder_is_a_problem_of_its_source(
    base_dir: Path, tmp_path: Path, cache_dir: Path, file: str, content: str | None
) -> None:
    shutil.copytree(base_dir / "llama", tmp_path / "llama")
    (tmp_path / "llama" / file).unlink()
    if content is not None:
        (tmp_path / "llama" / file).write_text(content)
    found = problems(mesh({"name": "llama"}), tmp_path, cache_dir)
    assert found.keys() == {(0, "source")} and file in found[0, "source"]


def test_a_damaged_gguf_file_is_a_problem_of_its_source(tmp_path: Path, cache_dir: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    found = problems(mesh({"name": "m", "source": "bad.gguf"}), tmp_path, cache_dir)
    assert "not a GGUF file, or damaged" in found[0, "source"]


@pytest.mark.parametrize(("max_model_len", "reported"), [(8192, False), (8193, True)])
def test_a_model_cannot_be_longer_than_its_context(
    base_dir: Path, cache_dir: Path, max_model_len: int, reported: bool
) -> None:
    found = problems(mesh(sim(max_model_len=max_model_len)), base_dir, cache_dir)
    expected = {(0, "max_model_len"): "is 8193; the model's context holds 8192 tokens"} if reported else {}
    assert found == expected


@pytest.mark.parametrize(("max_model_len", "reported"), [(2048, False), (2049, True)])
def test_a_model_cannot_be_longer_than_the_pool(
    base_dir: Path, cache_dir: Path, max_model_len: int, reported: bool
) -> None:
    config = mesh(sim(max_model_len=max_model_len), kv_pool="1MiB", slab="64KiB")
    expected = "is 2049; the unit's kv_pool holds 2048 tokens of this model"
    assert problems(config, base_dir, cache_dir) == ({(0, "max_model_len"): expected} if reported else {})


@pytest.mark.parametrize(("slab", "reported"), [(TOKEN_BLOCK_BYTES, False), (TOKEN_BLOCK_BYTES - 1, True)])
def test_a_token_block_has_to_fit_into_a_slab(base_dir: Path, cache_dir: Path, slab: int, reported: bool) -> None:
    found = problems(mesh(sim(), slab=slab), base_dir, cache_dir)
    assert found.keys() == ({(0, "block_size")} if reported else set())
    assert all(f"a token block of 16 tokens is {TOKEN_BLOCK_BYTES} bytes" in problem for problem in found.values())


def test_a_core_that_is_not_available_is_named_once_per_unit(base_dir: Path, cache_dir: Path) -> None:
    available = os.sched_getaffinity(0)
    cores = [min(available), max(available) + 1, max(available) + 2]
    found = problems(mesh(sim(), cores=cores), base_dir, cache_dir)
    assert found == {("cores",): f"core {cores[1]} is not available; available: {sorted(available)}"}


@pytest.mark.parametrize(("kv_pool", "kv_swap"), [("900TiB", "0"), ("64MiB", "900TiB")])
def test_pool_and_swap_have_to_fit_into_the_memory_of_the_machine(
    base_dir: Path, cache_dir: Path, kv_pool: str, kv_swap: str
) -> None:
    found = problems(mesh(sim(), kv_pool=kv_pool, kv_swap=kv_swap), base_dir, cache_dir)
    assert found.keys() == {("kv_pool",)}
    assert found["kv_pool",].startswith("kv_pool and kv_swap are together 9")
    assert found["kv_pool",].endswith("; this machine has 64.0GiB")


def test_only_the_swap_of_a_unit_on_a_gpu_is_memory_of_the_machine(base_dir: Path, cache_dir: Path) -> None:
    model = {"name": "m", "source": "llama"}
    assert problems(mesh(model, device="cuda:0", kv_pool="900TiB"), base_dir, cache_dir) == {}
    found = problems(mesh(model, device="cuda:0", kv_swap="900TiB"), base_dir, cache_dir)
    assert found.keys() == {("kv_swap",)} and found["kv_swap",] == "kv_swap is 900.0TiB; this machine has 64.0GiB"


def test_every_problem_has_the_path_of_its_field(base_dir: Path, cache_dir: Path) -> None:
    broken = sim(name="broken", source="nothing")
    unit = {"kv_pool": "64MiB", "models": [sim(), broken]}
    config = MeshConfig.model_validate({"units": [{**unit, "name": "a"}, {**unit, "name": "b"}]})
    found = [location for location, _ in model_problems(config, base_dir, cache_dir)]
    assert found == [("units", index, "models", 1, "source") for index in (0, 1)]


def test_the_memory_of_a_container_has_to_hold_the_weights_of_prepared_models_once(
    base_dir: Path, cache_dir: Path
) -> None:
    unit = {"kv_pool": "64MiB", "models": [{"name": "m", "source": "llama"}]}
    config = MeshConfig.model_validate({"units": [{**unit, "name": name, "cores": [n]} for n, name in enumerate("ab")]})
    model = prepare_model(config.units[0].models[0], "panels", base_dir, cache_dir, ignore_progress)
    prepared = {"a": {"m": model}, "b": {"m": model}}
    assert list(prepared_problems(config, prepared, MACHINE)) == []
    ((location, problem),) = prepared_problems(config, prepared, MemoryLimit(128 << 20, Path("/memory.max")))
    assert model.image is not None
    assert location == ("units",)
    assert f"the weights {size_text(model.image.stat().st_size)}, " in problem


def test_a_native_model_is_prepared_once(base_dir: Path, cache_dir: Path) -> None:
    phases: list[str] = []
    model = ModelConfig(name="m", source="llama")
    prepared = prepare_model(model, "panels", base_dir, cache_dir, lambda phase, done, total: phases.append(phase))
    assert prepared.folder == base_dir / "llama"
    assert prepared.image is not None and prepared.weights_fingerprint == map_image(prepared.image).fingerprint
    assert phases == ["preparing", "preparing"]
    assert (
        prepare_model(model, "panels", base_dir, cache_dir, lambda *progress: pytest.fail("prepared again")) == prepared
    )


def test_a_model_is_prepared_for_each_device_and_dtype(base_dir: Path, cache_dir: Path) -> None:
    placements = [("cpu", "float32"), ("cuda:0", "float32"), ("cuda:1", "float16"), ("cuda:2", "bfloat16")]
    prepared = []
    for device, dtype in placements:
        unit = {"device": device, "models": [{"name": "m", "source": "llama", "dtype": dtype}]}
        (config,) = MeshConfig.model_validate({"units": [unit]}).units
        prepared.append(prepare_model(config.models[0], packing_of(config), base_dir, cache_dir, ignore_progress))
    assert {one.folder for one in prepared} == {base_dir / "llama"}
    assert len({one.image for one in prepared}) == len({one.weights_fingerprint for one in prepared}) == 4
    images = [one.image.name.partition("-")[2].partition("-")[2] for one in prepared if one.image is not None]
    assert images == ["panels-v3.f32", "rows-v4.f32", "rows-v4.f16", "rows-v4.bf16"]


def test_a_gguf_file_is_converted_and_prepared(base_dir: Path, cache_dir: Path) -> None:
    phases: list[str] = []
    model = ModelConfig(name="m", source="tiny.gguf")
    prepared = prepare_model(model, "panels", base_dir, cache_dir, lambda phase, done, total: phases.append(phase))
    assert prepared.folder is not None and prepared.folder.is_dir()
    assert prepared.image is not None and prepared.image.is_file()
    assert list(dict.fromkeys(phases)) == ["converting", "preparing"]
    assert prepare_model(model, "panels", base_dir, cache_dir, ignore_progress) == prepared


def test_a_sim_model_has_a_folder_for_its_tokenizer_but_no_image(base_dir: Path, cache_dir: Path) -> None:
    prepared = prepare_model(ModelConfig(**sim(source="llama")), "panels", base_dir, cache_dir, ignore_progress)
    assert prepared.folder == base_dir / "llama" and prepared.image is None


def test_a_sim_model_without_a_source_needs_no_file(base_dir: Path, cache_dir: Path) -> None:
    prepared = prepare_model(ModelConfig(**sim()), "panels", base_dir, cache_dir, ignore_progress)
    assert (prepared.folder, prepared.image) == (None, None)
    assert not cache_dir.exists()


def test_sim_models_with_different_profiles_have_different_fingerprints(base_dir: Path, cache_dir: Path) -> None:
    def fingerprint(**profile: Any) -> str:
        model = ModelConfig(**sim(sim=profile))
        return prepare_model(model, "panels", base_dir, cache_dir, ignore_progress).weights_fingerprint

    assert fingerprint() == fingerprint(output_tokens=0) != fingerprint(output_tokens=5)


@pytest.mark.parametrize(
    ("source", "error"), [("nothing", ConfigError), ("empty", ModelUnsupported), ("notes.txt", ConfigError)]
)
def test_a_model_that_cannot_be_prepared_is_named(
    base_dir: Path, cache_dir: Path, source: str, error: type[Exception]
) -> None:
    with pytest.raises(error, match=r"^model my-model: ") as raised:
        prepare_model(ModelConfig(name="my-model", source=source), "panels", base_dir, cache_dir, ignore_progress)
    assert type(raised.value) is error


def test_the_spec_of_a_prepared_model_is_that_of_its_folder(base_dir: Path) -> None:
    assert model_spec(base_dir / "llama") == read_model_spec(base_dir / "llama")
    assert model_spec(None) is SIM_SPEC


@pytest.mark.parametrize("source", ["llama", "tiny.gguf"])
def test_the_spec_of_local_files_is_that_of_the_prepared_model(base_dir: Path, cache_dir: Path, source: str) -> None:
    model = ModelConfig(name="m", source=source)
    spec = local_model_spec(model, base_dir, cache_dir)
    assert not cache_dir.exists()
    assert spec == model_spec(prepare_model(model, "panels", base_dir, cache_dir, ignore_progress).folder)


def test_the_spec_of_a_sim_model_without_a_source_is_the_sim_spec(base_dir: Path, cache_dir: Path) -> None:
    assert local_model_spec(ModelConfig(**sim()), base_dir, cache_dir) is SIM_SPEC


def test_the_spec_of_a_catalog_model_needs_its_download(base_dir: Path, cache_dir: Path) -> None:
    model = ModelConfig(name=CATALOG_NAME)
    with pytest.raises(ConfigError, match=f"not on this machine; `muxmesh model pull {CATALOG_NAME}` downloads it"):
        local_model_spec(model, base_dir, cache_dir)
    shutil.copytree(base_dir / "llama", model_folder(CATALOG[CATALOG_NAME], cache_dir))
    assert local_model_spec(model, base_dir, cache_dir) == read_model_spec(base_dir / "llama")


def test_a_downloaded_catalog_model_is_checked_like_a_folder(base_dir: Path, cache_dir: Path) -> None:
    config = mesh({"name": CATALOG_NAME, "max_model_len": 600})
    shutil.copytree(base_dir / "llama", model_folder(CATALOG[CATALOG_NAME], cache_dir))
    found = problems(config, base_dir, cache_dir)
    assert found == {(0, "max_model_len"): "is 600; the model's context holds 512 tokens"}


def identity(folder: Path | None = None, fingerprint: str = "w", device: str = "cpu", **model: Any) -> KvIdentity:
    prepared = PreparedModel(folder=folder, image=None, weights_fingerprint=fingerprint)
    unit = UnitConfig.model_validate({"device": device, "models": [{"name": "m", "engine": "sim", **model}]})
    return kv_identity(unit, unit.models[0], prepared)


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        (lambda: identity(fingerprint="other"), "weights"),
        (lambda: identity(block_size=32), "layout"),
        (lambda: identity(engine="native"), "layout"),
        (lambda: identity(device="cuda:0"), "layout"),
        (lambda: identity(dtype="float16", kv_cache_dtype="float32"), "weight_dtype"),
    ],
)
def test_kv_is_not_shared_between_models_that_differ(changed: Callable[[], KvIdentity], field: str) -> None:
    first, second = identity(), changed()
    assert [one.name for one in fields(KvIdentity) if getattr(first, one.name) != getattr(second, one.name)] == [field]


def test_kv_is_shared_whatever_the_model_is_called_and_however_it_is_scheduled() -> None:
    assert identity() == identity(name="other", max_num_seqs=3, prefill_token_budget=9)


def test_kv_depends_on_the_rope_of_the_model(base_dir: Path, tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "factor": 4.0}
    write_tiny_model(tmp_path / "linear", TinyShape(rope=rope))
    plain, linear = identity(base_dir / "llama"), identity(tmp_path / "linear")
    assert plain.rope != linear.rope
    assert replace(linear, rope=plain.rope) == plain


@pytest.mark.parametrize("source", ["llama", "tiny.gguf"])
def test_a_router_needs_no_weights_and_has_the_same_model_without_them(
    base_dir: Path, cache_dir: Path, tmp_path: Path, source: str
) -> None:
    model = ModelConfig(name="m", source=source)
    whole = prepare_model(model, "panels", base_dir, cache_dir, ignore_progress)
    if source == "llama":
        shutil.copytree(base_dir / source, tmp_path / source, ignore=shutil.ignore_patterns("*.safetensors"))
    else:
        shutil.copy(base_dir / source, tmp_path / source)
    without = prepare_model(model, "panels", tmp_path, tmp_path / "other", ignore_progress, with_weights=False)
    assert (without.image, without.weights_fingerprint) == (None, "")
    assert not [path for path in (tmp_path / "other").rglob("*") if path.suffix in (".safetensors", ".f32")]
    assert model_spec(without.folder) == model_spec(whole.folder)
    unit = UnitConfig(models=(model,))
    identities = [kv_identity(unit, model, prepared) for prepared in (whole, without)]
    assert replace(identities[1], weights=identities[0].weights) == identities[0]


def test_problems_of_a_router_are_those_without_weights(base_dir: Path, cache_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(base_dir / "llama", tmp_path / "llama", ignore=shutil.ignore_patterns("*.safetensors"))
    config = mesh({"name": "m", "source": "llama"})
    assert list(model_problems(config, tmp_path, cache_dir)) != []
    assert list(model_problems(config, tmp_path, cache_dir, with_weights=False)) == []
    (tmp_path / "llama" / "tokenizer.json").write_text("{")
    assert len(list(model_problems(config, tmp_path, cache_dir, with_weights=False))) == 1
