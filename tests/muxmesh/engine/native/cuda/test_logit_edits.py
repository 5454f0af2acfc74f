"""Logits that a request changes, bit for bit those of the host's sampler."""

from dataclasses import fields

import numpy as np
import pytest
from torch import Tensor

from muxmesh.device.torch_device import InterpretedDevice, open_torch_device
from muxmesh.engine.native.cuda.logit_edits import DeviceEdits
from muxmesh.engine.native.cuda.sampling_plan import LogitEdits, plan_sampling
from muxmesh.engine.step import Chunk, SampleSpec
from muxmesh.engine.token_sampler import adjusted
from muxmesh.types import Sampling

DEVICE = open_torch_device()
VOCAB_SIZE = 70
"""A mask has two whole words and a part of a third."""


def edits_of(*specs: SampleSpec, vocab_size: int = VOCAB_SIZE) -> LogitEdits:
    edits = plan_sampling([Chunk(job, 7, (1,), (0,), spec) for job, spec in enumerate(specs)], vocab_size).edits
    assert edits is not None
    return edits


def edited(logits: np.ndarray, *specs: SampleSpec) -> np.ndarray:
    on_device = DEVICE.upload(logits)
    edits = DeviceEdits.upload(edits_of(*specs, vocab_size=logits.shape[1]), DEVICE)
    edits.bias_and_mask(on_device)
    edits.penalize(on_device)
    return on_device.cpu().numpy()


SPECS = {
    "nothing": SampleSpec(Sampling(), 0),
    "bias": SampleSpec(Sampling(logit_bias=((0, 4.5), (69, -100.0))), 0),
    "allowed": SampleSpec(Sampling(allowed_token_ids=(0, 31, 32, 63, 64, 69), logit_bias=((32, 1.5),)), 0),
    "banned": SampleSpec(Sampling(), 0, banned=frozenset({31, 64})),
    "bitmask": SampleSpec(Sampling(), 0, token_bitmask=np.array([2**32 - 1, 1 << 31, 0b100001], dtype=np.uint32)),
    "repetition": SampleSpec(Sampling(repetition_penalty=1.3), 0, prompt_token_ids=(3, 4, 3), output_token_ids=(69, 4)),
    "frequency and presence": SampleSpec(
        Sampling(frequency_penalty=0.7, presence_penalty=-1.1), 0, prompt_token_ids=(5,), output_token_ids=(8, 9, 8)
    ),
}


@pytest.fixture
def logits() -> np.ndarray:
    return np.random.default_rng(3).normal(0, 3, (len(SPECS), VOCAB_SIZE)).astype(np.float32)


@pytest.mark.parametrize("name", [name for name in SPECS if name != "nothing"])
def test_each_change_alone_is_that_of_the_host(logits: np.ndarray, name: str) -> None:
    got = edited(logits[:1], SPECS[name])
    assert np.array_equal(got[0], adjusted(logits[0], SPECS[name]))
    assert not np.array_equal(got, logits[:1])


def test_the_rows_of_one_batch_have_their_own_changes(logits: np.ndarray) -> None:
    expected = [adjusted(row, spec) for row, spec in zip(logits, SPECS.values(), strict=True)]
    assert np.array_equal(edited(logits, *SPECS.values()), np.stack(expected))


def test_a_banned_token_stays_banned_and_no_penalty_makes_a_logit_infinite() -> None:
    spec = SampleSpec(Sampling(repetition_penalty=1e-40), 0, banned=frozenset({1}), prompt_token_ids=(0, 1, 2))
    got = edited(np.array([[1.0, 5.0, -1.0, 2.0]], dtype=np.float32), spec)
    assert got.tolist() == [[float(np.finfo(np.float32).max), -np.inf, pytest.approx(0.0, abs=1e-39), 2.0]]


def test_a_positive_logit_is_divided_by_the_repetition_penalty_and_a_negative_one_multiplied() -> None:
    spec = SampleSpec(Sampling(repetition_penalty=2.0), 0, prompt_token_ids=(0,), output_token_ids=(1,))
    assert edited(np.array([[3.0, -3.0, 3.0]], dtype=np.float32), spec).tolist() == [[1.5, -6.0, 3.0]]


class CountingDevice(InterpretedDevice):
    """Counts the transfers to the device."""

    num_uploads = 0

    def upload(self, array: np.ndarray) -> Tensor:
        self.num_uploads += 1
        return super().upload(array)


def test_all_edits_are_uploaded_in_one_transfer_with_their_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    device = CountingDevice()
    edits = edits_of(*SPECS.values())
    uploaded = DeviceEdits.upload(edits, device)
    assert device.num_uploads == 1
    for field in fields(DeviceEdits):
        expected, got = getattr(edits, field.name), getattr(uploaded, field.name).numpy()
        assert (got.dtype, got.shape, got.tolist()) == (expected.dtype, expected.shape, expected.tolist())
