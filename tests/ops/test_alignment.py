"""Clip ratios of a rounded router against trying everything."""

import pytest
import torch
from torch.nn import functional

from moecli.ops.alignment import Inputs, clipped, divergence, each, joint, nearest, ratios

E, D, T = 6, 16, 60


def case(seed=0, bias=True, top=2, dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed)
    weight = (torch.randn(E, D, generator=rng) * torch.rand(E, D, generator=rng) ** 3).to(dtype)
    x = torch.randn(T, D, generator=rng)
    bias_E = torch.randn(E, generator=rng) if bias else None
    logits = x @ weight.float().T + (bias_E if bias else 0)
    return weight, Inputs(x, bias_E, logits.topk(top, -1).indices, logits)


def slow(weight, seen, ratio, bits):
    """The definition, one row at a time."""
    rounded = torch.empty_like(weight)
    for e in range(E):
        scale = float(ratio[e]) * float(weight[e].abs().max()) / ((2**bits - 1) / 2)
        rounded[e] = (weight[e] / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale
    logits = seen.x_TD @ rounded.T + (0 if seen.bias_E is None else seen.bias_E)
    p_TE, q_TE = seen.logits_TE.softmax(-1), logits.softmax(-1)
    return float((p_TE * (p_TE.log() - q_TE.log())).gather(-1, seen.top_TK).sum()) / T


def test_the_divergence_is_that_of_the_definition_and_of_torch_when_all_count():
    weight, seen = case()
    ratio = torch.linspace(0.4, 1.0, E)
    found = divergence(seen, seen.logits(clipped(weight, ratio, 4)))
    assert float(found) == pytest.approx(slow(weight, seen, ratio, 4), rel=1e-4)
    weight, seen = case(top=E)
    z = seen.logits(clipped(weight, ratio, 4))
    wanted = functional.kl_div(z.log_softmax(-1), seen.logits_TE.softmax(-1), reduction="batchmean")
    assert float(divergence(seen, z)) == pytest.approx(float(wanted), rel=1e-4)


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("bias", [False, True])
def test_joint_is_the_best_of_all_equal_ratios(bits, bias):
    weight, seen = case(bias=bias)
    losses = [slow(weight, seen, r.expand(E), bits) for r in ratios()]
    found = joint(weight, seen, bits)
    assert len(ratios()) == 101 and float(ratios()[0]) == 1 and float(ratios()[-1]) == pytest.approx(0.35)
    assert (found == found[0]).all() and float(found[0]) == float(ratios()[losses.index(min(losses))])


@pytest.mark.parametrize("top", [2, E])
@pytest.mark.parametrize("bias", [False, True])
def test_each_is_row_after_row_by_trying_everything(top, bias):
    """Its first pass, replayed with the whole definition in place of the two terms; then no row can gain any more."""
    weight, seen = case(1, bias, top)
    ratio = joint(weight, seen, 3).clone()
    start = slow(weight, seen, ratio, 3)
    for _ in range(8):
        before = ratio.clone()
        for e in range(E):
            losses = []
            for r in ratios():
                ratio_r = ratio.clone()
                ratio_r[e] = r
                losses.append(slow(weight, seen, ratio_r, 3))
            if min(losses) < slow(weight, seen, ratio, 3) - 1e-9:
                ratio[e] = ratios()[losses.index(min(losses))]
        if torch.equal(before, ratio):
            break
    found = each(weight, seen, 3)
    assert torch.equal(found, ratio) and slow(weight, seen, found, 3) < start


def test_nearest_looks_at_weights_alone():
    weight, _ = case(2)
    found = nearest(weight, 3)
    for e in range(E):
        errors = [float((clipped(weight, r.expand(E), 3)[e] - weight[e]).square().sum()) for r in ratios()]
        assert errors[list(ratios()).index(found[e])] == min(errors)


def test_values_are_on_a_grid_of_so_many_levels():
    weight, _ = case(3, dtype=torch.bfloat16)
    found = clipped(weight, torch.full((E,), 0.5), 3)
    assert found.dtype == torch.bfloat16
    for e in range(E):
        scale = (weight[e].float().abs().max() / 3.5 * 0.5).bfloat16().float()
        codes = found[e].float() / scale
        assert torch.allclose(codes, codes.round(), atol=2e-2)
        assert codes.round().min() >= -4 and codes.round().max() <= 3
    zeros = clipped(torch.zeros(2, 4), torch.ones(2), 8)
    assert torch.equal(zeros, torch.zeros(2, 4))
