import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from muxmesh.errors import ModelUnsupported
from muxmesh.models.sampling_defaults import SamplingDefaults, read_sampling_defaults
from muxmesh.types import Sampling

ALL = {"temperature", "top_k", "top_p", "min_p", "repetition_penalty"}


def defaults(folder: Path, generation: Any, config: Any = None) -> SamplingDefaults:
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    (folder / "config.json").write_text(json.dumps(config or {}))
    return read_sampling_defaults(folder)


@pytest.mark.parametrize(
    "content",
    [
        {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.1, "do_sample": True},
        {"do_sample": False, "temperature": 1.0, "top_k": 50},
        {"max_new_tokens": 2048, "eos_token_id": [1, 2]},
        {"top_k": 0, "top_p": 1},
        {"temperature": None},
        {},
    ],
    ids=str,
)
def test_the_defaults_are_what_vllm_takes_from_the_file(tmp_path: Path, content: dict[str, Any]) -> None:
    """vLLM takes these six fields of transformers' `to_diff_dict`."""
    found = defaults(tmp_path, content)
    reference = GenerationConfig.from_pretrained(tmp_path).to_diff_dict()
    for name in (*ALL, "max_new_tokens"):
        assert getattr(found, name) == reference.get(name), name


def test_without_the_file_the_fields_of_the_config_count(tmp_path: Path) -> None:
    assert defaults(tmp_path, None, {"temperature": 0.5}).temperature == 0.5
    assert defaults(tmp_path, {}, {"temperature": 0.5}).temperature is None


def test_only_fields_that_the_request_leaves_unset_are_replaced() -> None:
    model = SamplingDefaults(temperature=0.6, top_k=20, repetition_penalty=1.1)
    given = Sampling(temperature=0.2, top_p=0.5)
    assert model.applied_to(given, {"top_k", "min_p"}) == Sampling(temperature=0.2, top_p=0.5, top_k=20)
    assert model.applied_to(Sampling(), ALL) == Sampling(temperature=0.6, top_k=20, repetition_penalty=1.1)
    assert SamplingDefaults().applied_to(given, ALL) == given


def test_the_top_k_that_vllm_writes_for_off_is_off(tmp_path: Path) -> None:
    assert defaults(tmp_path, {"top_k": -1}).top_k == 0


@pytest.mark.parametrize(("own", "configured", "used"), [(None, 512, 512), (100, 512, 100), (4096, 512, 512)])
def test_the_configured_length_is_limited_by_that_of_the_model(own: int | None, configured: int, used: int) -> None:
    assert SamplingDefaults(max_new_tokens=own).limited(configured) == used


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", "1.0"), ("temperature", -0.1), ("temperature", 101), ("temperature", True),
        ("temperature", float("nan")), ("temperature", float("inf")), ("temperature", [0.5]),
        ("top_k", 1.5), ("top_k", -2), ("top_k", 1 << 32), ("top_k", "50"), ("top_k", False),
        ("top_p", 0.0), ("top_p", 1.01), ("top_p", {}),
        ("min_p", -0.1), ("min_p", 1.1),
        ("repetition_penalty", 0), ("repetition_penalty", -1.0), ("repetition_penalty", 1e400),
        ("max_new_tokens", 0), ("max_new_tokens", 1 << 70), ("max_new_tokens", 8.0),
    ],
    ids=str,
)  # fmt: skip
def test_a_default_that_no_request_may_have_is_refused_by_name(tmp_path: Path, field: str, value: Any) -> None:
    with pytest.raises(ModelUnsupported, match=rf"generation_config\.json: {field}: is .*; .*") as caught:
        defaults(tmp_path, {field: value})
    assert "\n" not in str(caught.value)
