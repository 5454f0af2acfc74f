"""Log files on a disk that is full: /dev/full refuses every write, as such a disk does."""

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from muxmesh.supervisor.log_file import AS_IT_IS, LogFile, bound_log


@pytest.fixture
def full(tmp_path: Path) -> Iterator[LogFile]:
    (tmp_path / "full.log").symlink_to("/dev/full")
    file = LogFile(tmp_path / "full.log")
    yield file
    file.close()


def test_a_line_has_the_time(tmp_path: Path) -> None:
    file = LogFile(tmp_path / "a.log")
    file.write_line("a", "up")
    file.close()
    assert re.fullmatch(r"[-\d]+ [:,\d]+ up\n", (tmp_path / "a.log").read_text())


def test_a_line_that_has_a_time_of_its_own_stays_as_it_is(tmp_path: Path) -> None:
    file = LogFile(tmp_path / "a.log", AS_IT_IS)
    file.write_line("a", '{"message": "up"}')
    file.close()
    assert (tmp_path / "a.log").read_text() == '{"message": "up"}\n'


def test_a_log_that_cannot_be_written_raises_nothing_and_is_reported_once(
    full: LogFile, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(5000):
        full.write_line("a", f"line {number} " + "x" * 100)
    full.close()
    assert [record.getMessage() for record in caplog.records] == [
        f"{full.baseFilename} cannot be written; its lines are lost until it can"
    ]
    assert capsys.readouterr().err == "", "logging prints no traceback"


def test_a_log_that_reports_to_itself_does_not_recurse(full: LogFile, caplog: pytest.LogCaptureFixture) -> None:
    supervisor = logging.getLogger("supervisor")
    supervisor.addHandler(full)
    try:
        supervisor.warning("first")
        supervisor.warning("second")
    finally:
        supervisor.removeHandler(full)
    assert len(caplog.records) == 3


def test_lines_are_written_again_when_they_can_be(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "logs"
    file = LogFile(folder / "a.log")
    for turn in range(2):
        file.write_line("a", "lost")
        file.write_line("a", "lost too")
        folder.mkdir()
        file.write_line("a", f"kept {turn}")
        file.close()
        assert [line.split(maxsplit=2)[2] for line in (folder / "a.log").read_text().splitlines()] == [f"kept {turn}"]
        (folder / "a.log").unlink()
        folder.rmdir()
        file = LogFile(folder / "a.log")
    assert len(caplog.records) == 2


def test_a_folder_that_is_not_there_stops_nothing(tmp_path: Path) -> None:
    file = LogFile(tmp_path / "none" / "a.log")
    file.write_line("a", "up")
    file.close()


MAX_BYTES = 256 * 1024


@pytest.mark.parametrize("mode", ["ab", "wb"], ids=["appends", "writes at its own offset"])
def test_the_log_of_another_program_occupies_at_most_twice_its_bound(tmp_path: Path, mode: str) -> None:
    path, earlier = tmp_path / "control.log", tmp_path / "control.log.1"
    with path.open(mode, buffering=0) as log:
        for turn in range(8):
            log.write(bytes([turn + 1]) * (MAX_BYTES * 3 // 4))
            os.fsync(log.fileno())
            bound_log(path, MAX_BYTES)
            assert path.stat().st_blocks * 512 < MAX_BYTES
            assert not earlier.exists() or earlier.stat().st_size == MAX_BYTES
    assert earlier.read_bytes()[-MAX_BYTES * 3 // 4 :] == bytes([8]) * (MAX_BYTES * 3 // 4)


def test_the_log_of_another_program_is_emptied_on_a_full_disk_too(tmp_path: Path) -> None:
    (tmp_path / "control.log.1").symlink_to("/dev/full")
    (tmp_path / "control.log").write_bytes(b"x" * MAX_BYTES)
    bound_log(tmp_path / "control.log", MAX_BYTES)
    assert (tmp_path / "control.log").stat().st_size == 0


def test_a_log_that_is_not_there_or_short_stays_as_it_is(tmp_path: Path) -> None:
    bound_log(tmp_path / "none.log", MAX_BYTES)
    (tmp_path / "a.log").write_text("line")
    bound_log(tmp_path / "a.log", MAX_BYTES)
    assert [path.name for path in tmp_path.iterdir()] == ["a.log"]
    assert (tmp_path / "a.log").read_text() == "line"
