import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

from muxmesh.cli.main import main
from muxmesh.cli.predictor import read_items
from muxmesh.errors import ConfigError
from muxmesh.predictor.evaluate import Item


def write_outputs(path: Path, num_prompts: int = 400) -> Path:
    """Prompts of two kinds, short and long, each with an output of two models."""
    rng = random.Random(1)
    lines = []
    for number in range(num_prompts):
        task, prompt, length = rng.choice(
            [("short", f"Is {number} odd? Yes or no.", 3), ("long", f"Write a long essay about place {number}.", 300)]
        )
        for model, factor in (("terse", 1), ("chatty", 3)):
            line = {"prompt": prompt, "model": model, "n_out": rng.randint(length, 2 * length) * factor, "task": task}
            lines.append(json.dumps(line))
    path.write_text("\n".join(lines))
    return path


def write_line(path: Path, **fields: Any) -> Path:
    path.write_text(json.dumps({"prompt": "a", "n_out": 3, **fields}))
    return path


def test_a_replay_is_reported_by_model_and_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_outputs(tmp_path / "outputs.jsonl")
    assert main(["predictor", "eval", str(path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["num_answers"] == 800 and report["num_evaluated"] == 400
    assert set(report["models"]) == {"terse", "chatty"} and set(report["tasks"]) == {"short", "long"}
    pooled = report["pooled"]
    assert pooled["tau"] > 0.4 and pooled["mae"] < pooled["mae_median"] and 0.8 < pooled["p90_coverage"] < 1
    assert 0 < report["predict_ms"]["p50"] <= report["predict_ms"]["p99"]


def test_the_table_has_a_line_for_all_outputs_for_each_model_and_for_each_task(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_outputs(tmp_path / "outputs.jsonl", 40)
    assert main(["predictor", "eval", str(path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert main(["predictor", "eval", str(path)]) == 0
    first, header, *lines = capsys.readouterr().out.splitlines()
    assert first == "80 outputs; the figures are of the last 40"
    assert header.split() == ["outputs", "tau", "MAE", "of", "median", "in", "p90", "hits"]
    groups = {"all": report["pooled"]}
    groups |= {f"model {name}": figures for name, figures in report["models"].items()}
    groups |= {f"task {name}": figures for name, figures in report["tasks"].items()}
    assert len(groups) == 5
    for line, (name, figures) in zip(lines, groups.items(), strict=False):
        assert line[:24].rstrip() == name
        assert line[24:].split()[:2] == [str(figures["num"]), f"{figures['tau']:.3f}"]
    assert not any("windows of 500" in line for line in lines)
    assert lines[-1].startswith("One prediction: ")


def test_the_coverage_of_windows_is_shown_if_there_are_enough_outputs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predictor", "eval", str(write_outputs(tmp_path / "outputs.jsonl", 600))]) == 0
    assert "p90 coverage in 1 windows of 500: " in capsys.readouterr().out


def test_outputs_that_were_cut_off_are_counted_beside_the_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "outputs.jsonl"
    path.write_text("\n".join('{"prompt": "a", "n_out": 3, "censored": true}' for _ in range(4)))
    assert main(["predictor", "eval", str(path)]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == "4 outputs; the figures are of the last 0"
    assert second.startswith("4 outputs were cut off")


def test_items_are_read_in_order_with_their_defaults(tmp_path: Path) -> None:
    path = tmp_path / "outputs.jsonl.gz"
    lines = [
        {"prompt": "ä", "n_out": 3},
        {"prompt": "b", "n_out": 0, "model": "m", "task": "t", "censored": True, "other": "ignored"},
        {"prompt": "", "n_out": 10_000_000, "task": None, "censored": None},
    ]
    path.write_bytes(gzip.compress("\n\n".join(map(json.dumps, lines)).encode()))
    first, second, third = read_items(path)
    assert first == Item("ä", first.model, 3, task="", censored=False)
    assert second == Item("b", "m", 1, task="t", censored=True), "an empty output counts as one token"
    assert third == Item("", first.model, 10_000_000)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"prompt": 5}, '"prompt" is 5; a string is needed'),
        ({"prompt": None}, '"prompt" is null; a string is needed'),
        ({"model": 5}, '"model" is 5; a string is needed'),
        (
            {"n_out": "many"},
            '"n_out" is "many"; the number of output tokens is needed, a whole number from 0 to 10000000',
        ),
        ({"n_out": True}, '"n_out" is true; the number of output tokens'),
        ({"n_out": 1.5}, '"n_out" is 1.5; the number'),
        ({"n_out": None}, '"n_out" is null; the number'),
        ({"n_out": -1}, '"n_out" is -1; the number'),
        ({"n_out": 10_000_001}, '"n_out" is 10000001; the number'),
        ({"censored": 1}, '"censored" is 1; true if the output was cut off, or false'),
        ({"task": 7}, '"task" is 7; a string is needed'),
        ({"task": "\ud800"}, r'"task" is "\ud800"; a string is needed'),
        ({"prompt": "\ud800"}, "half of a surrogate pair"),
        ({"model": "\ud800"}, "half of a surrogate pair"),
    ],
)
def test_a_field_of_the_wrong_type_is_refused_with_its_line(tmp_path: Path, fields: Any, problem: str) -> None:
    path = write_line(tmp_path / "outputs.jsonl", **fields)
    path.write_text('{"prompt": "good", "n_out": 1}\n\n' + path.read_text())
    with pytest.raises(ConfigError) as caught:
        list(read_items(path))
    assert str(caught.value).startswith(f"{path}: line 3: ")
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("line", "problem"),
    [('{"n_out": 3}', '"prompt" is missing; a string'), ('{"prompt": "a"}', '"n_out" is missing; the number')],
)
def test_a_required_key_that_is_missing_is_named(tmp_path: Path, line: str, problem: str) -> None:
    path = tmp_path / "outputs.jsonl"
    path.write_text(line)
    with pytest.raises(ConfigError, match=f"line 1: {problem}"):
        list(read_items(path))


@pytest.mark.parametrize(("content", "problem"), [("not json", "line 1: "), ("[]", "line 1: "), ("", "has no outputs")])
def test_a_file_without_outputs_is_refused(
    tmp_path: Path, content: str, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "outputs.jsonl"
    path.write_text(content)
    assert main(["predictor", "eval", str(path)]) == 1
    assert f"muxmesh: {path}: {problem}" in capsys.readouterr().err


def test_a_missing_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predictor", "eval", str(tmp_path / "nothing.jsonl")]) == 1
    assert "nothing.jsonl" in capsys.readouterr().err
