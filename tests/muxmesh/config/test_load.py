"""mesh.yaml as text: line numbers, YAML errors, and several errors at once. `test_schema` tests the fields."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from muxmesh.config.contradictions import order_without_effect
from muxmesh.config.load import checked_config, default_config, load_mesh_config, parse_mesh_config, with_listen
from muxmesh.config.schema import DEFAULT_MODEL, MeshConfig
from muxmesh.config.section import Location
from muxmesh.errors import ConfigError

GOOD = """
listen: 0.0.0.0:6000
units:
  - name: cpu0
    kv_pool: 2GiB
    models:
      - name: chat
        source: ./models/chat
        max_num_seqs: 4
      - name: load
        engine: sim
        sim: {base_s: 0.01}
"""


def problems(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_mesh_config(text, "mesh.yaml")
    return str(caught.value).splitlines()


def test_a_valid_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "mesh.yaml").write_text(GOOD)
    config = load_mesh_config(tmp_path / "mesh.yaml").config
    unit, model = config.units[0], config.models()["chat"]
    assert (config.listen, unit.kv_pool, model.max_num_seqs) == ("0.0.0.0:6000", 2 * 1024**3, 4)


def test_the_line_of_every_field_is_known() -> None:
    lines = parse_mesh_config(GOOD, "mesh.yaml").lines
    assert lines["listen",] == 2
    assert lines["units", 0, "kv_pool"] == 5
    assert lines["units", 0, "models", 1] == 10
    assert lines["units", 0, "models", 1, "sim", "base_s"] == 12


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "{}", "null"])
def test_an_empty_file_is_the_default_mesh(text: str) -> None:
    assert parse_mesh_config(text, "mesh.yaml").config == default_config().config == MeshConfig()
    assert list(MeshConfig().models()) == [DEFAULT_MODEL]


def test_every_error_is_reported_with_field_and_line() -> None:
    found = problems(
        """listen: nowhere
colour: blue
units:
  - kv_pool: 10
    models:
      - name: a b
      - name: ok
        block_size: 17
        max_num_seqs: many
"""
    )
    assert [line.split(": ")[:2] for line in found] == [
        ["mesh.yaml:1", "listen"],
        ["mesh.yaml:2", "colour"],
        ["mesh.yaml:4", "units[0].kv_pool"],
        ["mesh.yaml:6", "units[0].models[0].name"],
        ["mesh.yaml:8", "units[0].models[1].block_size"],
        ["mesh.yaml:9", "units[0].models[1].max_num_seqs"],
    ]


def test_a_missing_field_is_reported_at_its_parent() -> None:
    assert problems("units:\n  - models:\n    - {name: a}\n    - source: b") == [
        "mesh.yaml:4: units[0].models[1].name: is required"
    ]


def test_a_list_of_invalid_items_is_not_called_too_short() -> None:
    (problem,) = problems("units:\n  - models:\n    - {}")
    assert problem == "mesh.yaml:3: units[0].models[0].name: is required"


def test_an_empty_list_is_refused() -> None:
    assert problems("units:\n  - models: []") == ["mesh.yaml:2: units[0].models: must not be empty"]


@pytest.mark.parametrize("text", ["- 1", "text"])
def test_a_text_that_is_no_mapping_is_refused(text: str) -> None:
    assert problems(text) == ["mesh.yaml:1: must be a mapping with fields like `listen` and `units`"]


def test_equal_fields_of_different_units_are_no_duplicates() -> None:
    text = "units:\n  - {name: a, cores: [0], models: [{name: m}]}\n  - {name: b, cores: [1], models: [{name: m}]}"
    assert [unit.name for unit in parse_mesh_config(text, "mesh.yaml").config.units] == ["a", "b"]


def test_anchors_and_merge_keys_are_supported() -> None:
    text = """
units:
  - models:
    - &sim
      name: a
      engine: sim
      max_num_seqs: 3
    - <<: *sim
      name: b
"""
    models = parse_mesh_config(text, "mesh.yaml").config.models()
    assert [(name, model.engine, model.max_num_seqs) for name, model in models.items()] == [
        ("a", "sim", 3),
        ("b", "sim", 3),
    ]


def test_an_error_in_a_merged_field_is_reported_at_the_field_that_merges_it() -> None:
    text = "units:\n  - models:\n    - &m {name: a, block_size: 7}\n    -\n      <<: *m\n      name: b"
    assert [problem.split(": ")[:2] for problem in problems(text)] == [
        ["mesh.yaml:3", "units[0].models[0].block_size"],
        ["mesh.yaml:5", "units[0].models[1].block_size"],
    ]


def test_errors_of_combinations_are_reported_with_their_lines_too() -> None:
    text = "listen: 127.0.0.1:70000\nunits:\n  - models:\n    - name: a\n    - name: a"
    assert problems(text) == [
        "mesh.yaml:1: listen: port is larger than 65535",
        "mesh.yaml:5: units[0].models[1].name: 'a' is the name of another model",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "order:\n  policy: fcfs\n  longest_lead: 1",
            "mesh.yaml:3: order.longest_lead: has no effect with policy: fcfs; it is for srtf-aged",
        ),
        (
            "order: {mlfq_quantum_s: 1}",
            "mesh.yaml:1: order.mlfq_quantum_s: has no effect with policy: srtf-aged; it is for mlfq",
        ),
    ],
)
def test_a_setting_of_another_policy_is_refused(text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_mesh_config(text, "mesh.yaml", order_without_effect)
    assert str(caught.value) == expected


def test_errors_of_fields_hide_no_error_of_other_fields() -> None:
    text = """
units:
  - device: gpu
    kv_pool: 10MiB
    slab: 20MiB
    cores: [0, 0]
    models:
      - {name: a, engine: sims}
      - {name: a, threads: 0}
order: {policy: fcfs, longest_lead: 1}
"""
    with pytest.raises(ConfigError) as caught:
        parse_mesh_config(text, "mesh.yaml", order_without_effect)
    assert [line.split(": ")[1] for line in str(caught.value).splitlines()] == [
        "units[0].device",
        "units[0].slab",
        "units[0].cores",
        "units[0].models[0].engine",
        "units[0].models[1].name",
        "units[0].models[1].threads",
        "order.longest_lead",
    ]


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("units: [{kv_pool: much, slab: 20GiB, models: [{name: a}]}]", "units[0].kv_pool"),
        ("units: [{slab: big, kv_pool: 1MiB, models: [{name: a}]}]", "units[0].slab"),
        ("units: [{models: [{name: a, engine: fast, sim: {base_s: 1}}]}]", "units[0].models[0].engine"),
        ("order: {policy: best, mlfq_quantum_s: 1}", "order.policy"),
        ("units: [{cores: many, models: [{name: a, threads: 9}]}]", "units[0].cores"),
        ("units: [{cores: [0], models: [{name: a, max_model_len: x}]},"
         " {name: b, cores: [1], models: [{name: a, max_model_len: 9}]}]", "units[0].models[0].max_model_len"),
        ("units: [{cores: [0], models: [{name: a, generation_config: bogus}]},"
         " {name: b, cores: [1], models: [{name: a, generation_config: ignore}]}]",
         "units[0].models[0].generation_config"),
        ("units: [{device: cuda, mps: on, require_ipc: true, models: [{name: a, dtype: bfloat16, compute_share: 50}]}]",
         "units[0].device"),
        ("units: [{device: gpu, models: [{name: a, kv_cache_dtype: float16, continuous_decode_steps: 4}]}]",
         "units[0].device"),
        ("units: [{device: 'cuda:0', green_contexts: true, models: [{name: a, compute_share: half}]}]",
         "units[0].models[0].compute_share"),
        ("units: [{modles: [{name: a}]}]", "units[0].modles"),
        ("unit: [{models: [{name: a}]}]", "unit"),
    ],
)  # fmt: skip
def test_what_may_follow_from_an_invalid_field_is_not_reported(text: str, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_mesh_config(text, "mesh.yaml", order_without_effect)
    assert [line.split(": ")[1] for line in str(caught.value).splitlines()] == [field]


def test_checks_of_models_are_reported_with_the_errors_of_other_fields() -> None:
    def check(config: MeshConfig) -> Iterator[tuple[Location, str]]:
        for index, model in enumerate(config.units[0].models):
            yield ("units", 0, "models", index, "source"), f"{model.name} is not there"

    with pytest.raises(ConfigError) as caught:
        parse_mesh_config(
            "listen: 5\nunits:\n  - models:\n    - {name: a}\n    - {name: b c}\n    - {name: d}", "f", check
        )
    assert [line.split(": ", 2)[:2] for line in str(caught.value).splitlines()] == [
        ["f:1", "listen"],
        ["f:4", "units[0].models[0].source"],
        ["f:5", "units[0].models[1].name"],
        ["f:6", "units[0].models[2].source"],
    ]


def test_a_file_with_very_many_problems_lists_a_hundred() -> None:
    found = problems("units:\n  - models:\n" + "    - {name: '?'}\n" * 300)
    assert len(found) == 101
    assert found[-1] == "mesh.yaml: and 200 more problems"


def test_a_problem_is_one_line_whatever_the_file_has() -> None:
    assert problems('"a\\nb\\e": 1') == [
        "mesh.yaml:1: a\\nb\\x1b: unknown field; known: mesh_id, listen, tls, internal_tls, redis_url, log_format, "
        "metrics, access, routers, router, order, units"
    ]


def test_refused_problems_are_sorted_by_line() -> None:
    loaded = parse_mesh_config("mesh_id: m\nlisten: a:1\norder:\n  trace: true", "mesh.yaml")
    loaded.refuse([])
    with pytest.raises(ConfigError) as caught:
        loaded.refuse([(("order", "policy"), "third"), (("listen",), "second"), (("mesh_id",), "first")])
    assert str(caught.value).splitlines() == [
        "mesh.yaml:1: mesh_id: first",
        "mesh.yaml:2: listen: second",
        "mesh.yaml:3: order.policy: third",
    ]


def test_a_problem_of_the_default_configuration_has_its_origin() -> None:
    with pytest.raises(ConfigError, match=re.escape("(default configuration):1: units[0].cores: too many")):
        default_config().refuse([(("units", 0, "cores"), "too many")])


def test_the_listen_address_can_be_replaced() -> None:
    loaded = parse_mesh_config(GOOD, "mesh.yaml")
    replaced = with_listen(loaded, "[::1]:0")
    assert replaced.config == loaded.config.model_copy(update={"listen": "[::1]:0"})
    assert replaced.lines == loaded.lines


def test_a_replaced_listen_address_keeps_which_fields_are_set() -> None:
    """`sim` without the sim engine, and settings of another policy, are errors only if they are set."""
    loaded = with_listen(parse_mesh_config("order: {longest_lead: 100}", "mesh.yaml"), "a:1")
    assert loaded.config.order.model_fields_set == {"longest_lead"}
    assert loaded.config.units[0].models[0].model_fields_set == MeshConfig().units[0].models[0].model_fields_set


@pytest.mark.parametrize("listen", ["somewhere", ":50051", "127.0.0.1:x", "127.0.0.1:", ""])
def test_a_replaced_listen_address_is_host_and_port(listen: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"listen: is {listen!r}; HOST:PORT is needed")):
        with_listen(default_config(), listen)


def test_a_configuration_that_is_from_no_file_is_checked_too() -> None:
    config = MeshConfig.model_validate({"units": [{"models": [{"name": "m", "dtype": "float16"}]}]})
    with pytest.raises(ConfigError, match=r"^\(command line\):1: units\[0\].models\[0\].dtype: "):
        checked_config(config, "(command line)")
