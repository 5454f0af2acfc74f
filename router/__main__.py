"""`python -m router --runtime FILE [--name NAME] [--listen HOST:PORT] [--drain SECONDS] [--parent PID]`.

With or without a supervisor, also several beside each other.
"""

import logging
import math
import os
import socket
import sys

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # predictor fits are background work: one core is enough
# gRPC reads it when it is loaded. With the default it prints a line for each TLS handshake that fails, so that any
# client could fill the log.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

from muxmesh.config.listen_address import check_open_access
from muxmesh.config.runtime import MeshRuntime
from muxmesh.errors import ConfigError
from muxmesh.file_lock import only_process
from muxmesh.lifecycle import Stop, configure_logging, run_service, service_arguments
from muxmesh.metrics.monitor import Monitor
from muxmesh.quoting import quoted
from router.app import DRAIN_S, serve

_SWITCH_S = 0.0005
"""Seconds after which a thread that predicts or tokenizes yields the GIL to the event loop. Python's own is 5 ms."""
MAX_DRAIN_S = 86_400
_OPTIONS = {
    "name": "of this router in `muxmesh status`, unique in the mesh (default: router-HOSTNAME)",
    "listen": "HOST:PORT of the public API (default: that of mesh.yaml)",
    "drain": "seconds for which a router that is stopped lets running requests finish (default: 2)",
}


def _drain_s(text: str | None) -> float:
    """Seconds that the option names. Raises ConfigError."""
    try:
        seconds = DRAIN_S if text is None else float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= MAX_DRAIN_S:
        raise ConfigError(f"--drain: is {quoted(text or '')}; must be seconds, from 0 to {MAX_DRAIN_S}")
    return seconds


def main() -> None:
    """Reads the runtime file and serves until SIGTERM or SIGINT."""
    arguments = service_arguments(__doc__, optional=_OPTIONS)
    sys.setswitchinterval(_SWITCH_S)
    name = arguments.name or ("router" if arguments.parent is not None else f"router-{socket.gethostname()}")
    monitor = Monitor(arguments.metrics)

    async def serve_mesh(stop: Stop) -> None:
        runtime = MeshRuntime.read(arguments.runtime)
        configure_logging(logging.INFO, runtime.config.log_format, name)
        if arguments.listen is not None:
            runtime = runtime.with_listen(arguments.listen)
            runtime.config.check_port_is_fixed()
            check_open_access(runtime.config)
        with only_process(runtime.run_dir, runtime.router_endpoint(name).name):
            await serve(runtime, stop, monitor, name, _drain_s(arguments.drain))

    run_service(serve_mesh, name, monitor)


if __name__ == "__main__":
    main()
