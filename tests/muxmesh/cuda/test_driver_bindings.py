"""NVIDIA's own Python bindings as a second caller of the library under test: both see the same device and memory."""

import os
from contextlib import ExitStack
from typing import Any

from cuda.bindings import driver as cuda

from muxmesh.cuda.driver import CudaDriver
from tests.support.driver_memory import SIZE, DriverMemory


def checked(answer: tuple[Any, ...]) -> Any:
    """What a call of the bindings returned beside its error code."""
    assert answer[0] == cuda.CUresult.CUDA_SUCCESS, answer[0]
    return answer[1] if len(answer) == 2 else answer[1:]


def bindings_properties() -> Any:
    properties = cuda.CUmemAllocationProp()
    properties.type = cuda.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    properties.requestedHandleTypes = cuda.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
    properties.location.type = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    properties.location.id = 0
    return properties


def test_the_bindings_see_the_same_device(driver: CudaDriver) -> None:
    checked(cuda.cuInit(0))
    device = driver.device(0)
    assert checked(cuda.cuDeviceGetCount()) == driver.num_devices()
    handle = checked(cuda.cuDeviceGet(0))
    assert checked(cuda.cuDeviceGetUuid(handle)).bytes.hex() == device.uuid.removeprefix("GPU-").replace("-", "")
    assert checked(cuda.cuDeviceGetName(256, handle)).split(b"\0")[0].decode() == device.name
    assert checked(cuda.cuDeviceTotalMem(handle)) == device.total_bytes
    multiprocessors = cuda.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
    assert checked(cuda.cuDeviceGetAttribute(multiprocessors, handle)) == device.num_sms
    granularity = checked(
        cuda.cuMemGetAllocationGranularity(bindings_properties(), cuda.CUmemAllocationGranularity_flags(0))
    )
    assert granularity == driver.granularity(0)


def test_the_bindings_divide_the_sms_into_the_same_groups(driver: CudaDriver) -> None:
    sms = checked(cuda.cuDeviceGetDevResource(0, cuda.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM))
    assert sms.sm.smCount == driver.device(0).num_sms
    groups, count, _ = checked(cuda.cuDevSmResourceSplitByCount(64, sms, 0, 8))
    assert (count, groups[0].sm.smCount) == (driver.sm_groups(0).count, driver.sm_groups(0).num_sms)


def test_memory_of_the_bindings_is_imported(in_context: CudaDriver, undo: ExitStack) -> None:
    kind = cuda.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
    handle = checked(cuda.cuMemCreate(SIZE, bindings_properties(), 0))
    fd = checked(cuda.cuMemExportToShareableHandle(handle, kind, 0))
    imported = in_context.import_fd(int(fd))
    os.close(int(fd))
    address = in_context.map(imported, SIZE, 0)
    undo.callback(in_context.unmap, address, SIZE)
    in_context.release(imported)
    checked(cuda.cuMemRelease(handle))
    checked(cuda.cuMemcpyHtoD(address, b"by the bindings", 15))
    content = bytearray(15)
    in_context.copy_to_host(content, address)
    assert content == b"by the bindings"


def test_the_bindings_get_the_same_errors(driver: CudaDriver, memory: DriverMemory) -> None:
    def code(answer: tuple[Any, ...]) -> int:
        return int(answer[0])

    kind = cuda.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
    address = checked(cuda.cuMemAddressReserve(SIZE, 0, 0, 0))
    assert code(cuda.cuMemMap(address, SIZE // 2, 0, memory.handle, 0)) in (1, 801)
    assert code(cuda.cuMemAddressFree(address, SIZE)) == 0
    assert code(cuda.cuMemCreate(12345, bindings_properties(), 0)) == 1
    assert code(cuda.cuMemCreate(1 << 42, bindings_properties(), 0)) == 2
    assert code(cuda.cuMemImportFromShareableHandle(999, kind)) == 999
    assert code(cuda.cuIpcGetMemHandle(memory.address)) == 1
    assert code(cuda.cuDeviceGet(driver.num_devices())) == 101


def test_a_mapping_without_access_cannot_be_copied(memory: DriverMemory) -> None:
    address = checked(cuda.cuMemAddressReserve(SIZE, 0, 0, 0))
    checked(cuda.cuMemMap(address, SIZE, 0, memory.handle, 0))
    assert int(cuda.cuMemcpyHtoD(address, b"x", 1)[0]) == 1
    checked(cuda.cuMemUnmap(address, SIZE))
    checked(cuda.cuMemAddressFree(address, SIZE))
