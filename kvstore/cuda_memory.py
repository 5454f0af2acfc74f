"""`DeviceMemory` of a GPU: the pool and each model's weights, allocated here and mapped by the workers.

kvstore is the owner, outside of MPS and without torch: it runs no kernel, so no fault of a worker reaches it, and the
memory outlives every worker. Virtual memory management needs no context on the device; legacy IPC, for devices that
export no file descriptors, needs the primary one.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack

from kvstore.device_memory import CUDA, Segment, Shard, Transport, WeightsSegment, new_memfd
from muxmesh.cuda.driver import CudaDriver
from muxmesh.errors import DeviceError

_log = logging.getLogger(__name__)
_PAGE_BYTES = 4096
_WORD_BYTES = 8
_PLAIN_GRANULARITY = 2 << 20
"""A plain allocation of a multiple of this shares its IPC handle with no other one."""


class CudaMemory:
    """Owns the device memory of a unit: one shard of one segment, and a segment for the weights of each model.

    Sizes are rounded up to the device's granularity.
    """

    kind = CUDA

    def __init__(
        self,
        driver: CudaDriver,
        index: int,
        pool_bytes: int,
        weights_bytes: Mapping[str, int],
        legacy_ipc: bool = False,
    ) -> None:
        """Allocates on device ``index``. ``weights_bytes``: size of the weights by model. ``legacy_ipc``: use
        legacy IPC even if the device exports file descriptors.

        Raises DeviceError if the memory does not fit, or this process is a client of MPS; then nothing is allocated.
        """
        self._driver = driver
        self._device = driver.device(index)
        if self._device.is_mps_client:
            raise DeviceError(
                "kvstore is a client of CUDA MPS, where a fault of any client ends it; start it with a "
                "CUDA_MPS_PIPE_DIRECTORY in which no daemon listens"
            )
        can_export = self._device.has_vmm and self._device.has_posix_fd
        self.transport = Transport.VMM_FD if can_export and not legacy_ipc else Transport.LEGACY_IPC
        if not can_export:
            _log.warning("%s exports no file descriptors of its memory: legacy IPC is used", self._device.name)
        with ExitStack() as undo:
            self._granularity = self._prepare()
            self.shards = (Shard((self._allocate("the KV pool", pool_bytes, undo),)),)
            self._weights = {model: self._weights_segment(model, size, undo) for model, size in weights_bytes.items()}
            self._undo = undo.pop_all()

    @property
    def num_sms(self) -> int:
        return self._device.num_sms

    def weights(self, model: str) -> WeightsSegment | None:
        return self._weights.get(model)

    def forget_weights(self) -> None:
        for weights in self._weights.values():
            os.pwrite(weights.page_fd, bytes(_WORD_BYTES), 0)

    def close(self) -> None:
        """Gives the memory back. Under `Transport.VMM_FD` it stays until the last worker's mapping is gone."""
        self._undo.close()

    def _prepare(self) -> int:
        """Makes the device ready for allocations of the transport. Returns the granularity of their sizes."""
        if self.transport is Transport.VMM_FD:
            return self._driver.granularity(self._device.index)
        self._driver.use_primary_context(self._device.index)
        return _PLAIN_GRANULARITY

    def _weights_segment(self, model: str, num_bytes: int, undo: ExitStack) -> WeightsSegment:
        segment = self._allocate(f"the weights of {model}", num_bytes, undo)
        page_fd = new_memfd("muxmesh-weights-page", _PAGE_BYTES)
        undo.callback(os.close, page_fd)
        return WeightsSegment(segment, page_fd)

    def _allocate(self, what: str, num_bytes: int, undo: ExitStack) -> Segment:
        size = -(-num_bytes // self._granularity) * self._granularity
        try:
            if self.transport is Transport.VMM_FD:
                return self._exported(size, undo)
            return self._with_ipc_handle(size, undo)
        except DeviceError as error:
            raise DeviceError(
                f"cannot allocate {size} bytes for {what} on {self._device.name} ({self._device.uuid}, "
                f"{self._device.total_bytes} bytes in all): {error}"
            ) from error

    def _exported(self, size: int, undo: ExitStack) -> Segment:
        handle = self._driver.create(self._device.index, size)
        undo.callback(self._quietly, self._driver.release, handle)
        fd = self._driver.export_fd(handle)
        undo.callback(os.close, fd)
        return Segment(fd, size, self._device.uuid)

    def _with_ipc_handle(self, size: int, undo: ExitStack) -> Segment:
        address = self._driver.allocate(size)
        undo.callback(self._quietly, self._driver.free, address)
        return Segment(None, size, self._device.uuid, self._driver.ipc_handle(address))

    @staticmethod
    def _quietly(give_back: Callable[[int], None], handle: int) -> None:
        """Gives the rest back even if the driver refuses one: the process ends anyway."""
        with contextlib.suppress(DeviceError):
            give_back(handle)
