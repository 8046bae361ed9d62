"""FP8 and MXFP4 against their bit formulas, over all codes, and against compressed-tensors itself."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moecli.ops.floats import dequantize_fp8, dequantize_mxfp4, quantize_fp8, quantize_mxfp4


def e4m3(byte: int) -> float:
    """OFP8 e4m3: sign, 4 bits of exponent with bias 7, 3 of mantissa; all ones is NaN, there is no infinity."""
    sign, exponent, mantissa = byte >> 7, byte >> 3 & 15, byte & 7
    if (exponent, mantissa) == (15, 7):
        return math.nan
    size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if sign else size


def e2m1(code: int) -> float:
    """OCP e2m1: sign, 2 bits of exponent with bias 1, 1 of mantissa."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    size = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return -size if sign else size


def nearest(value: float, levels: list[float]) -> float:
    """The nearest level, by trying all of them; of two as near, the one with the even code (their order)."""
    return min(enumerate(levels), key=lambda item: (abs(item[1] - value), item[0] % 2))[1]


FINITE = [e4m3(code) for code in range(127)]
SIZES = [e2m1(code) for code in range(8)]


def test_every_fp8_code_reads_as_its_formula():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)[None]
    for scale in (1.0, 0.375, 2.0**-20):
        found = dequantize_fp8(codes, torch.tensor([[scale]])).flatten().tolist()
        for byte, value in enumerate(found):
            expected = e4m3(byte) * scale
            assert value == expected or (math.isnan(value) and math.isnan(expected)), byte


def test_every_mxfp4_code_reads_as_its_formula_under_every_exponent():
    packed = torch.arange(256, dtype=torch.uint8).repeat(255, 1)[:, :128]
    packed = torch.cat([packed, packed + 128], 1)  # every pair of codes
    scale = torch.arange(255, dtype=torch.uint8)[:, None].repeat(1, 16)
    found = dequantize_mxfp4(packed, scale, torch.float64)
    sizes = [[e2m1(byte & 15), e2m1(byte >> 4)] for byte in range(256)]
    expected = torch.tensor(sizes, dtype=torch.float64).flatten() * torch.tensor(
        [[2.0 ** (e - 127)] for e in range(255)], dtype=torch.float64
    )
    fits = expected.abs() <= torch.finfo(torch.float32).max
    assert torch.equal(found[fits], expected[fits])


def test_every_fp8_code_is_the_code_of_its_value():
    codes = torch.tensor([c for c in range(256) if c & 127 != 127], dtype=torch.uint8).view(torch.float8_e4m3fn)[None]
    again, scale = quantize_fp8(codes.float())
    assert scale.tolist() == [[1.0]]
    assert torch.equal(again.view(torch.uint8), codes.view(torch.uint8))


def test_every_mxfp4_code_is_the_code_of_its_value():
    packed = torch.tensor([[(2 * i) | (2 * i + 1) << 4 for i in range(8)] * 2], dtype=torch.uint8)
    for exponent in (3, 100, 127, 200):
        scale = torch.tensor([[exponent]], dtype=torch.uint8)
        again, found = quantize_mxfp4(dequantize_mxfp4(packed, scale, torch.float32))
        assert found.tolist() == [[exponent]]
        assert torch.equal(again, torch.where(packed == 0x98, 0x90, packed))  # -0 is written as 0


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40), st.sampled_from([torch.float32, torch.bfloat16])
)
def test_fp8_takes_the_nearest_code_of_the_stored_scale(values, dtype):
    weight = torch.tensor([values]).to(dtype)
    codes, scale = quantize_fp8(weight)
    assert scale.dtype == dtype and scale.shape == (1, 1)
    for value, code in zip(weight.float().flatten().tolist(), codes.float().flatten().tolist(), strict=True):
        quotient = float(torch.tensor(value) / scale.float())
        assert abs(code) == nearest(min(abs(quotient), 448.0), FINITE)
        assert code == 0 or (code < 0) == (value < 0)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(-100, 100, width=16), min_size=32, max_size=32))
def test_mxfp4_takes_the_nearest_code_under_a_power_of_two(values):
    weight = torch.tensor([values])
    packed, scale = quantize_mxfp4(weight)
    found = dequantize_mxfp4(packed, scale, torch.float32).flatten().tolist()
    largest = max(map(abs, values))
    if largest == 0:
        assert found == [0.0] * 32
        return
    power = 2.0 ** (int(scale) - 127)
    assert 3.5 * power <= largest < 7 * power
    for value, level in zip(values, found, strict=True):
        assert abs(level) == nearest(abs(value) / power, SIZES) * power
        assert level == 0 or (level < 0) == (value < 0)


def test_blocks_share_a_scale_and_edges_are_smaller():
    weight = torch.randn(130, 300, generator=torch.Generator().manual_seed(0))
    codes, scale = quantize_fp8(weight, blocks=True)
    assert scale.shape == (2, 3)
    dense = dequantize_fp8(codes, scale, blocks=True)
    for row in range(2):
        for column in range(3):
            part = (slice(128 * row, 128 * row + 128), slice(128 * column, 128 * column + 128))
            step = weight[part].abs().max() / 448
            assert scale[row, column] == step
            assert torch.equal(dense[part], (weight[part] / step).to(torch.float8_e4m3fn).float() * step)


def test_leading_dimensions_are_separate_matrices():
    weight = torch.randn(3, 40, 64, generator=torch.Generator().manual_seed(1))
    for encode in (quantize_fp8, lambda w: quantize_fp8(w, blocks=True), quantize_mxfp4):
        together, apart = encode(weight), [encode(matrix) for matrix in weight]
        for index, whole in enumerate(together):
            bits = [part[index].view(torch.uint8) if index == 0 else part[index] for part in apart]
            assert torch.equal(whole.view(torch.uint8) if index == 0 else whole, torch.stack(bits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_stay_zeros(dtype):
    weight = torch.zeros(2, 64, dtype=dtype)
    assert dequantize_fp8(*quantize_fp8(weight)).abs().max() == 0
    assert dequantize_mxfp4(*quantize_mxfp4(weight), dtype).abs().max() == 0


def test_a_width_that_groups_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="groups of 32, which do not divide the input width 48"):
        quantize_mxfp4(torch.zeros(1, 48))


def test_compressed_tensors_reads_and_writes_the_same():
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams

    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    scheme = preset_name_to_scheme("MXFP4A16", ["Linear"])
    groups = weight.unflatten(-1, (-1, 32))
    theirs, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights)
    packed, scale = quantize_mxfp4(weight)
    library = BaseCompressor.get_value_from_registry("mxfp4-pack-quantized")
    powers = 2.0 ** (scale.float() - 127)
    assert torch.equal(theirs.float(), scale.float()) or torch.equal(theirs.float(), powers)
    written = library.compress({"weight": weight, "weight_scale": powers.to(torch.bfloat16)}, scheme)
    assert torch.equal(written["weight_scale"], scale)
    assert torch.equal(written["weight_packed"] & 0x77, packed & 0x77)  # -0 has a sign there
    read = library.decompress({"weight_packed": packed, "weight_scale": scale}, scheme)["weight"]
    assert torch.equal(read.to(torch.bfloat16), dequantize_mxfp4(packed, scale, torch.bfloat16))

    scheme = preset_name_to_scheme("FP8_DYNAMIC", ["Linear"])
    codes, scale = quantize_fp8(weight)
    naive = BaseCompressor.get_value_from_registry("float-quantized")
    read = naive.decompress({"weight": codes, "weight_scale": scale}, scheme)["weight"]
    assert torch.equal(read.to(torch.bfloat16), dequantize_fp8(codes, scale))
