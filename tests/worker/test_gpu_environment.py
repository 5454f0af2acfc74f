"""Services on a GPU that name their parent: they check the environment that it gave them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from muxmesh.config.runtime import MeshRuntime, ProcessKey
from muxmesh.types import Role
from tests.support.fake_driver import UUID
from tests.support.mps import mps_runtime

KEYS = {
    "kvstore": ProcessKey("kvstore", "u"),
    "prefill_svc": ProcessKey(Role.PREFILL, "u", "m"),
    "decode_svc": ProcessKey(Role.DECODE, "u", "m"),
}


@pytest.fixture
def runtime(tmp_path: Path) -> MeshRuntime:
    model = {"name": "m", "compute_share": {"prefill": 60, "decode": 40}}
    return mps_runtime(tmp_path, [{"name": "u", "device": "cuda:0", "models": [model]}], {"u": UUID})


def last_line_of(module: str, runtime: MeshRuntime, without: str) -> str:
    """Runs a service that lacks one variable; what it ends with."""
    file = runtime.run_dir / "runtime.json"
    runtime.write(file)
    key = KEYS[module]
    named = ("--unit", key.unit, *(("--model", key.model) if key.model else ()))
    environment = {**os.environ, **runtime.environment(key)}
    del environment[without]
    result = subprocess.run(
        (sys.executable, "-m", module, "--runtime", str(file), "--parent", str(os.getpid()), *named),
        env=environment,
        capture_output=True,
        check=False,
    )
    assert result.returncode == 1
    return result.stderr.decode().strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("module", "name", "variable", "value"),
    [
        ("kvstore", "kvstore/u", "CUDA_MPS_PIPE_DIRECTORY", "{run}/outside-mps"),
        ("kvstore", "kvstore/u", "CUDA_VISIBLE_DEVICES", UUID),
        ("prefill_svc", "prefill/m", "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "60"),
        ("decode_svc", "decode/m", "CUDA_MPS_PIPE_DIRECTORY", "{run}/mps-fa4ecada"),
    ],
)
def test_a_service_that_lacks_a_variable_names_it_and_its_value(
    runtime: MeshRuntime, module: str, name: str, variable: str, value: str
) -> None:
    expected = value.format(run=runtime.run_dir)
    assert last_line_of(module, runtime, without=variable) == (
        f"ERROR muxmesh.lifecycle: cannot serve: {name}: {variable} is not set; must be {expected}"
    )
