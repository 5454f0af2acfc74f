"""The CUDA driver API: what sharing a device's memory and its SMs between processes needs, by ctypes, without torch.

This file knows names, versions, argument types and error codes of libcuda, and undoes what it had done when a later
call of the same method fails. It knows nothing of pools, models or MPS. Pointers and handles are plain integers. An
operation on one of them that the driver refuses raises DeviceError; nothing is retried.

    memory          made by                    seen by other processes through         ends with
    VMM             create, import_fd          export_fd: a file descriptor            the last handle and mapping of it
    plain           allocate                   ipc_handle: 64 bytes (legacy IPC)       the process that allocated it
    host memory     register_host              -                                       unregister_host
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Mapping, Sequence
from ctypes import POINTER, c_char, c_char_p, c_int, c_size_t, c_ubyte, c_uint, c_uint64, c_ulonglong, c_void_p
from dataclasses import dataclass
from typing import Any

from muxmesh.cuda.sm_groups import SmGroups
from muxmesh.errors import DeviceError

_LOCATION_DEVICE = 1
_ALLOCATION_PINNED = 1
_HANDLE_POSIX_FD = 1
"""The only kind that is requested: some devices accept a request for FABRIC too, and fail at the export."""
_ACCESS_READ_WRITE = 3
_IPC_LAZY_PEER_ACCESS = 1
_IPC_HANDLE_BYTES = 64

_RESOURCE_SM = 1
_GROUP_SMS = 8
"""The smallest group of SMs that keeps what clusters of blocks need together, from compute capability 9.0 on."""
_GREEN_DEFAULT_STREAM = 1
_STREAM_NON_BLOCKING = 1

_ATTRIBUTE_NUM_SMS = 16
_ATTRIBUTE_CC_MAJOR = 75
_ATTRIBUTE_CC_MINOR = 76
_ATTRIBUTE_HAS_VMM = 102
_ATTRIBUTE_HAS_POSIX_FD = 103
_ATTRIBUTE_IS_MPS_CLIENT = 133


class _Location(ctypes.Structure):
    _fields_ = [("type", c_int), ("id", c_int)]


class _AllocationFlags(ctypes.Structure):
    _fields_ = [("compression", c_ubyte), ("rdma", c_ubyte), ("usage", ctypes.c_ushort), ("reserved", c_ubyte * 4)]


class _AllocationProperties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = [
        ("type", c_int),
        ("requested_handle_types", c_int),
        ("location", _Location),
        ("win32_metadata", c_void_p),
        ("flags", _AllocationFlags),
    ]


class _Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = [("location", _Location), ("flags", c_int)]


class _IpcHandle(ctypes.Structure):
    _fields_ = [("content", c_char * _IPC_HANDLE_BYTES)]


class _Resource(ctypes.Structure):
    """CUdevResource of SMs. The driver keeps more in the reserved parts."""

    _fields_ = [("type", c_int), ("reserved", c_ubyte * 92), ("num_sms", c_uint), ("more", c_ubyte * 44)]


_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetUuid_v2": (c_void_p, c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDeviceTotalMem_v2": (POINTER(c_size_t), c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuCtxSetCurrent": (c_void_p,),
    "cuMemGetAllocationGranularity": (POINTER(c_size_t), POINTER(_AllocationProperties), c_int),
    "cuMemCreate": (POINTER(c_uint64), c_size_t, POINTER(_AllocationProperties), c_ulonglong),
    "cuMemExportToShareableHandle": (POINTER(c_int), c_uint64, c_int, c_ulonglong),
    "cuMemImportFromShareableHandle": (POINTER(c_uint64), c_void_p, c_int),
    "cuMemRelease": (c_uint64,),
    "cuMemAddressReserve": (POINTER(c_uint64), c_size_t, c_size_t, c_uint64, c_ulonglong),
    "cuMemAddressFree": (c_uint64, c_size_t),
    "cuMemMap": (c_uint64, c_size_t, c_size_t, c_uint64, c_ulonglong),
    "cuMemUnmap": (c_uint64, c_size_t),
    "cuMemSetAccess": (c_uint64, c_size_t, POINTER(_Access), c_size_t),
    "cuMemAlloc_v2": (POINTER(c_uint64), c_size_t),
    "cuMemFree_v2": (c_uint64,),
    "cuMemGetAddressRange_v2": (POINTER(c_uint64), POINTER(c_size_t), c_uint64),
    "cuIpcGetMemHandle": (POINTER(_IpcHandle), c_uint64),
    "cuIpcOpenMemHandle_v2": (POINTER(c_uint64), _IpcHandle, c_uint),
    "cuIpcCloseMemHandle": (c_uint64,),
    "cuCtxSynchronize": (),
    "cuMemcpyHtoD_v2": (c_uint64, c_void_p, c_size_t),
    "cuMemcpyDtoH_v2": (c_void_p, c_uint64, c_size_t),
    "cuMemHostRegister_v2": (c_void_p, c_size_t, c_uint),
    "cuMemHostUnregister": (c_void_p,),
}

_GREEN_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "cuDeviceGetDevResource": (c_int, POINTER(_Resource), c_int),
    "cuDevSmResourceSplitByCount": (
        POINTER(_Resource), POINTER(c_uint), POINTER(_Resource), POINTER(_Resource), c_uint, c_uint,
    ),
    "cuDevResourceGenerateDesc": (POINTER(c_void_p), POINTER(_Resource), c_uint),
    "cuGreenCtxCreate": (POINTER(c_void_p), c_void_p, c_int, c_uint),
    "cuGreenCtxDestroy": (c_void_p,),
    "cuGreenCtxStreamCreate": (POINTER(c_void_p), c_void_p, c_uint, c_int),
}  # fmt: skip
"""Drivers before CUDA 12.4 lack some of them."""

_HINTS: dict[tuple[str, int], str] = {
    ("cuInit", 100): "no device is visible; compare CUDA_VISIBLE_DEVICES with the UUIDs of `nvidia-smi -L`",
    ("cuDeviceGet", 101): "CUDA_VISIBLE_DEVICES hides it, or the machine has fewer devices",
    ("cuDeviceGetAttribute", 1): "the driver does not know this attribute: it is too old",
    ("cuMemCreate", 1): "the size has to be a multiple of the granularity",
    ("cuMemCreate", 2): "the device has too little free memory",
    ("cuMemAlloc_v2", 2): "the device has too little free memory",
    ("cuMemMap", 801): "the size differs from that of the allocation",
    ("cuMemImportFromShareableHandle", 999): "the file descriptor is not of device memory",
    ("cuDevSmResourceSplitByCount", 915): "the device, or this share of it, has too few SMs for a green context",
    ("cuIpcGetMemHandle", 1): "only memory that `allocate` returned has a handle",
    ("cuIpcOpenMemHandle_v2", 1): "its owner has to live, in the same PID namespace",
    ("cuIpcOpenMemHandle_v2", 201): "a process cannot open a handle of its own memory",
}
"""What an error of a function means here, by function and code."""
_HINT_NOT_INITIALIZED = "a process that has used CUDA cannot use it in a child that it forks"


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """A device as this process sees it. ``num_sms`` is the share of an MPS client, not the whole device."""

    index: int
    uuid: str
    """Like `GPU-5f4df884-095b-d388-4934-d4853eca3833`."""
    name: str
    num_sms: int
    compute_capability: tuple[int, int]
    total_bytes: int
    has_vmm: bool
    has_posix_fd: bool
    """Memory of `CudaDriver.create` can be exported as a file descriptor."""
    is_mps_client: bool
    """This process is attached to an MPS daemon."""


class CudaDriver:
    """The driver library of this process. Every method raises DeviceError when the driver refuses it.

    Devices are counted from 0 among those that CUDA_VISIBLE_DEVICES names. Copies, `allocate`, IPC handles and
    registered memory need `use_primary_context` in the calling thread before; the other methods need no context.
    """

    def __init__(self, path: str = "libcuda.so.1") -> None:
        """Loads the library and initializes it, for the life of the process."""
        try:
            self._library = ctypes.CDLL(path)
            self._bind(_FUNCTIONS)
        except OSError as error:
            raise DeviceError(f"cannot load {path}: {error}; a unit on CUDA needs NVIDIA's driver") from error
        except AttributeError as error:
            raise DeviceError(f"{path} lacks a function: {error}; NVIDIA's driver is too old") from error
        self._path = path
        self._contexts: dict[int, c_void_p] = {}
        self._call("cuInit", 0)

    # Devices

    def num_devices(self) -> int:
        count = c_int()
        self._call("cuDeviceGetCount", count)
        return count.value

    def device(self, index: int) -> DeviceInfo:
        device, name, uuid, total_bytes = c_int(), ctypes.create_string_buffer(256), (c_ubyte * 16)(), c_size_t()
        self._call("cuDeviceGet", device, index)
        self._call("cuDeviceGetName", name, len(name), device)
        self._call("cuDeviceGetUuid_v2", uuid, device)
        self._call("cuDeviceTotalMem_v2", total_bytes, device)

        def attribute(number: int) -> int:
            value = c_int()
            self._call("cuDeviceGetAttribute", value, number, device)
            return value.value

        return DeviceInfo(
            index=index,
            uuid=_uuid_text(bytes(uuid)),
            name=name.value.decode(errors="replace"),
            num_sms=attribute(_ATTRIBUTE_NUM_SMS),
            compute_capability=(attribute(_ATTRIBUTE_CC_MAJOR), attribute(_ATTRIBUTE_CC_MINOR)),
            total_bytes=total_bytes.value,
            has_vmm=bool(attribute(_ATTRIBUTE_HAS_VMM)),
            has_posix_fd=bool(attribute(_ATTRIBUTE_HAS_POSIX_FD)),
            is_mps_client=bool(attribute(_ATTRIBUTE_IS_MPS_CLIENT)),
        )

    def use_primary_context(self, index: int) -> None:
        """Makes the device's primary context, in which torch computes, current in the calling thread."""
        context = self._contexts.get(index)
        if context is None:
            context = c_void_p()
            self._call("cuDevicePrimaryCtxRetain", context, index)
            self._contexts[index] = context
        self._call("cuCtxSetCurrent", context)

    # Green contexts: streams that are limited to a part of the SMs

    def sm_groups(self, index: int) -> SmGroups:
        """The groups of SMs that green contexts on this device are made of, the same in each process.

        For a client of MPS they are groups of the SMs of its percentage.
        """
        groups = self._split(index)
        return SmGroups(len(groups), int(groups[0].num_sms))

    def green_stream(self, index: int, groups: Sequence[int]) -> int:
        """Returns the handle of a new stream whose kernels run on these groups of SMs, for the life of the process.

        ``groups``: their numbers, from 0 to below `SmGroups.count`; at least one. Retains the primary context, which
        is also that of the stream's memory.
        """
        every = self._split(index)
        chosen = (_Resource * len(groups))(*(every[group] for group in groups))
        description, context, stream = c_void_p(), c_void_p(), c_void_p()
        self._call("cuDevResourceGenerateDesc", description, chosen, len(groups))
        self._call("cuGreenCtxCreate", context, description, index, _GREEN_DEFAULT_STREAM)
        try:
            self._call("cuGreenCtxStreamCreate", stream, context, _STREAM_NON_BLOCKING, 0)
        except DeviceError:
            self._call_quietly("cuGreenCtxDestroy", context)
            raise
        assert stream.value is not None
        return stream.value

    def _split(self, index: int) -> Sequence[_Resource]:
        """All groups of the device. Raises DeviceError if it has too few SMs for one."""
        try:
            self._bind(_GREEN_FUNCTIONS)
        except AttributeError as error:
            raise DeviceError(
                f"{self._path} has no green contexts ({error}); they need NVIDIA's driver for CUDA 12.4 or later"
            ) from error
        device, count = _Resource(), c_uint()
        self._call("cuDeviceGetDevResource", index, device, _RESOURCE_SM)
        self._call("cuDevSmResourceSplitByCount", None, count, device, None, 0, _GROUP_SMS)
        groups = (_Resource * count.value)()
        self._call("cuDevSmResourceSplitByCount", groups, count, device, None, 0, _GROUP_SMS)
        return groups[: count.value]

    # Virtual memory management

    def granularity(self, index: int) -> int:
        """Sizes of `create` and `map` are multiples of this many bytes."""
        granularity = c_size_t()
        self._call("cuMemGetAllocationGranularity", granularity, _allocation_properties(index), 0)
        return granularity.value

    def create(self, index: int, num_bytes: int) -> int:
        """Allocates zeroed memory on a device and returns its handle. The caller releases the handle."""
        handle = c_uint64()
        self._call("cuMemCreate", handle, num_bytes, _allocation_properties(index), 0)
        return handle.value

    def export_fd(self, handle: int) -> int:
        """Returns a new file descriptor of the memory, which keeps it alive. The caller closes it."""
        fd = c_int()
        self._call("cuMemExportToShareableHandle", fd, handle, _HANDLE_POSIX_FD, 0)
        os.set_inheritable(fd.value, False)
        return fd.value

    def import_fd(self, fd: int) -> int:
        """Returns a handle of memory that another process exported. The caller closes ``fd``, releases the handle."""
        handle = c_uint64()
        self._call("cuMemImportFromShareableHandle", handle, c_void_p(fd), _HANDLE_POSIX_FD)
        return handle.value

    def release(self, handle: int) -> None:
        """Gives up a handle. Mappings of the memory stay valid."""
        self._call("cuMemRelease", handle)

    def map(self, handle: int, num_bytes: int, index: int) -> int:
        """Maps a whole allocation for reads and writes by device ``index``. Returns its address."""
        address = c_uint64()
        with contextlib.ExitStack() as undo:
            self._call("cuMemAddressReserve", address, num_bytes, 0, 0, 0)
            undo.callback(self._call_quietly, "cuMemAddressFree", address, num_bytes)
            self._call("cuMemMap", address, num_bytes, 0, handle, 0)
            undo.callback(self._call_quietly, "cuMemUnmap", address, num_bytes)
            access = _Access(_Location(_LOCATION_DEVICE, index), _ACCESS_READ_WRITE)
            self._call("cuMemSetAccess", address, num_bytes, access, 1)
            undo.pop_all()
        return address.value

    def unmap(self, address: int, num_bytes: int) -> None:
        """Ends a mapping of `map`. No work on the device may use it any more."""
        self._call("cuMemUnmap", address, num_bytes)
        self._call("cuMemAddressFree", address, num_bytes)

    # Plain memory and legacy IPC

    def allocate(self, num_bytes: int) -> int:
        """Allocates memory with arbitrary content on the current context's device. Returns its address."""
        address = c_uint64()
        self._call("cuMemAlloc_v2", address, num_bytes)
        return address.value

    def free(self, address: int) -> None:
        self._call("cuMemFree_v2", address)

    def allocated_bytes(self, address: int) -> int:
        """Size of the allocation that begins at ``address``, whether `allocate` or `open_ipc_handle` returned it."""
        base, num_bytes = c_uint64(), c_size_t()
        self._call("cuMemGetAddressRange_v2", base, num_bytes, address)
        return num_bytes.value - (address - base.value)

    def ipc_handle(self, address: int) -> bytes:
        """Returns the 64 bytes by which another process opens memory of `allocate`."""
        handle = _IpcHandle()
        self._call("cuIpcGetMemHandle", handle, address)
        return bytes(handle)

    def open_ipc_handle(self, handle: bytes) -> int:
        """Maps memory of another process. Returns its address. The memory is lost when that process exits."""
        if len(handle) != _IPC_HANDLE_BYTES:
            raise DeviceError(f"an IPC handle has {_IPC_HANDLE_BYTES} bytes, not {len(handle)}")
        address = c_uint64()
        self._call("cuIpcOpenMemHandle_v2", address, _IpcHandle.from_buffer_copy(handle), _IPC_LAZY_PEER_ACCESS)
        return address.value

    def close_ipc_handle(self, address: int) -> None:
        self._call("cuIpcCloseMemHandle", address)

    # Copies, and host memory that the device reads and writes

    def copy_to_device(self, address: int, buffer: bytes | bytearray | memoryview) -> None:
        """Copies the whole buffer, bytes or writable, to the device. Blocks until every process sees it.

        The copy call alone may return while the bytes are still on their way from the driver's own pinned memory.
        """
        if num_bytes := memoryview(buffer).nbytes:
            source = buffer if isinstance(buffer, bytes) else ctypes.byref(c_char.from_buffer(buffer))
            self._call("cuMemcpyHtoD_v2", address, source, num_bytes)
            self._call("cuCtxSynchronize")

    def copy_to_host(self, buffer: bytearray | memoryview, address: int) -> None:
        """Fills the whole buffer, which is writable, from the device. Blocks until it is done."""
        if num_bytes := memoryview(buffer).nbytes:
            self._call("cuMemcpyDtoH_v2", ctypes.byref(c_char.from_buffer(buffer)), address, num_bytes)

    def register_host(self, address: int, num_bytes: int) -> None:
        """Pins mapped host memory, which commits it, so that copies run asynchronously and at full speed."""
        self._call("cuMemHostRegister_v2", c_void_p(address), num_bytes, 0)

    def unregister_host(self, address: int) -> None:
        self._call("cuMemHostUnregister", c_void_p(address))

    # Calls

    def _bind(self, functions: Mapping[str, tuple[Any, ...]]) -> None:
        """Declares types of functions. Raises AttributeError if the library lacks one."""
        for name, argument_types in functions.items():
            function = getattr(self._library, name)
            function.argtypes, function.restype = argument_types, c_int

    def _call(self, function: str, *arguments: Any) -> None:
        """Calls a function of the library; objects for which it expects a pointer are passed by reference."""
        code = getattr(self._library, function)(*arguments)
        if code:
            raise DeviceError(self._message(function, code))

    def _call_quietly(self, function: str, *arguments: Any) -> None:
        """Undoes a call after the error of another one, which is the one to report."""
        with contextlib.suppress(DeviceError):
            self._call(function, *arguments)

    def _message(self, function: str, code: int) -> str:
        name = c_char_p()
        self._library.cuGetErrorName(code, name)
        hint = _HINT_NOT_INITIALIZED if code == 3 else _HINTS.get((function, code), "")
        return f"{function} failed: {(name.value or b'error').decode()} ({code})" + (f": {hint}" if hint else "")


def _allocation_properties(index: int) -> _AllocationProperties:
    return _AllocationProperties(_ALLOCATION_PINNED, _HANDLE_POSIX_FD, _Location(_LOCATION_DEVICE, index))


def _uuid_text(raw: bytes) -> str:
    text = raw.hex()
    return f"GPU-{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"
