"""What the compiler makes of the kernels, for devices that this machine does not have."""

from __future__ import annotations

import pytest

from tests.support.compiled_kernels import compiled_elsewhere
from tests.support.triton_interpreter import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="this process compiles for the present device")

COMPILER = "tests.support.compiled_kernels"
KINDS = [  # dtype of q, dtype of the pool, head size, query heads per KV head
    *(f"bf16/bf16/{head_dim}/4" for head_dim in (64, 80, 128, 256)),
    "bf16/bf16/128/1",
    "bf16/bf16/256/7",
    *(f"f16/f16/{head_dim}/4" for head_dim in (128, 256)),
    *(f"f32/f32/{head_dim}/4" for head_dim in (128, 256)),
]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_keep_to_registers_wide_loads_and_matrix_instructions(capability: int) -> None:
    kernels = compiled_elsewhere(COMPILER, capability, *KINDS)
    # Decode attention is compiled with and without a split.
    assert len(kernels) == 4 * len(KINDS)
    for kernel in kernels:
        attention, exact = kernel["kernel"] in {"decode_kernel", "prefill_kernel"}, kernel["dtype"] == "f32"
        assert kernel["spill_bytes"] <= (32 if exact else 0), kernel
        # 4 bytes: ids, lengths and positions.
        assert set(kernel["loads"]) <= {"4", "16"}, kernel
        # The ids of the token blocks of a tile are copied by 4 bytes, ahead of its K and V.
        assert (kernel["narrow_copies"] < kernel["wide_copies"]) == attention, kernel
        if kernel["kernel"] == "prefill_kernel" and not exact:
            assert kernel["wgmma"] if capability == 90 else kernel["mma"], kernel
        if kernel["kernel"] == "decode_kernel" and not exact:
            assert kernel["mma"], kernel
            # Two programs fit on an SM, of Hopper and of Ampere.
            most_shared = (107 if capability == 90 else 75) * 1024
            assert kernel["shared_bytes"] <= most_shared and kernel["registers"] <= 168, kernel


@pytest.mark.timeout(600)
def test_the_kernels_beside_attention_compile_for_each_pair_of_dtypes_and_do_not_spill() -> None:
    kinds = ["bf16/bf16/128/4", "f16/f16/80/1", "f32/f32/64/4", "f32/bf16/128/4", "bf16/f16/64/3"]
    kernels = compiled_elsewhere(COMPILER, 90, *kinds, "--step")
    assert len(kernels) == 4 * len(kinds)
    assert [kernel for kernel in kernels if kernel["spill_bytes"]] == []
