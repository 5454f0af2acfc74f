"""The runner of a model on a GPU: lays steps out, uploads them, and reads tokens back. Samples on the device.

A step of decode rows only is computed by `decode_graphs`, several in a row if the step allows it. Any other step runs
the same forward pass over rows of its own. The device has finished all of a step when `run` returns or raises.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from muxmesh.clock import Clock
from muxmesh.device.kv_view import KvGeometry
from muxmesh.device.torch_device import Event, TorchDevice, device_errors, finished
from muxmesh.engine.native.cuda.attention_plan import AttentionPlan
from muxmesh.engine.native.cuda.decode_graphs import DecodeGraphs, DecodeTensors
from muxmesh.engine.native.cuda.device_rows import device_rows, upload
from muxmesh.engine.native.cuda.forward import DeviceForward
from muxmesh.engine.native.cuda.kv_layout import KvLayout
from muxmesh.engine.native.cuda.logit_passes import joined_outcome, logit_passes
from muxmesh.engine.native.cuda.product_check import check_products
from muxmesh.engine.native.cuda.run_outcome import plain_outcome, run_outcome
from muxmesh.engine.native.cuda.run_penalties import RunPenalties
from muxmesh.engine.native.cuda.sampling import Sampler, UploadedPlan
from muxmesh.engine.native.cuda.sampling_outcome import SampledArrays, SamplingOutcome, sampling_outcome
from muxmesh.engine.native.cuda.sampling_plan import SamplingPlan, plan_sampling
from muxmesh.engine.native.cuda.step_rows import StepRows, arrange, decode_buckets
from muxmesh.engine.step import Chunk, PromptScoring, SampleSpec, Step, StepOutcome
from muxmesh.models.device_capacity import MAX_LOGIT_ROWS
from muxmesh.models.model_spec import ModelSpec
from muxmesh.types import Sampling, blocks_for

_log = logging.getLogger(__name__)

_WARM_UP_SAMPLE = SampleSpec(Sampling(temperature=0.0), 0)


@dataclass(frozen=True, slots=True)
class RunnerLimits:
    """What a runner allocates for.

    ``max_model_len``: tokens of the longest sequence. ``max_logit_rows``: rows whose logits are in memory at once in a
    step that is not of decode rows only.
    """

    max_num_seqs: int
    step_token_budget: int
    max_model_len: int
    max_steps: int
    max_logit_rows: int = MAX_LOGIT_ROWS


class CudaRunner:
    """A `Runner` on a device of torch. `run` needs `load` first."""

    def __init__(
        self,
        device: TorchDevice,
        spec: ModelSpec,
        open_weights: Callable[[], Mapping[str, Tensor]],
        geometry: KvGeometry,
        pool: Tensor,
        limits: RunnerLimits,
        clock: Clock,
        use_graphs: bool = True,
    ) -> None:
        """``open_weights`` is called by `load`. ``pool``: the unit's pool on the device, in the dtype of the KV."""
        self.max_steps = limits.max_steps
        self._device = device
        self._spec = spec
        self._open_weights = open_weights
        self._geometry = geometry
        self._pool = pool
        self._limits = limits
        self._clock = clock
        self._use_graphs = use_graphs
        self._buckets = decode_buckets(limits.max_num_seqs)
        self._is_loaded = False

    def unload(self, drop_weights: bool) -> None:
        """Frees nothing: the weights and the memory of the graphs are on the device, where the unit counts them."""

    def load(self) -> None:
        """Allocates, compiles the kernels and captures the graphs, at the first call. Raises DeviceError, see
        `device_errors`.
        """
        if self._is_loaded:
            return
        started_at_s = self._clock.monotonic_s()
        with torch.inference_mode(), self._device.compute(), device_errors("loading the model"):
            weights = self._open_weights()
            if not self._device.is_interpreted:
                check_products(weights, self._limits.step_token_budget, self._device.num_sms)
            self._allocate(weights)
            self._graphs.prepare(self._buckets)
            self._warm_up()  # after the graphs: a capture frees the memory that is reserved and unused
            self._device.record().wait()
        self._is_loaded = True
        _log.info(
            "ready after %.1f s: %d batch sizes of decode %s graphs; device memory: %.0f MiB of weights and %.0f MiB "
            "of pool are shared, %.0f MiB are this worker's own beside CUDA's context",
            self._clock.monotonic_s() - started_at_s,
            len(self._buckets),
            "with" if self._use_graphs else "without",
            sum(tensor.nbytes for tensor in weights.values()) / 2**20,
            self._pool.nbytes / 2**20,
            self._device.reserved_bytes() / 2**20,
        )

    def run(self, step: Step, may_continue: Callable[[], bool]) -> StepOutcome:
        """See `Runner`. Raises DeviceLost if the device has faulted, DeviceError if its memory is full."""
        is_decode = all(len(chunk.token_ids) == 1 and chunk.sample and not chunk.scoring for chunk in step.chunks)
        doing = f"a step of {step.num_tokens} tokens of {len(step.chunks)} sequences"
        self._check_lengths(step)
        with torch.inference_mode(), self._device.compute(), device_errors(doing), finished(self._device):
            return self._run_decode(step, may_continue) if is_decode else self._run_mixed(step)

    def _check_lengths(self, step: Step) -> None:
        """Raises ValueError for a position past those that memory is allocated for: kernels do not check."""
        length = max(chunk.start + len(chunk.token_ids) for chunk in step.chunks) + step.num_steps - 1
        if length > self._limits.max_model_len:
            raise ValueError(f"a sequence has {length} tokens; the runner is for {self._limits.max_model_len}")

    def _allocate(self, weights: Mapping[str, Tensor]) -> None:
        spec, limits, where = self._spec, self._limits, self._device.torch_device
        dtype = weights["norm"].dtype
        self._plan = AttentionPlan.of(
            KvLayout.of(self._geometry),
            spec.num_heads,
            dtype.itemsize,
            self._device.compute_capability,
            self._device.num_sms,
        )
        max_blocks = blocks_for(limits.max_model_len, self._geometry.shape.block_size)
        elements = max(self._plan.workspace_elements(bucket, max_blocks) for bucket in self._buckets)
        workspace = torch.empty(elements, dtype=torch.float32, device=where)
        self._forward = DeviceForward(spec, weights, self._pool, self._plan, limits.max_model_len, workspace)
        self._tensors = DecodeTensors.allocate(
            where, limits.max_num_seqs, max_blocks, limits.max_steps, spec.vocab_size
        )
        self._sampler = Sampler(self._device, spec.vocab_size, limits.max_num_seqs)
        self._graphs = DecodeGraphs(
            self._device,
            self._forward,
            self._tensors,
            self._sampler.likely,
            self._geometry.shape.block_size,
            self._use_graphs,
        )

    def _warm_up(self) -> None:
        """Computes the largest step with a chunk, so that its memory is reserved. Writes no KV."""
        length = max(2, min(self._limits.step_token_budget, self._limits.max_model_len - 1))
        block_ids = (0,) * blocks_for(length, self._geometry.shape.block_size)
        scoring = PromptScoring((0,) * length, 1)
        chunks = [Chunk(0, 0, (0,) * length, block_ids, _WARM_UP_SAMPLE, scoring)]
        chunks += [Chunk(job, 0, (0,), (0,), _WARM_UP_SAMPLE) for job in range(1, self._limits.max_num_seqs)]
        rows = arrange(chunks, self._buckets, self._plan)
        rows.arrays["block_ids"].fill(-1)
        rows.arrays["context_lens"].fill(0)
        self._compute_mixed(rows)

    def _run_mixed(self, step: Step) -> StepOutcome:
        rows = arrange(step.chunks, self._buckets, self._plan)
        outcome = self._compute_mixed(rows)
        sampled = {job_id: (token,) for job_id, token in outcome.sampled.items()}
        return StepOutcome(sampled, outcome.prompt_logprobs, self._kv_bytes(step, 1), outcome.failed)

    def _compute_mixed(self, rows: StepRows) -> SamplingOutcome:
        """Computes a step and waits for it."""
        uploaded, vocab_size = upload(self._device, rows.arrays), self._spec.vocab_size
        hidden = self._forward.hidden(device_rows(rows, uploaded, self._tensors.tables))
        last, begun = hidden.index_select(0, uploaded["logit_rows"]), 0
        outcomes = []
        for chunks in logit_passes(rows.chunks, self._limits.max_logit_rows):
            plan = plan_sampling(chunks, vocab_size)
            logits = torch.empty((plan.num_logit_rows, vocab_size), dtype=torch.float32, device=last.device)
            if plan.num_logit_rows:
                self._forward.logits(last[begun : begun + plan.num_logit_rows], logits)
            begun += plan.num_logit_rows
            packed = self._sampler.enqueue(logits, self._sampler.upload(plan)).packed
            arrays = SampledArrays.unpack(plan, self._device.download(packed)(), vocab_size)
            outcomes.append(sampling_outcome(chunks, arrays))
        return joined_outcome(outcomes)

    def _run_decode(self, step: Step, may_continue: Callable[[], bool]) -> StepOutcome:
        rows = arrange(step.chunks, self._buckets, self._plan)
        plan = plan_sampling(rows.chunks, self._spec.vocab_size, step.num_steps)
        uploaded = upload(self._device, {**rows.arrays, **_padded_sampling(plan, rows.num_decodes)})
        self._tensors.begin(device_rows(rows, uploaded, self._tensors.tables), uploaded)
        if plan.is_plain:
            num_steps = self._enqueue_run(rows, step.num_steps, may_continue, self._graphs.sample)
            sampled, failed = plain_outcome(rows.chunks, *self._plain_samples(len(rows.chunks), num_steps))
        else:
            on_device, waits = self._sampler.upload(plan), list[Callable[[], np.ndarray]]()
            penalties = self._sampler.run_penalties(on_device) if step.num_steps > 1 else None
            num_steps = self._enqueue_run(
                rows, step.num_steps, may_continue, lambda _: waits.append(self._enqueue_sampling(on_device, penalties))
            )
            arrays = [SampledArrays.unpack(plan, wait(), self._spec.vocab_size) for wait in waits]
            sampled, failed = run_outcome(rows.chunks, arrays)
        return StepOutcome(sampled, {}, self._kv_bytes(step, num_steps), failed, num_steps)

    def _enqueue_run(
        self, rows: StepRows, max_steps: int, may_continue: Callable[[], bool], sample: Callable[[int], None]
    ) -> int:
        """Enqueues up to ``max_steps`` steps, at most one behind the one that the device computes. Returns how many."""
        last: Event | None = None
        for number in range(max_steps):
            if number and not may_continue():
                return number
            self._graphs.compute(rows.num_decodes)
            sample(rows.num_decodes)
            before, last = last, self._device.record()
            if before is not None:
                before.wait()
        return max_steps

    def _enqueue_sampling(self, plan: UploadedPlan, penalties: RunPenalties | None) -> Callable[[], np.ndarray]:
        """Samples a step with edits or log-probabilities, feeds the tokens back, and begins to read the result."""
        tensors, count = self._tensors, len(plan.plan.sample_rows)
        result = self._sampler.enqueue(tensors.logits[:count], plan, tensors.next_uniforms(count), penalties)
        tensors.feed_back(result.token_ids)
        if penalties is not None:
            penalties.count(result.token_ids)
        return self._device.download(result.packed)

    def _plain_samples(self, num_rows: int, num_steps: int) -> np.ndarray:
        """Tokens and statuses of the steps of a run, int64 [2, steps, rows]. Waits for the device."""
        tensors = self._tensors
        both = torch.stack([tensors.tokens[:num_steps, :num_rows], tensors.statuses[:num_steps, :num_rows]])
        return self._device.download(both)()

    def _kv_bytes(self, step: Step, num_steps: int) -> int:
        return num_steps * step.num_tokens * self._geometry.shape.kv_bytes_per_token


def _padded_sampling(plan: SamplingPlan, num_rows: int) -> dict[str, np.ndarray]:
    """Parameters f64 [4, rows] and uniforms f64 [steps, rows] of decode rows; padding rows are greedy."""
    num_steps, num_samples = plan.uniforms.shape
    parameters, uniforms = np.zeros((4, num_rows)), np.zeros((num_steps, num_rows))
    parameters[:, :num_samples] = plan.parameters
    uniforms[:, :num_samples] = plan.uniforms
    return {"parameters": parameters, "uniforms": uniforms}
