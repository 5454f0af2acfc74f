"""Sampling on the device: from logits to token ids and log-probabilities, without the host in between.

    plan = plan_sampling(chunks, vocab_size)                      # host
    uploaded = sampler.upload(plan)                               # enqueued
    result = sampler.enqueue(logits, uploaded)                    # enqueued; result.token_ids stay on the device
    arrays = device.download(result.packed)                       # one transfer
    outcome = sampling_outcome(chunks, SampledArrays.unpack(plan, arrays(), vocab_size))

A plain plan (`SamplingPlan.is_plain`) needs only `sampling_kernel.sample_rows` over tensors that stay where they are,
so a graph of a decode step can contain it. All of it equals `muxmesh.engine.token_sampler` for the same f32 logits; on
a GPU, whose ``exp`` rounds differently, a token differs only if its random number is within about 1e-6 of a boundary
between two tokens, or top-p or min-p is that close to one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from muxmesh.device.torch_device import TorchDevice
from muxmesh.engine.native.cuda.device_rows import upload
from muxmesh.engine.native.cuda.logit_edits import DeviceEdits
from muxmesh.engine.native.cuda.run_penalties import RunPenalties
from muxmesh.engine.native.cuda.sampling_kernel import BLOCK, SAMPLED, sample_rows
from muxmesh.engine.native.cuda.sampling_plan import SamplingPlan
from muxmesh.engine.native.cuda.token_logprobs import score_tokens


@dataclass(frozen=True, slots=True)
class UploadedPlan:
    """A `SamplingPlan` on the device."""

    plan: SamplingPlan
    sample_rows: Tensor | None
    """None if every logit row is sampled."""
    parameters: Tensor
    uniforms: Tensor
    edits: DeviceEdits | None
    scored_rows: Tensor | None
    scored_samples: Tensor | None
    scored_ids: Tensor | None


@dataclass(frozen=True, slots=True)
class DeviceSamples:
    """token_ids int64 [samples], and ``packed`` (int64): all that the host needs, see `SampledArrays.unpack`."""

    token_ids: Tensor
    packed: Tensor


class Sampler:
    """Samples on one device. Owns scratch memory of 8 KiB per row, so one call at a time, on one stream."""

    def __init__(self, device: TorchDevice, vocab_size: int, max_rows: int) -> None:
        """``max_rows``: the most samples of a step."""
        self.vocab_size = vocab_size
        self._device = device
        self.likely = torch.empty((max_rows, BLOCK), dtype=torch.int32, device=device.torch_device)
        """Scratch memory for `sample_rows`."""

    def upload(self, plan: SamplingPlan) -> UploadedPlan:
        """Enqueues the upload of a plan: one transfer, and one for its edits."""
        arrays = {"parameters": plan.parameters, "uniforms": plan.uniforms[0]}
        if len(plan.sample_rows) != plan.num_logit_rows:
            arrays["sample_rows"] = plan.sample_rows
        if (scored := plan.scored) is not None:
            arrays |= {"scored_rows": scored.rows, "scored_samples": scored.samples, "scored_ids": scored.token_ids}
        uploaded = upload(self._device, arrays)
        return UploadedPlan(
            plan=plan,
            sample_rows=uploaded.get("sample_rows"),
            parameters=uploaded["parameters"],
            uniforms=uploaded["uniforms"],
            edits=None if plan.edits is None else DeviceEdits.upload(plan.edits, self._device),
            scored_rows=uploaded.get("scored_rows"),
            scored_samples=uploaded.get("scored_samples"),
            scored_ids=uploaded.get("scored_ids"),
        )

    def run_penalties(self, uploaded: UploadedPlan) -> RunPenalties | None:
        """Enqueues what the steps of a run need for penalties; None if the plan has none."""
        if uploaded.plan.edits is None or not uploaded.plan.edits.has_penalties:
            return None
        assert uploaded.edits is not None
        return RunPenalties(uploaded.edits, self.vocab_size)

    def enqueue(
        self,
        logits: Tensor,
        uploaded: UploadedPlan,
        uniforms: Tensor | None = None,
        penalties: RunPenalties | None = None,
    ) -> DeviceSamples:
        """Enqueues all of a plan over ``logits`` (f32 [logit rows, vocabulary]), which stay unchanged.

        ``uniforms`` and ``penalties`` replace those of the plan: for a step of a run.
        """
        adjusted = logits if uploaded.sample_rows is None else logits[uploaded.sample_rows]
        if uploaded.edits is not None:
            adjusted = adjusted.clone() if adjusted is logits else adjusted
            uploaded.edits.bias_and_mask(adjusted)
            (penalties or uploaded.edits).penalize(adjusted)
        count = len(adjusted)
        token_ids = torch.empty(count, dtype=torch.int64, device=logits.device)
        statuses = torch.empty_like(token_ids)
        numbers = uploaded.uniforms if uniforms is None else uniforms
        sample_rows(adjusted, uploaded.parameters, numbers, token_ids, statuses, self.likely)
        can_sample = (statuses == SAMPLED).long()
        is_finite = can_sample if adjusted is logits else torch.isfinite(logits.amax(dim=1)).long()
        return DeviceSamples(token_ids, self._packed(logits, uploaded, token_ids, can_sample, is_finite))

    def _packed(
        self, logits: Tensor, uploaded: UploadedPlan, token_ids: Tensor, can_sample: Tensor, is_finite: Tensor
    ) -> Tensor:
        parts = [token_ids, can_sample, is_finite]
        scored = uploaded.plan.scored
        if scored is not None:
            assert uploaded.scored_rows is not None
            ids = _scored_ids(uploaded, token_ids)
            logprobs, ranks, top_ids, top_logprobs = score_tokens(
                logits, uploaded.scored_rows, ids, scored.num_candidates
            )
            parts += [logprobs.view(torch.int64), ranks, top_ids.flatten(), top_logprobs.flatten().view(torch.int64)]
        return torch.cat(parts)


def _scored_ids(uploaded: UploadedPlan, token_ids: Tensor) -> Tensor:
    """The scored tokens: those of prompts, and those that were just sampled."""
    assert uploaded.scored_ids is not None and uploaded.scored_samples is not None
    if not len(token_ids):
        return uploaded.scored_ids
    of_samples = token_ids[uploaded.scored_samples.clamp(min=0)]
    return torch.where(uploaded.scored_samples < 0, uploaded.scored_ids, of_samples)
