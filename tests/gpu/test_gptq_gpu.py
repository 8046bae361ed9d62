"""GPTQ's kernel at real sizes, and the stage on the device against the CPU."""

import pytest
import torch

from moecli.core.artifacts import CalibrationText
from moecli.families import family_of
from moecli.io.formats import DenseView
from moecli.io.overlay import OverlayWriter
from moecli.methods.quantize.gptq import Gptq, gptq
from moecli.ops.gptq import DAMPS, LEAF, factor, solve
from moecli.ops.kernels import kernels
from moecli.ops.pack import group_scale
from tests.methods.conftest import HandContext, checkpoint
from tests.ops import gptq_cases

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
__all__ = ["checkpoint"]


@pytest.mark.parametrize("rows", [768, 2048, 2051])
def test_the_kernel_gives_what_its_twin_gives(rows):
    fast = kernels("gptq", torch.empty(0, device="cuda"))
    gptq_cases.compare(fast, "cuda", experts=8, rows=rows, width=LEAF)


@pytest.mark.parametrize(("experts", "columns"), [(3, 2048), (5, 768), (1, 4096)])
def test_factors_are_those_of_float64(experts, columns):
    x = torch.randn(experts, 2 * columns, columns, device="cuda") + 2.0  # one direction far above all others
    hessian = x.mT @ x
    found = factor(hessian)
    wanted = factor(hessian.double())
    assert found.tries_E.tolist() == [0] * experts
    assert torch.equal(found.order_EC, wanted.order_EC)
    for upper, exact in zip(found.upper_ECC.double(), wanted.upper_ECC, strict=True):
        assert (upper - exact).norm() < 1e-3 * exact.norm()


def test_codes_of_real_sizes_are_those_of_the_twin_in_float64():
    x = torch.randn(2, 4096, 768, device="cuda") * torch.rand(768, device="cuda")
    weight = torch.randn(2, 2048, 768, device="cuda").bfloat16()
    scale = group_scale(weight, 4, 128)
    codes = solve(weight, scale, factor(x.mT @ x), 4).codes_ERC
    exact = solve(weight.double(), scale, factor((x.mT @ x).double()), 4).codes_ERC
    assert (codes != exact).float().mean() < 0.02, "ties move what follows in their row, no more"


def test_an_expert_without_a_factor_spoils_no_other():
    x = torch.randn(4, 1024, 512, device="cuda")
    hessian = x.mT @ x
    alone = factor(hessian[3:])
    hessian[0], hessian[1], hessian[2] = torch.nan, -hessian[1], 0.0
    found = factor(hessian)
    assert found.tries_E.tolist() == [len(DAMPS)] * 3 + [0]
    torch.testing.assert_close(found.upper_ECC[3:], alone.upper_ECC)
    assert torch.equal(found.upper_ECC[0], torch.eye(512, device="cuda"))


def test_what_is_put_from_the_device_is_written_as_it_was_then(checkpoint, tmp_path):
    model = checkpoint()
    values = torch.randn(300, 1000, 100, device="cuda")
    wanted = values.cpu()

    def write(part):
        for index, value in enumerate(values):
            part.put(f"new.{index:03d}", value[:, ::2] if index % 3 == 0 else value)
        values.zero_()

    with OverlayWriter(tmp_path / "overlay", model) as out:
        out.part("one", write)
    for index, value in enumerate(wanted):
        found = out.checkpoint.get(f"new.{index:03d}")
        assert torch.equal(found, value[:, ::2] if index % 3 == 0 else value), index


@pytest.mark.parametrize("options", [{}, {"asymmetric": 0.25}, {"bits": 1, "attention_bits": 4}])
def test_the_stage_gives_on_the_device_what_it_gives_on_the_cpu(checkpoint, tmp_path, options):
    model = checkpoint()
    ids = torch.randint(5, model.facts.vocab, (16, 48), generator=torch.Generator().manual_seed(0))
    text, found = CalibrationText(ids, torch.ones_like(ids), "digest"), {}
    for device in ("cpu", "cuda"):
        ctx = HandContext(tmp_path / "stages" / "quantize-gptq" / device)
        ctx.device = torch.device(device)
        gptq(Gptq(group_size=8, **options), text, model, None, ctx)
        found[device] = DenseView(ctx.finish(model))
    family, layer = family_of(model.config), model.facts.moe_layers[0]
    for expert in range(model.facts.experts):
        pairs = zip(*(family.read_expert(found[d], layer, expert)[:3] for d in ("cpu", "cuda")), strict=True)
        for one, other in pairs:
            moved = (one - other).abs() > 1e-5  # scales differ by the last bit
            assert moved.any(-1).float().mean() < 0.2, "ties move what follows in their row, no more"
