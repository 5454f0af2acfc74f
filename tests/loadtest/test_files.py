import gzip
import os
import threading
from pathlib import Path

import pytest

from loadtest.files import read_lines
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


def test_damaged_files_are_told_of(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    whole = gzip.compress("".join(LINES).encode())
    for content in (whole[:-9], whole[:200] + b"?" * 50 + whole[250:], b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="cannot be read after line"):
            list(read_lines(path))


def test_an_empty_file_has_no_lines(tmp_path: Path) -> None:
    (tmp_path / "lines").write_bytes(b"")
    assert list(read_lines(tmp_path / "lines")) == []
