"""`python -m router --runtime FILE [--name NAME] [--listen HOST:PORT] [--parent PID]`: with or without a supervisor,
also several beside each other.
"""

import os
import socket
import sys

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # predictor fits are background work: one core is enough

from muxmesh.config.runtime import MeshRuntime
from muxmesh.lifecycle import Stop, run_service, service_arguments
from muxmesh.metrics.monitor import Monitor
from router.app import serve

_SWITCH_S = 0.0005
"""Seconds after which a thread that predicts or tokenizes yields the GIL to the event loop. Python's own is 5 ms."""
_OPTIONS = {
    "name": "of this router in `muxmesh status`, unique in the mesh (default: router-HOSTNAME)",
    "listen": "HOST:PORT of the public API (default: that of mesh.yaml)",
}


def main() -> None:
    """Reads the runtime file and serves until SIGTERM or SIGINT."""
    arguments = service_arguments(__doc__, optional=_OPTIONS)
    sys.setswitchinterval(_SWITCH_S)
    default = "router" if arguments.parent is not None else f"router-{socket.gethostname()}"
    monitor = Monitor(arguments.metrics)

    async def serve_mesh(stop: Stop) -> None:
        runtime = MeshRuntime.read(arguments.runtime)
        if arguments.listen is not None:
            runtime = runtime.with_listen(arguments.listen)
        await serve(runtime, stop, monitor, arguments.name or default)

    run_service(serve_mesh, monitor)


if __name__ == "__main__":
    main()
