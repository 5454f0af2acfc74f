"""The words of errors: what the value is, what it must be, and what was probably meant."""

import pytest

from muxmesh.config.field_errors import closest, section_at, shown
from muxmesh.config.load import parse_mesh_config
from muxmesh.config.model_config import ModelConfig, SimProfile
from muxmesh.config.schema import MeshConfig, UnitConfig
from muxmesh.errors import ConfigError

IN_MODEL = "units: [{models: [{name: m, %s}]}]"
IN_UNIT = "units: [{models: [{name: m}], %s}]"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lisen: a:1", "lisen: unknown field; did you mean `listen`?"),
        ("model: a", "model: unknown field; known: mesh_id, listen, tls, internal_tls, redis_url, log_format, metrics, "
         "access, routers, router, order, units"),
        ("Units: []", "Units: unknown field; did you mean `units`?"),
        ("units: [{modles: []}]", "units[0].modles: unknown field; did you mean `models`?"),
        (IN_MODEL % "maxnumseqs: 3", "units[0].models[0].maxnumseqs: unknown field; did you mean `max_num_seqs`?"),
        (IN_UNIT % "gpu_memory_utilization: 0.9", "units[0].gpu_memory_utilization: unknown field; it is `kv_pool` of "
         "the unit, such as 24GiB"),
        (IN_MODEL % "max_num_batched_tokens: 2048", "units[0].models[0].max_num_batched_tokens: unknown field; it is "
         "`prefill_token_budget` of the model"),
        (IN_MODEL % "model: /models/a", "units[0].models[0].model: unknown field; it is `source`"),
        (IN_MODEL % "tensor_parallel_size: 2", "units[0].models[0].tensor_parallel_size: unknown field; it is "
         "`tensor_parallel` of the unit"),
        (IN_MODEL % "sim: {colour: 1}", "units[0].models[0].sim.colour: unknown field; known: base_s, per_token_s, "
         "per_context_s, prefill_scaling, decode_scaling, output_tokens, output_lengths"),
        (IN_UNIT % "device: gpu", "units[0].device: is 'gpu'; must be cpu or cuda:N, such as cuda:0"),
        (IN_UNIT % "device: cuda", "units[0].device: is 'cuda'; must be cpu or cuda:N, such as cuda:0"),
        (IN_MODEL % "engine: simm", "units[0].models[0].engine: is 'simm'; must be native or sim; did you mean sim?"),
        (IN_MODEL % "engine: vllm", "units[0].models[0].engine: is 'vllm'; must be native or sim; an engine on vLLM is "
         "not built yet"),
        (IN_MODEL % "dtype: half", "units[0].models[0].dtype: is 'half'; must be float32, float16 or bfloat16; did you "
         "mean float16?"),
        (IN_MODEL % "dtype: bf16", "units[0].models[0].dtype: is 'bf16'; must be float32, float16 or bfloat16; did you "
         "mean bfloat16?"),
        (IN_MODEL % "compute_share: 120", "units[0].models[0].compute_share: is 120; must be percent from 1 to 100, or "
         "two like {prefill: 60, decode: 40}"),
        (IN_MODEL % "compute_share: 50%", "units[0].models[0].compute_share: is '50%'; must be percent from 1 to 100, "
         "or two like {prefill: 60, decode: 40}"),
        (IN_MODEL % "compute_share: [50, 50]", "units[0].models[0].compute_share: is a list; must be percent from 1 to "
         "100, or two like {prefill: 60, decode: 40}"),
        (IN_MODEL % "compute_share: {decode: 0}", "units[0].models[0].compute_share.decode: is 0; must be at least 1"),
        (IN_MODEL % "block_size: 17", "units[0].models[0].block_size: is 17; must be 8, 16 or 32"),
        (IN_MODEL % "block_size: '16'", "units[0].models[0].block_size: is '16'; must be 8, 16 or 32; did you mean "
         "16?"),
        (IN_MODEL % "max_num_seqs: many", "units[0].models[0].max_num_seqs: is 'many'; must be a whole number"),
        (IN_MODEL % "max_num_seqs: 1.5", "units[0].models[0].max_num_seqs: is 1.5; must be a whole number"),
        (IN_MODEL % "max_num_seqs: 0", "units[0].models[0].max_num_seqs: is 0; must be at least 1"),
        (IN_MODEL % "max_num_seqs: 9999", "units[0].models[0].max_num_seqs: is 9999; must be at most 1024"),
        (IN_MODEL % "max_num_seqs: [1]", "units[0].models[0].max_num_seqs: is a list; must be a whole number"),
        (IN_MODEL % "sim: fast", "units[0].models[0].sim: is 'fast'; must be a mapping with fields like `base_s`, "
         "`per_token_s`, `per_context_s`"),
        (IN_MODEL % "source: 5", "units[0].models[0].source: is 5; must be text, in quotes if it looks like a number"),
        (IN_UNIT % "cores: 2", "units[0].cores: is 2; must be a list"),
        (IN_UNIT % "cores: [a]", "units[0].cores[0]: is 'a'; must be a whole number"),
        (IN_UNIT % "kv_pool: much", "units[0].kv_pool: is 'much'; must be bytes, or a number and one of KiB, MiB, GiB, "
         "TiB, KB, MB, GB, TB"),
        (IN_UNIT % "kv_pool: .inf", "units[0].kv_pool: is inf; must be bytes, or a number and one of KiB, MiB, GiB, "
         "TiB, KB, MB, GB, TB"),
        ("units: 5", "units: is 5; must be a list"),
        ("units:", "units: is empty; must be a list"),
        ("units: [5]", "units[0]: is 5; must be a mapping with fields like `name`, `device`, `mps`"),
        ("listen: 50051", "listen: is 50051; must be text, in quotes if it looks like a number"),
        ("listen: here", "listen: is 'here'; must be HOST:PORT"),
        ("redis_url: tcp://h", "redis_url: is 'tcp://h'; must begin with redis://, rediss://, unix://, "
         "redis+sentinel:// or redis+cluster://"),
        ("mesh_id: a b", "mesh_id: is 'a b'; must begin with a letter or a digit and have only letters, digits, '.', "
         "'_' and '-'"),
        (f"mesh_id: {'x' * 99}", "mesh_id: has 99 characters; at most 64"),
        ("router: {exempt_clients: [10.0.0.0/99]}", "router.exempt_clients[0]: is '10.0.0.0/99'; must be an address or "
         "a network like 10.1.0.0/16"),
        ("router: {exempt_clients: [0]}", "router.exempt_clients[0]: is 0; must be an address or a network like "
         "10.1.0.0/16"),
        ("metrics: {}", "metrics.listen: is required"),
        ("metrics: {listen: 9464}", "metrics.listen: is 9464; must be text, in quotes if it looks like a number"),
        ("metrics: {listen: here}", "metrics.listen: is 'here'; must be HOST:PORT"),
        ("metrics: {listen: '127.0.0.1:50051'}", "metrics.listen: 127.0.0.1:50051 is the address of the public API; "
         "choose another port"),
        ("order: {trace: 2}", "order.trace: is 2; must be true or false"),
        ("order: {trace: maybe}", "order.trace: is 'maybe'; must be true or false"),
        ("order: {longest_lead: .nan}", "order.longest_lead: is nan; must be a finite number"),
        ("order: {longest_lead: soon}", "order.longest_lead: is 'soon'; must be a number"),
        ("order: {mlfq_quantum_s: 0}", "order.mlfq_quantum_s: is 0; must be more than 0"),
        ("order: {policy: srtf_aged}", "order.policy: is 'srtf_aged'; must be fcfs, sjf, srtf, srtf-aged, hrrn or "
         "mlfq; did you mean srtf-aged?"),
    ],
)  # fmt: skip
def test_an_error_says_what_the_value_is_and_what_it_must_be(text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_mesh_config(text, "f")
    assert str(caught.value) == f"f:1: {expected}"


def test_a_long_value_is_cut() -> None:
    assert shown("x" * 1000) == f"'{'x' * 56}..."
    assert shown(10**400) == "a number of too many digits"


def test_the_closest_choice_ignores_case_and_is_none_if_nothing_is_close() -> None:
    assert closest("SIM", ["native", "sim"]) == "sim"
    assert closest("vllm", ["native", "sim"]) is None
    assert closest("", ["native", "sim"]) is None


def test_the_section_of_a_location() -> None:
    assert section_at((), MeshConfig) is MeshConfig
    assert section_at(("units", 3), MeshConfig) is UnitConfig
    assert section_at(("units", 3, "models", 0), MeshConfig) is ModelConfig
    assert section_at(("units", 3, "models", 0, "sim"), MeshConfig) is SimProfile
    assert section_at(("units", 3, "name", "x"), MeshConfig) is None
    assert section_at(("none", "x"), MeshConfig) is None
