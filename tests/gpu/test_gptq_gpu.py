"""GPTQ's kernel at real sizes, and the stage on the device against the CPU."""

import pytest
import torch

from moecli.core.artifacts import CalibrationText
from moecli.families import family_of
from moecli.io.formats import DenseView
from moecli.methods.quantize.gptq import Gptq, gptq
from moecli.ops.kernels import kernels
from tests.methods.conftest import HandContext, checkpoint
from tests.ops import gptq_cases

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
__all__ = ["checkpoint"]


@pytest.mark.parametrize("rows", [768, 2048, 2051])
def test_the_kernel_gives_what_its_twin_gives(rows):
    fast = kernels("gptq", torch.empty(0, device="cuda"))
    gptq_cases.compare(fast, "cuda", experts=8, rows=rows, width=128)


def test_the_stage_gives_on_the_device_what_it_gives_on_the_cpu(checkpoint, tmp_path):
    model = checkpoint()
    ids = torch.randint(5, model.facts.vocab, (16, 48), generator=torch.Generator().manual_seed(0))
    text, found = CalibrationText(ids, torch.ones_like(ids), "digest"), {}
    for device in ("cpu", "cuda"):
        ctx = HandContext(tmp_path / "stages" / "quantize-gptq" / device)
        ctx.device = torch.device(device)
        gptq(Gptq(group_size=8), text, model, None, ctx)
        found[device] = DenseView(ctx.finish(model))
    family, layer = family_of(model.config), model.facts.moe_layers[0]
    for expert in range(model.facts.experts):
        pairs = zip(*(family.read_expert(found[d], layer, expert)[:3] for d in ("cpu", "cuda")), strict=True)
        for one, other in pairs:
            moved = (one - other).abs() > 1e-5  # scales differ by the last bit
            assert moved.any(-1).float().mean() < 0.2, "ties move what follows in their row, no more"
