import os

import pytest

from muxmesh.cuda.driver import CudaDriver
from tests.support.fake_driver import fake_driver_folder


@pytest.fixture(scope="session")
def library() -> str:
    """The driver library under test: MUXMESH_TEST_LIBCUDA (libcuda.so.1 on a machine with a GPU), or the fake one."""
    return os.environ.get("MUXMESH_TEST_LIBCUDA") or str(fake_driver_folder() / "libcuda.so.1")


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
