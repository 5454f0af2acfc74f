"""Device memory that is allocated and mapped through the driver seam, for its tests."""

from __future__ import annotations

from contextlib import ExitStack

from muxmesh.cuda.driver import CudaDriver

SIZE = 4 << 20


class DriverMemory:
    """An allocation of `SIZE` bytes with a mapping, freed with ``undo``."""

    def __init__(self, driver: CudaDriver, undo: ExitStack) -> None:
        self.driver = driver
        self.handle = driver.create(0, SIZE)
        undo.callback(driver.release, self.handle)
        self.address = driver.map(self.handle, SIZE, 0)
        undo.callback(driver.unmap, self.address, SIZE)

    def read(self, offset: int, num_bytes: int) -> bytes:
        content = bytearray(num_bytes)
        self.driver.copy_to_host(content, self.address + offset)
        return bytes(content)
