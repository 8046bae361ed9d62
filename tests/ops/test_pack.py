"""Codes and packing against a plain oracle and against compressed-tensors itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moecli.ops.pack import INT_BITS, dequantize, pack_rows, quantize_rtn, unpack_rows

LEVELS = {1: [-1, 1]} | {bits: list(range(-(2 ** (bits - 1)), 2 ** (bits - 1))) for bits in (2, 3, 4, 8)}
"""Codes by number of bits, in the order in which they are packed."""


def bit_oracle(codes, bits):
    """One row as a Python integer: element i at bits [i*b, (i+1)*b), then cut into 32-bit words."""
    stream = sum(LEVELS[bits].index(q) << (i * bits) for i, q in enumerate(codes))
    words = [(stream >> (32 * w)) & 0xFFFFFFFF for w in range(-(-len(codes) * bits // 32))]
    return [w - 2**32 if w >= 2**31 else w for w in words]


@settings(deadline=None, max_examples=60)
@given(st.data(), st.sampled_from(INT_BITS), st.integers(1, 70), st.integers(1, 3))
def test_packing_equals_the_bit_oracle_and_round_trips(data, bits, columns, rows):
    codes = [[data.draw(st.sampled_from(LEVELS[bits])) for _ in range(columns)] for _ in range(rows)]
    packed = pack_rows(torch.tensor(codes, dtype=torch.int8), bits)
    assert packed.tolist() == [bit_oracle(row, bits) for row in codes]
    assert unpack_rows(packed, bits, columns).tolist() == codes


def test_three_bit_values_straddle_words():
    codes = torch.full((1, 11), -4, dtype=torch.int8)
    codes[0, 10] = 3
    assert pack_rows(codes, 3).tolist() == [[0xC0000000 - 2**32, 1]]


@pytest.mark.parametrize("bits", [4, 8])
def test_packing_equals_compressed_tensors(bits):
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, 64), dtype=torch.int8)
    assert torch.equal(pack_rows(codes, bits), pack_to_int32(codes, bits))


def test_leading_dimensions_pack_like_separate_matrices():
    codes = torch.randint(-8, 8, (3, 5, 16), dtype=torch.int8)
    assert torch.equal(pack_rows(codes, 4), torch.stack([pack_rows(c, 4) for c in codes]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_rounding_takes_the_nearest_level_of_the_stored_scale(bits, dtype):
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    codes, scale = quantize_rtn(weight, bits, 32)
    assert scale.dtype == dtype
    assert scale.shape == (6, 2)
    levels = torch.tensor(LEVELS[bits]).double()
    for row in range(6):
        for column in range(64):
            step = scale[row, column // 32].double()
            errors = (levels * step - weight[row, column].double()).abs()
            chosen = (codes[row, column].double() * step - weight[row, column].double()).abs()
            assert chosen <= errors.min() + 1e-6 * step


def test_one_bit_is_the_sign_times_the_mean_size():
    weight = torch.tensor([[1.0, -2.0, 0.0, 5.0, -0.0, -0.5, -1.5, 0.0]])
    codes, scale = quantize_rtn(weight, 1, 4)
    assert scale.tolist() == [[2.0, 0.5]]
    assert codes.tolist() == [[1, -1, 1, 1, 1, -1, -1, 1]]
    assert dequantize(codes, scale).tolist() == [[2.0, -2.0, 2.0, 2.0, 0.5, -0.5, -0.5, 0.5]]
    assert pack_rows(codes, 1).tolist() == [[0b10011101]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [1, 4])
@pytest.mark.parametrize("shrink", [False, True])
def test_a_group_of_zeros_stays_zero(bits, shrink, dtype):
    weight = torch.zeros(1, 64, dtype=dtype)
    weight[0, 32:] = 1
    codes, scale = quantize_rtn(weight, bits, 32, shrink)
    restored = dequantize(codes, scale)
    assert torch.isfinite(restored).all() and (scale > 0).all()
    assert restored[0, :32].abs().max() <= (torch.finfo(dtype).tiny if bits == 1 else 0)  # no code of 1 bit is zero
    assert (restored[0, 32:] == 1).all() or bits > 1


def test_dequantize_is_the_inverse_on_the_grid():
    codes = torch.randint(-8, 8, (4, 64), dtype=torch.int8)
    codes[:, ::32] = -8
    weight = dequantize(codes, torch.full((4, 2), 0.125))
    again, scale = quantize_rtn(weight, 4, 32)
    assert (dequantize(again, scale) - weight).abs().max() <= scale.max() / 2 + 1e-6


def test_a_group_that_does_not_divide_the_width_is_refused():
    with pytest.raises(ValueError, match="group_size 48 does not divide the input width 64"):
        quantize_rtn(torch.zeros(1, 64), 4, 48)
