from pathlib import Path

import pytest

from muxmesh.config.load import load_mesh_config, parse_mesh_config
from muxmesh.config.runtime import MAX_SOCKET_PATH, MeshRuntime, PreparedModel
from muxmesh.config.schema import DEFAULT_MODEL, MeshConfig, order_without_effect
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


def test_a_good_file_is_read() -> None:
    config = parse_mesh_config(GOOD, "mesh.yaml").config
    unit, model = config.units[0], config.models()["chat"]
    assert (config.listen, unit.kv_pool, model.max_num_seqs) == ("0.0.0.0:6000", 2 * 1024**3, 4)


def test_an_empty_file_is_the_default_mesh() -> None:
    assert parse_mesh_config("", "mesh.yaml").config == MeshConfig()
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


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("units: [", "mesh.yaml:1: not YAML"),
        ("a: 1\na: 2", "mesh.yaml:2: a: stands twice"),
        ("- 1", "mesh.yaml:1: must be a mapping"),
        ("units:\n  - models: []", "mesh.yaml:2: units[0].models: "),
        (
            "units:\n  - models:\n    - name: a\n    - name: a",
            "mesh.yaml:4: units[0].models[1].name: 'a' is the name of another model",
        ),
        (
            "units:\n  - {name: u, models: [{name: a}]}\n  - {name: u, models: [{name: b}]}",
            "mesh.yaml:3: units[1].name: 'u' is the name of another unit",
        ),
        (
            "units:\n  - {name: u, models: [{name: a}]}\n  - {name: v, models: [{name: b}]}",
            "mesh.yaml:3: units[1].cores: is needed: there are 2 units on 'cpu'",
        ),
        ("listen: 127.0.0.1:70000", "mesh.yaml:1: listen: the last port is 65535"),
        ("units:\n  - models:\n    - {name: a, engine: vllm}", "mesh.yaml:3: units[0].models[0].engine: "),
        ("units:\n  - models:\n    - {name: a, sim: {}}", "mesh.yaml:3: units[0].models[0].sim: has no effect"),
        ("units:\n  - kv_pool: 1MiB\n    slab: 2MiB\n    models: [{name: a}]", "mesh.yaml:3: units[0].slab: "),
        ("units: 7", "mesh.yaml:1: units: "),
        ("order: {longest_lead: true}", "mesh.yaml:1: order.longest_lead: is true; a number is needed"),
        ("units:\n  - kv_pool: no", "mesh.yaml:2: units[0].kv_pool: is false; a number is needed"),
        ("order: {longest_lead_s: yes}", "mesh.yaml:1: order.longest_lead_s: is true; a number is needed"),
    ],
)
def test_what_is_wrong_is_named(text: str, expected: str) -> None:
    assert any(line.startswith(expected) for line in problems(text)), problems(text)


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
def test_a_setting_of_another_order_is_refused(text: str, expected: str) -> None:
    loaded = parse_mesh_config(text, "mesh.yaml")
    with pytest.raises(ConfigError) as caught:
        loaded.refuse(order_without_effect(loaded.config))
    assert str(caught.value) == expected


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read"):
        load_mesh_config(tmp_path / "none.yaml")


def test_the_runtime_file_comes_back_as_it_was(tmp_path: Path) -> None:
    runtime = MeshRuntime(
        config=parse_mesh_config(GOOD, "mesh.yaml").config,
        run_dir=tmp_path,
        cache_dir=tmp_path,
        redis_url="unix:///x",
        prepared={"chat": PreparedModel(folder=tmp_path, image=None, weights_fingerprint="w")},
    )
    runtime.write(tmp_path / "runtime.json")
    assert MeshRuntime.read(tmp_path / "runtime.json") == runtime


def test_a_socket_path_that_the_kernel_would_cut_is_refused() -> None:
    runtime = MeshRuntime(
        config=MeshConfig(),
        run_dir=Path("/" + "x" * MAX_SOCKET_PATH),
        cache_dir=Path("/"),
        redis_url="unix:///x",
        prepared={},
    )
    with pytest.raises(ConfigError, match="longer than 107 bytes"):
        runtime.check_socket_paths()
