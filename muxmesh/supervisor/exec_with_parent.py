"""`python -m muxmesh.supervisor.exec_with_parent PARENT_PID COMMAND...` runs a program that dies with its parent."""

import os
import sys

from muxmesh.parent_death import die_with_parent


def main() -> None:
    """Makes this process die with its parent, then replaces it by the command."""
    parent_pid, *command = sys.argv[1:]
    die_with_parent(int(parent_pid))
    os.execvp(command[0], command)  # noqa: S606 - the supervisor builds the command


if __name__ == "__main__":
    main()
