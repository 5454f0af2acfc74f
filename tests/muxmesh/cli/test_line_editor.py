"""The history file of `muxmesh chat`: private, bounded, and never in the way."""

from pathlib import Path

import pytest
from prompt_toolkit.history import InMemoryHistory

from muxmesh.cli.line_editor import open_history


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MUXMESH_STATE_DIR", str(tmp_path / "state"))
    return tmp_path / "state" / "chat_history"


def test_messages_are_kept_for_the_next_chat_in_a_file_that_only_its_owner_can_read(path: Path) -> None:
    history = open_history(is_kept=True)
    for message in ("one", "two\nlines", "\ud800 half"):
        history.append_string(message)
    assert list(open_history(is_kept=True).load_history_strings()) == ["? half", "two\nlines", "one"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_file_that_others_could_read_becomes_private(path: Path) -> None:
    path.parent.mkdir()
    path.touch(0o644)
    open_history(is_kept=True)
    assert path.stat().st_mode & 0o777 == 0o600


def test_without_history_nothing_is_written(path: Path) -> None:
    open_history(is_kept=False).append_string("secret")
    assert not path.exists()


def test_a_long_history_loses_its_older_half(path: Path) -> None:
    history = open_history(is_kept=True)
    for number in range(300):
        history.append_string(f"{number} " + "x" * 4000)
    assert path.stat().st_size > 1 << 20
    kept = list(open_history(is_kept=True).load_history_strings())
    assert path.stat().st_size <= 1 << 19
    assert [message.split()[0] for message in kept] == [str(number) for number in range(299, 299 - len(kept), -1)]
    assert 100 < len(kept) < 200 and all(len(message.split()[1]) == 4000 for message in kept)


def test_a_state_directory_that_cannot_be_used_costs_only_the_history(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path.parent.touch()
    assert isinstance(open_history(is_kept=True), InMemoryHistory)
    assert "muxmesh: earlier messages are not available: " in capsys.readouterr().err


def test_a_file_that_becomes_unusable_costs_only_the_history(path: Path) -> None:
    history = open_history(is_kept=True)
    path.unlink()
    path.mkdir()
    history.append_string("one")
    assert list(history.load_history_strings()) == []
