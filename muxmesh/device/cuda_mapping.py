"""Device memory of another process, mapped into this one: imported from a file descriptor or a legacy IPC handle.

Mappings are made in the device's primary context, in which torch computes. They stay for the life of the process.
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


@dataclass(frozen=True, slots=True)
class MappedWeights:
    """Memory for the weights of a model, on the device, which all workers of the model share.

    ``memory``: uint8, at least as long as the weight image. ``page_fd``: the weights page, see
    `kvstore.device_memory.WeightsSegment`.
    """

    memory: Tensor
    page_fd: int


class CudaSegments:
    """The segments of a unit's device memory that are mapped into this process. Owns the mappings.

    ``device``: the GPU as this process sees it, which may have a share of its multiprocessors.
    """

    def __init__(self, driver: CudaDriver, torch_device: torch.device) -> None:
        """``torch_device``: where torch computes; the CPU if kernels are interpreted."""
        self.driver = driver
        self.device = driver.device(0)
        self._torch_device = torch_device
        self._mappings: list[CudaMapping] = []

    def map(self, num_bytes: int, device_uuid: str, ipc_handle: bytes, fd: int | None) -> Tensor:
        """Maps a segment on the device ``device_uuid``; see `map_segment`. Returns its bytes as a uint8 tensor.

        Raises DeviceError if that is not the device of this process.
        """
        if device_uuid != self.device.uuid:
            raise DeviceError(
                f"the unit's memory is on {device_uuid}, this process computes on {self.device.uuid}; "
                "CUDA_VISIBLE_DEVICES must be equal for all processes of the unit"
            )
        mapping = map_segment(self.driver, self.device.index, num_bytes, fd, ipc_handle)
        self._mappings.append(mapping)
        return mapping.tensor(self._torch_device)

    def register_host(self, address: int, num_bytes: int) -> None:
        """Pins mapped host memory for copies to and from the device, from any thread. Raises DeviceError."""
        self.driver.use_primary_context(self.device.index)
        self.driver.register_host(address, num_bytes)

    def close(self) -> None:
        """Ends all mappings, of which no tensor may be used any more, when the process cannot use the unit."""
        while self._mappings:
            with contextlib.suppress(DeviceError):  # the process ends because of another error
                self._mappings.pop().close(self.driver)


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
