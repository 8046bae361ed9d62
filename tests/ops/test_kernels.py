"""Every Triton kernel under Triton's interpreter, at toy sizes, against its twin in PyTorch.

`tests/conftest.py` switches the interpreter on where there is no device; `tests/gpu` runs the same comparisons there.
"""

import os
from importlib import import_module
from pathlib import Path

import pytest
import torch

from moecli.ops import kernels
from tests.ops import gptq_cases, gradient_cases, grouped_cases, packed_cases

pytest.importorskip("triton", reason="no triton here: kernels are tested where it is installed")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device: tests/gpu runs the kernels on it")

HALF_AND_SINGLE = (torch.float16, torch.float32)
"""The interpreter cannot multiply matrices of bfloat16; float16 takes the same way."""
TOY = {"experts": 2, "width": 20, "slots": 2, "tokens": (1, 3)}


def _packed(fast):
    packed_cases.compare(fast, "cpu", torch.float32, 4, columns=288, group=96, **TOY)  # padded columns, split groups
    packed_cases.compare(fast, "cpu", torch.float16, 3, columns=64, group=32, **TOY | {"tokens": (2,)})
    packed_cases.compare(fast, "cpu", torch.float16, 2, columns=256, group=256, **TOY | {"slots": 1, "tokens": (2,)})


CASES = {
    "gradients": lambda fast: gradient_cases.compare(fast, torch.float32, "cpu", visits=61, width=24),
    "gptq": lambda fast: gptq_cases.compare(fast, "cpu"),
    "gram": lambda fast: [grouped_cases.compare_gram(fast, dtype, "cpu", 70, 136) for dtype in HALF_AND_SINGLE],
    "grouped": lambda fast: grouped_cases.compare(fast, torch.float32, "cpu", tokens=11, width=24),
    "packed": _packed,
}


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_gives_what_its_twin_gives(name):
    assert os.environ["TRITON_INTERPRET"] == "1"
    CASES[name](import_module(f"moecli.ops.kernels.{name}"))


def test_no_kernel_is_left_out():
    folder = Path(kernels.__file__).parent
    assert set(CASES) == {file.stem for file in folder.glob("*.py")} - {"__init__"}
