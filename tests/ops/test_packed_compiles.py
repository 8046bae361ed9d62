"""The packed products' kernels compile for a Hopper GPU: Triton needs no device for that, and its interpreter accepts
programs that its compiler does not.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="no triton here: kernels are tested where it is installed")

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from moecli.ops.kernels import packed as kernels

def build(kernel, pointers, numbers, warps):
    names = kernel.arg_names
    assert set(names) == {*pointers, *numbers}, set(names) ^ {*pointers, *numbers}
    source = ASTSource(kernel, {n: pointers.get(n, "constexpr") for n in names},
                       {(names.index(n),): value for n, value in numbers.items()})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm["ptx"]

for bits in (2, 3, 4):
    for kind, rows, columns in (("gated", 1536, 2048), ("plain", 2048, 768), ("combined", 2048, 768)):
        pointers = {"low": "*i32", "high": "*i16" if bits == 3 else "*i32", "scale": "*bf16", "out": "*bf16"}
        sizes = {"K": columns, "N": rows, "B": columns // (128 if bits == 4 else 256), "G": columns // 128,
                 "SPAN": 128, "BITS": bits}
        if kind == "gated":
            build(kernels._dequantize, pointers, sizes | {"ROWS": 64}, 4)
        pointers |= {"x": "*bf16", "SLOTS": "i32"}
        sizes |= {"KIND": kind}
        one = kernels.ALONE[kind]
        text = build(kernels._alone, pointers | {"x": "*i32", "expert": "*i64", "weight": "*bf16"},
                     sizes | {"ROWS": one.rows, "WIDE": one.visits, "PARTS": one.parts, "STAGES": one.stages,
                              "EARLY": True}, one.warps)
        assert "mma" in text, "runs on tensor cores"
        if kind == "combined":
            continue
        shapes = list(dict.fromkeys(kernels.TOGETHER[kind].values()))
        for many in shapes if bits == 4 else shapes[:1]:
            text = build(kernels._together, pointers | {"order": "*i32", "start": "*i32"},
                         sizes | {"ROWS": many.rows, "VISITS": many.visits, "STAGES": many.stages}, many.warps)
            assert "mma" in text, "runs on tensor cores"
build(kernels._weigh, {"y": "*bf16", "weight": "*bf16", "out": "*bf16", "SLOTS": "i32", "N": "i32"},
      {"COLUMNS": 512}, 2)
order = {"expert": "*i64", "order": "*i32", "start": "*i32", "S": "i32"}
build(kernels._order, order, {"E": 128, "VISITS": 1024, "CHUNK": 8}, 4)
"""


@pytest.mark.slow
def test_every_kernel_compiles_for_hopper(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2]), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
