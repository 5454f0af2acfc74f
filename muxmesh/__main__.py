"""`muxmesh` and `python -m muxmesh`: Ctrl-C ends the program without a traceback while it is still loading, too."""

import sys


def main() -> int:
    """Runs the command line and returns its exit code. See `muxmesh.cli.main.main`."""
    try:
        from muxmesh.cli import main as cli  # noqa: PLC0415 - loading takes longer than much of what follows

        return cli.main()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
