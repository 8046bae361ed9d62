"""CAMERA-Q: which channel has which bits, what is left of it, and what a packed form would take."""

from dataclasses import replace

import pytest
import torch

from moecli.core.artifacts import CalibrationStats, LayerStats
from moecli.core.model import TensorSpec
from moecli.families import adapter, facts_of, family_of, linears_of
from moecli.io.formats import packed_specs
from moecli.methods.quantize.camera_q import CameraQ, camera_q, packed_bits
from moecli.methods.slim import down_norms
from moecli.ops.channels import camera_energy, tiers
from moecli.ops.pack import dequantize, quantize_rtn
from moecli.ops.tiers import rounded_columns, rounded_rows
from moecli.runner.open import sketch_of
from tests.methods.test_gptq import text_for

BITS = (4, 3, 2)


def stats_for(model):
    rng, e, f = torch.Generator().manual_seed(0), model.facts.experts, model.facts.expert_width
    return CalibrationStats({
        layer: LayerStats(400, torch.full((e,), 50), torch.full((e,), 25.0).double(), {
            "ph2": torch.rand(e, f, generator=rng, dtype=torch.float64) ** 4,
            "phmax": torch.rand(e, f, generator=rng) ** 2,
        }) for layer in model.facts.moe_layers
    })  # fmt: skip


def run(model, ctx, **options):
    opt = CameraQ(**{"group_size": 8, "down_group_size": 4, "tiers": BITS, "shares": (0.25, 0.5, 0.25)} | options)
    camera_q(opt, stats_for(model), model, ctx)
    return ctx.finish(model), opt


def energies(model, layer):
    s = stats_for(model)[layer]
    return camera_energy(s["ph2"], s["phmax"], down_norms(model, layer), 0.9)


def test_tiers_are_ranks_of_groups_among_all_channels_of_a_layer():
    score = torch.tensor([[9.0, 1.0, 8.0, 2.0], [7.0, 6.0, 0.5, 0.1]])
    found = tiers({3: score}, (0.25, 0.5, 0.25), 2)[3]
    # Blocks of two, best first: 9 + 8, 2 + 1 in one expert, 7 + 6, 0.5 + 0.1 in the other.
    assert found.tolist() == [[0, 1, 0, 1], [1, 1, 2, 2]]
    assert tiers({3: score}, (0.0, 1.0, 0.0), 2)[3].unique().tolist() == [1]
    assert tiers({3: score}, (1.0, 0.0, 0.0), 4)[3].unique().tolist() == [0]


def plain(experts, e, order, tier, group, down_group):
    """One expert, row by row and column group by column group."""
    gate, up, down = (value[e].clone() for value in experts[:3])
    for k in range(len(gate)):
        for value in (gate, up):
            value[k] = dequantize(*quantize_rtn(value[k][None], BITS[tier[k]], group))[0]
    for start in range(0, len(order), down_group):
        some = order[start : start + down_group]
        assert len(set(tier[some].tolist())) == 1
        down[:, some] = dequantize(*quantize_rtn(down[:, some], BITS[tier[some[0]]], down_group))
    return gate, up, down


def test_each_channel_is_rounded_at_its_bits_and_stays_in_its_place(checkpoint, context):
    model = checkpoint()
    found, _ = run(model, context())
    family = family_of(model.config)
    for layer in model.facts.moe_layers:
        energy = energies(model, layer)
        tier = tiers({layer: energy}, (0.25, 0.5, 0.25), 4)[layer]
        assert len(tier.unique()) == 3 and any(len(row.unique()) > 1 for row in tier)
        experts, written = family.read_experts(model, layer), family.read_experts(found, layer)
        for e in range(model.facts.experts):
            order = energy[e].argsort(descending=True, stable=True)
            for wanted, value in zip(plain(experts, e, order, tier[e], 8, 4), written[:3], strict=False):
                assert torch.equal(value[e], wanted)


def test_sorted_channels_compute_the_same_and_pack_without_loss(checkpoint, context):
    """What a packed form would do: permute gate, up and down alike, then hold each tier at its bits."""
    model = checkpoint()
    found, _ = run(model, context())
    family, layer = family_of(model.config), model.facts.moe_layers[0]
    energy = energies(model, layer)
    tier = tiers({layer: energy}, (0.25, 0.5, 0.25), 4)[layer]
    x = torch.randn(9, model.facts.hidden, generator=torch.Generator().manual_seed(1))
    for e in range(model.facts.experts):
        one = family.read_expert(found, layer, e)
        order = energy[e].argsort(descending=True, stable=True)
        moved = one._replace(gate_FD=one.gate_FD[order], up_FD=one.up_FD[order], down_DF=one.down_DF[:, order])
        before, after = (family.inner(w, x) @ w.down_DF.T for w in (one, moved))
        torch.testing.assert_close(before, after)
        for number, bits in enumerate(BITS):
            mine = tier[e][order] == number
            if not mine.any():
                continue
            assert torch.equal(mine.nonzero().flatten().diff(), torch.ones(int(mine.sum()) - 1, dtype=torch.int64))
            for part, group in ((moved.gate_FD[mine], 8), (moved.up_FD[mine], 8), (moved.down_DF[:, mine], 4)):
                levels = part.unflatten(-1, (-1, group)).flatten(0, 1)
                assert all(len(row.unique()) <= 2**bits for row in levels)


def test_the_size_is_that_of_each_tier_packed_by_itself():
    tier, opt = torch.tensor([[0] * 32 + [1] * 64 + [2] * 32, [2] * 128]), CameraQ(group_size=64, down_group_size=32)
    hidden, codes, whole = 256, 0, 0
    for number, bits in enumerate(BITS):
        for row in tier:
            count = int((row == number).sum())
            for shape, group in (((count, hidden), 64),) * 2 + (((hidden, count), 32),):
                if count:
                    packed, scale, _ = packed_specs("x.weight", TensorSpec("bfloat16", shape), bits, group).values()
                    codes += 8 * packed.bytes
                    whole += 8 * (packed.bytes + scale.bytes)
    assert packed_bits(opt, tier, hidden, 2) == (codes, whole)


def test_the_report_says_bits_and_size(checkpoint, context):
    model, ctx = checkpoint(), context()
    found, opt = run(model, ctx)
    record = ctx.records["packed"]
    assert record["expert_bits"] == pytest.approx(3.0) and record["expert_bits_stored"] > 3
    assert record["bytes"] < sum(spec.bytes for spec in sketch_of(model).specs.values())
    assert any("for research, not servable" in note for note in ctx.notes)
    assert opt.forecast(sketch_of(model)) == sketch_of(model) == sketch_of(found)


@pytest.mark.parametrize("model_type", ["qwen2_moe", "deepseek_v3", "gpt_oss", "granitemoe"])
def test_what_is_no_routed_expert_is_rounded_at_its_own_bits(model_type, checkpoint, context):
    model = checkpoint(model_type)
    found, _ = run(model, context(), bits=4, attention_bits=8, shared_bits=16)
    for linear in linears_of(model.config, sketch_of(model).specs):
        before, after = model.get(linear.name), found.get(linear.name)
        bits = {"attention": 8, "dense": 8}.get(linear.role)
        if linear.role == "expert":
            assert not torch.equal(before, after)
        elif bits is None:
            assert torch.equal(before, after), linear
        else:
            assert torch.equal(after, dequantize(*quantize_rtn(before, bits, 8)))
    with torch.no_grad():
        a, b = (adapter.load_model(m, "cpu", torch.float32)(text_for(model).ids[:1]).logits for m in (model, found))
    assert torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.8


def test_columns_that_share_a_scale_must_share_a_tier():
    weight, order = torch.randn(1, 2, 4), torch.arange(4)[None]
    with pytest.raises(ValueError, match="2 columns that share a scale"):
        rounded_columns(weight, order, torch.tensor([[0, 1, 1, 1]]), BITS, 2)
    same = rounded_rows(weight.mT, torch.tensor([[0, 0, 1, 1]]), BITS, 2)
    assert same.shape == (1, 4, 2)


@pytest.mark.parametrize(
    ("options", "field", "message"),
    [
        ({"shares": (0.5, 0.5, 0.5)}, "shares", "parts of 1"),
        ({"tiers": (2, 3, 4)}, "tiers", "must fall"),
        ({"down_group_size": 5}, "down_group_size", "does not divide the expert width"),
        ({"servable": "vllm"}, "servable", "no packed form"),
    ],
)
def test_what_cannot_work_is_refused(options, field, message, checkpoint):
    facts = replace(facts_of(checkpoint().config))
    (problem,) = CameraQ(**{"group_size": 8, "down_group_size": 4} | options).problems(facts)
    assert problem.option == field and message in problem.message and problem.hint
