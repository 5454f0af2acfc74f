"""mesh.yaml with whatever content: a configuration, or errors of one line each. `tests/muxmesh/config` has examples."""

import random
from typing import Any

import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from muxmesh.config.contradictions import order_without_effect as check
from muxmesh.config.field_errors import section_at
from muxmesh.config.load import parse_mesh_config
from muxmesh.config.model_config import ModelConfig, SimProfile
from muxmesh.config.schema import MeshConfig, OrderConfig, RouterConfig, UnitConfig
from muxmesh.errors import ConfigError
from tests.support.fuzzing import fuzz

VALID = """# a mesh
mesh_id: blue
listen: "127.0.0.1:50051"
redis_url: redis://host:6379
router: {max_waiting_requests: 100, max_prompt_bytes: 64KiB, predictor_budget_s: 0.05}
order:
  policy: srtf-aged
  longest_lead: 10
  longest_lead_s: 1e3
units:
  - &unit
    name: cpu0
    device: cpu
    cores: [0, 1]
    kv_pool: 2GiB
    kv_swap: 512MiB
    slab: 16777216
    models:
      - &model
        name: a
        engine: sim
        block_size: 16
        sim: {base_s: 0.01, per_token_s: .5, output_tokens: 0x10}
      - <<: *model
        name: b
        threads: 2
  - <<: *unit
    name: cpu1
    cores: [2]
    models: [*model]
"""
PIECES = [
    "&a ", "*a", "*model", "<<: *unit", "!!python/object:os.system ", "!!set ", "!x ", "- ", "? ", ": ", "{", "}", "[",
    "]", ",", "|\n", ">\n", "'", '"', "#", "---\n", "...\n", "%YAML 1.2\n", "\t", "\n", "\r", "\0", "\x85", "\u2028",
    "\ud800", "\ufeff", "~", "null", "yes", "1:30", ".inf", ".nan", "-1", "9" * 5000, "1e999", "0o17", "2026-13-45",
    "units:", "models:", "name:", "sim:", "cores:",
]  # fmt: skip
SECTIONS: list[type[BaseModel]] = [MeshConfig, UnitConfig, ModelConfig, SimProfile, OrderConfig, RouterConfig]
NAMES = sorted({name for section in SECTIONS for name in section.model_fields})
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**400), 10**400)
    | st.floats()
    | st.dates()
    | st.binary(max_size=5)
    | st.text(max_size=20)
    | st.sampled_from(
        ["cpu", "sim", "native", "fcfs", "mlfq", "1GiB", "4KiB", "raw", "int8", "a", "b", "h:1", "x" * 99]
    )
)
anything: st.SearchStrategy[Any] = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=5), inner, max_size=5)
    ),
    max_leaves=15,
)


def result(text: str) -> list[str]:
    """The lines of the error; none for a configuration."""
    try:
        parse_mesh_config(text, "f", check)
    except ConfigError as error:
        return str(error).splitlines()
    return []


def assert_config_or_lines(text: str) -> None:
    for line in result(text):
        assert line.startswith("f:"), line
        assert line.isprintable(), line
        assert "Input should" not in line and "Traceback" not in line, line
        assert len(line) < 1000 + len(text)


def test_the_text_that_is_changed_is_valid() -> None:
    assert result(VALID) == []


@given(st.randoms(use_true_random=False), st.integers(1, 6))
@fuzz(quick=60, part=0.08)
def test_changes_of_a_valid_text(chance: random.Random, num_changes: int) -> None:
    text = VALID
    for _ in range(num_changes):
        start = chance.randrange(len(text) + 1)
        end = min(len(text), start + chance.choice([0, 0, 1, 5, 40]))
        piece = chance.choice([chance.choice(PIECES), text[chance.randrange(len(text) or 1) :][:30], ""])
        text = text[:start] + piece + text[end:]
    assert_config_or_lines(text)


def section_of(root: type[BaseModel], values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A section with its real fields, in which values of any type stand beside nested sections."""
    fields = {}
    for name in root.model_fields:
        inner = section_at((name,), root)
        listed = section_at((name, 0), root)
        fields[name] = values
        if inner is not None:
            fields[name] = values | section_of(inner, values)
        elif listed is not None:
            fields[name] = values | st.lists(section_of(listed, values), min_size=1, max_size=3)
    return st.fixed_dictionaries({}, optional=fields)


@given(section_of(MeshConfig, anything))
@fuzz(quick=60, part=0.08)
def test_values_of_any_type_under_real_fields(content: dict[str, Any]) -> None:
    assert_config_or_lines(yaml.safe_dump(content, allow_unicode=True))


@given(st.text() | st.lists(st.sampled_from(PIECES), max_size=30).map("".join))
@fuzz(quick=60, part=0.04)
def test_any_text(text: str) -> None:
    assert_config_or_lines(text)
