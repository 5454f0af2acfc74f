"""Device memory of another process, mapped into this one: imported from a file descriptor or a legacy IPC handle.

The mapping is made in the device's primary context, in which torch computes. It stays for the life of the process.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor

from muxmesh.cuda.driver import CudaDriver
from muxmesh.device.dlpack import bytes_tensor
from muxmesh.errors import DeviceError


@dataclass(frozen=True, slots=True)
class CudaMapping:
    """A mapped range of device memory. ``num_bytes``: its whole size, a multiple of the device's granularity."""

    address: int
    num_bytes: int
    is_imported: bool
    """True: from a file descriptor. False: by a legacy IPC handle."""

    def tensor(self, device: torch.device) -> Tensor:
        """Returns the range as a uint8 tensor of ``device``, whose memory it is."""
        return bytes_tensor(self.address, self.num_bytes, device)

    def close(self, driver: CudaDriver) -> None:
        """Ends the mapping. No tensor over it may be used any more, nor any work on the device."""
        if self.is_imported:
            driver.unmap(self.address, self.num_bytes)
        else:
            driver.close_ipc_handle(self.address)


def map_segment(driver: CudaDriver, index: int, num_bytes: int, fd: int | None, ipc_handle: bytes) -> CudaMapping:
    """Maps memory of device ``index``: by ``ipc_handle`` unless it is empty, or else that of ``fd``.

    The caller closes ``fd``. Raises DeviceError if the driver refuses it, for example because the memory has another
    size than ``num_bytes``; then nothing stays mapped.
    """
    driver.use_primary_context(index)
    if ipc_handle:
        return _open(driver, num_bytes, ipc_handle)
    if fd is None:
        raise DeviceError("device memory came with neither a file descriptor nor an IPC handle")
    handle = driver.import_fd(fd)
    try:
        mapping = CudaMapping(driver.map(handle, num_bytes, index), num_bytes, is_imported=True)
    except DeviceError as error:
        with contextlib.suppress(DeviceError):
            driver.release(handle)
        raise DeviceError(f"cannot map {num_bytes} bytes of shared device memory: {error}") from error
    try:
        driver.release(handle)
    except DeviceError:
        with contextlib.suppress(DeviceError):
            mapping.close(driver)
        raise
    return mapping


def _open(driver: CudaDriver, num_bytes: int, ipc_handle: bytes) -> CudaMapping:
    mapping = CudaMapping(driver.open_ipc_handle(ipc_handle), num_bytes, is_imported=False)
    try:
        present_bytes = driver.allocated_bytes(mapping.address)
        if present_bytes < num_bytes:
            raise DeviceError(f"shared device memory has {present_bytes} bytes, not {num_bytes}")
    except DeviceError:
        with contextlib.suppress(DeviceError):
            mapping.close(driver)
        raise
    return mapping
