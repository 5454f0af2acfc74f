"""`muxmesh predictor eval`: how well the predictor would have guessed the answers of a file."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from loadtest.files import read_jsonl
from muxmesh.cli.common import print_json
from muxmesh.clock import SystemClock
from muxmesh.errors import ConfigError
from muxmesh.predictor.evaluate import Item, replay, report

_MOST_TOKENS = 10_000_000
_LEGEND = """\
tau: how well predictions rank the answers (Kendall's; 1 perfect, 0 not at all). MAE: mean error in tokens, beside that
of always saying the median. In p90: share of answers no longer than the predicted upper bound, 0.9 if it is right;
of those that were cut off it is estimated (Kaplan-Meier). Hits: share predicted from answers to prompts like it."""
_COLUMNS = ("num", "tau", "mae", "mae_median", "p90_coverage", "hit_rate")


def run(arguments: argparse.Namespace) -> int:
    """See `muxmesh predictor eval --help`."""
    items = list(read_items(arguments.file))
    if not items:
        raise ConfigError(f"{arguments.file}: has no answers")
    found = report(replay(items, SystemClock()))
    if arguments.json:
        print_json(found)
    else:
        print("\n".join(_lines(found)))
    return 0


def read_items(path: Path) -> Iterator[Item]:
    """The answers of a file, in its order. Raises ConfigError that names file, line and what is wrong."""
    for number, line in read_jsonl(path):
        place = f"{path}: line {number}"
        prompt, model, length = line.get("prompt"), line.get("model", "(one)"), line.get("n_out")
        if not isinstance(prompt, str) or not isinstance(model, str):
            raise ConfigError(f'{place}: needs "prompt", a text, and "model", a name if there is one')
        if not _is_text(prompt + model):
            raise ConfigError(f"{place}: has half of a surrogate pair, which is no text")
        if isinstance(length, bool) or not isinstance(length, int) or length < 0:
            raise ConfigError(f"{place}: n_out is {length!r}; a whole number of tokens")
        if length > _MOST_TOKENS:
            raise ConfigError(f"{place}: n_out is {length}; at most {_MOST_TOKENS} tokens")
        task, censored = line.get("task"), line.get("censored")
        if not (task is None or (isinstance(task, str) and _is_text(task))):
            raise ConfigError(f"{place}: task is {json.dumps(task)}; a name")
        if not (censored is None or isinstance(censored, bool)):
            raise ConfigError(f"{place}: censored is {json.dumps(censored)}; true if the answer was cut off, or false")
        yield Item(prompt, model, max(1, length), task or "", censored or False)


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _lines(found: Mapping[str, Any]) -> Iterator[str]:
    yield f"{found['num_answers']} answers; figures are of the last {found['num_evaluated']}"
    if found["num_censored"]:
        yield f"{found['num_censored']} were cut off: the predictor learns from them, and only `in p90` counts them"
    if not found["num_evaluated"]:
        return
    yield f"{'':24} {'answers':>8} {'tau':>6} {'MAE':>8} {'of median':>9} {'in p90':>7} {'hits':>6}"
    yield _line("all", found["pooled"])
    for kind in ("models", "tasks"):
        for name, figures in found[kind].items():
            yield _line(f"{kind[:-1]} {name}", figures)
    yield _LEGEND
    windows = found["p90_windows"]
    if windows["num"]:
        yield (
            f"p90 coverage in {windows['num']} windows of 500: {windows['lowest']:.3f} to {windows['highest']:.3f}, "
            f"{windows['within_band']:.0%} within 0.86 to 0.94"
        )
    times = found["predict_ms"]
    yield f"One prediction: {times['p50']:.2f} ms (p50), {times['p99']:.2f} ms (p99)"


def _line(name: str, figures: Mapping[str, float]) -> str:
    num, tau, mae, median, coverage, hits = (figures[column] for column in _COLUMNS)
    return f"{name[:24]:24} {num:8.0f} {tau:6.3f} {mae:8.1f} {median:9.1f} {coverage:7.3f} {hits:6.2f}"
