"""int8 on the device, compared with the definition in float64."""

import numpy as np
import pytest
import torch

from muxmesh.device import device_kv_codec
from muxmesh.device.cuda_pool import kv_dtype
from muxmesh.device.kv_codec import encoded_bytes
from muxmesh.device.torch_device import open_torch_device
from muxmesh.models.model_spec import KvShape

DEVICE = open_torch_device().torch_device
DTYPES = {"float32": (4, False), "float16": (2, False), "bfloat16": (2, True)}
ROUNDING = {torch.float32: 2e-7, torch.float16: 2**-11, torch.bfloat16: 2**-8}
"""Relative error of the decoded value's own rounding."""


def encode_group(blocks: torch.Tensor, shape: KvShape, num_tokens: int) -> torch.Tensor:
    """On the device; tensors are on the CPU."""
    return device_kv_codec.encode_group(blocks.to(DEVICE), shape, num_tokens).cpu()


def decode_group(data: torch.Tensor, shape: KvShape, count: int, dtype: torch.dtype) -> torch.Tensor:
    """On the device; tensors are on the CPU."""
    return device_kv_codec.decode_group(data.to(DEVICE), shape, count, dtype).cpu()


def shape_of(dtype: str, block_size: int = 16, head_dim: int = 64) -> KvShape:
    return KvShape(3, 2, head_dim, block_size, *DTYPES[dtype])


def random_blocks(shape: KvShape, count: int, seed: int = 1) -> torch.Tensor:
    """[count, layers * heads, 2, block_size, head_dim]; some channels are large."""
    values = np.random.default_rng(seed).standard_normal((count, 6, 2, shape.block_size, shape.head_dim))
    values[..., ::7] *= 100
    return torch.from_numpy(values).to(kv_dtype(shape))


def steps_of(blocks: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Half a step of the scale (f64) of each value: K per channel over the tokens, V per token; and where tokens are.

    Both [count, heads, 2, block_size, head_dim].
    """
    count, _, _, block_size, _ = blocks.shape
    valid = (torch.arange(count * block_size) < num_tokens).view(count, 1, 1, block_size, 1).expand(blocks.shape)
    values = torch.where(valid, blocks.double().abs(), 0)
    keys = values[:, :, :1].amax(dim=(0, 3), keepdim=True).expand(values[:, :, :1].shape)
    vectors = values[:, :, 1:].amax(dim=4, keepdim=True).expand(values[:, :, 1:].shape)
    return torch.cat([keys, vectors], dim=2) / 254, valid


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "num_tokens"), [(1, 1), (1, 16), (8, 128), (9, 130), (15, 239)])
def test_int8_differs_by_at_most_half_a_step_of_its_own_scale(dtype: str, count: int, num_tokens: int) -> None:
    shape = shape_of(dtype)
    blocks = random_blocks(shape, count)
    data = encode_group(blocks, shape, num_tokens)
    assert data.numel() == encoded_bytes(shape, num_tokens, "int8"), "one group"
    decoded = decode_group(data, shape, count, blocks.dtype)
    half_steps, valid = steps_of(blocks, num_tokens)
    bound = half_steps * 1.001 + blocks.double().abs() * ROUNDING[blocks.dtype]
    assert torch.all(((decoded.double() - blocks.double()).abs() <= bound) | ~valid)


def test_decoded_values_are_the_nearest_multiples_of_the_scale() -> None:
    shape = shape_of("float32")
    blocks = random_blocks(shape, 8)
    decoded = decode_group(encode_group(blocks, shape, 128), shape, 8, blocks.dtype).double()
    steps = 2 * steps_of(blocks, 128)[0]
    nearest = torch.round(blocks.double() / steps) * steps
    differs = (decoded - nearest).abs() > steps * 1e-4
    assert differs.double().mean() < 1e-4, "only where rounding is a tie"


@pytest.mark.parametrize("dtype", DTYPES)
def test_slots_past_the_last_token_affect_no_scale(dtype: str) -> None:
    shape = shape_of(dtype)
    blocks = random_blocks(shape, 2)
    expected = decode_group(encode_group(blocks, shape, 20), shape, 2, blocks.dtype)
    blocks[1, :, 0, 4:] = torch.inf
    blocks[1, :, 1, 4:] = torch.nan
    assert torch.equal(decode_group(encode_group(blocks, shape, 20), shape, 2, blocks.dtype), expected)


def test_zeros_stay_zeros() -> None:
    shape = shape_of("bfloat16")
    zeros = torch.zeros_like(random_blocks(shape, 2))
    assert not decode_group(encode_group(zeros, shape, 32), shape, 2, zeros.dtype).any()


def test_values_that_are_not_finite_leave_other_channels_and_tokens_as_they_are() -> None:
    shape = shape_of("float32")
    blocks = random_blocks(shape, 1)
    expected = decode_group(encode_group(blocks, shape, 16), shape, 1, blocks.dtype)
    blocks[0, 3, 0, 2, 5] = torch.nan
    blocks[0, 3, 1, 2, 5] = torch.inf
    decoded = decode_group(encode_group(blocks, shape, 16), shape, 1, blocks.dtype)
    expected[0, 3, 0, :, 5] = decoded[0, 3, 0, :, 5]
    expected[0, 3, 1, 2] = decoded[0, 3, 1, 2]
    torch.testing.assert_close(decoded, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("at_once", [1, 3000])
def test_large_groups_are_converted_in_parts(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = shape_of("bfloat16")
    blocks = random_blocks(shape, 2)
    expected = encode_group(blocks, shape, 30)
    restored = decode_group(expected, shape, 2, blocks.dtype)
    monkeypatch.setattr("muxmesh.device.device_kv_codec._ELEMENTS_AT_ONCE", at_once)
    assert torch.equal(encode_group(blocks, shape, 30), expected)
    assert torch.equal(decode_group(expected, shape, 2, blocks.dtype), restored)


@pytest.mark.parametrize(("block_size", "head_dim"), [(1, 18), (8, 18), (32, 256)])
def test_any_sizes_of_heads_and_blocks_are_restored(block_size: int, head_dim: int) -> None:
    shape = shape_of("float16", block_size, head_dim)
    blocks, num_tokens = random_blocks(shape, 3), 3 * block_size
    data = encode_group(blocks, shape, num_tokens)
    decoded = decode_group(data, shape, 3, blocks.dtype)
    half_steps, _ = steps_of(blocks, num_tokens)
    assert torch.all((decoded.double() - blocks.double()).abs() <= half_steps * 1.001 + blocks.double().abs() * 2**-11)
