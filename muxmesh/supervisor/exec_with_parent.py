"""`python -m muxmesh.supervisor.exec_with_parent PARENT_PID COMMAND...`: a program that ends with its parent."""

import os
import sys

from muxmesh.lifecycle import die_with_parent


def main() -> None:
    """Ties this process to its parent, then executes the command."""
    parent_pid, *command = sys.argv[1:]
    die_with_parent(int(parent_pid))
    os.execvp(command[0], command)  # noqa: S606 - a fixed command of the supervisor


if __name__ == "__main__":
    main()
