"""Types of command-line arguments. Each refuses other values with a line that says which ones fit."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

from muxmesh.addresses import check_address
from muxmesh.errors import InvalidRequest
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


def address(text: str) -> str:
    """HOST:PORT or another address of gRPC."""
    try:
        return check_address(text)
    except InvalidRequest as error:
        raise argparse.ArgumentTypeError(f"{error.problem} (set by --address or MUXMESH_ADDRESS)") from None
