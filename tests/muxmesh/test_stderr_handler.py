import logging
import os
import subprocess
import sys
from io import StringIO
from pathlib import Path

from muxmesh.stderr_handler import StderrHandler

LOGS = """
import logging, sys
from muxmesh.lifecycle import configure_logging

configure_logging(logging.INFO, None, "p")
log = logging.getLogger("x")
for number in range(2000):
    log.info("line %d %s", number, "x" * 200)
print("logged", flush=True)
sys.stdin.readline()
log.info("later")
"""


def test_a_process_whose_log_nobody_reads_goes_on_and_says_later_what_is_missing() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", LOGS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    with process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == b"logged\n"
        read = os.read(process.stderr.fileno(), 1 << 20)
        process.stdin.write(b"\n")
        process.stdin.close()
        read += process.stderr.read()
        assert process.wait(timeout=30) == 0
    *lines, dropped, later = read.decode().splitlines()
    assert later == "INFO x: later"
    assert lines == [f"INFO x: line {number} {'x' * 200}" for number in range(len(lines))]
    assert dropped == (
        f"WARNING muxmesh.stderr_handler: {2000 - len(lines)} log records were dropped, because nothing read them"
    )


def test_a_log_in_a_file_is_complete(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log:
        subprocess.run(
            [sys.executable, "-c", LOGS], input=b"\n", stdout=subprocess.DEVNULL, stderr=log, check=True, timeout=60
        )
    assert len((tmp_path / "log").read_bytes().splitlines()) == 2001


def test_a_stream_that_is_no_file_is_written_to() -> None:
    stream = StringIO()
    handler = StderrHandler(stream)
    handler.emit(logging.LogRecord("x", logging.INFO, "f", 1, "hello", None, None))
    assert stream.getvalue() == "hello\n"
