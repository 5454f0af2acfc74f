import argparse
from pathlib import Path

import pytest

from loadtest.spec import HELP
from muxmesh.cli import loadtest_options


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="muxmesh loadtest")
    loadtest_options.add_to(parser)
    return parser


def test_without_options_a_test_runs_and_nothing_is_set(parser: argparse.ArgumentParser) -> None:
    parsed = vars(parser.parse_args([]))
    assert parsed.pop("action") == "run"
    assert parsed.pop("goodput") == []
    assert (parsed.pop("allow_slow_driver"), parsed.pop("quiet")) == (False, False)
    assert set(parsed.values()) == {None}


def test_the_output_has_a_short_option(parser: argparse.ArgumentParser) -> None:
    assert parser.parse_args(["-o", "r.json"]).output == Path("r.json")


def test_values_are_parsed_by_their_kind(parser: argparse.ArgumentParser) -> None:
    line = (
        "--sweep 0.5,1,2 --max-concurrency 4 --timeout 1.5 --calibrate 0 --slo-scale 16 --slo-attainment 1 "
        "--goodput ttft:500 e2el:1 --vocabulary 32 --output r.json"
    )
    parsed = parser.parse_args(line.split())
    assert parsed.sweep == [0.5, 1.0, 2.0]
    assert (parsed.max_concurrency, parsed.timeout, parsed.calibrate, parsed.slo_scale) == (4, 1.5, 0, 16)
    assert (parsed.slo_attainment, parsed.vocabulary) == (1.0, 32)
    assert parsed.goodput == ["ttft:500", "e2el:1"]
    assert parsed.output == Path("r.json")


@pytest.mark.parametrize(
    ("option", "values", "problem"),
    [
        ("--sweep", ["", "1,", "1,x", "0", "-1", "inf", "nan"], "is not a list of rates"),
        ("--max-concurrency", ["0", "-1", "1.5", "x", str((1 << 20) + 1)], "whole number from 1 to 1048576"),
        ("--calibrate", ["-1", "1001", "x"], "whole number from 0 to 1000"),
        ("--slo-scale", ["0", "17", "2.5"], "whole number from 1 to 16"),
        ("--vocabulary", ["31", "x"], "whole number from 32 to 1048576"),
        ("--slo-attainment", ["0", "1.01", "nan", "x"], "number above 0 and at most 1"),
        ("--timeout", ["0", "-1", "inf", "nan", "x"], "number of seconds above 0"),
    ],
)
def test_a_value_outside_its_bounds_is_refused_with_the_bounds(
    parser: argparse.ArgumentParser,
    option: str,
    values: list[str],
    problem: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for value in values:
        with pytest.raises(SystemExit, match="2"):
            parser.parse_args([f"{option}={value}"])
        error = capsys.readouterr().err
        assert f"argument {option}: {value!r}" in error and problem in error


def test_superscripts_are_refused_without_a_traceback(
    parser: argparse.ArgumentParser, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["--calibrate", "²"])
    assert "argument --calibrate" in capsys.readouterr().err


def test_compare_takes_reports_and_needs_at_least_one(
    parser: argparse.ArgumentParser, capsys: pytest.CaptureFixture[str]
) -> None:
    parsed = parser.parse_args(["compare", "a.json", "b.json", "--html", "c.html"])
    assert (parsed.action, parsed.files, parsed.html) == ("compare", [Path("a.json"), Path("b.json")], Path("c.html"))
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["compare"])
    assert "REPORT.json" in capsys.readouterr().err


def test_the_help_explains_every_setting_of_a_workload(parser: argparse.ArgumentParser) -> None:
    assert HELP in parser.format_help()
