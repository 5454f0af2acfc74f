"""Output whose reader is slow, stopped or gone."""

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from muxmesh.cli.console import Console

_F_SETPIPE_SZ = 1031


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """The two ends of a pipe of one page."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, _F_SETPIPE_SZ, 4096)
    yield reader, writer
    for fd in (reader, writer):
        try:
            os.close(fd)
        except OSError:
            continue


def read_all(reader: int) -> str:
    found = b""
    while part := os.read(reader, 65536):
        found += part
    return found.decode()


def test_what_is_printed_arrives_in_order(pipe: tuple[int, int]) -> None:
    console = Console(pipe[1])
    print("first", file=console)
    print("zweite Zeile: ä", file=console, flush=True)
    console.close()
    os.close(pipe[1])
    assert read_all(pipe[0]) == "first\nzweite Zeile: ä\n"


def test_a_reader_that_is_stopped_holds_no_writer_up(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    console = Console(writer)
    for number in range(50_000):
        console.write(f"{number}\n")
    console.close()  # waits a second at most
    os.set_blocking(reader, False)
    assert os.read(reader, 4096).startswith(b"0\n1\n2\n")
    os.close(reader)
    console.thread.join(20)  # else it would write to the next file with this number


def test_dropped_output_is_counted(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    console = Console(writer)
    for _ in range(3000):
        console.write("x" * 99 + "\n")
    found = b""
    while b")\n" not in found:
        found += os.read(reader, 65536)
    console.close()
    (line,) = (line for line in found.decode().splitlines() if line.startswith("("))
    num_dropped = int(line.split()[0][1:])
    assert line.endswith("pieces of output were dropped because they were not read in time)")
    assert found.count(b"x" * 99 + b"\n") + num_dropped == 3000


def test_a_reader_that_is_gone_is_ignored(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    os.close(reader)
    console = Console(writer)
    for _ in range(10):
        console.write("nobody reads this\n")
    console.close()


def test_a_full_disk_is_ignored() -> None:
    with Path("/dev/full").open("wb", buffering=0) as full:
        console = Console(full.fileno())
        console.write("lost\n")
        console.close()


def test_a_terminal_that_is_not_blocking_gets_everything(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    os.set_blocking(writer, False)
    console = Console(writer)
    text = "y" * 100_000
    console.write(text)
    found = b""
    while len(found) < len(text):
        found += os.read(reader, 65536)
    console.close()
    assert found.decode() == text


def test_a_console_that_is_closed_takes_nothing_more(pipe: tuple[int, int]) -> None:
    console = Console(pipe[1])
    console.close()
    console.write("late")
    console.close()
    os.close(pipe[1])
    assert read_all(pipe[0]) == ""
