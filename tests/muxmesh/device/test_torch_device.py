import subprocess
import sys

import numpy as np
import pytest
import torch

from muxmesh.device.torch_device import CudaDevice, Event, InterpretedDevice, device_errors, finished, open_torch_device
from muxmesh.errors import DeviceError, DeviceLost


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> InterpretedDevice:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return InterpretedDevice()


def test_an_upload_is_a_copy(interpreted: InterpretedDevice) -> None:
    array = np.arange(4)
    uploaded = interpreted.upload(array)
    array[0] = 9
    assert uploaded.tolist() == [0, 1, 2, 3]


def test_a_download_is_a_copy(interpreted: InterpretedDevice) -> None:
    tensor = torch.arange(4)
    wait = interpreted.download(tensor)
    tensor[0] = 9
    assert wait().tolist() == [0, 1, 2, 3]


def test_a_captured_function_is_replayed_over_the_same_tensors(interpreted: InterpretedDevice) -> None:
    count = torch.zeros(1)

    def add_one() -> None:
        count.add_(1)

    replay = interpreted.capture(add_one)
    count.zero_()
    replay()
    replay()
    interpreted.record().wait()
    assert count.item() == 2


def test_cpu_tensors_need_an_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(DeviceError, match="TRITON_INTERPRET=1 is not in its environment"):
        InterpretedDevice()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_is_named_in_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for opened in (CudaDevice, open_torch_device):
        with pytest.raises(DeviceError, match=r"torch .* cannot use a GPU"):
            opened()


def test_the_environment_chooses_the_interpreter_with_a_warning() -> None:
    code = "from muxmesh.device.torch_device import open_torch_device; print(open_torch_device().torch_device)"
    done = subprocess.run(
        [sys.executable, "-c", f"import logging; logging.basicConfig(); {code}"],
        env={"TRITON_INTERPRET": "1", "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "cpu"
    assert "interpreted on the CPU" in done.stderr


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be asynchronously reported",
        "CUDA error: MPS client has been terminated",
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`",
        "Triton Error [CUDA]: device-side assert triggered",
    ],
)
def test_a_fault_of_the_device_is_final_and_named_in_one_line(message: str) -> None:
    with pytest.raises(DeviceLost) as raised, device_errors("a step of 3 tokens"):
        raise RuntimeError(message)
    assert str(raised.value) == f"a step of 3 tokens: {message.splitlines()[0]}"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_a_device_without_free_memory_is_not_lost(error: Exception) -> None:
    with pytest.raises(DeviceError, match="a step of 3 tokens: CUDA") as raised, device_errors("a step of 3 tokens"):
        raise error
    assert not isinstance(raised.value, DeviceLost)


def test_other_errors_are_not_of_the_device() -> None:
    with pytest.raises(RuntimeError, match="shape") as raised, device_errors("a step of 3 tokens"):
        raise RuntimeError("shape '[2]' is invalid")
    assert type(raised.value) is RuntimeError


class FaultyEvent:
    def wait(self) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_a_fault_before_the_end_of_a_block_that_raised_is_the_error(
    interpreted: InterpretedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    def record() -> Event:
        return FaultyEvent()

    monkeypatch.setattr(interpreted, "record", record)
    with (
        pytest.raises(DeviceLost, match="a copy: CUDA error: an illegal"),
        device_errors("a copy"),
        finished(interpreted),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")
