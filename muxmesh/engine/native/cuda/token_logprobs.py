"""Log-probabilities of tokens and the most likely tokens, computed on the device from rows of logits."""

from __future__ import annotations

import torch
from torch import Tensor

_ELEMENTS_AT_ONCE = 1 << 22
"""Logits that are converted to f64 at once: at most 64 MiB of temporary memory, and at least one row."""


def score_tokens(
    logits: Tensor, rows: Tensor, token_ids: Tensor, num_candidates: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns logprobs f64 [n], ranks int64 [n], and ids int64 and logprobs f64 [n, candidates] of the most likely.

    logits f32 [rows, vocabulary]; rows, token_ids int64 [n]: the logit row and the token of each. Rank 1 is the most
    likely. Candidates are in descending order, equal ones by id. What a row with NaN yields is meaningless.
    """
    count = min(num_candidates, logits.shape[1])
    per_pass = max(1, _ELEMENTS_AT_ONCE // logits.shape[1])
    parts = [
        _score(logits[some_rows], some_ids, count)
        for some_rows, some_ids in zip(torch.split(rows, per_pass), torch.split(token_ids, per_pass), strict=True)
    ]
    logprobs, ranks, top_ids, top_logprobs = (torch.cat(part) for part in zip(*parts, strict=True))
    return logprobs, ranks, top_ids, top_logprobs


def _score(logits: Tensor, token_ids: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`score_tokens` of logits that have a row for each token."""
    log_sums = torch.logsumexp(logits.double(), dim=1)
    own = logits.gather(1, token_ids[:, None])
    ranks = (logits > own).sum(dim=1) + 1
    top_ids = _most_likely(logits, count)
    top_logprobs = logits.gather(1, top_ids).double() - log_sums[:, None]
    return own[:, 0].double() - log_sums, ranks, top_ids, top_logprobs


def _most_likely(logits: Tensor, count: int) -> Tensor:
    """Ids of the ``count`` largest logits of each row, in descending order; of equals, the smaller id first.

    `torch.topk` alone picks any of equal logits. So it gets integers that are ordered as logit, then id.
    """
    if count == 0:
        return torch.empty((len(logits), 0), dtype=torch.int64, device=logits.device)
    bits = torch.where(logits == 0, 0.0, logits).view(torch.int32).long()  # 0.0 and -0.0 are equal
    keys = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    last = logits.shape[1] - 1
    ids = torch.arange(last, -1, -1, device=logits.device)
    return last - (torch.topk((keys << 32) | ids, count, dim=1).values & 0xFFFFFFFF)
