import os
from collections.abc import Callable
from pathlib import Path

import pytest

from muxmesh.errors import ModelUnsupported
from muxmesh.models.model_files import described, read_json_object, read_text


def write(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (write(b""), "f.json: is empty; a JSON object is needed"),
    "white space": (write(b" \n"), "f.json: is empty; a JSON object is needed"),
    "cut off": (write(b'{\n"a": '), "f.json:2: not JSON: Expecting value at column 6"),
    "a list": (write(b"[]"), "f.json: is a list, not a JSON object"),
    "a number": (write(b"7"), "f.json: is 7, not a JSON object"),
    "null": (write(b"null"), "f.json: is null, not a JSON object"),
    "byte order mark": (
        write(b"\xef\xbb\xbf{}"),
        "f.json:1: begins with a byte order mark; save it as UTF-8 without one",
    ),
    "UTF-16": (write('{"a": 1}'.encode("utf-16")), "f.json:1: is not UTF-8: byte 0xff at 0"),
    "Latin-1": (write(b'{\n"a": "\xe9"}'), "f.json:2: is not UTF-8: byte 0xe9 at 8"),
    "deep nesting": (write(b"[" * 200_000), "f.json: not JSON: is nested too deeply"),
    "deep objects": (write(b'{"a":' * 200_000), "f.json: not JSON: is nested too deeply"),
    "a long number": (write(b'{"a": ' + b"9" * 5000 + b"}"), "f.json: not JSON: has a number of thousands of digits"),
    "a git-lfs pointer": (
        write(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"),
        "f.json: is a git-lfs pointer, not the file itself; run `git lfs pull` in its repository",
    ),
    "a directory": (Path.mkdir, "f.json: is a directory, not a file"),
    "a broken link": (lambda path: path.symlink_to("nowhere"), "f.json: is a broken symbolic link"),
    "a link to itself": (lambda path: path.symlink_to(path), "f.json: "),
    "a FIFO": (os.mkfifo, "f.json: is not a regular file"),
    "too long": (write(b'{"a": "' + b"x" * 100 + b'"}'), "f.json: is 109 bytes long; at most 100"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_one_line_with_its_name(tmp_path: Path, damage: str) -> None:
    make, problem = DAMAGED[damage]
    path = tmp_path / "f.json"
    make(path)
    with pytest.raises(ModelUnsupported) as caught:
        read_json_object(path, 100 if damage == "too long" else 1 << 24)
    assert str(caught.value).startswith(f"{tmp_path}/{problem}")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < len(str(path)) + 120


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission_is_named(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    path.write_text("{}")
    path.chmod(0)
    with pytest.raises(ModelUnsupported, match=r"f\.json: cannot be read: Permission denied"):
        read_json_object(path)


def test_a_missing_file_is_none(tmp_path: Path) -> None:
    assert read_json_object(tmp_path / "none.json") is None
    assert read_text(tmp_path / "none" / "none.jinja") is None


def test_of_equal_keys_the_last_one_counts_as_in_transformers(tmp_path: Path) -> None:
    (tmp_path / "f.json").write_text('{"a": 1, "a": 2}')
    assert read_json_object(tmp_path / "f.json") == {"a": 2}


def test_the_line_ends_of_other_systems_are_read(tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(b"a\r\nb\rc\n")
    assert read_text(tmp_path / "t") == "a\nb\nc\n"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"), (True, "true"), (1.5, "1.5"), (float("nan"), "nan"), ("x", "'x'"), ([1], "a list"),
        ({}, "an object"), ("y" * 100, f"'{'y' * 99}..."), (10**100, f"1{'0' * 99}..."),
    ],
    ids=str,
)  # fmt: skip
def test_a_value_is_described_in_at_most_100_characters(value: object, text: str) -> None:
    assert described(value) == text
