"""`python -m kvstore --runtime FILE --unit NAME --parent PID`: started by the supervisor."""

import functools

from kvstore.app import serve
from muxmesh.config.runtime import MeshRuntime
from muxmesh.lifecycle import run_service, service_arguments


def main() -> None:
    """Serves the unit that the command line names, until SIGTERM or SIGINT."""
    arguments = service_arguments(__doc__, "unit")
    run_service(functools.partial(serve, MeshRuntime.read(arguments.runtime), arguments.unit))


if __name__ == "__main__":
    main()
