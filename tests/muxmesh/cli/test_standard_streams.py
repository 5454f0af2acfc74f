"""Standard streams that are closed when a command starts."""

import subprocess
import sys
from pathlib import Path

CLOSED = """
import os, sys
for number in (0, 1, 2):
    os.close(number)
sys.stdin = sys.stdout = sys.stderr = None
from muxmesh.cli import standard_streams
standard_streams.prepare()
print("lost")
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
os.write(fd, f"{fd} {sys.stdin.read()!r}".encode())
print("lost too", file=sys.stderr)
"""


def test_a_closed_standard_stream_becomes_no_other_file(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", CLOSED, str(tmp_path / "file")], check=True, timeout=60)
    number, read = (tmp_path / "file").read_text().split()
    assert int(number) > 2
    assert read == "''"
