"""Decode steps over tensors that stay where they are, so that one captured graph per batch bucket computes them.

A step is two functions: `compute` goes from token ids to logits; `sample` samples plainly, keeps the tokens and feeds
them back: the next step computes them at the next position, so steps run back to back without the host. Both enqueue
only. Knows no jobs: rows [0, bucket), of which those with a context are real.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from muxmesh.device.torch_device import TorchDevice
from muxmesh.engine.native.cuda.device_rows import DeviceRows
from muxmesh.engine.native.cuda.forward import DeviceForward
from muxmesh.engine.native.cuda.sampling_kernel import sample_rows

_ALIGNED_ROWS = 16
"""The number of rows of the tensors is a multiple: so each part of them begins at a multiple of 16 bytes."""


@dataclass(frozen=True, slots=True)
class DecodeTensors:
    """What decode steps read and write.

    token_ids, positions, context_lens int32 [rows]: of the next step, see `DeviceRows`. tables int32 [sequences,
    max_blocks]. logits f32 [rows, vocab_size]: of the last step. parameters f64 [4, rows], uniforms f64 [steps, rows]:
    see `sample_rows`. step int64 [1]: the next step of the run. tokens, statuses int64 [steps, rows]: of each step of
    the run.
    """

    token_ids: Tensor
    positions: Tensor
    context_lens: Tensor
    tables: Tensor
    logits: Tensor
    parameters: Tensor
    uniforms: Tensor
    step: Tensor
    tokens: Tensor
    statuses: Tensor

    @classmethod
    def allocate(
        cls, device: torch.device, max_num_seqs: int, max_blocks: int, max_steps: int, vocab_size: int
    ) -> DecodeTensors:
        """Allocates for at most ``max_num_seqs`` decode rows and as many chunks, whose tables share the tensor."""

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        rows = -(-max_num_seqs // _ALIGNED_ROWS) * _ALIGNED_ROWS
        return cls(
            token_ids=zeros(rows, dtype=torch.int32),
            positions=zeros(rows, dtype=torch.int32),
            context_lens=zeros(rows, dtype=torch.int32),
            tables=zeros(2 * rows, max_blocks, dtype=torch.int32),
            logits=zeros(rows, vocab_size, dtype=torch.float32),
            parameters=zeros(4, rows, dtype=torch.float64),
            uniforms=zeros(max_steps, rows, dtype=torch.float64),
            step=zeros(1, dtype=torch.int64),
            tokens=zeros(max_steps, rows, dtype=torch.int64),
            statuses=zeros(max_steps, rows, dtype=torch.int64),
        )

    def begin(self, rows: DeviceRows, uploaded: Mapping[str, Tensor]) -> None:
        """Takes the decode rows of a run of steps, and their ``uploaded`` parameters and uniforms."""
        bucket = rows.num_decodes
        self.token_ids[:bucket].copy_(rows.token_ids)
        self.positions[:bucket].copy_(rows.positions)
        self.context_lens[:bucket].copy_(rows.context_lens)
        self.parameters[:, :bucket].copy_(uploaded["parameters"])
        uniforms = uploaded["uniforms"]
        self.uniforms[: len(uniforms), :bucket].copy_(uniforms)
        self.step.zero_()

    def next_uniforms(self, num_rows: int) -> Tensor:
        """Random numbers of the first ``num_rows`` in the next step, f64 [num_rows]."""
        return self.uniforms.index_select(0, self.step)[0, :num_rows]

    def feed_back(self, token_ids: Tensor) -> None:
        """Makes ``token_ids`` (int64 [any number of first rows]) the next step's, each at its row's next position.

        The id of a row without finite logits may be out of range: it is clamped, and the row's result is not used.
        """
        count = len(token_ids)
        self.token_ids[:count].copy_(token_ids.clamp(0, self.logits.shape[1] - 1))
        is_real = (self.context_lens[:count] > 0).int()
        self.positions[:count].add_(is_real)
        self.context_lens[:count].add_(is_real)
        self.step.add_(1)


class DecodeGraphs:
    """The functions of decode steps for each bucket: captured graphs, or the same code without them."""

    def __init__(
        self,
        device: TorchDevice,
        forward: DeviceForward,
        tensors: DecodeTensors,
        likely: Tensor,
        block_size: int,
        use_graphs: bool,
    ) -> None:
        """``likely``: scratch memory of `sample_rows` for as many rows as the tensors have."""
        self._device = device
        self._forward = forward
        self._tensors = tensors
        self._likely = likely
        self._block_size = block_size
        self._use_graphs = use_graphs
        self._compute: dict[int, Callable[[], None]] = {}
        self._sample: dict[int, Callable[[], None]] = {}

    def prepare(self, buckets: Sequence[int]) -> None:
        """Computes a step of padding rows for each bucket, which compiles its kernels, and captures it.

        The largest first: the smaller ones then use its memory. Called on the compute stream.
        """
        self._tensors.context_lens.zero_()
        for bucket in sorted(buckets, reverse=True):
            self._tensors.step.zero_()
            self._compute[bucket] = self._prepared(functools.partial(self._enqueue_compute, bucket))
            self._sample[bucket] = self._prepared(functools.partial(self._enqueue_sample, bucket))

    def compute(self, bucket: int) -> None:
        """Enqueues the first half of a step: writes KV, and the logits of rows [0, bucket)."""
        self._compute[bucket]()

    def sample(self, bucket: int) -> None:
        """Enqueues the second half of a step, if its sampling is plain."""
        self._sample[bucket]()

    def _prepared(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        if self._use_graphs:
            return self._device.capture(enqueue)
        enqueue()
        return enqueue

    def _enqueue_compute(self, bucket: int) -> None:
        tensors = self._tensors
        positions, context_lens = tensors.positions[:bucket], tensors.context_lens[:bucket]
        tables = tensors.tables[:bucket]
        blocks = tables.gather(1, (positions // self._block_size).long()[:, None])[:, 0]
        rows = DeviceRows(
            token_ids=tensors.token_ids[:bucket],
            positions=positions,
            block_ids=torch.where(context_lens > 0, blocks, -1),
            tables=tables,
            num_decodes=bucket,
            context_lens=context_lens,
            tiles=None,
        )
        self._forward.logits(self._forward.hidden(rows), tensors.logits[:bucket])

    def _enqueue_sample(self, bucket: int) -> None:
        tensors = self._tensors
        sampled = torch.zeros((2, tensors.tokens.shape[1]), dtype=torch.int64, device=tensors.tokens.device)
        token_ids, statuses = sampled[0, :bucket], sampled[1, :bucket]
        sample_rows(
            tensors.logits[:bucket], tensors.parameters[:, :bucket], tensors.next_uniforms(bucket),
            token_ids, statuses, self._likely,
        )  # fmt: skip
        tensors.tokens.index_copy_(0, tensors.step, sampled[:1])
        tensors.statuses.index_copy_(0, tensors.step, sampled[1:])
        tensors.feed_back(token_ids)
