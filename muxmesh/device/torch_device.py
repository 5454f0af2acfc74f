"""The device of a worker that computes with torch: streams, events, uploads and graphs. The only file with torch.cuda.

`CudaDevice` is a GPU. `InterpretedDevice` computes with CPU tensors while Triton interprets the kernels: it is for
machines without a GPU and for tests, and it is thousands of times slower. Knows no model and no KV.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from muxmesh.cuda.driver import CudaDriver
from muxmesh.cuda.sm_groups import SmShare
from muxmesh.errors import DeviceError, DeviceLost

_log = logging.getLogger(__name__)


class Event(Protocol):
    """A point in the work that was enqueued on the device."""

    def wait(self) -> None:
        """Blocks until the device has reached it."""


class TorchDevice(Protocol):
    """One device of torch. A worker has one; its methods may be called from any thread."""

    @property
    def torch_device(self) -> torch.device:
        """Where tensors are to be allocated."""

    @property
    def num_sms(self) -> int:
        """Streaming multiprocessors that this process may use."""

    @property
    def compute_capability(self) -> tuple[int, int]:
        """Major and minor; sizes of tiles depend on it."""

    @property
    def is_interpreted(self) -> bool:
        """True if kernels are interpreted over CPU tensors."""

    def upload(self, array: np.ndarray) -> Tensor:
        """Returns a copy of ``array`` on the device. The copy is enqueued on the present stream; does not block."""

    def download(self, tensor: Tensor) -> Callable[[], np.ndarray]:
        """Enqueues a copy of ``tensor`` to host memory on the present stream; does not block.

        Returns a function that blocks until the copy is done and returns it.
        """

    def staging(self, num_bytes: int) -> Tensor:
        """Returns new pinned host memory as uint8, from and to which copies run beside the host."""

    def compute(self) -> contextlib.AbstractContextManager[None]:
        """While the block runs, what this thread enqueues goes to the compute stream."""

    def copying(self) -> contextlib.AbstractContextManager[None]:
        """While the block runs, what this thread enqueues goes to the copy stream, beside the compute stream."""

    def record(self) -> Event:
        """Returns the present end of the present stream as an event."""

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """Captures what ``enqueue`` enqueues as a graph, after one warm-up call. Returns a function that replays it.

        The tensors that ``enqueue`` uses must stay where they are. What it allocates is freed at its end: the graphs of
        a device use the same memory, one after the other. Called within `compute`.
        """

    def reserved_bytes(self) -> int:
        """Device memory that torch has reserved in this process; what was mapped does not count."""


class CudaDevice:
    """`TorchDevice` of the first visible GPU."""

    is_interpreted = False

    def __init__(self, share: SmShare | None = None) -> None:
        """Creates torch's context. With ``share`` a green context limits the compute stream to these SMs.

        Raises DeviceError if torch cannot use the GPU, or the driver has no green contexts.
        """
        try:
            torch.cuda.init()  # type: ignore[no-untyped-call]
            self.torch_device = torch.device("cuda", 0)
            torch.cuda.set_device(self.torch_device)
            properties = torch.cuda.get_device_properties(0)
        except (RuntimeError, AssertionError) as error:
            raise DeviceError(f"torch {torch.__version__} cannot use a GPU: {error}") from error
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        self.num_sms = int(properties.multi_processor_count)
        self.compute_capability = (int(properties.major), int(properties.minor))
        self._copy_stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._graph_memory: Any = None
        if share is None:
            self._compute_stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        else:
            self._compute_stream, self.num_sms = _green_stream(share, self.num_sms)

    def upload(self, array: np.ndarray) -> Tensor:
        host = torch.from_numpy(np.ascontiguousarray(array)).pin_memory()
        return host.to(self.torch_device, non_blocking=True)

    def download(self, tensor: Tensor) -> Callable[[], np.ndarray]:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        event = self.record()

        def wait() -> np.ndarray:
            event.wait()
            return host.numpy()

        return wait

    def staging(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    @contextlib.contextmanager
    def compute(self) -> Iterator[None]:
        with torch.cuda.stream(self._compute_stream):
            yield

    @contextlib.contextmanager
    def copying(self) -> Iterator[None]:
        with torch.cuda.stream(self._copy_stream):
            yield

    def record(self) -> Event:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return _CudaEvent(event)

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        enqueue()
        torch.cuda.current_stream().synchronize()
        if self._graph_memory is None:
            self._graph_memory = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, pool=self._graph_memory, stream=self._compute_stream, capture_error_mode="thread_local"
        ):
            enqueue()
        return graph.replay

    def reserved_bytes(self) -> int:
        return torch.cuda.memory_reserved()


class _CudaEvent:
    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self) -> None:
        self._event.synchronize()


def _green_stream(share: SmShare, num_sms: int) -> tuple[torch.cuda.Stream, int]:
    """Returns a stream whose kernels use only the SMs of ``share``, and the number of these SMs.

    Not by torch's own green contexts, which are of the same SMs in each process. Raises DeviceError.
    """
    driver = CudaDriver()
    driver.use_primary_context(0)
    gpu = driver.sm_groups(0)
    groups = share.groups(gpu, num_sms)
    handle = driver.green_stream(0, groups)
    stream = torch.cuda.ExternalStream(handle, torch.device("cuda", 0))  # type: ignore[no-untyped-call]
    return stream, gpu.num_sms * len(groups)


class InterpretedDevice:
    """`TorchDevice` of CPU tensors, on which Triton interprets the kernels. Everything is done when it returns."""

    is_interpreted = True

    def __init__(self, num_sms: int = 4) -> None:
        """``num_sms``: for what divides work by it. Raises DeviceError unless Triton is told to interpret."""
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise DeviceError("Triton compiles kernels in this process: TRITON_INTERPRET=1 is not in its environment")
        self.torch_device = torch.device("cpu")
        self.num_sms = num_sms
        self.compute_capability = (9, 0)

    def upload(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.array(array))

    def download(self, tensor: Tensor) -> Callable[[], np.ndarray]:
        copy = tensor.numpy().copy()
        return lambda: copy

    def staging(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    @contextlib.contextmanager
    def compute(self) -> Iterator[None]:
        with np.errstate(all="ignore"):  # the interpreter computes with NumPy, which would warn where a GPU does not
            yield

    def copying(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def record(self) -> Event:
        return _DoneEvent()

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        enqueue()
        return enqueue

    def reserved_bytes(self) -> int:
        return 0


class _DoneEvent:
    def wait(self) -> None: ...


_FAULTS = ("CUDA error", "CUDA driver error", "Triton Error [CUDA]", "CUBLAS_STATUS")
"""In the messages of torch and Triton for errors of the device. Nearly all of them make every later call fail."""


@contextlib.contextmanager
def device_errors(doing: str) -> Iterator[None]:
    """Turns the errors of torch and Triton for the device into those of the mesh, with ``doing`` in the message.

    Raises DeviceError if the device has too little memory free, and DeviceLost for any other error of the device: what
    was computed since the last wait may be wrong, and a device that has faulted stays so for this process.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceError(f"{doing}: {_first_line(error)}") from error
    except RuntimeError as error:
        if not any(fault in str(error) for fault in _FAULTS):
            raise
        is_full = "out of memory" in str(error) or "ALLOC_FAILED" in str(error)
        raise (DeviceError if is_full else DeviceLost)(f"{doing}: {_first_line(error)}") from error


@contextlib.contextmanager
def finished(device: TorchDevice) -> Iterator[None]:
    """Waits at the end of the block for all that the present stream has, also if the block raises.

    Its caller may then free memory that the block's work reads or writes, for other processes too.
    """
    try:
        yield
    finally:
        device.record().wait()


def device_bytes(device: TorchDevice, num_bytes: int) -> Tensor:
    """Returns new memory on the device (uint8, one dimension), of this process alone. Raises DeviceError if it is full.

    Its content is undefined.
    """
    with device_errors(f"allocating {num_bytes} bytes"):
        return torch.empty(num_bytes, dtype=torch.uint8, device=device.torch_device)


def _first_line(error: RuntimeError) -> str:
    return str(error).partition("\n")[0]


def open_torch_device(share: SmShare | None = None) -> TorchDevice:
    """Returns the worker's device: the GPU, or CPU tensors if TRITON_INTERPRET=1 is in the environment.

    Triton reads the same variable, so kernels and tensors agree. Raises DeviceError.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        _log.warning("TRITON_INTERPRET=1: kernels are interpreted on the CPU, thousands of times slower than on a GPU")
        return InterpretedDevice()
    return CudaDevice(share)
