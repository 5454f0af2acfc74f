"""`python -m router --runtime FILE --parent PID`: started by the supervisor."""

import functools
import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # a fit is background work: not on every core

from muxmesh.config.runtime import MeshRuntime
from muxmesh.lifecycle import run_service, service_arguments
from router.app import serve


def main() -> None:
    """Reads the arguments and serves."""
    arguments = service_arguments(__doc__)
    run_service(functools.partial(serve, MeshRuntime.read(arguments.runtime)))


if __name__ == "__main__":
    main()
