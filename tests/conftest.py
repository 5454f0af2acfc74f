import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

# Read when grpc is loaded: meshes are started from this process, which watches their health over gRPC.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "false"
# Read when numpy is loaded: small products are slower on several threads, and routers fit on one.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Scripts that tests start by `env python3` run this interpreter, not a slow shim before it.
os.environ["PATH"] = os.pathsep.join((os.path.dirname(sys.executable), os.environ["PATH"]))
# Read when a Triton kernel is imported: kernels run in Triton's interpreter, on CPU tensors. With 0, on a GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

# Under nohup it is ignored, and `muxmesh up` would go on ignoring it.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
# In a job that a shell script starts in the background it is ignored, and so are the interrupts that tests send.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from muxmesh.engine.native.kernel_cache import kernel_cache_dir

# Read when numba is loaded. Kernels compiled by one run are kept for the next.
_CACHE = Path(__file__).resolve().parent.parent / "build" / "test-cache"
_KERNELS = _CACHE / "numba"
os.environ.setdefault("NUMBA_CACHE_DIR", str(kernel_cache_dir(_CACHE)))

import pytest
import redis
from hypothesis import is_hypothesis_test, settings

from muxmesh.stderr_handler import StderrHandler
from tests.support.redis_process import running_redis

settings.register_profile("default", deadline=None)
settings.register_profile("long", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


_LONGEST_FIRST = ("compose", "mesh", "deploy")
_PROPERTY_TIMEOUT_S = 3600
"""Of a property test. Hypothesis shrinks a failing example for up to 300 s, and would take a timeout of pytest for
another failure, which it then reports as inconsistent since it does not replay.
"""


@pytest.fixture(autouse=True)
def own_root_logger() -> Iterator[None]:
    """A command that a test runs in this process logs to the stderr of that test, not of later ones."""
    root = logging.getLogger()
    level = root.level
    yield
    root.setLevel(level)
    for handler in [one for one in root.handlers if isinstance(one, StderrHandler)]:
        root.removeHandler(handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest starts first, since `make test` runs two files at a time."""
    for item in items:
        if is_hypothesis_test(getattr(item, "obj", None)) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(_PROPERTY_TIMEOUT_S))

    def position(item: pytest.Item) -> int:
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        return _LONGEST_FIRST.index(folder) if folder in _LONGEST_FIRST else len(_LONGEST_FIRST)

    items.sort(key=position)


@pytest.fixture(scope="session", autouse=True)
def _own_directories(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing of the user's cache or state is read or written; workers find the kernels that earlier runs compiled."""
    cache = tmp_path_factory.mktemp("cache")
    os.makedirs(_KERNELS, exist_ok=True)
    (cache / "numba").symlink_to(_KERNELS)
    os.environ["MUXMESH_CACHE_DIR"] = str(cache)
    os.environ["MUXMESH_STATE_DIR"] = str(tmp_path_factory.mktemp("state"))


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a redis-server that runs during the test session."""
    with running_redis(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture
def redis_url(redis_server: str) -> str:
    """URL of an empty Redis."""
    with redis.Redis.from_url(redis_server) as client:
        client.flushall()
    return redis_server
