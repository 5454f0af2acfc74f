"""Operations of a peer without torch: device memory through `muxmesh.cuda.driver` alone, as kvstore uses it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from muxmesh.cuda.driver import CudaDriver


class DriverOperations:
    """The driver of this process, and what it has created or imported, by name."""

    def __init__(self) -> None:
        self.driver = CudaDriver()
        self._handles: dict[str, tuple[int, int]] = {}
        self._addresses: dict[str, int] = {}

    def run(self, operation: str, arguments: Mapping[str, Any], fds: Sequence[int]) -> Any:
        """Runs the operation of this name with ``arguments``; those that take a descriptor get the first of ``fds``."""
        method = getattr(self, f"do_{operation}")
        return method(*fds[:1], **arguments)

    def do_info(self) -> Any:
        return dataclasses.asdict(self.driver.device(0))

    def do_create(self, name: str, num_bytes: int) -> Any:
        """Creates memory and returns a descriptor of it. No context is made."""
        handle = self.driver.create(0, num_bytes)
        self._handles[name] = handle, num_bytes
        return {"fd": self.driver.export_fd(handle)}

    def do_import(self, fd: int, name: str, num_bytes: int) -> Any:
        self._handles[name] = self.driver.import_fd(fd), num_bytes
        os.close(fd)
        return None

    def do_map(self, name: str) -> Any:
        handle, num_bytes = self._handles[name]
        self.driver.use_primary_context(0)
        self._addresses[name] = self.driver.map(handle, num_bytes, 0)
        self.driver.release(handle)
        return self._addresses[name]

    def do_unmap(self, name: str) -> Any:
        self.driver.unmap(self._addresses.pop(name), self._handles.pop(name)[1])

    def do_allocate(self, name: str, num_bytes: int) -> Any:
        """Allocates plain memory and returns its IPC handle as hexadecimal text."""
        self.driver.use_primary_context(0)
        self._addresses[name] = self.driver.allocate(num_bytes)
        return self.driver.ipc_handle(self._addresses[name]).hex()

    def do_open(self, name: str, handle: str) -> Any:
        self.driver.use_primary_context(0)
        self._addresses[name] = self.driver.open_ipc_handle(bytes.fromhex(handle))

    def do_close(self, name: str) -> Any:
        self.driver.close_ipc_handle(self._addresses.pop(name))

    def do_write(self, name: str, text: str, offset: int = 0) -> Any:
        self.driver.copy_to_device(self._addresses[name] + offset, text.encode())

    def do_read(self, name: str, num_bytes: int, offset: int = 0) -> Any:
        buffer = bytearray(num_bytes)
        self.driver.copy_to_host(buffer, self._addresses[name] + offset)
        return buffer.decode(errors="replace")
