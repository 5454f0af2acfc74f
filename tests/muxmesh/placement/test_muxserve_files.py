"""MuxServe's own files."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from muxmesh.errors import ConfigError
from muxmesh.placement.muxserve_files import read_measured_runs, read_muxserve_profile, read_placement_input
from muxmesh.types import Role

CELL = {"prefill": 20.0, "decoding": 10.0}
PROFILE: dict[str, Any] = {
    "llama-7b": {"1": {"100": {"2": {"64": CELL, "32": CELL}, "1": {"32": CELL}}, "30": {"1": {"32": CELL}}}}
}
INPUT: dict[str, Any] = {
    "what": "made up",
    "cluster": {"nnodes": 1, "ngpus_per_node": 8},
    "models": [{"name": "a", "model": "llama-7b", "rate": 2.5}],
    "published_score": 1.5,
    "published_units": [
        {
            "num_gpus": 1,
            "models": [{"name": "a", "tp": 1, "prefill_share": 80, "decode_share": 30, "max_num_seqs": 7}],
        }
    ],
}


def written(folder: Path, content: object) -> Path:
    path = folder / "file.json"
    path.write_text(json.dumps(content))
    return path


def test_a_profile_is_read_gzipped_or_not_in_seconds_and_any_order(tmp_path: Path) -> None:
    packed = tmp_path / "profile.json.gz"
    packed.write_bytes(gzip.compress(json.dumps(PROFILE).encode()))
    for path in (packed, written(tmp_path, PROFILE)):
        model = read_muxserve_profile(path).models["llama-7b"]
        assert model.tables[1].shares == (30, 100)
        assert model.tables[1].next_larger(Role.DECODE, 100, 2, 33) == 0.01
        assert model.tables[1].next_larger(Role.PREFILL, 30, 2, 33) == -1
        assert model.weights_bytes == 13_476_831_232
        assert model.kv_bytes_per_token == 512 * 1024


def test_a_placement_input_is_read_with_its_published_plan(tmp_path: Path) -> None:
    read = read_placement_input(written(tmp_path, INPUT))
    assert (read.num_nodes, read.devices_per_node, read.published_score) == (1, 8, 1.5)
    assert (read.mean_prompt_tokens, read.mean_output_tokens) == (161, 337)
    placed = read.published_units[0].models[0]
    assert (placed.kind, placed.decode_share, placed.max_num_seqs) == ("llama-7b", 30, 7)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"cluster": {"nnodes": 0, "ngpus_per_node": 8}}, "cluster.nnodes: is 0; a positive whole number"),
        ({"models": []}, "models: must not be empty"),
        ({"models": [{"name": "a", "model": "gpt", "rate": 1}]}, "model gpt: is not known; known: llama-7b"),
        ({"models": [{"name": "a", "model": "llama-7b", "rate": 0}]}, "a: rate: is 0; requests per second"),
        ({"models": INPUT["models"] * 2}, "a name appears twice"),
        ({"published_units": [{"num_gpus": 1, "models": [{"name": "b"}]}]}, "b: is none of `models`"),
    ],
)
def test_an_invalid_entry_is_named(tmp_path: Path, change: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        read_placement_input(written(tmp_path, INPUT | change))


def test_both_kinds_of_measured_runs_are_read(tmp_path: Path) -> None:
    synthetic = {
        "id": "a",
        "model": "llama-7b",
        "rate_floor": 3,
        "dev": "mesh1idx0",
        "tpt": 2.5,
        "avg_req_latency": 9.0,
        "avg_ttft": 0.5,
        "slo": {"8": 40, "total": 50},
    }
    case = {"alpha": 0.9, "scale": 0.5, "systems": {"spatial": {"llms": [synthetic]}}}
    run = read_measured_runs(written(tmp_path, [case]))[0]
    assert (run.system, run.alpha, run.models[0].within_slo, run.models[0].num_requests) == (
        "spatial",
        0.9,
        {8.0: 40},
        50,
    )
    traced = {
        "model_name": "llama-7b",
        "mps": [80, 30],
        "first_token_latency": 0.5,
        "output_per_token_latency": 0.02,
        "request_num": 9,
        "throughput": 1.5,
        "prefill_avg_batches": 2.0,
        "prefill_batch_times": 5,
        "decoding_avg_batches": 3.0,
        "decoding_batch_times": 70,
        "p99[TTFT]": 0.9,
        "tokens_throughput": 50.0,
    }
    model = read_measured_runs(written(tmp_path, {"temporal": {"a": traced}}))[0].models[0]
    assert (model.decode_share, model.percentiles_s, model.num_decode_steps) == (30, {"p99[TTFT]": 0.9}, 70)
    with pytest.raises(ConfigError, match="is no file of measured runs"):
        read_measured_runs(written(tmp_path, {"temporal": {"a": {}}}))


def test_files_that_are_no_such_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("no json")
    with pytest.raises(ConfigError, match="is not JSON"):
        read_muxserve_profile(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_muxserve_profile(tmp_path / "none")
    with pytest.raises(ConfigError, match="llama-7b: 1: share: is 'x'; a positive whole number"):
        read_muxserve_profile(written(tmp_path, {"llama-7b": {"1": {"x": {}}}}))
