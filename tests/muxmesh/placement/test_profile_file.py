"""The file of `muxmesh profile`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from muxmesh.errors import ConfigError
from muxmesh.placement.profile import MachineFacts, ModelProfile, Profile
from muxmesh.placement.profile_file import format_profile, parse_profile, read_profile
from muxmesh.placement.step_table import table_from_cells

CELLS = [[[0.01, 0.02], [0.03, -1]], [[0.005, 0.01], [0.02, 0.0300001]]]
PROFILE = Profile(
    MachineFacts("cpu", 'A "quoted" CPU: 2 cores', 1, 8 * 2**30, 2),
    {"tiny": ModelProfile("tiny", 1000, 64, {1: table_from_cells((50, 100), (1, 2), (16, 32), CELLS, CELLS)})},
    contention=0.25,
)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "profile.yaml"
    path.write_text(format_profile(PROFILE))
    read = read_profile(path)
    assert (read.machine, read.contention) == (PROFILE.machine, 0.25)
    model = read.models["tiny"]
    assert (model.weights_bytes, model.kv_bytes_per_token) == (1000, 64)
    np.testing.assert_array_equal(model.tables[1].prefill, PROFILE.models["tiny"].tables[1].prefill)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("cores: 2", "cores: two", "machine.cores: is 'two'; must be a whole number"),
        ("weights: 1000\n", "\n", "models.0.weights: is required"),
        ("shares: [50, 100]", "shares: [100, 50]", "tables.0: shares: are .*ascending order"),
        ("[0.01, 0.02]", "[0.01]", "prefill: must have a list for each share"),
        ("contention: 0.25", "contention: -1", "contention: is -1; must be at least 0"),
        ("contention: 0.25", "contention: [", "is not YAML"),
    ],
)
def test_an_invalid_field_is_named_with_what_would_be_right(old: str, new: str, problem: str) -> None:
    content = format_profile(PROFILE)
    assert old in content
    with pytest.raises(ConfigError, match=f"^p.yaml: .*{problem}"):
        parse_profile(content.replace(old, new), "p.yaml")


def test_a_model_twice_a_list_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    content = format_profile(PROFILE)
    with pytest.raises(ConfigError, match="tiny: has the same name twice"):
        parse_profile(content + content.partition("models:\n")[2], "p.yaml")
    with pytest.raises(ConfigError, match=r"p.yaml: is no profile: it has no `machine`"):
        parse_profile("[]", "p.yaml")
    with pytest.raises(ConfigError, match=r"cannot be read: No such file.*muxmesh profile"):
        read_profile(tmp_path / "none.yaml")


def test_samples_without_a_table_of_one_device_are_refused() -> None:
    content = format_profile(PROFILE).replace("tensor_parallel: 1", "tensor_parallel: 2")
    with pytest.raises(ConfigError, match=r"^p.yaml: models: tiny: samples: are of tensor_parallel 1"):
        parse_profile(f"{content}  samples: [[prefill, 50, 1, 16, 0.1, 3, 0]]\n", "p.yaml")
