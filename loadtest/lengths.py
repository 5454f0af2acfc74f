"""How long prompts and answers are: a distribution of both, or pairs from a file. Pure but for reading the file."""

from __future__ import annotations

import csv
import math
import random
import re
from collections.abc import Callable
from pathlib import Path

from loadtest.files import read_lines
from muxmesh.errors import ConfigError

Draw = Callable[[random.Random], tuple[int, int]]
"""(prompt tokens, answer tokens), both at least 1."""

_FORM = re.compile(r"([DNUE])\(([^()]*)\)(?:/\(([^()]*)\))?")
HELP = (
    "D(2000,200): always 2000 prompt and 200 answer tokens; N(480,240)/(300,150): normal, mean and standard deviation "
    "of prompt/answer; U(10,20)/(5,9): uniform; E(480)/(300): exponential; or a CSV file with columns n_in,n_out"
)


def parse_lengths(text: str) -> Draw:
    """The distribution that ``text`` names. Raises ConfigError."""
    match = _FORM.fullmatch(text.replace(" ", ""))
    if match is None:
        if Path(text).is_file():
            return _from_file(Path(text))
        raise ConfigError(f"lengths={text}: neither a distribution nor a file; {HELP}")
    kind, first, second = match.groups()
    prompt, answer = _numbers(text, first), _numbers(text, second) if second is not None else None
    wanted = {"D": 2, "N": 2, "U": 2, "E": 1}[kind]
    if kind == "D":
        if answer is not None or len(prompt) != 2:
            raise ConfigError(f"lengths={text}: D takes prompt and answer, like D(2000,200)")
        return lambda rng: (_whole(prompt[0]), _whole(prompt[1]))
    if answer is None or len(prompt) != wanted or len(answer) != wanted:
        raise ConfigError(f"lengths={text}: {kind} takes {wanted} number(s) for prompt and for answer; {HELP}")
    if kind == "U" and not (prompt[0] <= prompt[1] and answer[0] <= answer[1]):
        raise ConfigError(f"lengths={text}: U takes the smaller number first, like U(10,20)/(5,9)")
    draw_one = {"N": _normal, "U": _uniform, "E": _exponential}[kind]
    return lambda rng: (_whole(draw_one(rng, prompt)), _whole(draw_one(rng, answer)))


def _numbers(text: str, inside: str) -> list[float]:
    try:
        numbers = [float(part) for part in inside.split(",")]
    except ValueError:
        raise ConfigError(f"lengths={text}: {inside!r} are no numbers; {HELP}") from None
    if not all(math.isfinite(number) and number >= 0 for number in numbers):
        raise ConfigError(f"lengths={text}: numbers are at least 0")
    return numbers


def _normal(rng: random.Random, of: list[float]) -> float:
    return rng.normalvariate(of[0], of[1])


def _uniform(rng: random.Random, of: list[float]) -> float:
    return rng.uniform(of[0], of[1])


def _exponential(rng: random.Random, of: list[float]) -> float:
    return rng.expovariate(1 / of[0]) if of[0] else 0.0


def _whole(number: float) -> int:
    return max(1, round(number))


def _from_file(path: Path) -> Draw:
    reader = csv.DictReader(read_lines(path))
    columns = reader.fieldnames or ()
    if not {"n_in", "n_out"} <= set(columns):
        raise ConfigError(f"{path}: needs columns n_in and n_out; has {', '.join(columns) or 'none'}")
    try:
        pairs = [(_whole(float(row["n_in"])), _whole(float(row["n_out"]))) for row in reader]
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{path}: line {reader.line_num}: n_in and n_out are to be numbers") from None
    if not pairs:
        raise ConfigError(f"{path}: has no rows")
    return lambda rng: pairs[rng.randrange(len(pairs))]
