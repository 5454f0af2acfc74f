"""`python -m router --runtime FILE --parent PID`: started by the supervisor."""

import functools
import os
import sys

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # a fit is background work: it gets one core

from muxmesh.config.runtime import MeshRuntime
from muxmesh.lifecycle import run_service, service_arguments
from router.app import serve

_SWITCH_S = 0.0005
"""How long the event loop and the threads that predict and tokenize wait for each other; Python's default is 5 ms."""


def main() -> None:
    """Reads the arguments and serves."""
    arguments = service_arguments(__doc__)
    sys.setswitchinterval(_SWITCH_S)
    run_service(functools.partial(serve, MeshRuntime.read(arguments.runtime)))


if __name__ == "__main__":
    main()
