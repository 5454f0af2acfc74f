"""The stored constants."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.muxserve.constants import PATH, read_constants
from muxmesh.errors import ConfigError


def test_the_stored_constants_can_be_read_and_replaced_by_a_fit() -> None:
    constants = read_constants()
    fitted = replace(constants, contention=1.0, overhead=0.5)
    assert (fitted.contention, fitted.overhead) == (1.0, 0.5)
    assert fitted.memory_fraction == constants.memory_fraction


def test_a_wrong_value_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(PATH.read_text().replace("memory_fraction: 0.65", "memory_fraction: much"))
    with pytest.raises(ConfigError, match="memory_fraction: is 'much'"):
        read_constants(path)
    path.write_text("contention: 1\n")
    with pytest.raises(ConfigError, match="needs exactly these fields"):
        read_constants(path)
