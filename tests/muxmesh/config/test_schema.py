"""The fields of mesh.yaml: what is valid, and the error for what is not."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from muxmesh.config.load import parse_mesh_config
from muxmesh.config.schema import MIB, MeshConfig, ModelConfig, OrderConfig, Section, UnitConfig, order_without_effect
from muxmesh.errors import ConfigError


def problems(text: str) -> list[str]:
    """One line for each problem, without the name of the file."""
    try:
        parse_mesh_config(text, "")
    except ConfigError as error:
        return [line.removeprefix(":") for line in str(error).splitlines()]
    return []


def units(*fields: str) -> str:
    """mesh.yaml with a unit in each line from 2 on, each with a model `m` unless it has `models`."""
    listed = (unit if "models" in unit else f"{unit}, models: [{{name: m}}]" for unit in fields)
    return "units:\n" + "\n".join(f"  - {{{unit}}}" for unit in listed)


def _sections(section: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield section
    for child in section.__subclasses__():
        yield from _sections(child)


@pytest.mark.parametrize("section", list(_sections(Section))[1:])
def test_every_field_has_a_description(section: type[BaseModel]) -> None:
    assert [name for name, field in section.model_fields.items() if not field.description] == []


@pytest.mark.parametrize("section", list(_sections(Section))[1:])
def test_every_section_is_frozen_and_refuses_unknown_fields(section: type[BaseModel]) -> None:
    assert section.model_config.get("frozen") is True
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        section.model_validate({"unknown": 1})


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("order: {longest_lead: true}", "1: order.longest_lead: is true; must be a number"),
        ("order: {longest_lead_s: yes}", "1: order.longest_lead_s: is true; must be a number"),
        ("router: {max_restarts: off}", "1: router.max_restarts: is false; must be a number"),
        (units("kv_pool: no"), "2: units[0].kv_pool: is false; must be a number"),
        (units("models: [{name: m, threads: on}]"), "2: units[0].models[0].threads: is true; must be a number"),
    ],
)
def test_a_boolean_is_not_a_number(text: str, problem: str) -> None:
    assert problems(text) == [problem]


def test_a_boolean_field_takes_a_boolean() -> None:
    assert parse_mesh_config("order: {trace: yes}", "").config.order.trace is True


@pytest.mark.parametrize("name", ["a", "A1", "smol-LM2.135m_x", "7b", "a" * 64])
def test_a_name_has_letters_digits_and_three_other_characters(name: str) -> None:
    assert UnitConfig.model_validate({"name": name, "models": [{"name": name}]}).models[0].name == name


@pytest.mark.parametrize("name", ["", "-a", ".a", "_a", "a b", "a/b", "a:b", "{a}", "ä", "a\n", "a" * 65])
def test_a_name_that_breaks_socket_paths_or_redis_keys_is_invalid(name: str) -> None:
    for field in ({"mesh_id": name}, {"units": [{"name": name, "models": [{"name": "m"}]}]}):
        with pytest.raises(ValidationError):
            MeshConfig.model_validate(field)


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "0.0.0.0:65535", "[::1]:50051", "host.example:1"])
def test_a_listen_address_is_host_and_port(listen: str) -> None:
    assert parse_mesh_config(f"listen: '{listen}'", "").config.listen == listen


@pytest.mark.parametrize("listen", ["localhost", ":50051", "a:", "a:b", "a:123456"])
def test_a_listen_address_without_host_or_port_is_invalid(listen: str) -> None:
    (problem,) = problems(f"listen: '{listen}'")
    assert problem.startswith("1: listen: ")


def test_a_port_above_the_largest_is_invalid() -> None:
    assert problems("listen: 127.0.0.1:65536") == ["1: listen: port is larger than 65535"]


@pytest.mark.parametrize(
    ("url", "is_valid"), [("redis://h:1", True), ("unix:///x", True), ("http://h", False), ("x", False)]
)
def test_a_redis_url_has_a_scheme_of_redis(url: str, is_valid: bool) -> None:
    assert (problems(f"redis_url: {url}") == []) is is_valid


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


@pytest.mark.parametrize(
    ("cores", "field"),
    [("[-1]", "cores[0]"), ("[0, true]", "cores[1]"), ("[1.0]", "cores[0]"), ("['1']", "cores[0]"), ("[]", "cores"),
     ("0-3", "cores"), ("2", "cores")],
)  # fmt: skip
def test_cores_are_a_list_of_whole_numbers(cores: str, field: str) -> None:
    (problem,) = problems(units(f"cores: {cores}"))
    assert problem.startswith(f"2: units[0].{field}: ")


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
    assert problems(units("models: [{name: a}, {name: b}, {name: a}]")) == [
        "2: units[0].models[2].name: 'a' is the name of another model"
    ]


def placed_twice(first: str, second: str) -> str:
    return units(
        f"name: a, cores: [0], models: [{{name: m{first}}}]", f"name: b, cores: [1], models: [{{name: m{second}}}]"
    )


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


def test_the_configuration_of_a_model_is_that_of_its_first_unit() -> None:
    config = parse_mesh_config(placed_twice(", max_num_seqs: 3", ", max_num_seqs: 4"), "").config
    assert [(name, model.max_num_seqs) for name, model in config.models().items()] == [("m", 3)]


def test_torch_is_an_alias_of_the_native_engine() -> None:
    aliased = parse_mesh_config(placed_twice(", engine: torch", ", engine: native"), "").config
    assert {model.engine for _, model in aliased.placements()} == {"native"}


@pytest.mark.parametrize("engine", ["vllm", "Torch", "", "null"])
def test_an_unknown_engine_is_refused(engine: str) -> None:
    (problem,) = problems(units(f"models: [{{name: m, engine: {engine}}}]"))
    assert problem.startswith("2: units[0].models[0].engine: is ")


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_a_sim_profile_needs_the_sim_engine(engine: str) -> None:
    assert problems(units(f"models: [{{name: m, engine: {engine}, sim: {{}}}}]")) == [
        "2: units[0].models[0].sim: has no effect with engine: native; it is for sim"
    ]


def test_geometric_output_lengths_need_a_mean() -> None:
    assert problems(units("models: [{name: m, engine: sim, sim: {output_lengths: geometric}}]")) == [
        "2: units[0].models[0].sim: output_lengths: geometric needs output_tokens, the mean length"
    ]


@pytest.mark.parametrize("value", [".nan", ".inf", "-0.1", "3601"])
def test_step_times_are_finite_and_at_most_an_hour(value: str) -> None:
    (problem,) = problems(units(f"models: [{{name: m, engine: sim, sim: {{base_s: {value}}}}}]"))
    assert problem.startswith("2: units[0].models[0].sim.base_s: ")


@pytest.mark.parametrize(("budget", "seqs", "expected"), [(128, 16, 128), (64, 64, 64), (8, 40, 40)])
def test_a_step_has_a_token_for_every_sequence(budget: int, seqs: int, expected: int) -> None:
    model = ModelConfig(name="m", prefill_token_budget=budget, max_num_seqs=seqs)
    assert model.step_token_budget == expected


@pytest.mark.parametrize(
    ("field", "value"),
    [("block_size", 17), ("dtype", "float16"), ("max_model_len", 1), ("default_max_new_tokens", 0),
     ("max_num_seqs", 0), ("max_num_seqs", 1025), ("kv_answer_tokens", 0), ("kv_guaranteed", -1),
     ("kv_swap_format", "int4"), ("prefill_token_budget", 0), ("threads", 0)],
)  # fmt: skip
def test_a_field_of_a_model_outside_its_range_is_refused(field: str, value: Any) -> None:
    (problem,) = problems(units(f"models: [{{name: m, {field}: {value}}}]"))
    assert problem.startswith(f"2: units[0].models[0].{field}: ")


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("2GiB", 2 << 30),
        ("512MiB", 512 << 20),
        (1048576, MIB),
        ("1048576", MIB),
        ("1.5MiB", 3 << 19),
        (" 2 gib ", 2 << 30),
        ("3G", 3 * 10**9),
        ("3MB", 3 * 10**6),
    ],
)
def test_sizes_have_binary_units(text: str | int, num_bytes: int) -> None:
    unit = UnitConfig.model_validate({"kv_pool": text, "slab": 4096, "models": [{"name": "m"}]})
    assert unit.kv_pool == num_bytes


@pytest.mark.parametrize(
    "field",
    [
        "kv_pool: 1023KiB",
        "slab: 4095",
        "kv_swap: -1",
        "kv_pool: 2GX",
        "kv_pool: much",
        "kv_pool: 4GB!",
        "kv_swap: 1GiB + 2GiB",
        "slab: 64MiB more",
        "kv_swap: 1GiB2",
    ],
)
def test_a_size_that_is_too_small_or_malformed_is_refused(field: str) -> None:
    (problem,) = problems(units(field))
    assert problem.startswith(f"2: units[0].{field.partition(':')[0]}: ")


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


@pytest.mark.parametrize(("num_bytes", "slabs"), [(0, 0), (1, 1), (MIB, 1), (MIB + 1, 2)])
def test_a_guarantee_is_rounded_up_to_slabs(num_bytes: int, slabs: int) -> None:
    model = ModelConfig.model_validate({"name": "m", "kv_guaranteed": num_bytes})
    assert UnitConfig.model_validate({"slab": MIB, "models": [model]}).guaranteed_slabs(model) == slabs


def test_the_capacity_counts_whole_blocks_in_whole_slabs() -> None:
    model = ModelConfig(name="m", block_size=8)
    unit = UnitConfig.model_validate({"kv_pool": 3 * MIB + MIB // 2, "slab": MIB, "models": [model]})
    assert unit.capacity_tokens(model, 400_000) == 3 * 2 * 8
    assert unit.capacity_tokens(model, MIB + 1) == 0


@pytest.mark.parametrize(
    ("order", "without_effect"),
    [
        ({}, []),
        ({"longest_lead": 1.0, "longest_lead_s": 2.0}, []),
        ({"policy": "mlfq", "mlfq_quantum_s": 1.0}, []),
        ({"policy": "mlfq", "longest_lead": 100.0}, ["longest_lead"]),
        ({"policy": "fcfs", "longest_lead_s": 1.0, "mlfq_quantum_s": 1.0}, ["longest_lead_s", "mlfq_quantum_s"]),
    ],
)
def test_a_setting_of_another_policy_has_no_effect(order: dict[str, Any], without_effect: list[str]) -> None:
    config = MeshConfig.model_validate({"order": order})
    assert [location for location, _ in order_without_effect(config)] == [("order", name) for name in without_effect]


def test_the_policy_has_the_settings_of_the_order() -> None:
    policy = OrderConfig(policy="mlfq", mlfq_quantum_s=0.25).scheduling_policy()
    assert (policy.name, policy.quantum_s) == ("mlfq", 0.25)
    aged = OrderConfig(longest_lead=7.0).scheduling_policy()
    assert (aged.name, aged.longest_lead, aged.longest_lead_s) == ("srtf-aged", 7.0, math.inf)
    assert OrderConfig(longest_lead_s=3.0).scheduling_policy().longest_lead_s == 3.0


@pytest.mark.parametrize("value", [".nan", ".inf", "0", "-1"])
def test_the_quantum_is_positive_and_finite(value: str) -> None:
    (problem,) = problems(f"order: {{policy: mlfq, mlfq_quantum_s: {value}}}")
    assert problem.startswith("1: order.mlfq_quantum_s: ")


def test_an_unknown_policy_is_refused_with_the_known_ones() -> None:
    (problem,) = problems("order: {policy: lifo}")
    assert problem == "1: order.policy: is 'lifo'; must be fcfs, sjf, srtf, srtf-aged, hrrn or mlfq"


def test_exempt_clients_are_addresses_and_networks_and_survive_the_runtime_file() -> None:
    given = MeshConfig.model_validate({"router": {"exempt_clients": ["10.0.0.5", "10.1.0.0/16", "2001:db8::/64"]}})
    read = MeshConfig.model_validate_json(given.model_dump_json())
    assert [str(one) for one in read.router.exempt_clients] == ["10.0.0.5/32", "10.1.0.0/16", "2001:db8::/64"]
    assert read == given
