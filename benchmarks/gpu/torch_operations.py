"""Operations of a peer with torch: imports as a worker does them, and work on the device to be timed or faulted."""

from __future__ import annotations

import dataclasses
import functools
import mmap
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from benchmarks.gpu.ceilings import measure_ceilings
from muxmesh.cuda.driver import CudaDriver
from muxmesh.cuda.sm_groups import SmShare
from muxmesh.device.cuda_mapping import map_segment
from muxmesh.device.torch_device import TorchDevice, open_torch_device

_WITHOUT_DEVICE = ("green",)


class TorchOperations:
    """The device of this process, and the tensors that it has, by name."""

    def __init__(self) -> None:
        self.share: SmShare | None = None
        self.tensors: dict[str, torch.Tensor] = {}

    @functools.cached_property
    def driver(self) -> CudaDriver:
        """The driver, loaded by the first operation that needs it."""
        return CudaDriver()

    @functools.cached_property
    def device(self) -> TorchDevice:
        """The device, opened by the first operation that needs it."""
        return open_torch_device(self.share)

    def run(self, operation: str, arguments: Mapping[str, Any], fds: Sequence[int]) -> Any:
        """Runs the operation of this name with ``arguments``; those that take a descriptor get the first of ``fds``."""
        method = getattr(self, f"do_{operation}")
        if operation in _WITHOUT_DEVICE:
            return method(*fds[:1], **arguments)
        with self.device.compute():
            return method(*fds[:1], **arguments)

    def do_green(self, shares: Sequence[int], index: int) -> None:
        """Limits the compute stream to its share of the SMs by a green context; before any other operation.

        ``shares``: in percent, of all processes that are limited. ``index``: of this one's.
        """
        self.share = None if shares[index] == 100 else SmShare(tuple(shares), index)

    def do_product_times(self, size: int, count: int) -> Any:
        """Milliseconds of a product, enqueued and from a graph."""
        a, b = (torch.randn(size, size, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        out = torch.empty_like(a)

        def enqueue() -> None:
            torch.mm(a, b, out=out)

        replay = self.device.capture(enqueue)
        plain_s, graph_s = _seconds(enqueue, count), _seconds(replay, count)
        return {"num_sms": self.device.num_sms, "plain_ms": 1e3 * plain_s, "graph_ms": 1e3 * graph_s}

    def do_info(self) -> Any:
        """What driver and torch see: SMs, whether MPS is attached."""
        info = self.driver.device(0)
        return {"num_sms": info.num_sms, "torch_sms": self.device.num_sms, "is_mps_client": info.is_mps_client}

    def do_import(self, fd: int, name: str, num_bytes: int) -> Any:
        """Maps memory of another process as a worker does. Reports where its tensor is."""
        mapping = map_segment(self.driver, 0, num_bytes, fd, b"")
        os.close(fd)
        tensor = self.tensors[name] = mapping.tensor(self.device.torch_device)
        same = tensor.data_ptr() == mapping.address
        return {"same_address": same, "device": str(tensor.device), "bytes": tensor.nbytes}

    def do_write_bf16(self, name: str, value: float, count: int) -> None:
        self.tensors[name].view(torch.bfloat16)[:count] = value
        self.device.record().wait()

    def do_sum_bf16(self, name: str, count: int) -> float:
        return float(self.tensors[name].view(torch.bfloat16)[:count].double().sum())

    def do_write(self, name: str, text: str) -> None:
        content = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        self.tensors[name][: len(content)].copy_(content)
        self.device.record().wait()

    def do_read(self, name: str, num_bytes: int) -> str:
        return bytes(self.tensors[name][:num_bytes].tolist()).decode(errors="replace")

    def do_device_name(self) -> str:
        return self.driver.device(0).name

    def do_ceilings(self, copied_bytes: int, size: int) -> Any:
        """What the card can do at most, see `benchmarks.gpu.ceilings`."""
        return dataclasses.asdict(measure_ceilings(copied_bytes, size))

    def do_spin(self, cycles: int) -> None:
        """Enqueues a kernel that runs for so many cycles of the clock; does not wait for it."""
        torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]

    def do_work(self, rounds: int) -> float:
        """Computes for a while and waits. Returns seconds."""
        a = torch.randn(2048, 2048, device="cuda")
        return _seconds(lambda: a @ a, rounds) * rounds

    def do_wait(self) -> None:
        torch.cuda.synchronize()

    def do_fault(self) -> None:
        """Reads where nothing is mapped, as a kernel with a wrong address does."""
        torch.take(torch.zeros(4, device="cuda"), torch.tensor([0], device="cuda"))  # loads the module
        from benchmarks.gpu.faulting_kernel import read_nowhere  # noqa: PLC0415 - needs Triton compiled

        read_nowhere()
        torch.cuda.synchronize()

    def do_memfd(self, num_bytes: int) -> Any:
        """Registers a mapped memfd in pieces through the driver; GB/s each way, and those of plain pinned memory."""
        fd = os.memfd_create("swap")
        os.ftruncate(fd, num_bytes)
        host = torch.frombuffer(mmap.mmap(fd, 0), dtype=torch.uint8)
        os.close(fd)
        started_at_s = time.perf_counter()
        self.driver.use_primary_context(0)
        self.driver.register_host(host.data_ptr(), num_bytes)
        figures = {"register_s": time.perf_counter() - started_at_s}
        device = torch.randint(255, (num_bytes,), dtype=torch.uint8, device="cuda")
        plain = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        for name, memory in (("registered", host), ("pinned", plain)):
            out = num_bytes / _seconds(lambda: memory.copy_(device, non_blocking=True), 5) / 1e9  # noqa: B023
            back = num_bytes / _seconds(lambda: device.copy_(memory, non_blocking=True), 5) / 1e9  # noqa: B023
            figures |= {f"{name}_out_gb_s": out, f"{name}_in_gb_s": back}
        self.tensors["swap"], self.tensors["swapped"] = host, device
        return figures

    def do_memfd_beside(self, size: int) -> Any:
        """Copies beside products, on streams of their own: GB/s, and the time of a product over that of one alone."""
        host, device = self.tensors["swap"], self.tensors["swapped"]
        a = torch.randn(size, size, dtype=torch.bfloat16, device="cuda")
        alone_s = _seconds(lambda: a @ a, 20)
        torch.cuda.synchronize()
        first, last = _timers()
        with self.device.copying():
            first.record()
            for _ in range(4):
                host.copy_(device, non_blocking=True)
            last.record()
        beside_s = _seconds(lambda: a @ a, 20)
        torch.cuda.synchronize()
        gb_s = 4 * len(host) / first.elapsed_time(last) / 1e6
        return {"out_gb_s_beside": gb_s, "product_time_ratio": beside_s / alone_s}


def _seconds(enqueue: Callable[[], Any], count: int) -> float:
    """Seconds of one call on the present stream, the mean of ``count`` after a warm-up, by events."""
    enqueue()
    first, last = _timers()
    first.record()
    for _ in range(count):
        enqueue()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1e3 / count


def _timers() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
