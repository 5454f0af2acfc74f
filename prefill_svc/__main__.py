"""`python -m prefill_svc --runtime FILE --model NAME --parent PID`: started by the supervisor."""

from kvstore.client.worker import worker_main
from muxmesh.config.runtime import Role
from prefill_svc.service import open_services

if __name__ == "__main__":
    worker_main(Role.PREFILL, __doc__, open_services)
