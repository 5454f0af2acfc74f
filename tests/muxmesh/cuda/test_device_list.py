"""The list of GPUs, from the fake driver in a process of its own."""

from pathlib import Path

import pytest

from muxmesh.cuda.device_list import DeviceList
from muxmesh.errors import DeviceError
from tests.support.fake_driver import NUM_SMS, OTHER_UUID, UUID, fake_driver_environment
from tests.support.mps import fake_daemon


def set_driver(monkeypatch: pytest.MonkeyPatch, **settings: str) -> None:
    for name, value in fake_driver_environment(**settings).items():
        monkeypatch.setenv(name, value)


def test_the_devices_are_listed_by_their_index(monkeypatch: pytest.MonkeyPatch) -> None:
    set_driver(monkeypatch, FAKE_CUDA_UUIDS=f"{UUID},{OTHER_UUID}")
    devices = DeviceList().devices
    assert [(device.index, device.uuid) for device in devices] == [(0, UUID), (1, OTHER_UUID)]
    assert devices[0].compute_capability == (9, 0)
    assert devices[0].has_vmm


def test_devices_are_counted_among_those_that_the_operator_makes_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    set_driver(monkeypatch, FAKE_CUDA_UUIDS=f"{UUID},{OTHER_UUID}", CUDA_VISIBLE_DEVICES=f"{OTHER_UUID},0")
    assert [(device.index, device.uuid) for device in DeviceList().devices] == [(0, OTHER_UUID), (1, UUID)]


def test_whole_devices_are_listed_even_if_a_daemon_listens(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with fake_daemon(tmp_path_factory.mktemp("m")) as daemon:
        set_driver(monkeypatch, CUDA_MPS_ACTIVE_THREAD_PERCENTAGE="50", **daemon.control.environment)
        (device,) = DeviceList().devices
        assert (device.num_sms, device.is_mps_client) == (NUM_SMS, False)


def test_a_driver_that_cannot_be_loaded_is_an_error_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "libcuda.so.1").touch()
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    with pytest.raises(DeviceError, match=r"^cannot load libcuda.so.1: .*; a unit on CUDA needs NVIDIA's driver$"):
        _ = DeviceList().devices


def test_the_driver_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    set_driver(monkeypatch)
    gpus = DeviceList()
    assert [device.uuid for device in gpus.devices] == [UUID]
    monkeypatch.setenv("FAKE_CUDA_UUIDS", OTHER_UUID)
    assert [device.uuid for device in gpus.devices] == [UUID]
    assert [device.uuid for device in DeviceList().devices] == [OTHER_UUID]
