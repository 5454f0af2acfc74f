import subprocess
import sys

import numpy as np
import pytest
import torch

from muxmesh.device.torch_device import CudaDevice, InterpretedDevice, open_torch_device
from muxmesh.errors import DeviceError


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> InterpretedDevice:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return InterpretedDevice()


def test_an_upload_is_a_copy(interpreted: InterpretedDevice) -> None:
    array = np.arange(4)
    uploaded = interpreted.upload(array)
    array[0] = 9
    assert uploaded.tolist() == [0, 1, 2, 3]


def test_a_captured_function_is_replayed_over_the_same_tensors(interpreted: InterpretedDevice) -> None:
    count = torch.zeros(1)

    def add_one() -> None:
        count.add_(1)

    replay = interpreted.capture(add_one)
    count.zero_()
    replay()
    replay()
    assert count.item() == 2
    assert interpreted.record().is_done()


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
