"""What the compiler makes of the sampling kernel, for devices that this machine does not have."""

import json
import os
import subprocess
import sys

import pytest

from tests.support.triton_interpreter import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="this process compiles for the present device")


@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernel_keeps_to_registers_and_reads_rows_16_bytes_at_a_time(capability: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.compiled_sampling", str(capability), "128256"],
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert [kernel["vocab_size"] for kernel in kernels] == [128256]
    for kernel in kernels:
        assert kernel["spill_bytes"] == 0, kernel
        # 8 bytes: the parameters. 4 bytes: tokens of the list of likely ones.
        assert set(kernel["loads"]) == {"4", "8", "16"} and kernel["loads"]["16"] >= 6, kernel
