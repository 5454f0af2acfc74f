import pytest

from benchmarks.report import Report


def verdict(report: Report, name: str) -> str:
    line = next(line for line in report.table().splitlines() if line.startswith(name))
    return line.removeprefix(name).split(maxsplit=1)[1] if len(line.removeprefix(name).split(maxsplit=1)) > 1 else ""


@pytest.mark.parametrize(
    ("bar", "shown", "holds"),
    [
        ((), "", True),
        (("at least 1", True), "at least 1: ok", True),
        (("at least 1", False), "at least 1: MISSED", False),
        (("at least 1", True, "at least 2", True), "at least 1: ok; aim at least 2: reached", True),
        (("at least 1", True, "at least 2", False), "at least 1: ok; aim at least 2: not reached", True),
        (("at least 1", False, "at least 2", False), "at least 1: MISSED; aim at least 2: not reached", False),
        (("", None, "at least 2", False), "aim at least 2: not reached", True),
    ],
)
def test_a_bar_shows_whether_it_holds_and_whether_its_aim_is_reached(
    bar: tuple[object, ...], shown: str, holds: bool
) -> None:
    report = Report("x")
    report.bar("speed", 1.5, *bar)  # type: ignore[arg-type]
    assert verdict(report, "speed") == shown
    assert report.holds() == holds


def test_a_verdict_needs_what_it_is_about() -> None:
    report = Report("x")
    for arguments in (("at least 1", None), ("", True), ("", None, "at least 2", None), ("", None, "", False)):
        with pytest.raises(AssertionError):
            report.bar("speed", 1.0, *arguments)
