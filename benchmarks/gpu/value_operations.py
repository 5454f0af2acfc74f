"""Operations of a peer that show what a model computes: each product against f32, each step operation by operation.

Weights and KV are random numbers of the host, because those of a device depend on how many SMs it has.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu.engine_operations import EngineOperations, failed_reason, random_weights
from benchmarks.gpu.operation_trace import OperationTrace
from muxmesh.engine.native.cuda.row_kernels import silu_and_multiply
from muxmesh.engine.step import Step, StepOutcome

_POOL_NUMBERS = 1 << 22
"""Random numbers of the KV, which repeat."""
_POISON_BYTES = {64 << 10: 512, 32 << 20: 64}
"""Size of a piece of memory → how many: torch has one kind of blocks for tensors up to 1 MiB and one for larger."""
_NUM_LARGEST = 8
_PRODUCTS = ("0.qkv", "0.o", "0.gate_up", "0.down", "lm_head")


class ValueOperations(EngineOperations):
    """As `EngineOperations`, with the same weights and KV in every process."""

    def _random_pool(self, elements: int, dtype: torch.dtype) -> Tensor:
        numbers = np.random.default_rng(1).standard_normal(min(elements, _POOL_NUMBERS), dtype=np.float32)
        some = torch.from_numpy(numbers).to(dtype).to(self.device.torch_device)
        return some.repeat(-(-elements // len(some)))[:elements]

    def _random_weights(self, dtype: torch.dtype) -> dict[str, Tensor]:
        chance = np.random.default_rng(0)

        def normal(target: Tensor, scale: float) -> Tensor:
            numbers = chance.standard_normal(tuple(target.shape), dtype=np.float32) * np.float32(scale)
            return target.copy_(torch.from_numpy(numbers))

        return random_weights(self.spec, dtype, self.device.torch_device, normal)

    def do_generated(self) -> list[str]:
        """Names of the weights that are not finite if the device's random generator makes them, as other peers do."""
        made = super()._random_weights(self.weights["norm"].dtype)
        return [name for name, weight in made.items() if not torch.isfinite(weight).all()]

    def do_products(self, rows: list[int]) -> Any:
        """Each product of a layer and of the logits, as the forward pass computes it, against the same in f32.

        ``error``: the largest difference over the largest value.
        """
        with torch.inference_mode():
            return [self._product(name, count) for count in rows for name in _PRODUCTS]

    def do_row_operations(self, rows: int) -> Any:
        """The norm and the gate against the same in f32; see `do_products`."""
        with torch.inference_mode():
            x, weight = self._rows(rows, self.spec.hidden_size), self.weights["norm"]
            normed, exact = (
                functional.rms_norm(one, scale.shape, scale, self.spec.rms_norm_eps)
                for one, scale in ((x, weight), (x.float(), weight.float()))
            )
            inner = self.spec.intermediate_size
            gate_up = self._rows(rows, 2 * inner)
            gated = torch.empty((rows, inner), dtype=gate_up.dtype, device=gate_up.device)
            silu_and_multiply(gate_up, gated)
            gate, up = gate_up.float().chunk(2, dim=1)
            return [
                {"name": "norm", "rows": rows, **_error(normed, exact)},
                {"name": "gate", "rows": rows, **_error(gated, functional.silu(gate) * up)},
            ]

    def do_steps(self, prompt: int, batch: int, context: int, repeats: int) -> Any:
        """A decode step of ``batch`` sequences, if any, and ``repeats`` times a prompt of ``prompt`` tokens.

        Then the prompt once more, traced. Failures name their reason; tokens are greedy; ``largest``: the likely ones.
        """
        decode, prefill = self._run(self._decode_step(batch, context, 1)) if batch else None, self._prefill_step(prompt)
        failures = [failed_reason(self._run(prefill)) for _ in range(repeats)]
        with OperationTrace() as trace:
            outcome = self._run(prefill)
        failures += [failed_reason(one) for one in (decode, outcome) if one]
        return {
            "failures": [reason for reason in failures if reason],
            "decode tokens": [_first_token(decode, job) for job in range(batch)] if decode else [],
            "token": _first_token(outcome, 0),
            "trace": [[one.name, one.norm if one.is_finite else None] for one in trace.tensors()],
            "largest": [] if trace.logits is None else trace.logits[0].topk(_NUM_LARGEST).indices.tolist(),
        }

    def do_poison(self) -> None:
        """Fills memory that torch has free, and the next workspaces of cuBLAS, with bytes that are NaN in every dtype.

        Captured graphs have the addresses of the workspaces of before: no decode step with graphs may follow.
        """
        if not self.device.is_interpreted:
            torch._C._cuda_clearCublasWorkspaces()
        where = self.device.torch_device
        for num_bytes, count in _POISON_BYTES.items() if not self.device.is_interpreted else ():
            pieces = [torch.full((num_bytes,), 255, dtype=torch.uint8, device=where) for _ in range(count)]
            del pieces
        self.device.record().wait()

    def _run(self, step: Step) -> StepOutcome:
        return self.runner.run(step, lambda: True)

    def _prefill_step(self, num_tokens: int) -> Step:
        """As that of `EngineOperations`, in the last blocks: the KV of decode steps stays as it is."""
        (chunk,) = super()._prefill_step(num_tokens).chunks
        ids = np.random.default_rng(2).permutation(self.num_blocks)[-len(chunk.block_ids) :]
        return Step((dataclasses.replace(chunk, block_ids=tuple(ids.tolist())),))

    def _product(self, name: str, rows: int) -> dict[str, Any]:
        weight = self.weights[name]
        x = self._rows(rows, weight.shape[1])
        if name in ("0.o", "0.down"):
            found = self._rows(rows, weight.shape[0])
            exact = found.float() + x.float() @ weight.float().t()
            found.addmm_(x, weight.t())
        else:
            found, exact = functional.linear(x, weight), x.float() @ weight.float().t()
        return {"name": name, "rows": rows, **_error(found, exact)}

    def _rows(self, rows: int, columns: int) -> Tensor:
        numbers = np.random.default_rng(columns).standard_normal((rows, columns), dtype=np.float32)
        return torch.from_numpy(numbers).to(self.weights["norm"].dtype).to(self.device.torch_device)


def _first_token(outcome: StepOutcome, job: int) -> int | None:
    return outcome.sampled[job][0].token_id if outcome.sampled.get(job) else None


def _error(found: Tensor, exact: Tensor) -> dict[str, float | bool]:
    """Whether both are finite, and the largest difference over the largest value."""
    is_finite = bool(torch.isfinite(found).all()), bool(torch.isfinite(exact).all())
    error = float((found.float() - exact).abs().max() / exact.abs().max())
    return {"is_finite": all(is_finite), "f32_is_finite": is_finite[1], "error": error if all(is_finite) else -1.0}
