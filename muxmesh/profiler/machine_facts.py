"""What a profile records of the machine that it is measured on."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

from muxmesh.cuda.driver import DeviceInfo
from muxmesh.machine_limits import memory_limit, num_usable_cores
from muxmesh.placement.profile import MachineFacts

_CPU_INFO = Path("/proc/cpuinfo")


def cpu_facts() -> MachineFacts:
    """The CPU, with the cores that this process may use."""
    return MachineFacts("cpu", _cpu_name(_CPU_INFO), 1, memory_limit().num_bytes, num_usable_cores())


def gpu_facts(devices: Sequence[DeviceInfo], index: int) -> MachineFacts:
    """The GPU ``index``, and how many of the machine's are of the same kind."""
    device = devices[index]
    same = [other for other in devices if (other.name, other.num_sms) == (device.name, device.num_sms)]
    return MachineFacts("cuda", device.name, len(same), device.total_bytes)


def _cpu_name(info: Path) -> str:
    """The processor as the kernel names it, or else its architecture."""
    try:
        lines = info.read_text().splitlines()
    except OSError:
        lines = []
    names = [
        value.strip() for line in lines for name, _, value in [line.partition(":")] if name.strip() == "model name"
    ]
    return names[0] if names and names[0] else platform.machine()
