"""`python -m benchmarks.muxserve measured FILE... --profile PROFILE --lengths LENGTHS [--fit]`, or `... scale DATA`."""

from __future__ import annotations

import argparse
import sys

from benchmarks.muxserve import measured, scale
from muxmesh.errors import ConfigError


def main() -> int:
    """Runs one of the two studies."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.muxserve")
    commands = parser.add_subparsers(dest="command", required=True)
    measured.add_arguments(commands.add_parser("measured", help=measured.__doc__))
    scale.add_arguments(commands.add_parser("scale", help=scale.__doc__))
    options = parser.parse_args()
    try:
        return scale.run(options) if options.command == "scale" else measured.run(options)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
