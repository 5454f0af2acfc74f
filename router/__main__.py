"""`python -m router --runtime FILE --parent PID`: started by the supervisor."""

import functools
import os
import sys

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # predictor fits are background work: one core is enough

from muxmesh.config.runtime import MeshRuntime
from muxmesh.lifecycle import run_service, service_arguments
from router.app import serve

_SWITCH_S = 0.0005
"""Seconds after which a thread that predicts or tokenizes yields the GIL to the event loop. Python's own is 5 ms."""


def main() -> None:
    """Reads the runtime file and serves until SIGTERM or SIGINT."""
    arguments = service_arguments(__doc__)
    sys.setswitchinterval(_SWITCH_S)
    run_service(functools.partial(serve, MeshRuntime.read(arguments.runtime)))


if __name__ == "__main__":
    main()
