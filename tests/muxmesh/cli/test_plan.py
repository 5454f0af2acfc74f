"""`muxmesh plan`: from files to a mesh.yaml."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from muxmesh.cli.main import main
from muxmesh.cli.plan_inputs import Counts, live_loads
from muxmesh.config.load import load_mesh_config, parse_mesh_config
from muxmesh.config.model_config import SimProfile
from muxmesh.placement.measured_cells import MeasuredSettings
from muxmesh.placement.plan import PlacedModel, PlacedUnit, Plan
from muxmesh.placement.profile import MachineFacts, ModelProfile, Profile
from muxmesh.placement.profile_file import format_profile
from muxmesh.placement.replan import moves
from muxmesh.v1 import mesh_pb2
from tests.support.fake_mesh import FakeMesh
from tests.support.placement import load, profile, table

WORKLOAD = """
models:
- {name: a, source: small, rate: 2, slo: {scale: 4}}
- {name: b, source: small, rate: 1, prompt_tokens: 300}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the profile of a GPU, of a CPU, and a workload."""
    monkeypatch.chdir(tmp_path)
    tables = {size: table(size, 0.05) for size in (1, 2)}
    models = {"small": ModelProfile("small", 10**9, 1000, tables)}
    (tmp_path / "gpu.yaml").write_text(format_profile(Profile(MachineFacts("cuda", "a GPU", 2, 16 * 2**30), models)))
    models = {"small": ModelProfile("small", 10**8, 1000, {1: table(1, 1.0)})}
    (tmp_path / "cpu.yaml").write_text(
        format_profile(Profile(MachineFacts("cpu", "a CPU", 1, 4 * 2**30, 2), models, contention=0.2))
    )
    (tmp_path / "workload.yaml").write_text(WORKLOAD)
    return tmp_path


def planned(*arguments: str) -> int:
    return main(["plan", "--workload", "workload.yaml", "--moves", "200", *arguments])


@pytest.mark.parametrize("name", ["gpu", "cpu"])
def test_a_plan_is_a_valid_mesh_yaml_with_its_estimate(folder: Path, name: str) -> None:
    assert planned("--profile", f"{name}.yaml", "-o", "mesh.yaml") == 0
    text = (folder / "mesh.yaml").read_text()
    assert text.startswith("# Written by `muxmesh plan`: 2 models on")
    assert "# 2 requests/s of 161 + 337 tokens: serves" in text
    config = load_mesh_config(folder / "mesh.yaml").config
    placed = {model.name: (unit, model) for unit, model in config.placements()}
    assert set(placed) == {"a", "b"}
    unit, model = placed["a"]
    assert model.source == "small" and model.slo is not None and model.slo.scale == 4
    assert unit.is_cuda is (name == "gpu") and (unit.cores is not None) is (name == "cpu")
    assert unit.arbiter.over_subscription == (20 if name == "gpu" else 0)
    for unit in config.units:
        assert sum(one.compute_share.decode for one in unit.models) <= (120 if name == "gpu" else 100)


SIM = SimProfile(base_s=0.05, per_token_s=1e-6)


@pytest.mark.parametrize(
    ("machine", "settings", "expected"),
    [
        ("cpu", MeasuredSettings("sim", SIM.fingerprint, "float32", "float32", 16, 128, 16, 8192), {"sim": SIM}),
        (
            "cpu",
            MeasuredSettings("native", "w", "float32", "float32", 32, 256, 16, 8192, threads=2),
            {"block_size": 32, "prefill_token_budget": 256},
        ),
        (
            "cuda",
            MeasuredSettings("native", "w", "bfloat16", "float16", 16, 512, 16, 8192, None, False, 4),
            {
                "dtype": "bfloat16",
                "kv_cache_dtype": "float16",
                "prefill_token_budget": 512,
                "cuda_graphs": False,
                "continuous_decode_steps": 4,
            },
        ),
    ],
)
def test_a_plan_has_the_settings_that_its_step_times_hold_for(
    folder: Path, machine: str, settings: MeasuredSettings, expected: dict[str, object]
) -> None:
    models = {"small": ModelProfile("small", 1, 1000, {1: table(1, 0.05)}, settings)}
    profile = Profile(MachineFacts(machine, "a device", 1, 16 * 2**30, 1), models)
    (folder / "measured.yaml").write_text(format_profile(profile))
    (folder / "workload.yaml").write_text("models: [{name: '12', source: small, rate: 1}]")
    assert planned("--profile", "measured.yaml", "-o", "mesh.yaml") == 0
    model = load_mesh_config(folder / "mesh.yaml").config.models()["12"]
    assert model.engine == settings.engine
    others = {"name", "source", "engine", "compute_share", "max_num_seqs", "expected_rate"}
    assert {name: getattr(model, name) for name in model.model_fields_set - others} == expected


def test_requests_longer_than_the_profiled_model_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = MeasuredSettings("native", "w", "float32", "float32", 16, 128, 16, max_model_len=600)
    models = {"small": ModelProfile("small", 1, 1000, {1: table(1, 0.05)}, settings)}
    profile = Profile(MachineFacts("cpu", "a CPU", 1, 16 * 2**30, 1), models)
    (folder / "measured.yaml").write_text(format_profile(profile))
    assert planned("--profile", "measured.yaml") == 1
    message = (
        "b: prompt_tokens and output_tokens are 637 together; 'small' was profiled with at most 600 (max_model_len)"
    )
    assert message in capsys.readouterr().err


def test_each_model_on_a_cpu_has_memory_for_its_blocks_beside_those_of_the_others(folder: Path) -> None:
    assert planned("--profile", "cpu.yaml", "--cluster", "1x1x2GiB", "-o", "mesh.yaml") == 0
    (unit,) = load_mesh_config(folder / "mesh.yaml").config.units
    assert unit.kv_pool // unit.slab >= 4
    assert all(unit.guaranteed_slabs(model) >= 1 for model in unit.models)


def test_explanations_comparisons_and_json_say_what_the_plan_is_worth(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert planned("--profile", "gpu.yaml", "-o", "mesh.yaml", "--explain") == 0
    assert "next best:" in capsys.readouterr().out
    assert planned("--profile", "gpu.yaml", "--compare", "mesh.yaml", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["estimates"]["plan"] == result["estimates"]["mesh.yaml"]
    assert result["estimates"]["plan"]["corrected"] <= result["bound"]


def test_the_best_plans_are_judged_by_simulation(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert planned("--profile", "gpu.yaml", "--simulate", "20", "--json") == 0
    estimate = json.loads(capsys.readouterr().out)["estimates"]["plan"]
    assert estimate["simulated"]["throughput"] == pytest.approx(estimate["corrected"], rel=0.4)
    assert 0 < estimate["simulated"]["attainment"] <= 1


def test_muxserve_inputs_are_planned_and_compared_with_what_was_published(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = {
        share: {batch: {"256": {"prefill": 100.0 * int(batch), "decoding": 20.0 * 100 / int(share)}} for batch in "124"}
        for share in ("30", "80", "90")
    }
    (folder / "profile.json").write_text(json.dumps({"llama-7b": {"1": cells, "2": cells}}))
    unit = {
        "num_gpus": 2,
        "models": [{"name": "a", "tp": 2, "prefill_share": 80, "decode_share": 30, "max_num_seqs": 4}],
    }
    content = {
        "cluster": {"nnodes": 1, "ngpus_per_node": 2},
        "models": [{"name": "a", "model": "llama-7b", "rate": 0.4}],
        "published_units": [unit],
    }
    (folder / "input.json").write_text(json.dumps(content))
    arguments = ["--profile", "profile.json", "--muxserve", "input.json", "--moves", "50", "--json"]
    assert main(["plan", *arguments, "--objective", "both"]) == 0
    estimates = json.loads(capsys.readouterr().out)["estimates"]
    assert set(estimates) == {"plan", "published"}
    assert estimates["plan"]["reference"] >= estimates["published"]["reference"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("rate: 2", "rate: 0", r"workload.yaml:3: models.0.rate: is 0; must be more than 0"),
        ("source: small, rate: 2", "source: smal, rate: 2", r"a: 'smal' is not in the profile, which has: small"),
        ("name: b", "name: a", r"a: is the name of two models"),
        ("rate: 2, ", "", r"a: rate: is required, in requests per second"),
        ("rate: 2", "speed: 2", r"models.0.speed: unknown field"),
        ("slo: {scale: 4}", "slo: {}", r"workload.yaml: models: a: slo: sets no objective; set ttft_s"),
        ("models:", "cluster: {devices_per_node: 1, memory: 1GiB}\nmodels:", r"a: small fits no unit of 1 or fewer"),
    ],
)
def test_what_is_invalid_or_impossible_is_refused_by_name(
    folder: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, message: str
) -> None:
    (folder / "workload.yaml").write_text(WORKLOAD.replace(old, new, 1))
    assert planned("--profile", "gpu.yaml") == 1
    assert message in capsys.readouterr().err


def test_options_that_are_missing_or_wrong_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--profile", "none.yaml"], "none.yaml: cannot be read"),
        (["--profile", "gpu.yaml", "--live", "127.0.0.1:1"], "--compare: is required with --live"),
        (["--profile", "gpu.yaml", "--tls"], "--tls: has no effect without --live, the address of a mesh"),
        (["--profile", "gpu.yaml", "--cluster", "1x2x16GiX"], "--cluster 1x2x16GiX: memory: is"),
        (["--profile", "cpu.yaml", "--cluster", "1x8x1GiB"], "has 8 cores, the profiled machine 2"),
        (
            ["--profile", "gpu.yaml", "--load", "models=c rate=1 requests=3 lengths=D(9,9)"],
            "--load: has requests for c",
        ),
        (["--profile", "gpu.yaml", "--live", "x:1", "--compare", "m.yaml", "--load", "rate=1"], "--load: contradicts"),
    ):
        assert planned(*arguments) == 1
        assert message in capsys.readouterr().err


def test_options_that_an_input_of_muxserve_would_override_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for option, value in (("--cluster", "1x2x16GiB"), ("--load", "rate=1"), ("--live", "127.0.0.1:1")):
        arguments = ["--profile", "p.json", "--muxserve", "m.json", "--compare", "mesh.yaml", option, value]
        assert main(["plan", *arguments]) == 1
        assert f"{option}: contradicts --muxserve" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("cores", "problem"), [(6, None), (5, "units: u: has 5 cores; a can be estimated on 1, 2, 4, 6")]
)
def test_a_unit_whose_number_of_cores_has_no_times_is_not_compared(
    folder: Path, capsys: pytest.CaptureFixture[str], cores: int, problem: str | None
) -> None:
    (folder / "cpu.yaml").write_text((folder / "cpu.yaml").read_text().replace("cores: 2", "cores: 6"))
    models = "[{name: a, source: small}, {name: b, source: small}]"
    (folder / "old.yaml").write_text(f"units: [{{name: u, cores: {list(range(cores))}, models: {models}}}]")
    assert planned("--profile", "cpu.yaml", "--compare", "old.yaml", "--json") == (0 if problem is None else 1)
    result = json.loads(capsys.readouterr().out)
    if problem is None:
        assert result["estimates"]["old.yaml"]["corrected"] > 0
    else:
        assert problem in result["message"]


def test_a_plan_that_does_not_fit_the_cluster_is_compared_but_not_simulated(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = "{name: u, device: 'cuda:0', tensor_parallel: 2, models: [{name: a, source: small}]}"
    second = "{name: v, device: 'cuda:0', models: [{name: b, source: small}]}"
    (folder / "old.yaml").write_text(f"units: [{first}, {second}]")
    arguments = ["--profile", "gpu.yaml", "--compare", "old.yaml"]
    assert planned(*arguments) == 0
    assert planned(*arguments, "--simulate", "3") == 1
    assert "old.yaml: its units need more devices or memory" in capsys.readouterr().err


def test_a_load_gives_the_lengths_that_it_sends(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": "x" * 399, "output_tokens": 300}))
    for lengths in ("lengths=D(100,300)", "prompts=prompts.jsonl output=forced"):
        assert planned("--profile", "gpu.yaml", "--load", f"models=a rate=1 requests=3 {lengths} cap=50") == 0
        assert "requests/s of 100 + 50 tokens" in capsys.readouterr().out


def test_rates_and_lengths_of_a_running_mesh_are_differences_of_its_counters() -> None:
    early, late = Counts(100, 2, 0, 1000, 2000), Counts(120, 4, 6, 1400, 3000)
    assert live_loads({"a": early}, {"a": late}, 10.0)["a"] == (2.8, 20.0, 50.0)
    idle = live_loads({"a": late}, {"a": late}, 10.0)["a"]
    assert idle[0] > 0 and idle[1:] == (1400 / 120, 25.0)


def test_moves_are_what_changes_between_two_plans() -> None:
    def placed(name: str, share: int = 30) -> PlacedModel:
        return PlacedModel(load(name, 1.0), 90, share, 4)

    before = Plan((PlacedUnit(1, (placed("a"), placed("b"))), PlacedUnit(2, (placed("c"),))))
    after = Plan((PlacedUnit(1, (placed("a"),)), PlacedUnit(2, (placed("c", 60), placed("b")))))
    found = {one.model: one for one in moves(before, after, profile(), {"b": 3.0}, bytes_per_s=100.0)}
    assert set(found) == {"b", "c"}
    assert (found["c"].change, found["c"].load_bytes) == ("restarts", 0)
    assert (found["b"].change, found["b"].load_s, found["b"].drained_sequences) == ("moves", 1.0, 3.0)


def test_the_moves_of_a_running_mesh_are_shown_beside_the_plan_and_not_in_it(
    folder: Path, mesh: FakeMesh, capsys: pytest.CaptureFixture[str]
) -> None:
    assert planned("--profile", "gpu.yaml", "-o", "running.yaml") == 0
    capsys.readouterr()
    mesh.statuses = [
        mesh_pb2.GetStatusResponse(
            models=[
                mesh_pb2.RouterModelStatus(
                    model=name, num_requests_finished=num, prompt_tokens=200 * num, output_tokens=100 * num
                )
                for name in "ab"
            ]
        )
        for num in (20, 21)
    ]
    live = ("--live", mesh.address, "--seconds", "0.05", "--compare", "running.yaml")
    assert planned("--profile", "gpu.yaml", *live) == 0
    out, error = capsys.readouterr()
    assert set(parse_mesh_config(out, "the plan").config.models()) == {"a", "b"}
    assert "requests within their SLO" in error and "Nothing was changed." in error
