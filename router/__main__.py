"""`python -m router --runtime FILE --parent PID`: started by the supervisor."""

import functools

from muxmesh.config.runtime import MeshRuntime
from muxmesh.lifecycle import run_service, service_arguments
from router.app import serve


def main() -> None:
    """Reads the arguments and serves."""
    arguments = service_arguments(__doc__)
    run_service(functools.partial(serve, MeshRuntime.read(arguments.runtime)))


if __name__ == "__main__":
    main()
