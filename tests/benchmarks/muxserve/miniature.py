"""A made-up profile and made-up measured runs in the shape of MuxServe's files, with round numbers."""

from dataclasses import replace
from typing import Any

from benchmarks.muxserve.cases import ModelCase
from benchmarks.muxserve.constants import read_constants
from benchmarks.muxserve.lengths import lengths_of
from benchmarks.muxserve.replay import Replayer
from muxmesh.placement.muxserve_files import A100_80GB, LLAMA_SIZES, MeasuredModel
from muxmesh.placement.profile import ModelProfile, Profile
from muxmesh.placement.step_table import StepTable, table_from_cells

SHARES, BATCHES, TOKENS = (50, 100), (1, 100), (100, 200, 600)


def table() -> StepTable:
    """A prefill takes 1 ms a prompt token on the whole device; a decode step 10 ms and 10 us for a token of context."""
    prefill = [[[batch * length * 0.1 / share for length in TOKENS] for batch in BATCHES] for share in SHARES]
    decode = [[[(0.01 + batch * length * 1e-5) for length in TOKENS] for batch in BATCHES] for _ in SHARES]
    return table_from_cells(SHARES, BATCHES, TOKENS, prefill, decode)


def profile() -> Profile:
    tables = {1: table(), 8: table()}
    return Profile(
        A100_80GB,
        {
            kind: ModelProfile(kind, size.weights_bytes, size.kv_bytes_per_token, tables)
            for kind, size in LLAMA_SIZES.items()
        },
    )


def replayer(contention: float = 0.0, overhead: float = 0.0) -> Replayer:
    constants = replace(read_constants(), contention=contention, overhead=overhead)
    return Replayer(profile(), lengths_of([(100, 50)]), constants)


def model(name: str = "a", num_requests: int = 1, **options: Any) -> ModelCase:
    fields = {"duration_s": 1.0, "mean_prompt": 100.0, "mean_output": 51.0, "prefill_share": 100, "decode_share": 50}
    return ModelCase(name, "llama-7b", 1.0, num_requests, **(fields | options))


def measured_model(name: str, kind: str = "llama-7b", **options: Any) -> MeasuredModel:
    return MeasuredModel(name, kind, **({"throughput": 1.0, "mean_ttft_s": 0.1, "num_requests": 10} | options))
