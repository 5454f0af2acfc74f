"""`python -m kvstore --runtime FILE --unit NAME --parent PID`: started by the supervisor."""

import argparse
import functools
from pathlib import Path

from kvstore.app import serve
from muxmesh.config.runtime import MeshRuntime
from muxmesh.lifecycle import die_with_parent, run_service


def main() -> None:
    """Reads the arguments and serves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runtime", type=Path, required=True)
    parser.add_argument("--unit", required=True)
    parser.add_argument("--parent", type=int, required=True)
    arguments = parser.parse_args()
    die_with_parent(arguments.parent)
    run_service(functools.partial(serve, MeshRuntime.read(arguments.runtime), arguments.unit))


if __name__ == "__main__":
    main()
