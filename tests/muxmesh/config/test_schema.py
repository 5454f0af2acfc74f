"""The fields of mesh.yaml: what is valid, and the error for what is not."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from muxmesh.config.load import parse_mesh_config
from muxmesh.config.model_config import ModelConfig
from muxmesh.config.schema import MeshConfig, OrderConfig, UnitConfig
from muxmesh.config.section import MIB, Section
from tests.support.mesh_yaml import placed_twice, problems, units


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


@pytest.mark.parametrize(
    ("url", "is_valid"), [("redis://h:1", True), ("unix:///x", True), ("http://h", False), ("x", False)]
)
def test_a_redis_url_has_a_scheme_of_redis(url: str, is_valid: bool) -> None:
    assert (problems(f"redis_url: {url}") == []) is is_valid


@pytest.mark.parametrize(
    ("cores", "field"),
    [("[-1]", "cores[0]"), ("[0, true]", "cores[1]"), ("[1.0]", "cores[0]"), ("['1']", "cores[0]"), ("[]", "cores"),
     ("0-3", "cores"), ("2", "cores")],
)  # fmt: skip
def test_cores_are_a_list_of_whole_numbers(cores: str, field: str) -> None:
    (problem,) = problems(units(f"cores: {cores}"))
    assert problem.startswith(f"2: units[0].{field}: ")


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


@pytest.mark.parametrize(("num_bytes", "slabs"), [(0, 0), (1, 1), (MIB, 1), (MIB + 1, 2)])
def test_a_guarantee_is_rounded_up_to_slabs(num_bytes: int, slabs: int) -> None:
    model = ModelConfig.model_validate({"name": "m", "kv_guaranteed": num_bytes})
    assert UnitConfig.model_validate({"slab": MIB, "models": [model]}).guaranteed_slabs(model) == slabs


def test_the_capacity_counts_whole_blocks_in_whole_slabs() -> None:
    model = ModelConfig(name="m", block_size=8)
    unit = UnitConfig.model_validate({"kv_pool": 3 * MIB + MIB // 2, "slab": MIB, "models": [model]})
    assert unit.capacity_tokens(model, 400_000) == 3 * 2 * 8
    assert unit.capacity_tokens(model, MIB + 1) == 0


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


@pytest.mark.parametrize(("engine", "set_to", "steps"), [("native", None, 16), ("sim", None, 1), ("sim", 4, 4)])
def test_decode_steps_run_in_a_row_on_a_device_and_if_set_in_the_sim_engine(
    engine: Any, set_to: int | None, steps: int
) -> None:
    assert ModelConfig(name="m", engine=engine, continuous_decode_steps=set_to).max_decode_steps == steps
