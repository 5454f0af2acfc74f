"""`python -m decode_svc --runtime FILE --model NAME --parent PID`: started by the supervisor."""

from decode_svc.service import open_services
from kvstore.client.worker import worker_main
from muxmesh.config.runtime import Role

if __name__ == "__main__":
    worker_main(Role.DECODE, __doc__, open_services)
