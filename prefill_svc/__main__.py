"""`python -m prefill_svc --runtime FILE --unit NAME --model NAME [--parent PID]`: with or without a supervisor."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # for numpy, which computes no products here

from muxmesh.types import Role
from prefill_svc.service import open_services
from worker.worker_process import worker_main

if __name__ == "__main__":
    worker_main(Role.PREFILL, __doc__, open_services)
