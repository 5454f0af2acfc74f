"""The checks, most important first. Time limits are for a machine where torch takes 5 s to start."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.gpu_check.check import Check

_COMPILED = (("TRITON_INTERPRET", "0"),)
_REAL_DRIVER = (("MUXMESH_TEST_LIBCUDA", "libcuda.so.1"),)
_KERNELS = "tests/muxmesh/engine/native/cuda"

CHECKS = (
    Check("shares-values", "what a model computes is the same with any share of the SMs", 150, "alone"),
    Check("shares-tokens", "tokens of a mesh with shares of 40 and 30 % are those without MPS", 150, "mps"),
    Check("ipc", "memory passes by descriptor and by IPC handle, and outlives its owner", 40, "beside"),
    Check("dlpack", "the tensor of imported memory has its address; bf16 is read by another process", 60, "beside"),
    Check("mesh-tokens", "tokens of meshes in f32 on the GPU equal those on the CPU", 150, "beside"),
    Check("group-restart", "a killed worker: FAULT, all workers of the GPU new, the same tokens", 120, "mps"),
    Check(
        "driver", "the driver seam's contract holds on the real libcuda as on the fake one", 60, "beside",
        ("tests/muxmesh/cuda/test_driver.py", "tests/muxmesh/cuda/test_driver_bindings.py"), _REAL_DRIVER, workers=4,
    ),
    Check(
        "kernels", "compiled kernels agree with float64: 1e-5 f32, 1e-3 f16, 1e-2 bf16", 150, "beside",
        (_KERNELS, f"--ignore={_KERNELS}/test_compiled_kernels.py"), _COMPILED, workers=8,
    ),
    Check("mps-faults", "terminate_client harms no other client; else FAULT, then ACTIVE; bytes kept", 90, "mps"),
    Check("swap", "sequences are swapped to pinned memory and back, and no token changes", 60, "beside"),
    Check("unlimited-worker", "a worker that MPS does not limit exits with an error that names MPS", 60, "mps"),
    Check("mps-answers", "answers of the control program as recorded", 40, "mps"),
    Check("sanitizer", "compute-sanitizer finds no bad access of the kernels", 120, "beside"),
    Check(
        "torch-reference", "the reference in torch agrees with transformers on the GPU", 120, "beside",
        ("tests/muxmesh/engine/native/test_torch_reference.py", "-k", "cuda"),
    ),
    Check("hand-off", "under 1 ms; kvstore is no MPS client", 60, "alone"),
    Check("graphs", "a graph is faster and samples the same tokens", 90, "alone"),
    Check("attention", "over 0.7 of the copy ceiling where much is read", 60, "alone"),
    Check("mps-shares", "SMs 132, 66, 38, 12; products in proportion, copies less so", 90, "alone"),
    Check("memfd", "near plain pinned memory, also beside products", 40, "alone"),
    Check("green", "time in proportion to 1 / SMs, also under MPS and from a graph; no SMs shared", 60, "alone"),
)  # fmt: skip
"""What `make gpu-check` runs."""


def dry_checks() -> tuple[Check, ...]:
    """The checks that also run without a GPU, where the fake driver and Triton's interpreter stand in for it."""
    return tuple(replace(check, environment=()) for check in CHECKS if check.name in DRY)


DRY = (
    "shares-values", "shares-tokens", "ipc", "dlpack", "mps-answers", "graphs", "mesh-tokens", "unlimited-worker",
    "group-restart", "hand-off",
)  # fmt: skip
