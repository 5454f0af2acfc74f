"""The settings of one model of a unit, in mesh.yaml.

Knows no units, files or models on disk.
"""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import ByteSize, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from muxmesh.config.section import MAX_BYTES, MAX_COUNT, Name, Section
from muxmesh.config.slo_config import SloConfig
from muxmesh.types import Dtype, KvFormat, LengthPrediction, Role

_SIM_PREFIX = "sim:"


class SimProfile(Section):
    """Step times of the sim engine, in seconds.

    A step that computes n tokens, which together attend to c earlier tokens, takes
    ``base_s + per_token_s * n + per_context_s * c``.
    """

    base_s: float = Field(default=0.0, ge=0, le=3600)
    """Seconds of each step."""
    per_token_s: float = Field(default=0.0, ge=0, le=3600)
    """Additional seconds for each token that the step computes."""
    per_context_s: float = Field(default=0.0, ge=0, le=3600)
    """Additional seconds for each earlier token that a token of the step attends to."""
    prefill_scaling: float = Field(default=1.0, ge=0, le=1)
    """The part of a prefill step's time that is inversely proportional to the worker's `compute_share`. At a share s a
    step takes `(1 - prefill_scaling) + prefill_scaling / s` times as long as on the whole device."""
    decode_scaling: float = Field(default=1.0, ge=0, le=1)
    """The same for decode steps, which a device often computes as fast with a part of its cores."""
    output_tokens: int = Field(default=0, ge=0, le=MAX_COUNT)
    """Output length in tokens at which the engine samples EOS. 0: outputs end at max_new_tokens only."""
    output_lengths: Literal["equal", "geometric"] = "equal"
    """`equal`: all outputs have `output_tokens` tokens. `geometric`: each token is the last one with probability
    `1 / output_tokens`, computed from the previous token, the index and the seed."""

    @property
    def fingerprint(self) -> str:
        """Stands for the weights of a sim model, which has none. `from_fingerprint` reads it."""
        return _SIM_PREFIX + self.model_dump_json()

    @classmethod
    def from_fingerprint(cls, text: str) -> Self:
        """Raises ValueError if ``text`` is not the `fingerprint` of a sim model."""
        if not text.startswith(_SIM_PREFIX):
            raise ValueError("is not the fingerprint of a sim model")
        return cls.model_validate_json(text.removeprefix(_SIM_PREFIX))

    def scaling_of(self, role: Role) -> float:
        return self.prefill_scaling if role == Role.PREFILL else self.decode_scaling

    @model_validator(mode="after")
    def _geometric_needs_a_mean(self) -> Self:
        if self.output_lengths == "geometric" and self.output_tokens == 0:
            raise ValueError("output_lengths: geometric needs output_tokens, the mean length")
        return self


class ComputeShare(Section):
    """The largest part of the device that a worker may use, in percent: of a GPU's streaming multiprocessors (SMs), of
    the CPU time of a unit's cores.
    """

    prefill: int = Field(default=100, ge=1, le=100)
    """Of the prefill worker."""
    decode: int = Field(default=100, ge=1, le=100)
    """Of the decode worker."""

    def of(self, role: Role) -> int:
        return self.prefill if role == Role.PREFILL else self.decode

    @property
    def is_limit(self) -> bool:
        """Whether a worker may use less than the whole device."""
        return min(self.prefill, self.decode) < 100


class ModelConfig(Section):
    """One model of a unit, served there by a prefill and a decode worker."""

    name: Name
    """The value of GenerateRequest.model for this model."""
    source: str | None = None
    """A catalog name (`muxmesh model list`), a folder in Hugging Face format or a GGUF file. Unset: the catalog name
    `name`."""
    engine: Literal["native", "sim"] = "native"
    """`native` computes the model. `sim` generates deterministic tokens with the step times in `sim`, for tests.
    `torch` is an alias of `native`."""
    dtype: Dtype = "float32"
    """Data type of weights and activations: `float32`, `float16` or `bfloat16`. A CPU computes in float32 only. On a
    GPU float32 is exact (no TF32), and bfloat16 is what most models are published in."""
    kv_cache_dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Data type of KV. `auto`: that of `dtype`. On a GPU a model in float32 may keep its KV in half the memory."""
    compute_share: ComputeShare = ComputeShare()
    """Part of the device that each worker of the model may use, like `{prefill: 60, decode: 40}`, or one number for
    both. The arbiter lets workers compute at the same time as long as their shares fit (see `arbiter`), so the sum of
    all workers may exceed 100. On a GPU MPS or `green_contexts` limit a worker. On a CPU it has a thread for each core
    of its share, rounded up, and pauses between steps, so that over a few seconds it uses at most its share of the CPU
    time of the unit's cores. With `engine: sim` its steps take longer, by `sim.prefill_scaling` and
    `sim.decode_scaling`."""
    cuda_graphs: bool = True
    """On a GPU: decode steps are captured once for each batch size (1, 2, 4, ... `max_num_seqs`) and replayed."""
    continuous_decode_steps: int | None = Field(default=None, ge=1, le=256)
    """On a GPU, or with `engine: sim`: how many decode steps a worker computes in a row before it schedules again, so
    that the device does not wait for the host after each token. Their tokens are sent together. A run ends early when
    another worker waits for the device, when a request arrives, is cancelled or pre-empted, and after 20 ms. 1: each
    token is sent by itself. Unset: 16, with `engine: sim` 1."""
    block_size: Literal[8, 16, 32] = 16
    """Tokens in a KV block."""
    max_model_len: int | None = Field(default=None, ge=2, le=MAX_COUNT)
    """Limit on prompt and output together, in tokens. Unset: the context length of the model."""
    default_max_new_tokens: int = Field(default=512, ge=1, le=MAX_COUNT)
    """Longest output, in tokens, of a request without max_new_tokens. Context length and KV pool limit it further."""
    generation_config: Literal["auto", "ignore"] = "auto"
    """`auto`: where a request leaves a sampling parameter unset, the value in the model's `generation_config.json`
    applies, and its `max_new_tokens` limits `default_max_new_tokens`. `ignore`: sampling is unmodified unless a request
    asks for more. Ids of end-of-sequence tokens are read from the file in both cases."""
    max_num_seqs: int = Field(default=16, ge=1, le=1024)
    """Sequences in the batch of each worker. A decode worker has up to `max_paused_seqs` more that it does not
    compute."""
    max_paused_seqs: int | None = Field(default=None, ge=0, le=4096)
    """Sequences that others pre-empt from the batch of a decode worker and that keep their KV in the pool. While it has
    so many, queued requests pre-empt no more. 0: none is pre-empted for others. Unset: `max_num_seqs`."""
    kv_answer_tokens: int = Field(default=128, ge=1, le=MAX_COUNT)
    """Output tokens for which KV memory is reserved before a request starts. More is allocated as the output grows. If
    the pool is full, the sequence is pre-empted: its KV is swapped to `kv_swap` or freed, and the sequence resumes when
    memory is free."""
    kv_reserve: Literal["answer_tokens", "p90"] = "answer_tokens"
    """Of `p90`, the memory reserved before a request starts is for the 0.9 quantile of its predicted output instead of
    `kv_answer_tokens`. Fewer requests start at once then, and hardly one is pre-empted for memory, but in virtual time
    throughput under memory pressure was a third to a half lower: see docs/swap.md."""
    kv_guaranteed: ByteSize = Field(default=ByteSize(0), ge=0, le=MAX_BYTES)
    """KV memory that this model can always claim from the unit's pool, like `512MiB`, rounded up to whole slabs. Unused
    slabs are lent to other models. They return as the requests of these models end, and by pre-emption after a second.
    The rest of the pool is divided by `expected_rate` at first and by use later."""
    expected_rate: float | None = Field(default=None, gt=0, le=1e6)
    """Requests per second, as expected. At first the KV memory that is not guaranteed is divided in proportion to it
    and to the size of the models' KV. Unset: in equal parts. Set it for all models of a unit, or for none."""
    kv_swap_format: KvFormat = "raw"
    """Format of KV in `kv_swap`. `raw` is exact. `int8` needs a quarter of the memory of float32, half of that of
    the other types, but slightly changes the output of a swapped sequence, and its KV does not enter the prefix
    cache."""
    prefill_token_budget: int = Field(default=128, ge=1, le=MAX_COUNT)
    """Prompt tokens computed in one step, or `max_num_seqs` if that is larger. A longer prompt is computed in chunks,
    which get smaller as the context grows. Other workers of the unit and cancelled requests wait until a step ends. 128
    suits a CPU; a GPU is fast from about 2048 on."""
    threads: int | None = Field(default=None, ge=1, le=MAX_COUNT)
    """Threads of each worker on a CPU. Unset: one for each core of its `compute_share` of the unit's cores, which are
    at most the quota of its cgroup (container, service), rounded up."""
    slo: SloConfig | None = None
    """Latency that requests of the model are to have, like `{ttft_s: 0.5, tpot_s: 0.05}` or `{scale: 8}`. Unset: no
    objective, and nothing is counted."""
    pinned: bool = False
    """If true, the model falls asleep only by `muxmesh model sleep`, whatever `max_awake_models` and `idle_sleep_s` of
    its unit are."""
    start: Literal["awake", "asleep"] | None = None
    """Whether the model is awake when its unit starts. A model that is `asleep` has loaded nothing, and its first
    request wakes it. Unset: awake, as far as `max_awake_models` permits; pinned models first, then in the order of this
    file."""
    sim: SimProfile = SimProfile()
    """Step times and output lengths of `engine: sim`. An error with other engines."""

    @field_validator("engine", mode="before")
    @classmethod
    def _accept_torch_as_native(cls, value: object) -> object:
        return "native" if value == "torch" else value

    @field_validator("compute_share", mode="before")
    @classmethod
    def _accept_one_share_for_both(cls, value: object) -> object:
        if isinstance(value, (dict, ComputeShare)):
            return value
        if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 100:
            return {"prefill": value, "decode": value}
        raise PydanticCustomError("share", "must be percent from 1 to 100, or two like {prefill: 60, decode: 40}")

    @property
    def kv_dtype(self) -> Dtype:
        """Data type of KV: `kv_cache_dtype` resolved."""
        return self.dtype if self.kv_cache_dtype == "auto" else self.kv_cache_dtype

    @property
    def paused_limit(self) -> int:
        """`max_paused_seqs` resolved."""
        return self.max_num_seqs if self.max_paused_seqs is None else self.max_paused_seqs

    @property
    def max_decode_steps(self) -> int:
        """`continuous_decode_steps` resolved."""
        return self.continuous_decode_steps or (1 if self.engine == "sim" else 16)

    @property
    def step_token_budget(self) -> int:
        """Tokens computed in one step. At least `max_num_seqs`, so that each step has a token of every sequence."""
        return max(self.prefill_token_budget, self.max_num_seqs)


_P90_EXCEEDED_BY = 0.1


def reserved_output_tokens(config: ModelConfig, prediction: LengthPrediction | None, num_sent: int) -> int:
    """Output tokens, beyond the known ones, for which a request has KV memory reserved when it starts; at least 1.

    ``num_sent``: tokens of its output that are known already.
    """
    if config.kv_reserve == "answer_tokens" or prediction is None:
        return config.kv_answer_tokens
    return min(math.ceil(prediction.remaining_tokens(num_sent, _P90_EXCEEDED_BY)), MAX_COUNT)
