"""`python -m muxmesh.supervisor.guard PARENT_PID COMMAND...`: makes a program that is not ours die with its parent."""

import os
import sys

from muxmesh.lifecycle import die_with_parent


def main() -> None:
    """Ties this process to its parent, then becomes the command."""
    parent_pid, *command = sys.argv[1:]
    die_with_parent(int(parent_pid))
    os.execvp(command[0], command)  # noqa: S606 - a fixed command of the supervisor


if __name__ == "__main__":
    main()
