"""What the compiler makes of the sampling kernel, for devices that this machine does not have."""

import pytest

from tests.support.compiled_kernels import compiled_elsewhere
from tests.support.triton_interpreter import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="this process compiles for the present device")


@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernel_keeps_to_registers_and_reads_rows_16_bytes_at_a_time(capability: int) -> None:
    kernels = compiled_elsewhere("tests.support.compiled_sampling", capability, "128256")
    assert [kernel["vocab_size"] for kernel in kernels] == [128256]
    for kernel in kernels:
        assert kernel["spill_bytes"] == 0, kernel
        # 8 bytes: the parameters. 4 bytes: tokens of the list of likely ones.
        assert set(kernel["loads"]) == {"4", "8", "16"} and kernel["loads"]["16"] >= 6, kernel
