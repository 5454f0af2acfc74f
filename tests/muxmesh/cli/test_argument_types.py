"""Arguments of the command line: what fits is read, what does not is refused with a line that says what would."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import pytest

from muxmesh.cli import argument_types as types

READ: tuple[tuple[Callable[[str], Any], str, Any], ...] = (
    (types.whole, "-3", -3),
    (types.number, "1e3", 1000.0),
    (types.temperature, "0.7", 0.7),
    (types.temperature, "model", None),
    (types.seconds, "0.5", 0.5),
    (types.setting, "max_num_seqs=4", ("max_num_seqs", 4)),
    (types.setting, "slo={ttft_s: 2}", ("slo", {"ttft_s": 2})),
    (types.setting, "name=a=b", ("name", "a=b")),
    (types.bias, "42=-100", (42, -100.0)),
    (types.fraction(0, 1), "1", 1.0),
    (types.count, "1", 1),
    (types.counts(), "4,1,4", (1, 4)),
    (types.counts(100), "100", (100,)),
    (types.device, "cpu", "cpu"),
    (types.device, "cuda:7", "cuda:7"),
    (types.address, "127.0.0.1:50051", "127.0.0.1:50051"),
)

REFUSED: tuple[tuple[Callable[[str], Any], str, str], ...] = (
    (types.whole, "1.5", "'1.5' is not a whole number"),
    (types.number, "nan", "'nan' is not a finite number"),
    (types.number, "1e999", "'1e999' is not a finite number"),
    (types.temperature, "warm", "'warm' is neither a finite number nor `model`"),
    (types.seconds, "0", "'0' is not a number of seconds above 0"),
    (types.setting, "max_num_seqs", "'max_num_seqs' is not FIELD=VALUE, such as max_num_seqs=4"),
    (types.setting, "=4", "'=4' is not FIELD=VALUE"),
    (types.setting, "slo={", "'{' is no value of YAML"),
    (types.bias, "42", "'42' is not ID=BIAS, such as 42=-100"),
    (types.fraction(0, 1), "1.01", "'1.01' is not a number from 0 to 1"),
    (types.count, "0", "'0' is not a whole number of at least 1"),
    (types.counts(), "1,,2", "'1,,2' is not a list of whole numbers of at least 1, such as 1,2,4"),
    (types.counts(100), "1,101", "'1,101' is not a list of whole numbers from 1 to 100, such as 1,2,4"),
    (types.device, "cuda", "'cuda' is neither cpu nor cuda:N"),
    (types.device, "gpu:0", "'gpu:0' is neither cpu nor cuda:N"),
    (types.address, "localhost", "(set by --address or MUXMESH_ADDRESS)"),
)


@pytest.mark.parametrize(("parse", "text", "value"), READ)
def test_what_fits_is_read(parse: Callable[[str], Any], text: str, value: object) -> None:
    assert parse(text) == value


@pytest.mark.parametrize(("parse", "text", "message"), REFUSED)
def test_what_does_not_fit_is_refused_with_what_would(parse: Callable[[str], Any], text: str, message: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as refused:
        parse(text)
    assert message in str(refused.value)
