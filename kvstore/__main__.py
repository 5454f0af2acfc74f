"""`python -m kvstore --runtime FILE --unit NAME [--parent PID]`: with or without a supervisor."""

import logging
import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # for numpy, which computes no products here

from kvstore.app import serve
from muxmesh.config.runtime import MeshRuntime, ProcessKey
from muxmesh.file_lock import only_process
from muxmesh.lifecycle import Stop, configure_logging, run_service, service_arguments
from muxmesh.metrics.monitor import Monitor


def main() -> None:
    """Serves the unit that the command line names, until SIGTERM or SIGINT."""
    arguments = service_arguments(__doc__, "unit")
    monitor = Monitor(arguments.metrics)
    key = ProcessKey("kvstore", arguments.unit)

    async def serve_unit(stop: Stop) -> None:
        runtime = MeshRuntime.read(arguments.runtime)
        configure_logging(logging.INFO, runtime.config.log_format, runtime.display_name(key))
        runtime.set_environment(key, os.environ, has_supervisor=arguments.parent is not None)
        with only_process(runtime.run_dir, runtime.display_name(key)):
            await serve(runtime, arguments.unit, stop, monitor)

    run_service(serve_unit, key.name, monitor)


if __name__ == "__main__":
    main()
