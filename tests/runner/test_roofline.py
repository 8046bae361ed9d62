"""Estimates in plan and report: source and result, and never without the word."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moecli.core.artifacts import sketch_of
from moecli.families.count import count_of
from moecli.ops.roofline import GPUS, decode
from moecli.runner.report_words import estimates_markdown
from moecli.runner.roofline import CONTEXT, estimates
from tests.runner.chains import opened, pruned, quantized


def test_both_sides_on_every_gpu(tiny_model: Any, tmp_path: Path) -> None:
    source = opened(tiny_model("qwen3_moe"))
    small = pruned(source, tmp_path / "p", [0, 2, 3, 5])
    found = estimates(sketch_of(source), sketch_of(small))
    assert [e.gpu for e in found[::3]] == [gpu.name for gpu in GPUS]
    count = count_of(sketch_of(small))
    assert count is not None
    first = next(e for e in found if e.gpu == "H100 SXM" and e.what == "decode" and e.batch == 8)
    wanted = decode(count, next(g for g in GPUS if g.name == "H100 SXM"), 8, CONTEXT)
    assert first.after == pytest.approx(wanted.tokens_per_s)
    assert first.after is not None and first.after > first.before
    assert all(e.after_bytes is not None and e.after_bytes < e.before_bytes for e in found)
    page = estimates_markdown(found)
    assert page.count("| H100 SXM |") == 1
    assert page.startswith("| estimate, tokens/s |")
    assert "Estimate, not measured" in page


def test_packed_weights_are_read_as_they_are_stored(tiny_model: Any, tmp_path: Path) -> None:
    source = opened(tiny_model("qwen3_moe"))
    found = estimates(sketch_of(source), sketch_of(quantized(source, tmp_path / "q", bits=4)))
    assert all(e.after is not None and e.after > e.before for e in found if e.what == "decode" and e.batch == 1)


def test_without_headers_there_is_no_estimate(tiny_model: Any) -> None:
    sketch = sketch_of(opened(tiny_model("qwen3_moe")))
    assert estimates(replace(sketch, specs={})) == ()
    assert all(e.after is None for e in estimates(sketch))
    other = {**sketch.config, "quantization_config": {"quant_method": "fp8"}}
    assert estimates(replace(sketch, config=other)) == ()
