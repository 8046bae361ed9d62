"""Packed products on a device, at real sizes, against their twins."""

import pytest
import torch

from moecli.ops.kernels import kernels
from tests.ops import packed_cases

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_packed_products_are_those_of_the_weights_they_stand_for(bits, dtype):
    fast = kernels("packed", torch.empty(0, device="cuda"))
    packed_cases.compare(
        fast, "cuda", dtype, bits, experts=16, width=768, columns=2048, group=128, tokens=(1, 8, 64), slots=8
    )


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_columns_that_fill_no_block_and_narrow_groups(bits):
    fast = kernels("packed", torch.empty(0, device="cuda"))
    packed_cases.compare(fast, "cuda", torch.bfloat16, bits, experts=5, width=200, columns=480, group=96)
