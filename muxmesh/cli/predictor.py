"""`muxmesh predictor eval`: the accuracy of the length predictor on the outputs in a file.

It reads the file and formats the report; `muxmesh.predictor.evaluate` does the replay.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from muxmesh.quoting import named

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from loadtest.files import read_jsonl
from muxmesh.cli.common import print_json
from muxmesh.clock import SystemClock
from muxmesh.errors import ConfigError
from muxmesh.predictor.evaluate import Item, replay, report

_MAX_OUTPUT_TOKENS = 10_000_000
_LEGEND = """\
tau: rank correlation of predicted and true lengths (Kendall's; 1 is perfect, 0 is none). MAE: mean absolute error in
tokens. Of median: the MAE of always predicting the median. In p90: share of outputs no longer than the predicted 0.9
quantile, ideally 0.9; outputs that were cut off enter by the Kaplan-Meier estimate. Hits: share of predictions that are
retrieved from outputs of similar prompts."""
_COLUMNS = ("num", "tau", "mae", "mae_median", "p90_coverage", "hit_rate")


def run(arguments: argparse.Namespace) -> int:
    """Replays the file and prints the report; returns the exit code."""
    items = list(read_items(arguments.file))
    if not items:
        raise ConfigError(f"{arguments.file}: has no outputs")
    evaluation = report(replay(items, SystemClock()))
    if arguments.json:
        print_json(evaluation)
    else:
        print("\n".join(_lines(evaluation)))
    return 0


def read_items(path: Path) -> Iterator[Item]:
    """Yields the outputs of a file, in its order. Raises ConfigError with the file, the line and the field."""
    for number, line in read_jsonl(path):
        where = f"{path}: line {number}"
        prompt, model, length = line.get("prompt"), line.get("model", "(one)"), line.get("n_out")
        if not isinstance(prompt, str):
            raise ConfigError(f"{where}: {_given(line, 'prompt')}; a string is needed")
        if not isinstance(model, str):
            raise ConfigError(f"{where}: {_given(line, 'model')}; a string is needed")
        if not _is_text(prompt + model):
            raise ConfigError(f"{where}: has half of a surrogate pair, which is not valid text")
        if isinstance(length, bool) or not isinstance(length, int) or not 0 <= length <= _MAX_OUTPUT_TOKENS:
            raise ConfigError(
                f"{where}: {_given(line, 'n_out')}; the number of output tokens is needed, a whole number from 0 to "
                f"{_MAX_OUTPUT_TOKENS}"
            )
        task, censored = line.get("task"), line.get("censored")
        if not (task is None or (isinstance(task, str) and _is_text(task))):
            raise ConfigError(f"{where}: {_given(line, 'task')}; a string is needed")
        if not (censored is None or isinstance(censored, bool)):
            raise ConfigError(f"{where}: {_given(line, 'censored')}; true if the output was cut off, or false")
        yield Item(prompt, model, max(1, length), task or "", censored or False)


def _given(line: Mapping[str, Any], name: str) -> str:
    """What a line has under a key, as JSON."""
    return f'"{name}" is {named(json.dumps(line[name]))}' if name in line else f'"{name}" is missing'


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _lines(evaluation: Mapping[str, Any]) -> Iterator[str]:
    yield f"{evaluation['num_answers']} outputs; the figures are of the last {evaluation['num_evaluated']}"
    if evaluation["num_censored"]:
        yield (
            f"{evaluation['num_censored']} outputs were cut off: the predictor learns from them, and only `in p90` "
            "counts them"
        )
    if not evaluation["num_evaluated"]:
        return
    yield f"{'':24} {'outputs':>8} {'tau':>6} {'MAE':>8} {'of median':>9} {'in p90':>7} {'hits':>6}"
    yield _line("all", evaluation["pooled"])
    for kind in ("models", "tasks"):
        for name, figures in evaluation[kind].items():
            yield _line(f"{kind[:-1]} {name}", figures)
    yield _LEGEND
    windows = evaluation["p90_windows"]
    if windows["num"]:
        yield (
            f"p90 coverage in {windows['num']} windows of 500: {windows['lowest']:.3f} to {windows['highest']:.3f}, "
            f"{windows['within_band']:.0%} within 0.86 to 0.94"
        )
    times = evaluation["predict_ms"]
    yield f"One prediction: {times['p50']:.2f} ms (p50), {times['p99']:.2f} ms (p99)"


def _line(name: str, figures: Mapping[str, float]) -> str:
    num, tau, mae, median, coverage, hits = (figures[column] for column in _COLUMNS)
    return f"{name[:24]:24} {num:8.0f} {tau:6.3f} {mae:8.1f} {median:9.1f} {coverage:7.3f} {hits:6.2f}"
