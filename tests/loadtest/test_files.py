import gzip
import os
import threading
from pathlib import Path

import pytest

from loadtest.files import read_csv, read_jsonl, read_lines
from muxmesh.errors import ConfigError

LINES = [f"line {number} é\n" for number in range(3000)]


@pytest.mark.parametrize("is_gzipped", [False, True])
def test_a_pipe_is_read_from_its_beginning(tmp_path: Path, is_gzipped: bool) -> None:
    pipe, content = tmp_path / "pipe", "".join(LINES).encode()
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(gzip.compress(content) if is_gzipped else content,))
    writer.start()
    assert list(read_lines(pipe)) == LINES
    writer.join()


@pytest.mark.parametrize("name", ["lines.txt", "lines.gz"])
@pytest.mark.parametrize("is_gzipped", [False, True])
def test_gzip_is_detected_by_content(tmp_path: Path, name: str, is_gzipped: bool) -> None:
    content = "".join(LINES[:5]).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if is_gzipped else content)
    assert list(read_lines(tmp_path / name)) == LINES[:5]


def test_a_damaged_file_is_an_error_with_its_last_line(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    whole = gzip.compress("".join(LINES).encode())
    for content in (whole[:-9], whole[:200] + b"?" * 50 + whole[250:], b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="lines: cannot be read after line"):
            list(read_lines(path))


def test_the_lines_before_the_damage_are_read(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b"ok\n" * 20_000 + b"\xff")
    lines = []
    with pytest.raises(ConfigError) as error:
        for line in read_lines(path):
            lines.append(line)  # noqa: PERF402 - the loop ends with an error
    assert len(lines) > 1000
    assert f"after line {len(lines)}:" in str(error.value)


def test_a_byte_order_mark_is_not_part_of_the_first_line(tmp_path: Path) -> None:
    (tmp_path / "lines").write_text("\ufeffa\n")
    assert list(read_lines(tmp_path / "lines")) == ["a\n"]


def test_an_empty_file_has_no_lines(tmp_path: Path) -> None:
    (tmp_path / "lines").write_bytes(b"")
    assert list(read_lines(tmp_path / "lines")) == []


def test_a_missing_file_and_a_folder_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none: No such file"):
        list(read_lines(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"cannot be read after line 0: .*Is a directory"):
        list(read_lines(tmp_path))


def test_blank_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text('\n{"a": 1}\n  \n\n{"b": [2]}')
    assert list(read_jsonl(path)) == [(2, {"a": 1}), (5, {"b": [2]})]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "items.jsonl: line 2: not JSON: Expecting property name"),
        ('{"a": 1} {"b": 2}', "line 2: not JSON: Extra data"),
        ("[1]", "line 2: is list, not a JSON object"),
        ('"text"', "line 2: is str, not a JSON object"),
        ('{"a":' * 100_000, "line 2: is nested too deep"),
        (f'{{"a": {"1" * 5000}}}', "line 2: has a number of too many digits"),
        ("null", "line 2: is NoneType, not a JSON object"),
    ],
)
def test_a_line_that_is_not_an_object_is_refused_by_number(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text(f'{{"a": 1}}\n{line}\n')
    items = read_jsonl(path)
    assert next(items) == (1, {"a": 1})
    with pytest.raises(ConfigError, match=message):
        next(items)


def test_rows_are_numbered_by_their_last_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('a,b\n1,2\n"3\n",4\n')
    assert list(read_csv(path, ("a", "b"))) == [(2, {"a": "1", "b": "2"}), (4, {"a": "3\n", "b": "4"})]


@pytest.mark.parametrize(("text", "missing"), [("", "a, b"), ("b,c\n1,2\n", "a")])
def test_missing_columns_are_named(tmp_path: Path, text: str, missing: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"rows.csv: has no column {missing}; needed for a test$"):
        list(read_csv(path, ("a", "b"), "; needed for a test"))


@pytest.mark.parametrize(("num_rows", "line"), [(0, 1), (1, 3)])
def test_what_is_not_csv_is_an_error_with_its_line(tmp_path: Path, num_rows: int, line: int) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("a,b\n1,2\n" * num_rows + "x" * 200_000 + ",2\n")
    with pytest.raises(ConfigError, match=f"rows.csv: line {line}: not CSV: field larger than field limit"):
        list(read_csv(path, ("a", "b")))
