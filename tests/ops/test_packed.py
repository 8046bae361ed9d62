"""Experts that stay packed: the layout holds the codes, and the twins of its kernels compute their products."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moecli.ops import pack
from moecli.ops.packed import (
    PACKED_BITS,
    arrange,
    codes,
    combined_product,
    dequantized,
    gated_product,
    product,
    span_of,
)
from tests.ops.packed_cases import random_packed


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from(PACKED_BITS),
    groups=st.integers(1, 5),
    group=st.sampled_from([32, 64, 96, 128, 160, 192, 256]),
    rows=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_the_layout_gives_back_codes_and_the_weights_of_the_checkpoint(bits, groups, group, rows, seed):
    rng = torch.Generator().manual_seed(seed)
    stored = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (2, rows, groups * group), generator=rng).to(torch.int8)
    scale = torch.rand(2, rows, groups, generator=rng).bfloat16()
    packed = arrange(stored, scale, bits)
    assert torch.equal(codes(packed), stored)
    assert torch.equal(dequantized(packed), pack.dequantize(stored, scale))


@pytest.mark.parametrize("bits", PACKED_BITS)
def test_an_expert_takes_its_bits_and_its_scales(bits):
    packed = random_packed(bits, 3, 8, 512, 128, torch.bfloat16)
    assert packed.bytes() == 8 * (512 * bits // 8 + 512 // 128 * 2)


def test_where_each_code_lies():
    stored = torch.zeros(1, 1, 256, dtype=torch.int8)
    stored[0, 0, 128 + 2 * 32 + 2 * 5] = 1
    stored[0, 0, 128 + 3 * 32 + 2 * 5 + 1] = 1
    packed = arrange(stored, torch.ones(1, 1, 2), 4)
    expected = torch.full((1, 2, 1, 16), 0x88888888 - 2**32, dtype=torch.int64)
    expected[0, 1, 0, 5] += (1 << 4 * 2) + (1 << 4 * 3 + 16)  # block 1, word 5, slices 2 and 3 of its halves
    assert torch.equal(packed.low.long(), expected)


def test_the_third_bit_lies_apart():
    stored = torch.full((1, 1, 256), -4, dtype=torch.int8)
    stored[0, 0, 7 * 32 + 1] = 3  # code 7: low 3, third 1
    packed = arrange(stored, torch.ones(1, 1, 1), 3)
    assert packed.low.flatten().tolist() == [-(2**30)] + [0] * 15
    assert packed.high.flatten().tolist() == [-(2**15)] + [0] * 15


@pytest.mark.parametrize("bits", PACKED_BITS)
def test_products_are_those_of_each_visit_alone(bits):
    packed = random_packed(bits, 4, 10, 96, 32, torch.float32)
    weights = dequantized(packed).double()
    x, expert = torch.randn(3, 96, generator=torch.Generator().manual_seed(0)), torch.tensor([2, 0, 2, 3, 0, 0])
    plain = torch.stack([weights[e] @ x[s // 2].double() for s, e in enumerate(expert.tolist())])
    gated = torch.stack([g / (1 + (-g).exp()) * u for g, u in (row.split(5) for row in plain)])
    torch.testing.assert_close(product(x, packed, expert).double(), plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gated_product(x, packed, expert).double(), gated, rtol=1e-5, atol=1e-5)
    weight, six = torch.rand(3, 2, generator=torch.Generator().manual_seed(1)), x.repeat_interleave(2, 0)
    mixed = (plain.unflatten(0, (3, 2)) * weight[..., None]).sum(1)
    found = combined_product(six, packed, expert, weight).double()
    torch.testing.assert_close(found, mixed, rtol=1e-5, atol=1e-5)


def test_scales_are_shared_out_where_a_group_does_not_divide_a_block():
    assert [span_of(4, 768, group) for group in (128, 768, 256, 192, 96, 32)] == [128, 768, 256, 64, 32, 32]
    assert span_of(2, 144, 144) == 256, "one scale for the whole row covers the padding too"


def test_what_cannot_stay_packed_is_refused():
    some = torch.zeros(1, 2, 32, dtype=torch.int8)
    with pytest.raises(ValueError, match="experts of 8 bits cannot stay packed, only of 2, 3, 4"):
        arrange(some, torch.ones(1, 2, 1), 8)
    with pytest.raises(ValueError, match=r"groups of 16 columns cannot stay packed, .* a multiple of 32"):
        arrange(some, torch.ones(1, 2, 2), 4)
    with pytest.raises(ValueError, match="3 scales do not divide 32 columns"):
        arrange(some, torch.ones(1, 2, 3), 4)
