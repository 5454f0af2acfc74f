import os
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from muxmesh.cuda.driver import CudaDriver
from tests.support.driver_memory import DriverMemory
from tests.support.fake_driver import fake_driver_library


@pytest.fixture(scope="session")
def library() -> str:
    """The driver library under test: MUXMESH_TEST_LIBCUDA (libcuda.so.1 on a machine with a GPU), or the fake one."""
    return os.environ.get("MUXMESH_TEST_LIBCUDA") or fake_driver_library()


@pytest.fixture(scope="session")
def is_fake() -> bool:
    return not os.environ.get("MUXMESH_TEST_LIBCUDA")


@pytest.fixture(scope="session")
def driver(library: str) -> CudaDriver:
    """The library, initialized in this process."""
    return CudaDriver(library)


@pytest.fixture
def in_context(driver: CudaDriver) -> CudaDriver:
    """The driver, with the first device's primary context current in the test's thread."""
    driver.use_primary_context(0)
    return driver


@pytest.fixture
def undo() -> Iterator[ExitStack]:
    """Runs its callbacks at the end of the test."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def memory(in_context: CudaDriver, undo: ExitStack) -> DriverMemory:
    """Allocated and mapped memory."""
    return DriverMemory(in_context, undo)
