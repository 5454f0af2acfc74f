import json
import random
from pathlib import Path

import pytest

from muxmesh.cli.main import main


def answers(path: Path, count: int = 400) -> Path:
    rng = random.Random(1)
    lines = []
    for number in range(count):
        task, prompt, length = rng.choice(
            [("short", f"Is {number} odd? Yes or no.", 3), ("long", f"Write a long essay about place {number}.", 300)]
        )
        for model, times in (("terse", 1), ("chatty", 3)):
            line = {"prompt": prompt, "model": model, "n_out": rng.randint(length, 2 * length) * times, "task": task}
            lines.append(json.dumps(line))
    path.write_text("\n".join(lines))
    return path


def test_a_replay_is_reported_by_model_and_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = answers(tmp_path / "answers.jsonl")
    assert main(["predictor", "eval", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_answers"] == 800 and found["num_evaluated"] == 400
    assert set(found["models"]) == {"terse", "chatty"} and set(found["tasks"]) == {"short", "long"}
    pooled = found["pooled"]
    assert pooled["tau"] > 0.4 and pooled["mae"] < pooled["mae_median"] and 0.8 < pooled["p90_coverage"] < 1
    assert 0 < found["predict_ms"]["p50"] <= found["predict_ms"]["p99"]


def test_the_table_names_what_it_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predictor", "eval", str(answers(tmp_path / "answers.jsonl", 600))]) == 0
    out = capsys.readouterr().out
    assert "tau" in out and "model chatty" in out and "task long" in out and "windows of 500" in out


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"prompt": 5, "n_out": 3}', "line 1"),
        ('{"prompt": "a", "n_out": "many"}', "n_out"),
        ('{"prompt": "a", "n_out": true}', "n_out"),
        ('{"prompt": "a"}', "n_out"),
        ('{"prompt": "a", "n_out": 3, "censored": 1}', "line 1: censored is 1; true"),
        ('{"prompt": "a", "n_out": 3, "task": 7}', "line 1: task is 7; a name"),
        ("not json", "line 1"),
        (r'{"prompt": "\ud800", "n_out": 3}', "line 1: has half of a surrogate pair"),
        (r'{"prompt": "a", "model": "\ud800", "n_out": 3}', "line 1: has half of a surrogate pair"),
        ("", "no answers"),
    ],
)
def test_a_bad_file_is_told_in_words(tmp_path: Path, line: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(line)
    assert main(["predictor", "eval", str(path)]) == 1
    assert told in capsys.readouterr().err


def test_a_file_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predictor", "eval", str(tmp_path / "nothing.jsonl")]) == 1
    assert "nothing.jsonl" in capsys.readouterr().err


def test_answers_that_were_cut_off_are_counted_beside_the_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join('{"prompt": "a", "n_out": 3, "censored": true}' for _ in range(4)))
    assert main(["predictor", "eval", str(path)]) == 0
    told = capsys.readouterr().out
    assert "4 answers; figures are of the last 0" in told and "4 were cut off" in told
