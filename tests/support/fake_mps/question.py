"""A question to the daemon of `control_program`: sends stdin and prints the answer. Imports as little as possible."""

from __future__ import annotations

import os
import socket
import sys


def ask() -> bool:
    """Whether a daemon listens."""
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(os.environ["CUDA_MPS_PIPE_DIRECTORY"] + "/control")
        except OSError:
            return False
        connection.sendall(b"ui\n" + sys.stdin.buffer.read())
        connection.shutdown(socket.SHUT_WR)
        while chunk := connection.recv(65536):
            sys.stdout.write(chunk.decode())
    return True
