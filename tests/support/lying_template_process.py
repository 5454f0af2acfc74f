"""A process in place of `muxmesh.models.template_process`, whose responses claim to be longer than they may be."""

import socket
import sys


def main() -> None:
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        connection.recv(1 << 16)
        connection.sendall((1).to_bytes(4) + b"t")
        connection.recv(1 << 16)
        connection.sendall(((1 << 32) - 1).to_bytes(4))
        while connection.send(bytes(1 << 16)):
            pass


if __name__ == "__main__":
    main()
