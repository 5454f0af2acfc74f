"""Fields of mesh.yaml that do not fit together."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.grant_page import MAX_WORKERS
from muxmesh.config.contradictions import MAX_UNIT_MODELS, order_without_effect, tensor_parallel_problems
from muxmesh.config.load import parse_mesh_config
from muxmesh.config.schema import MeshConfig
from muxmesh.errors import ConfigError
from muxmesh.types import Role
from tests.support.mesh_yaml import placed_twice, problems, units


def test_a_port_above_the_largest_is_invalid() -> None:
    assert problems("listen: 127.0.0.1:65536") == ["1: listen: port is larger than 65535"]


def test_units_on_several_devices_are_valid_but_cannot_be_run() -> None:
    config = parse_mesh_config(
        units("name: a, device: cuda:0, tensor_parallel: 2", "name: b, device: cuda:2"), "m"
    ).config
    ((location, problem),) = tensor_parallel_problems(config)
    assert location == ("units", 0, "tensor_parallel")
    assert problem.startswith("is 2; no engine can compute a model on several devices yet")


def test_cores_of_units_on_one_cpu_are_disjoint() -> None:
    assert problems(units("name: a, cores: [0, 1]", "name: b, cores: [2]")) == []
    assert problems(units("name: a, cores: [0, 1]", "name: b, cores: [2, 1]", "name: c, cores: [1]")) == [
        "3: units[1].cores: core 1 is also in unit a; units need disjoint cores",
        "4: units[2].cores: core 1 is also in unit a; units need disjoint cores",
    ]


@given(st.lists(st.sets(st.integers(0, 5), min_size=1, max_size=4), min_size=2, max_size=4))
def test_units_are_accepted_exactly_if_no_core_is_in_two_of_them(cores: list[set[int]]) -> None:
    text = units(*(f"name: u{index}, cores: {sorted(own)}" for index, own in enumerate(cores)))
    assert (problems(text) == []) is (len(set().union(*cores)) == sum(map(len, cores)))


def test_several_units_on_one_cpu_need_cores() -> None:
    assert problems(units("name: a, cores: [0]", "name: b")) == [
        "3: units[1].cores: is required, such as cores: [0]: 2 units are on 'cpu'"
    ]
    assert problems(units("name: a", "name: b")) == [
        "2: units[0].cores: is required, such as cores: [0]: 2 units are on 'cpu'",
        "3: units[1].cores: is required, such as cores: [0]: 2 units are on 'cpu'",
    ]


def test_a_single_unit_needs_no_cores() -> None:
    assert parse_mesh_config(units("name: a"), "").config.units[0].cores is None


def test_a_core_is_listed_once() -> None:
    assert problems(units("cores: [3, 0, 3]")) == ["2: units[0].cores: lists core 3 2 times"]


@pytest.mark.parametrize(("threads", "is_valid"), [(1, True), (2, True), (3, False)])
def test_a_worker_has_at_most_one_thread_for_each_core_of_its_unit(threads: int, is_valid: bool) -> None:
    found = problems(units(f"cores: [4, 5], models: [{{name: m, threads: {threads}}}]"))
    assert found == ([] if is_valid else ["2: units[0].models[0].threads: is 3; the unit has 2 cores"])


def test_names_of_units_are_unique() -> None:
    assert problems(units("name: u, cores: [0]", "name: u, cores: [1]")) == [
        "3: units[1].name: 'u' is the name of another unit"
    ]


def test_two_units_need_different_names_since_both_have_the_same_default() -> None:
    assert problems(units("cores: [0]", "cores: [1]")) == ["3: units[1].name: 'unit0' is the name of another unit"]


def test_names_of_models_are_unique_in_a_unit() -> None:
    assert problems(units("models: [{name: a}, {name: b}, {name: a, engine: sim}]")) == [
        "2: units[0].models[2].name: 'a' is the name of another model"
    ]


def test_a_model_may_be_in_several_units() -> None:
    config = parse_mesh_config(placed_twice("", ""), "").config
    assert [unit.name for unit in config.units_of("m")] == ["a", "b"]
    assert [(unit.name, model.name) for unit, model in config.placements()] == [("a", "m"), ("b", "m")]
    assert config.units_of("x") == ()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("source", "./other"),
        ("engine", "sim"),
        ("max_model_len", "100"),
        ("default_max_new_tokens", "7"),
    ],
)
def test_a_model_in_several_units_has_the_same_client_visible_fields(field: str, value: str) -> None:
    problem = f"3: units[1].models[0].{field}: differs from 'm' in unit a; must be equal in all units"
    assert problems(placed_twice("", f", {field}: {value}")) == [problem]
    assert problems(placed_twice(f", {field}: {value}", "")) == [problem]
    assert problems(placed_twice(f", {field}: {value}", f", {field}: {value}")) == []


def test_a_sim_model_in_several_units_has_the_same_profile() -> None:
    sim = ", engine: sim, sim: {base_s: %s}"
    assert problems(placed_twice(sim % 1, sim % 1)) == []
    assert problems(placed_twice(sim % 1, sim % 2)) == [
        "3: units[1].models[0].sim: differs from 'm' in unit a; must be equal in all units"
    ]


@pytest.mark.parametrize(
    "field", ["max_num_seqs: 3", "block_size: 8", "kv_guaranteed: 16MiB", "prefill_token_budget: 64", "threads: 1"]
)
def test_a_model_in_several_units_may_have_different_resources(field: str) -> None:
    assert problems(placed_twice("", f", {field}")) == []


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_a_sim_profile_needs_the_sim_engine(engine: str) -> None:
    assert problems(units(f"models: [{{name: m, engine: {engine}, sim: {{}}}}]")) == [
        "2: units[0].models[0].sim: has no effect with engine: native; it is for sim"
    ]


def test_a_slab_fits_into_the_pool() -> None:
    assert problems(units("kv_pool: 1MiB, slab: 1MiB")) == []
    assert problems(units("kv_pool: 1MiB, slab: 2MiB")) == [
        "2: units[0].slab: is 2097152 bytes, larger than kv_pool (1048576 bytes)"
    ]


def test_guaranteed_memory_fits_into_the_pool_in_whole_slabs() -> None:
    text = "kv_pool: 4MiB, slab: 1MiB, models: [{name: a, kv_guaranteed: %s}, {name: b, kv_guaranteed: 2MiB}]"
    assert problems(units(text % "2MiB")) == []
    assert problems(units(text % "2049KiB")) == [
        "2: units[0].kv_pool: has 4 slabs of 1048576 bytes; kv_guaranteed of the models needs 5 slabs"
    ]


@pytest.mark.parametrize(
    ("order", "without_effect"),
    [
        ({}, []),
        ({"longest_lead": 1.0, "longest_lead_s": 2.0}, []),
        ({"policy": "mlfq", "mlfq_quantum_s": 1.0}, []),
        ({"policy": "mlfq", "longest_lead": 100.0}, ["longest_lead"]),
        ({"policy": "fcfs", "longest_lead_s": 1.0, "mlfq_quantum_s": 1.0}, ["longest_lead_s", "mlfq_quantum_s"]),
        ({"fairness_band_s": 2.0, "overdue_share": 0.5, "max_wait_s": 5.0}, []),
        ({"fairness_band_s": 2.0, "overdue_share": 0.5}, ["overdue_share"]),
        ({"fairness": False, "fairness_band_s": 2.0, "overdue_share": 0.5}, ["fairness_band_s", "overdue_share"]),
    ],
)
def test_a_setting_of_another_policy_has_no_effect(order: dict[str, Any], without_effect: list[str]) -> None:
    config = MeshConfig.model_validate({"order": order})
    assert [location for location, _ in order_without_effect(config)] == [("order", name) for name in without_effect]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{models: [{name: a, dtype: bfloat16}]}", "models[0].dtype: is bfloat16; a CPU computes in float32 only"),
        (
            "{models: [{name: a, kv_cache_dtype: float16}]}",
            "models[0].kv_cache_dtype: is float16; a CPU computes in float32 only",
        ),
        (
            "{models: [{name: a, continuous_decode_steps: 4}]}",
            "models[0].continuous_decode_steps: has no effect with engine: native on device: cpu; "
            "it is for device: cuda:N and for engine: sim",
        ),
        ("{mps: off, models: [{name: a}]}", "mps: has no effect with device: cpu; it is for device: cuda:N"),
        (
            "{device: 'cuda:1', models: [{name: a, threads: 2}]}",
            "models[0].threads: has no effect with device: cuda:1; it is for device: cpu",
        ),
        (
            "{device: 'cuda:0', mps: off, models: [{name: a, compute_share: {decode: 40}}]}",
            "models[0].compute_share: has no effect with mps: off; it is for mps: auto or on, or green_contexts: true",
        ),
        (
            "{device: 'cuda:0', green_contexts: true, models: [{name: a}, {name: b, compute_share: 100}]}",
            "green_contexts: has no effect: no model of the unit has a compute_share below 100",
        ),
        (
            "{device: 'cuda:0', models: [{name: a, engine: sim}]}",
            "models[0].engine: sim computes on no GPU; the unit's device is cuda:0",
        ),
        (
            "{device: 'cuda:0', models: [{name: a, dtype: bfloat16, kv_cache_dtype: float32}]}",
            "models[0].kv_cache_dtype: is float32, more exact than dtype: bfloat16; "
            "it may be auto, float16 or bfloat16",
        ),
    ],
)
def test_a_setting_that_the_device_does_not_have_is_refused(text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_mesh_config(f"units: [{text}]", "mesh.yaml")
    assert str(caught.value) == f"mesh.yaml:1: units[0].{expected}"


@pytest.mark.parametrize(
    "unit",
    [
        "mps: off, models: [{name: a}]",
        "mps: off, models: [{name: a, compute_share: 100}]",
        "mps: off, green_contexts: true, models: [{name: a}, {name: b, compute_share: 50}]",
        "mps: auto, models: [{name: a, compute_share: 50}]",
    ],
)
def test_a_share_is_accepted_where_something_limits_workers_to_it(unit: str) -> None:
    assert problems(f"units: [{{device: 'cuda:0', {unit}}}]") == []


@pytest.mark.parametrize(
    ("arbiter", "expected"),
    [
        ("mode: spatial, max_overtakes: 3", ["max_overtakes: has no effect with mode: spatial"]),
        ("mode: temporal, over_subscription: 0", ["over_subscription: has no effect with mode: temporal"]),
        ("mode: fcfs, urgent_slack_s: 0.1", ["urgent_slack_s: has no effect with mode: fcfs"]),
        ("mode: roundrobin, max_stall_s: 0.1, stall_budget: 0", ["stall_budget: has no effect with mode: roundrobin"]),
        ("mode: fcfs, max_stall_s: 0.1", ["max_stall_s: has no effect with mode: fcfs"]),
        ("mode: adbs, max_stall_s: 0.1, stall_budget: 0.2", []),
        ("mode: adbs, urgent_slack_s: 0.1, over_subscription: 10, max_overtakes: 3, longest_grant_s: 5", []),
        ("mode: auto, urgent_slack_s: 0.1, over_subscription: 10", []),
    ],
)
def test_a_setting_that_the_mode_of_the_arbiter_ignores_is_named(arbiter: str, expected: list[str]) -> None:
    found = problems(f"units: [{{arbiter: {{{arbiter}}}, models: [{{name: a, slo: {{scale: 4}}}}]}}]")
    assert found == [f"1: units[0].arbiter.{one}" for one in expected]


def test_settings_of_the_arbiter_that_its_unit_has_no_use_for_are_named() -> None:
    assert problems("units: [{arbiter: {urgent_slack_s: 0.1}, models: [{name: a}]}]") == [
        "1: units[0].arbiter.urgent_slack_s: has no effect: no model of the unit has an slo"
    ]
    gpu = "units: [{device: 'cuda:0', mps: %s, arbiter: {over_subscription: 10}, models: [{name: a}]}]"
    assert problems(gpu % "auto") == []
    assert problems(gpu % "off") == [
        "1: units[0].arbiter.over_subscription: has no effect with mps: off; it is for mps: auto or on"
    ]


def test_all_models_of_a_unit_have_an_expected_rate_or_none() -> None:
    models = "[{name: a, expected_rate: 2}, {name: b%s}]"
    assert problems(f"units: [{{models: {models % ', expected_rate: 0.5'}}}]") == []
    assert problems(f"units: [{{models: {models % ''}}}]") == [
        "1: units[0].models[0].expected_rate: has no effect: other models of the unit have none; set it for all of "
        "them or for none"
    ]


def test_a_share_is_accepted_on_a_cpu() -> None:
    assert problems("units: [{models: [{name: a, compute_share: 50, threads: 2}]}]") == []


def test_slabs_on_a_gpu_are_aligned_for_its_loads() -> None:
    text = "units: [{device: %s, slab: %d, models: [{name: a}]}]"
    assert problems(text % ("'cuda:0'", 65600)) == [] == problems(text % ("cpu", 65608))
    assert problems(text % ("'cuda:0'", 65608)) == [
        "1: units[0].slab: is 65608 bytes; on a GPU it must be a multiple of 64"
    ]


def test_a_model_may_be_on_a_cpu_and_on_a_gpu_if_it_computes_the_same() -> None:
    text = "units: [{name: c, models: [{name: m}]}, {name: g, device: 'cuda:0', models: [{name: m%s}]}]"
    assert problems(text % ", dtype: float32, compute_share: 50") == []
    assert problems(text % ", dtype: bfloat16") == [
        "1: units[1].models[0].dtype: differs from 'm' in unit c; must be equal in all units"
    ]


def test_units_on_gpus_need_no_cores() -> None:
    text = "units: [{name: a, device: 'cuda:0', models: [{name: a}]}, {name: b, device: 'cuda:1', models: [{name: b}]}]"
    assert [unit.device_index for unit in parse_mesh_config(text, "mesh.yaml").config.units] == [0, 1]


def test_one_number_is_the_share_of_both_workers() -> None:
    text = "units: [{device: 'cuda:0', models: [{name: a, compute_share: 40, dtype: bfloat16}]}]"
    model = parse_mesh_config(text, "mesh.yaml").config.units[0].models[0]
    assert [model.compute_share.of(role) for role in Role] == [40, 40]
    assert model.kv_dtype == "bfloat16"


@pytest.mark.parametrize(
    ("models", "problem"),
    [
        (
            "{name: a, pinned: true}, {name: b}",
            "is 1, but 1 models are pinned: the others could never wake; must be at least 2",
        ),
        (
            "{name: a, pinned: true}, {name: b, pinned: true}",
            "is 1, but 2 models are pinned: the others could never wake; must be at least 2",
        ),
        (
            "{name: a, start: awake}, {name: b, start: awake}",
            "is 1, but 2 models start awake or are pinned; must be at least 2",
        ),
        ("{name: a, start: awake}, {name: b, start: asleep}, {name: c}", ""),
        ("{name: a, pinned: true}", ""),
    ],
)
def test_every_model_can_be_awake_at_some_time(models: str, problem: str) -> None:
    found = problems(units(f"max_awake_models: 1, models: [{models}]"))
    assert found == ([f"2: units[0].max_awake_models: {problem}"] if problem else [])


@pytest.mark.parametrize("num_models", [MAX_UNIT_MODELS, MAX_UNIT_MODELS + 1])
def test_a_unit_has_a_slot_for_each_worker_of_its_models(num_models: int) -> None:
    models = ", ".join(f"{{name: m{index}}}" for index in range(num_models))
    problem = "2: units[0].models: has 65 models; a unit has at most 64"
    assert problems(units(f"models: [{models}]")) == ([problem] if num_models > MAX_UNIT_MODELS else [])
    assert len(Role) * MAX_UNIT_MODELS == MAX_WORKERS
