"""Foreign memory as a tensor, on the CPU. `make gpu-check` does the same with device memory."""

import ctypes

import pytest
import torch

from muxmesh.device.dlpack import bytes_tensor

CPU = torch.device("cpu")


def test_a_tensor_is_the_memory_itself() -> None:
    memory = (ctypes.c_uint8 * 64)(*range(64))
    tensor = bytes_tensor(ctypes.addressof(memory), 64, CPU)
    assert tensor.dtype == torch.uint8 and tensor.device == CPU and tensor.tolist() == list(range(64))
    assert tensor.data_ptr() == ctypes.addressof(memory)
    memory[5] = 200
    tensor[6] = 201
    assert tensor[5] == 200 and memory[6] == 201


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_tensor_is_viewed_in_every_dtype_of_kv(dtype: torch.dtype) -> None:
    memory = (ctypes.c_uint8 * 64)()
    view = bytes_tensor(ctypes.addressof(memory), 64, CPU).view(dtype)
    view[1] = 1.5
    assert view.data_ptr() == ctypes.addressof(memory) and view.numel() == 64 // view.itemsize
    assert (
        bytes(memory)[view.itemsize : 2 * view.itemsize]
        == torch.tensor([1.5], dtype=dtype).view(torch.uint8).numpy().tobytes()
    )


def test_the_memory_outlives_the_tensor() -> None:
    memory = (ctypes.c_uint8 * 8)()
    address = ctypes.addressof(memory)
    for value in range(3):
        tensor = bytes_tensor(address, 8, CPU)
        tensor[0] = value
        del tensor
        assert memory[0] == value
