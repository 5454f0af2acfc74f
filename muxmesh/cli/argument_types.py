"""Types of command-line arguments. Each refuses other values with a line that says which ones fit."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from typing import Any

from muxmesh.addresses import check_address
from muxmesh.errors import InvalidRequest, MeshError
from muxmesh.quoting import quoted


def whole(text: str) -> int:
    """A whole number. Its range is for the mesh to check."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not a whole number") from None


def number(text: str) -> float:
    """A finite number. Its range is for the mesh to check."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not a finite number")
    return value


def temperature(text: str) -> float | None:
    """A temperature, or None for ``model``."""
    if text == "model":
        return None
    try:
        return number(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is neither a finite number nor `model`") from None


def seconds(text: str) -> float:
    """A time above 0."""
    value = number(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not a number of seconds above 0")
    return value


def setting(text: str) -> tuple[str, Any]:
    """A field of a model and its value, as in mesh.yaml."""
    from muxmesh.config.yaml_reader import read_fields  # noqa: PLC0415 - needs PyYAML, which the client has not

    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not FIELD=VALUE, such as max_num_seqs=4")
    try:
        fields = read_fields(f"value: {value}", "value")
    except MeshError:
        raise argparse.ArgumentTypeError(f"{quoted(value)} is no value of YAML") from None
    if fields.problems or not isinstance(fields.data, dict) or "value" not in fields.data:
        raise argparse.ArgumentTypeError(f"{quoted(value)} is no value of YAML")
    return name.strip(), fields.data["value"]


def bias(text: str) -> tuple[int, float]:
    """A token id and the number added to its logit."""
    token_id, _, value = text.partition("=")
    try:
        return whole(token_id), number(value)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not ID=BIAS, such as 42=-100") from None


def fraction(least: float, most: float) -> Callable[[str], float]:
    """Numbers from ``least`` to ``most``."""

    def parse(text: str) -> float:
        value = number(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{quoted(text)} is not a number from {least:g} to {most:g}")
        return value

    return parse


def count(text: str) -> int:
    """A whole number of at least 1."""
    value = whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not a whole number of at least 1")
    return value


def counts(most: int | None = None) -> Callable[[str], tuple[int, ...]]:
    """Whole numbers from 1 to ``most``, separated by commas. They are sorted, and each is kept once."""
    needed = "whole numbers of at least 1" if most is None else f"whole numbers from 1 to {most}"

    def parse(text: str) -> tuple[int, ...]:
        try:
            values = sorted({int(part) for part in text.split(",")})
        except ValueError:
            values = []
        if not values or values[0] < 1 or (most is not None and values[-1] > most):
            raise argparse.ArgumentTypeError(f"{quoted(text)} is not a list of {needed}, such as 1,2,4")
        return tuple(values)

    return parse


def device(text: str) -> str:
    """The device of a unit."""
    if not re.fullmatch(r"cpu|cuda:\d{1,3}", text):
        raise argparse.ArgumentTypeError(f"{quoted(text)} is neither cpu nor cuda:N")
    return text


def address(text: str) -> str:
    """HOST:PORT or another address of gRPC."""
    try:
        return check_address(text)
    except InvalidRequest as error:
        raise argparse.ArgumentTypeError(f"{error.problem} (set by --address or MUXMESH_ADDRESS)") from None
