"""YAML that is refused, in bounded time, with its line; and what plain values mean."""

import os
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from muxmesh.config.yaml_reader import MAX_DEPTH, MAX_FILE_BYTES, MAX_VALUES, read_fields, read_text
from muxmesh.errors import ConfigError


def error(text: str) -> str:
    """The error of a text that cannot be read."""
    with pytest.raises(ConfigError) as caught:
        read_fields(text, "f")
    return str(caught.value)


def problems(text: str) -> list[tuple[tuple[str | int, ...], str]]:
    return read_fields(text, "f").problems


def data(text: str) -> Any:
    found = read_fields(text, "f")
    assert found.problems == []
    return found.data


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{number}: &a{number} [{', '.join([f'*a{number - 1}'] * 9)}]\n" for number in range(1, 12)
)
MERGE_BOMB = "a0: &a0 {x: 1}\n" + "".join(
    f"a{number}: &a{number} {{<<: [*a{number - 1}, *a{number - 1}]}}\n" for number in range(1, 18)
)
ALIAS_CHAIN = "a0: &a0 [x]\n" + "".join(f"a{number}: &a{number} [*a{number - 1}]\n" for number in range(1, 100))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (BOMB, f"f:1: has more than {MAX_VALUES} values, after aliases are expanded"),
        (MERGE_BOMB, f"has more than {MAX_VALUES} values, after "),
        (ALIAS_CHAIN, f"f:1: is nested more than {MAX_DEPTH} deep by aliases"),
        ("[" * 200_000, f"f:1: is nested more than {MAX_DEPTH} deep"),
        ("{a: " * 50_000, f"f:1: is nested more than {MAX_DEPTH} deep"),
        ("- " * 100_000 + "1", f"f:1: is nested more than {MAX_DEPTH} deep"),
        ("".join(f"{' ' * depth}a:\n" for depth in range(600)), f"f:21: is nested more than {MAX_DEPTH} deep"),
        ("a:\n" + "- x\n" * (MAX_VALUES + 1), f"has more than {MAX_VALUES} values"),
    ],
    ids=["aliases", "merge keys", "chain of aliases", "flow lists", "flow mappings", "lists", "mappings", "long list"],
)
def test_a_text_that_would_expand_without_bound_is_refused(text: str, expected: str) -> None:
    assert expected in error(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("units: [", "f:1: not YAML: expected the node content, but found '<stream end>'"),
        ("listen: a:1\nunits: }", "f:2: not YAML: "),
        ("a: 1\n---\nb: 2", "f:2: not YAML: a second document begins; one is needed"),
        ("units:\n\t- a", "f:2: not YAML: found character '\\t' that cannot start any token; indent with spaces"),
        ("a: 1\nb: \0", "f:2: not YAML: the character U+0000"),
        ("a: 1\n\n\ud800", "f:3: not YAML: the character U+D800"),
        ("a: *b", "f:1: not YAML: found undefined alias 'b'"),
        ("%YAML 7.0\n---\na: 1", "f:1: not YAML: found incompatible YAML document (version 1.* is required)"),
    ],
)
def test_a_text_that_is_not_yaml_is_refused_with_its_line(text: str, expected: str) -> None:
    assert error(text).startswith(expected)
    assert "\n" not in error(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: !!python/object/apply:os.system [x]", (("a",), "has the tag !!python/object/apply:os.system")),
        ("a: !own x", (("a",), "has the tag !own, which is not supported; write a plain value")),
        ("a: !!set {b}", (("a",), "has the tag !!set")),
        ("a: !!binary aGk=", (("a",), "has the tag !!binary")),
        ("a: !!timestamp 2026-01-01", (("a",), "has the tag !!timestamp")),
        ("a: !!int ''", (("a",), "cannot be read as !!int")),
        ("a: !!bool maybe", (("a",), "cannot be read as !!bool")),
        ("a: !!float one", (("a",), "cannot be read as !!float")),
        (f"a: {'9' * 5000}", (("a",), "cannot be read as !!int")),
        ("a: 1\nb: 2\na: 3", (("a",), "is a duplicate of the field in line 1")),
        ("? [a]\n: 1", ((), "has a list or a mapping as a field name in line 1")),
        ("<<: 5", (("<<",), "must be an alias of a mapping, or a list of aliases")),
        ("a: &a\n  - *a", (("a", 0), "is an alias of a field that contains it")),
        ("a: &a\n  b: *a", (("a", "b"), "is an alias of a field that contains it")),
        ("&r\na: *r", (("a",), "is an alias of a field that contains it")),
        ("a: &a\n  <<: *a", (("a", "<<"), "merges a mapping that contains it")),
    ],
)
def test_a_value_that_is_not_plain_is_a_problem_of_its_field(text: str, expected: tuple[Any, str]) -> None:
    ((location, problem),) = problems(text)
    assert (location, problem[: len(expected[1])]) == expected


def test_a_field_that_is_refused_is_left_out() -> None:
    found = read_fields("a: !own x\nb: [1, !own y]", "f")
    assert found.data == {"b": [1, None]}
    assert found.omitted == {("a",), ("b", 1)}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2026-01-01", "2026-01-01"),
        ("2026-99-99", "2026-99-99"),
        ("1:30", "1:30"),
        ("1:30.5", "1:30.5"),
        ("=", "="),
        ("~", None),
        ("", None),
        ("yes", True),
        ("'yes'", "yes"),
        ("0x10", 16),
        ("1_000", 1000),
        ("1.5", 1.5),
        (".inf", float("inf")),
        ("!!str 5", "5"),
        ("!!int '5'", 5),
    ],
)
def test_plain_values(text: str, value: object) -> None:
    assert data(f"a: {text}") == {"a": value}


def test_the_first_of_merged_fields_counts_and_an_own_field_before_it() -> None:
    text = "x: &x {a: 1, b: 1}\ny: &y {<<: *x, b: 2, c: 2}\nz:\n  <<: [*y, *x]\n  c: 3"
    assert data(text)["z"] == {"a": 1, "b": 2, "c": 3}


def test_each_alias_is_a_value_of_its_own() -> None:
    found = data("a: &a {b: 1}\nc: *a")
    found["a"]["b"] = 2
    assert found["c"] == {"b": 1}


def test_a_file_is_utf_8_with_or_without_a_byte_order_mark(tmp_path: Path) -> None:
    for name, content in (("plain", "ä: 1".encode()), ("bom", "\ufeffä: 1".encode())):
        (tmp_path / name).write_bytes(content)
        assert read_text(tmp_path / name) == "ä: 1"


@pytest.mark.parametrize(("content", "line"), [(b"\xe9", 1), (b"a: 1\n\nb: \xff", 3), ("a: 1".encode("utf-16"), 1)])
def test_a_file_that_is_not_utf_8_is_refused_with_its_line(tmp_path: Path, content: bytes, line: int) -> None:
    (tmp_path / "latin.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"latin\.yaml:{line}: is not UTF-8: byte 0x(e9|ff)"):
        read_text(tmp_path / "latin.yaml")


def make_directory(path: Path) -> None:
    path.mkdir()


def make_link_to_zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [make_directory, make_link_to_zeros])
def test_what_is_neither_a_file_nor_a_pipe_is_refused(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "x.yaml")
    with pytest.raises(ConfigError, match=r"x\.yaml: cannot be read: it is neither a regular file nor a pipe"):
        read_text(tmp_path / "x.yaml")


@pytest.mark.parametrize("content", ["", "a: 1", "#" * MAX_FILE_BYTES])
def test_a_pipe_is_read_to_its_end(tmp_path: Path, content: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=(content,))
    writer.start()
    assert read_text(tmp_path / "pipe") == content
    writer.join()


def test_a_pipe_that_a_program_has_written_and_closed_is_read(tmp_path: Path) -> None:
    """As the shell passes it: /dev/fd/63."""
    read_end, write_end = os.pipe()
    os.write(write_end, b"a: 1")
    os.close(write_end)
    try:
        assert read_text(Path(f"/dev/fd/{read_end}")) == "a: 1"
    finally:
        os.close(read_end)


def test_a_pipe_without_an_end_is_refused_at_the_limit_of_a_file() -> None:
    with subprocess.Popen(["yes"], stdout=subprocess.PIPE) as endless:
        assert endless.stdout is not None
        with pytest.raises(ConfigError, match=f"is larger than {MAX_FILE_BYTES} bytes"):
            read_text(Path(f"/dev/fd/{endless.stdout.fileno()}"))
        endless.kill()


def test_a_pipe_without_a_writer_is_refused_after_a_while(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match=r"pipe: cannot be read: nothing is written to this pipe for 0\.01 s"):
        read_text(tmp_path / "pipe", longest_wait_s=0.01)


@pytest.mark.parametrize("name", ["none.yaml", "a\0b", "n" * 300])
def test_a_file_that_cannot_be_opened_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read: "):
        read_text(tmp_path / name)


def test_a_file_of_a_gigabyte_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "big.yaml").open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(ConfigError, match=f"big.yaml: is larger than {MAX_FILE_BYTES} bytes"):
        read_text(tmp_path / "big.yaml")
