import json
import random
from pathlib import Path
from typing import get_args

import pytest

from muxmesh.cli.main import main
from muxmesh.placement.measured_cells import Cell
from muxmesh.placement.profile import ModelProfile, Profile
from muxmesh.placement.profile_file import format_profile
from muxmesh.profiler.recorder import table_of
from muxmesh.types import ArbiterMode, Role
from tests.support.profiles import MACHINE, cells
from tests.support.tiny import TinyShape, write_tiny_model

MESH = """
units:
  - kv_pool: 64MiB
    models:
      - {name: a, engine: sim, max_num_seqs: 4, sim: {base_s: 0.02}}
"""
BOTH = ((Role.PREFILL, 50), (Role.DECODE, 100))
LOAD = "rate=5 lengths=U(5,50)/(5,60) requests=60 seed=1"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "mesh.yaml"
    path.write_text(MESH)
    return path


def simulate(*arguments: str | Path) -> int:
    return main(["simulate", *map(str, arguments)])


def test_the_report_has_the_columns_of_a_load_test(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate("-c", config, "--workload", LOAD, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["completed"] == 60 and report["failed"] == 0
    assert report["median_ttft_ms"] > 0 and report["median_itl_ms"] is None
    assert report["simulation"]["policy"] == "srtf-aged" and report["simulation"]["num_events"] > 60


def test_the_report_has_what_the_workers_of_each_unit_were_granted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "two.yaml"
    config.write_text(
        f"{MESH}      - {{name: b, engine: sim, sim: {{base_s: 0.01}}, compute_share: {{prefill: 60, decode: 40}}}}\n"
        "    max_awake_models: 1\n    arbiter: {mode: roundrobin}\n"
    )
    assert simulate("-c", config, "--workload", f"{LOAD} models=a,b") == 0
    text = capsys.readouterr().out
    assert "Unit unit0: busy" in text and "b                        decode     40%" in text and "woke" in text
    assert simulate("-c", config, "--workload", f"{LOAD} models=a,b", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    unit = report["simulation"]["units"]["unit0"]
    assert [(one["model"], one["role"], one["share"]) for one in unit["workers"]] == [
        ("a", "prefill", 1.0), ("a", "decode", 1.0), ("b", "prefill", 0.6), ("b", "decode", 0.4)
    ]  # fmt: skip
    assert all(one["num_grants"] > 0 and one["granted_s"] > 0 for one in unit["workers"])
    assert unit["share_s"] <= unit["busy_s"] <= report["duration"] and unit["num_swapped"] == 0
    assert unit["switches"]["b"]["num_wakes"] > 0


def test_modes_of_the_arbiter_and_contention_are_compared_without_a_change_of_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "two.yaml"
    model = "{{name: {}, engine: sim, compute_share: 60, sim: {{base_s: 0.01, decode_scaling: 0}}}}"
    config.write_text(f"units: [{{kv_pool: 64MiB, models: [{model.format('a')}, {model.format('b')}]}}]")
    latencies, warned = {}, set[tuple[str | None, str]]()
    for mode, contention in (("temporal", "0"), ("spatial", "0"), ("spatial", "0.5"), (None, "0.5")):
        options = ("--contention", contention) if mode is None else ("--arbiter", mode, "--contention", contention)
        assert simulate("-c", config, "--workload", f"{LOAD} models=a,b", *options, "--json") == 0
        report = json.loads(capsys.readouterr().out)
        latencies[mode, contention] = report["mean_e2el_ms"]
        if report["warnings"]:
            warned.add((mode, contention))
            assert "without slowing each other down" in report["warnings"][0]
    assert latencies["spatial", "0"] < latencies["spatial", "0.5"] < latencies["temporal", "0"]
    assert latencies[None, "0.5"] > latencies["spatial", "0.5"]
    assert warned == {("spatial", "0")}  # shares of 60% each, all at once


def test_every_mode_of_the_arbiter_can_be_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate("--help") == 0
    assert "{" + ",".join(get_args(ArbiterMode)) + "}" in capsys.readouterr().out


def test_a_report_has_the_attainment_of_each_model_and_their_rate_weighted_throughput(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "two.yaml"
    config.write_text(f"{MESH}      - {{name: b, engine: sim, sim: {{base_s: 0.01}}, slo: {{scale: 16}}}}\n")
    assert simulate("-c", config, "--workload", f"{LOAD} models=a:3,b", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["slo"]["by_model"].keys() == {"a", "b"}
    assert report["by_model"]["a"]["slo_attainment"] is None
    assert 0 <= report["by_model"]["b"]["slo_attainment"] == report["slo_attainment"] <= 1
    assert report["configured_slo"] == {"b": {"scale": 16}}
    throughputs = {name: one["request_throughput"] for name, one in report["by_model"].items()}
    assert min(throughputs.values()) < report["rate_weighted_throughput"] < max(throughputs.values())


def test_table_page_trace_and_report_are_written(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    html, trace, output = tmp_path / "a.html", tmp_path / "a.jsonl", tmp_path / "a.json"
    assert (
        simulate("-c", config, "--workload", LOAD, "--policy", "hrrn", "--html", html, "--trace", trace, "-o", output)
        == 0
    )
    printed = capsys.readouterr()
    assert "Successful requests:" in printed.out and "driver" not in printed.out and "order hrrn" in printed.err
    decisions = [json.loads(line) for line in trace.read_text().splitlines()]
    assert [one["number"] for one in decisions] == list(range(1, 61))
    assert all(one["reason"].startswith("hrrn, priority 0: ") for one in decisions)
    assert "<svg" in html.read_text() and json.loads(output.read_text())["completed"] == 60


def test_better_predictions_shorten_latencies_of_natural_outputs(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    latencies = []
    for tau in ("0", "1"):
        load = "rate=9 lengths=E(20)/(60) output=natural requests=400 seed=2"
        assert simulate("-c", config, "--workload", load, "--tau", tau, "--json") == 0
        latencies.append(json.loads(capsys.readouterr().out)["mean_normalized_latency_s_per_token"])
    assert latencies[1] < 0.8 * latencies[0]


def test_lengths_of_prompt_texts_come_from_the_predictor_of_the_mesh(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(1)
    kinds = (("Name the colour of {}.", 4), ("Write a detailed essay about {}.", 80))
    lines = []
    for number in range(300):
        prompt, length = rng.choice(kinds)
        lines.append(json.dumps({"prompt": prompt.format(f"thing {number}"), "n_out": length + rng.randint(0, 3)}))
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(lines))
    load = f"rate=6 prompts={path} requests=600"
    means = []
    for tau in ((), ("--tau", "0"), ("--tau", "1")):
        assert simulate("-c", config, "--workload", load, *tau, "--json") == 0
        means.append(json.loads(capsys.readouterr().out)["mean_normalized_latency_s_per_token"])
    own, useless, perfect = means
    assert own < (useless + perfect) / 2


BAD = {
    "an engine without times": (
        MESH.replace("engine: sim, ", "").replace(", sim: {base_s: 0.02}", ""),
        LOAD,
        "units[0].models[0].engine: has no step times to simulate with; measure them with `muxmesh profile`",
    ),
    "steps of no time": (
        MESH.replace("{base_s: 0.02}", "{base_s: 0}"),
        LOAD,
        "units[0].models[0].sim: every step takes no time; set base_s, per_token_s or per_context_s",
    ),
    "a model that is not there": (MESH, f"{LOAD} models=b", "workload: models=b: not served; these are: a"),
    "a workload without end": (
        MESH,
        "rate=1 lengths=D(1,1)",
        "workload: needs requests=N or duration=S to end",
    ),
    "a negative rate": (MESH, "rate=-1 lengths=D(1,1) requests=1", "workload: rate=-1: must be at least 0"),
    "endless steps": (
        MESH.replace("{base_s: 0.02}", "{base_s: .inf}"),
        LOAD,
        "units[0].models[0].sim.base_s: is inf; must be a finite number",
    ),
    "a thousand years of arrivals": (
        MESH,
        "rate=1e-10 lengths=D(1,1) requests=3",
        "workload: takes 2.78e+10 virtual seconds; a report covers at most 1e+07",
    ),
    "a year of steps": (
        MESH.replace("{base_s: 0.02}", "{base_s: 3600}"),
        "rate=1 lengths=D(1,3000) requests=2",
        "workload: takes 1.08e+07 virtual seconds; a report covers at most 1e+07",
    ),
    "two models and no choice": (
        f"{MESH}      - {{name: b, engine: sim, sim: {{base_s: 1}}}}\n",
        LOAD,
        "workload: models=... has to name one of: a, b",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_input_is_refused_with_its_reason(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, load, problem = BAD[name]
    path = tmp_path / "mesh.yaml"
    path.write_text(text)
    assert simulate("-c", path, "--workload", load) == 1
    assert problem in capsys.readouterr().err


def test_tau_without_effect_is_refused(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate("-c", config, "--workload", LOAD, "--tau", "0.5") == 1
    assert "no effect" in capsys.readouterr().err
    assert simulate("-c", config, "--workload", f"{LOAD} output=natural", "--tau", "1.5") == 2
    assert "argument --tau: '1.5' is not a number from 0 to 1" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--output", "--html", "--trace"])
def test_a_path_that_cannot_be_written_is_refused_before_the_simulation(
    option: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, problem in ((tmp_path, "is a folder"), (tmp_path / "no" / "a", f"the folder {tmp_path / 'no'} does not")):
        assert simulate("-c", config, "--workload", LOAD, option, path) == 1
        assert problem in capsys.readouterr().err


def test_a_simulation_repeats_to_the_last_decision(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    traces = []
    for number in range(2):
        assert simulate("-c", config, "--workload", LOAD, "--trace", tmp_path / f"{number}.jsonl", "--json") == 0
        traces.append((tmp_path / f"{number}.jsonl").read_text())
    assert traces[0] == traces[1] and traces[0].count("\n") == 60


def test_the_policy_of_the_command_line_replaces_that_of_the_file(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text(f"order: {{policy: fcfs, longest_lead: 5}}\n{MESH}")
    assert simulate("-c", config, "--workload", LOAD) == 1
    assert "order.longest_lead" in capsys.readouterr().err
    assert simulate("-c", config, "--workload", LOAD, "--policy", "srtf-aged", "--json") == 0
    assert json.loads(capsys.readouterr().out)["simulation"]["policy"] == "srtf-aged"


@pytest.mark.parametrize(("name", "expected"), [((), "sjf"), (("--name", "mine"), "mine")])
def test_a_report_is_named_after_its_policy_unless_it_has_a_name(
    config: Path, name: tuple[str, ...], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert simulate("-c", config, "--workload", LOAD, "--policy", "sjf", *name, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["name"], report["target"]) == (expected, "simulated mesh.yaml, sjf")


def test_models_that_compute_are_simulated_with_the_step_times_of_a_profile(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_tiny_model(tmp_path / "tiny", TinyShape())
    path, mesh = tmp_path / "profile.yaml", tmp_path / "mesh.yaml"
    measured = {name: ModelProfile(name, 1, 1, {1: table_of(cells(name))}) for name in (str(folder), "other")}
    path.write_text(format_profile(Profile(MACHINE, measured)))
    mesh.write_text(f"units: [{{models: [{{name: a, source: {folder}}}, {{name: b, source: other, engine: sim}}]}}]")
    load = "rate=0.1 lengths=D(64,2) requests=10 seed=1 models=a"
    assert simulate("-c", mesh, "--workload", load, "--profile", path) == 1
    assert "models[1].sim: every step takes no time" in capsys.readouterr().err
    mesh.write_text(f"units: [{{models: [{{name: a, source: {folder}, compute_share: {{prefill: 50}}}}]}}]")
    assert simulate("-c", mesh, "--workload", load, "--profile", path, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    steps_ms = sum(1000 * cells("a")[Cell("a", role, share, 1, 64)].seconds for role, share in BOTH)
    assert steps_ms < report["median_e2el_ms"] < steps_ms + 25  # what messages take
