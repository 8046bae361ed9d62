"""Slimming keeps the channels with the best scores, exactly; every score against a loop over tokens."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import save_file

from moecli.core.artifacts import CalibrationStats, LayerStats, sketch_of
from moecli.core.errors import MoecliError, StageFailed
from moecli.core.model import ModelSketch
from moecli.engine.backward import backward_sweep
from moecli.engine.collectors import collectors
from moecli.families import expert_forward, facts_of, family_of, forecast_width, width_config, width_problem
from moecli.families.adapter import load_model
from moecli.io.reader import FolderCheckpoint
from moecli.methods.slim import loaded_words, unseen_last
from moecli.methods.slim.camera_p import CameraP, camera_p
from moecli.methods.slim.flap import Flap, flap
from moecli.methods.slim.heapr import Heapr, heapr, memory_words, saliency
from moecli.methods.slim.magnitude import Magnitude, magnitude
from moecli.methods.slim.moe_slimming import MoeSlimming, layer_weights, moe_slimming
from moecli.methods.slim.random import Random, random
from tests import tiny
from tests.engine import gradient_oracle
from tests.engine.memory import aliased
from tests.engine.texts import random_batches

FINE = {"align": 8}
SHARED = ("deepseek_v3", "ernie4_5_moe", "qwen2_moe")


def stats_of(model, names, batches=None):
    """Statistics of random text, there and back."""
    swept = backward_sweep(model, batches or random_batches((4, 4)))
    forward = [n for n in names if n not in ("gh2",)]
    there = {s.index: s.observe(collectors(forward)) for s in swept if s.is_moe}
    if "gh2" not in names:
        return CalibrationStats(there)
    back = {s.index: s.observe(collectors(["gh2"])) for s in swept.back() if s.is_moe}
    layers = {i: LayerStats(s.tokens, s.count_E, s.gate_sum_E, {**s.extra, **back[i].extra}) for i, s in there.items()}
    return CalibrationStats(layers)


def logits(checkpoint):
    batch = random_batches((3,), seed=5)[0]
    with torch.no_grad():
        return load_model(checkpoint)(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits


def folder_of(source, folder):
    """A checkpoint in memory, written out."""
    save_file({name: source.get(name).contiguous() for name in source.names()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(dict(source.config)))
    return FolderCheckpoint(folder, facts_of)


def made_up(model, seed=0):
    """h2 and gh2 without running anything."""
    rng = torch.Generator().manual_seed(seed)
    facts = model.facts

    def layer():
        count = torch.randint(1, 50, (facts.experts,), generator=rng)
        extra = {n: torch.rand(facts.experts, facts.expert_width, generator=rng).double() for n in ("h2", "gh2")}
        return LayerStats(100, count, count.double(), extra)

    return CalibrationStats({i: layer() for i in facts.moe_layers})


# -- what is written


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_zeros_and_narrow_tensors_compute_the_same(family, checkpoint, context):
    model = checkpoint(family)
    stats, results = made_up(model), []
    for widths in ("uniform", "pad"):
        ctx = context(widths)
        heapr(Heapr(ratio=0.5, widths=widths, **FINE), stats, model, ctx)
        results.append(ctx.finish(model))
        assert {k for kept in ctx.records["kept_channels"].values() for k in kept} == {16}
    narrow, padded = results
    for layer in model.facts.moe_layers:
        w = family_of(padded.config).read_experts(padded, layer)
        assert {int((x == 0).all(2).sum()) for x in (w.gate_FD, w.up_FD, w.down_DF.mT)} == {8 * 16}
    assert (narrow.facts.expert_width, padded.facts.expert_width) == (16, 32)
    assert narrow.facts.shared_width == model.facts.shared_width
    assert family_of(narrow.config).accounting(narrow) == []
    torch.testing.assert_close(logits(narrow), logits(padded), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(narrow), logits(model), atol=1e-3)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_dropping_a_channel_takes_its_product_from_the_output(family, checkpoint, context):
    """The expert lacks exactly h_k down_k, summed over the dropped k."""
    model, ctx = checkpoint(family), context()
    heapr(Heapr(ratio=0.25, **FINE), made_up(model), model, ctx)
    slim, kin = ctx.finish(model), family_of(model.config)
    x_TD = torch.randn(5, model.facts.hidden, generator=torch.Generator().manual_seed(1))
    before, after = kin.read_expert(model, 1, 3), family_of(slim.config).read_expert(slim, 1, 3)
    gate, up = (x_TD @ w.T + (0 if b is None else b) for w, b in
                ((before.gate_FD, before.gate_bias_F), (before.up_FD, before.up_bias_F)))  # fmt: skip
    h_TF = kin.gate_and_up(gate, up)
    stats = made_up(model)[1]
    order = saliency(stats, "mean")[3].argsort(descending=True)
    gone = order[24:]
    wanted = expert_forward(kin, before, x_TD) - h_TF[:, gone] @ before.down_DF[:, gone].T
    torch.testing.assert_close(expert_forward(kin, after, x_TD), wanted, rtol=1e-4, atol=1e-5)
    kept = order[:24].sort().values
    assert torch.equal(after.up_FD, before.up_FD[kept]), "kept channels stay bit for bit, in their order"


def test_a_ratio_that_rounds_to_nothing_is_refused_and_pad_keeps_all(checkpoint, context):
    model, ctx = checkpoint(), context()
    opt = Heapr(ratio=0.1, widths="pad", scope="expert", align=16)
    heapr(opt, made_up(model), model, ctx)
    assert torch.equal(logits(ctx.finish(model)), logits(model))
    (problem,) = Heapr(ratio=0.1, align=16).problems(model.facts)
    assert problem.message == "`align: 16` rounds what is left of 32 channels up to all of them"
    assert problem.hint == "write `align: 2`"


def test_an_alias_model_is_slimmed_by_stored_expert(checkpoint, context, tmp_path):
    small = folder_of(aliased(checkpoint(), [6, 1, 3, 4, 7], [0, 1, 1, 2, 3, 0, 0, 4])[0], tmp_path)
    stats, ctx = stats_of(small, ["h2", "gh2"]), context()
    heapr(Heapr(ratio=0.5, **FINE), stats, small, ctx)
    slim = ctx.finish(small)
    assert (slim.facts.experts, slim.facts.router_rows, slim.facts.expert_width) == (5, 8, 16)
    logits(slim)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_forecast_is_what_is_written(family, checkpoint, context):
    model, ctx = checkpoint(family), context()
    opt = Heapr(ratio=0.5, **FINE)
    heapr(opt, made_up(model), model, ctx)
    written, told = ctx.finish(model), opt.forecast(sketch_of(model))
    assert {n: written.spec(n) for n in written.names()} == dict(told.specs)
    assert written.facts == told.facts


# -- scores


def test_heapr_is_the_definition(checkpoint):
    """1/n sum_t 1/2 (h_k w_k)^T G (h_k w_k) with G = 1/n sum_t a a^T from the gradient at the experts' outputs."""
    model = checkpoint("mixtral")
    batch = random_batches((3,), length=12)[0]
    _, sums = gradient_oracle.statistics(load_model(model, dtype=torch.float64), model, [batch])
    whole = load_model(model, dtype=torch.float64)
    outputs = _outputs_with_gradients(whole, model)
    gradient_oracle._loss(whole, batch).backward()
    valid = batch.attention_mask.flatten().tolist()
    for layer, found in sums.items():
        stats = LayerStats(0, found["count"].long(), found["gate_sum"], found)
        down_EDF = family_of(model.config).read_experts(model, layer).down_DF.double()
        for expert, visits in outputs[layer].items():
            pairs = [(h, y.grad) for h, y, t in visits if valid[t]]
            if not pairs:
                continue
            gram = sum(torch.outer(a, a) for _, a in pairs) / len(pairs)
            for k in range(model.facts.expert_width):
                moved = [h[k] * down_EDF[expert, :, k] for h, _ in pairs]
                wanted = sum(float(m @ gram @ m) / 2 for m in moved) / len(pairs)
                assert float(saliency(stats, "mean")[expert, k]) == pytest.approx(wanted, rel=1e-11)


def _outputs_with_gradients(whole, source):
    """{layer: {expert: [(h, y, token)]}} filled by the next forward pass."""
    kin, found = family_of(source.config), {}
    for layer in source.facts.moe_layers:
        weights = [kin.read_expert(source, layer, e) for e in range(source.facts.experts)]
        weights = [type(w)(*(None if v is None else v.double() for v in w)) for w in weights]
        visits = found[layer] = {e: [] for e in range(source.facts.experts)}

        def forward(hidden, index, weight, weights=weights, visits=visits):
            rows = []
            for t, (x, chosen) in enumerate(zip(hidden, index.tolist(), strict=True)):
                total = 0
                for slot, e in enumerate(chosen):
                    w = weights[e]
                    h = kin.gate_and_up(w.gate_FD @ x, w.up_FD @ x)
                    y = w.down_DF @ h
                    y.retain_grad()
                    visits[e].append((h.detach(), y, t))
                    total = total + weight[t, slot] * y
                rows.append(total)
            return torch.stack(rows)

        whole.get_submodule(kin.experts_module(layer)).forward = forward
    return found


def test_reduce_sum_multiplies_by_the_tokens(checkpoint):
    stats = made_up(checkpoint())[0]
    mean, total = saliency(stats, "mean"), saliency(stats, "sum")
    torch.testing.assert_close(total, mean * stats.count_E.double()[:, None])
    assert float(mean[2, 5]) == pytest.approx(
        float(stats["h2"][2, 5] * stats["gh2"][2, 5]) / int(stats.count_E[2]) ** 2 / 2
    )


def kept_by(ctx, model):
    """{layer: [[channels] of each expert]} by looking for the source's rows of `up`."""
    slim, found = ctx.finish(model), {}
    for layer in model.facts.moe_layers:
        before, after = (family_of(c.config).read_experts(c, layer).up_FD for c in (model, slim))
        found[layer] = [
            [int((old == row).all(1).nonzero()[0]) for row in new if bool(row.any())]
            for old, new in zip(before, after, strict=True)
        ]
    return found


def best(score_EF, keep):
    return [sorted(sorted(range(len(row)), key=lambda k: (-row[k], k))[:keep]) for row in score_EF.tolist()]


def test_camera_p_weighs_energy_and_peak(checkpoint, context):
    model, ctx = checkpoint(), context()
    stats = stats_of(model, ["ph2", "phmax"])
    camera_p(CameraP(ratio=0.5, alpha=0.75, **FINE), stats, model, ctx)
    for layer, kept in kept_by(ctx, model).items():
        norm = family_of(model.config).read_experts(model, layer).down_DF.double().norm(dim=1)
        score = (0.25 * stats[layer]["ph2"] + 0.75 * stats[layer]["phmax"].double() ** 2) * norm**2
        seen = stats[layer].count_E > 0
        expected = best(torch.where(seen[:, None], score, norm), 16)
        assert kept == expected


def test_flap_ranks_by_standardised_variance(checkpoint, context):
    model, ctx = checkpoint(), context()
    stats = stats_of(model, ["h1", "h2"])
    flap(Flap(ratio=0.5, widths="pad", scope="global", **FINE), stats, model, ctx)
    rows = []
    for layer, s in stats.items():
        norm = family_of(model.config).read_experts(model, layer).down_DF.double().norm(dim=1)
        for e, n in enumerate(s.count_E.tolist()):
            assert n > 0
            raw = [
                (float(s["h2"][e, k]) / n - (float(s["h1"][e, k]) / n) ** 2) * float(norm[e, k]) ** 2 for k in range(32)
            ]
            mean = math.fsum(raw) / 32
            spread = math.sqrt(math.fsum((r - mean) ** 2 for r in raw) / 32)
            rows.append(sorted(((r - mean) / spread for r in raw), reverse=True))
    blocks = sorted(
        ((sum(row[i : i + 8]), -e, -i) for e, row in enumerate(rows) for i in range(0, 32, 8)), reverse=True
    )
    counts = [0] * len(rows)
    for _, e, _ in blocks[: len(blocks) // 2]:
        counts[-e] += 8
    assert [k for kept in ctx.records["kept_channels"].values() for k in kept] == counts
    assert "the experts have no output bias, so what dropped channels give on average is lost" in ctx.notes


def test_flap_puts_the_mean_of_dropped_channels_into_the_bias(checkpoint, context):
    model, ctx = checkpoint("gpt_oss"), context()
    stats = stats_of(model, ["h1", "h2"])
    flap(Flap(ratio=0.5, **FINE), stats, model, ctx)
    slim, kin = ctx.finish(model), family_of(model.config)
    for layer, s in stats.items():
        before, after = kin.read_experts(model, layer), family_of(slim.config).read_experts(slim, layer)
        for e, n in enumerate(s.count_E.tolist()):
            kept = {int((before.up_FD[e] == row).all(1).nonzero()[0]) for row in after.up_FD[e]}
            wanted = before.down_bias_D[e].double()
            for k in set(range(32)) - kept if n else ():
                wanted = wanted + float(s["h1"][e, k]) / n * before.down_DF[e, :, k].double()
            torch.testing.assert_close(after.down_bias_D[e].double(), wanted, rtol=1e-4, atol=1e-6)
    assert not ctx.notes[1:]


def test_moe_slimming_gives_experts_what_their_share_asks_for(checkpoint, context):
    """Binary search for one m a layer, as the paper has it, against the stage."""
    model, ctx = checkpoint(), context()
    stats = stats_of(model, ["h2", "share"])
    moe_slimming(MoeSlimming(ratio=0.5, widths="pad", scope="layer", align=1), stats, model, ctx)
    for layer, s in stats.items():
        assert bool((s.count_E > 0).all())
        value, weight = s["h2"].sqrt().tolist(), s["share"].clamp(min=0).sqrt().tolist()

        def counts(m, value=value, weight=weight):
            found = []
            for row, c in zip(value, weight, strict=True):
                held, count, largest = 0.0, 0, sorted(row, reverse=True)
                while count < 32 and held < min(1.0, c * m) * sum(row):
                    held, count = held + largest[count], count + 1
                found.append(count)
            return found

        low, high = 0.0, 1e6
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if sum(counts(middle)) <= 128 else (low, middle)
        kept = ctx.records["kept_channels"][str(layer)]
        assert sum(kept) == 128
        assert all(abs(k - c) <= 1 for k, c in zip(kept, counts(low), strict=True))
        assert len(set(kept)) > 1


def test_layers_of_moe_slimming_are_smoothed(checkpoint, context):
    model = checkpoint()
    shares = {0: 9.0, 1: 1.0, 2: 1.0, 3: 0.04}
    layers = {i: LayerStats(1, torch.ones(1), torch.ones(1), {"share": torch.tensor([v])}) for i, v in shares.items()}
    losses = list(shares.values())
    for _ in range(4):
        losses = [math.sqrt(x) for x in losses]
        mean = sum(losses) / 4
        spread = math.sqrt(sum((x - mean) ** 2 for x in losses) / 4)
        losses = [min(max(x, mean - spread), mean + spread) for x in losses]
    assert list(layer_weights(layers).values()) == pytest.approx([x * 4 / sum(losses) for x in losses])
    assert set(layer_weights({1: layers[1], 2: layers[2]}).values()) == {1.0}
    ctx, stats = context(), stats_of(model, ["h2", "share"])
    moe_slimming(MoeSlimming(ratio=0.5, widths="pad", scope="global", **FINE), stats, model, ctx)
    assert sum(map(sum, ctx.records["kept_channels"].values())) == 256


def test_a_gram_that_is_not_a_number_stops_the_stage(checkpoint, context):
    model = checkpoint()
    stats = made_up(model)
    for s in stats.values():
        s.extra["ph_cov"] = torch.eye(32).repeat(8, 1, 1)
    stats[1]["ph_cov"][4, 2, 2] = torch.nan
    with pytest.raises(StageFailed, match="`ph_cov` of expert 4 holds values that are not numbers") as caught:
        heapr(Heapr(ratio=0.5, repair="least_squares", **FINE), stats, model, context())
    assert caught.value.where == "layer 1"


def test_magnitude_and_random_need_no_text(checkpoint, context):
    model, ctx = checkpoint("deepseek_v3"), context()
    magnitude(Magnitude(ratio=0.5, **FINE), model, None, ctx)
    for layer, kept in kept_by(ctx, model).items():
        w = family_of(model.config).read_experts(model, layer)
        score = torch.stack([
            torch.stack([w.gate_FD[e, k].norm() * w.up_FD[e, k].norm() * w.down_DF[e, :, k].norm() for k in range(32)])
            for e in range(8)
        ])  # fmt: skip
        assert kept == best(score, 16)
    first, second = context("a"), context("b")
    for ctx in (first, second):
        random(Random(ratio=0.5, **FINE), model, None, ctx)
    assert kept_by(first, model) == kept_by(second, model)
    with pytest.raises(StageFailed, match="`protect` and `repair` read calibration statistics"):
        magnitude(Magnitude(ratio=0.5, repair="least_squares", **FINE), model, None, context("c"))


def test_experts_without_tokens_go_first_and_are_counted(checkpoint, context):
    model, ctx = checkpoint(), context()
    stats = made_up(model)
    stats[0].count_E[5] = 0
    stats[0]["h2"][5] = stats[0]["gh2"][5] = 0
    heapr(Heapr(ratio=0.25, widths="pad", scope="layer", **FINE), stats, model, ctx)
    assert ctx.records["kept_channels"]["0"][5] == 0
    assert "1 of 16 experts saw no calibration token; their channels were ranked by their weights" in ctx.notes
    assert any("1 of 16 experts lost all channels" in note for note in ctx.notes)
    ctx = context("floor")
    heapr(Heapr(ratio=0.25, widths="pad", scope="layer", floor=9, **FINE), stats, model, ctx)
    assert ctx.records["kept_channels"]["0"][5] == 16
    kept = kept_by(ctx, model)[0][5]
    norm = family_of(model.config).read_expert(model, 0, 5).down_DF.double().norm(dim=0)
    assert kept == best(norm[None], 16)[0]


def test_unseen_channels_are_below_all_others():
    score = torch.tensor([[-3.0, 5.0], [0.0, 0.0], [1.0, 2.0]])
    found = unseen_last(score, torch.tensor([4, 0, 1]), torch.tensor([[1.0, 1.0], [2.0, 7.0], [1.0, 1.0]]))
    assert torch.equal(found[[0, 2]], score[[0, 2]])
    assert float(found[1].max()) < -3
    assert found[1, 1] > found[1, 0]


# -- protection and repair


def test_super_experts_stay_whole(checkpoint, context):
    model, ctx = checkpoint(), context()
    stats = made_up(model)
    for layer, s in stats.items():
        s.extra["absmax"] = torch.ones(8)
        s.extra["absmax"][3] = 100.0 if layer == 0 else 1.0
        s["h2"][3] = 0
    heapr(Heapr(ratio=0.5, widths="pad", scope="global", protect="super_experts", **FINE), stats, model, ctx)
    kept = ctx.records["kept_channels"]
    assert (kept["0"][3], kept["1"][3]) == (32, 0)
    assert sum(map(sum, kept.values())) == 256
    assert ctx.records["protected"] == {"0": [3]}
    (problem,) = Heapr(ratio=0.5, protect="super_experts", **FINE).problems(model.facts)
    assert problem.hint == "write `widths: ragged`"
    with pytest.raises(StageFailed, match="channels must stay"):
        heapr(
            Heapr(ratio=0.95, widths="pad", scope="layer", protect="super_experts", **FINE), stats, model, context("b")
        )


@pytest.mark.parametrize("widths", ["uniform", "pad"])
def test_repair_brings_layer_outputs_nearer(widths, checkpoint, context):
    model = checkpoint()
    stats = stats_of(model, ["h2", "gh2", "ph_cov"], random_batches((16,), length=48))
    results = {}
    for repair in ("none", "least_squares"):
        ctx = context(repair)
        heapr(Heapr(ratio=0.5, widths=widths, repair=repair, **FINE), stats, model, ctx)
        results[repair] = ctx.finish(model)
        assert any("was refitted" in note for note in ctx.notes) == (repair != "none")
    gram, enough = stats[0]["ph_cov"].double(), stats[0].count_E >= 32
    assert bool(enough.any())
    errors = {}
    for repair, slim in results.items():
        before, after = family_of(model.config).read_experts(model, 0), family_of(slim.config).read_experts(slim, 0)
        wide = torch.zeros_like(before.down_DF)
        for e in range(8):
            for k, row in enumerate(after.up_FD[e]):
                if bool(row.any()):
                    wide[e, :, int((before.up_FD[e] == row).all(1).nonzero()[0])] = after.down_DF[e, :, k]
        gap = (wide - before.down_DF).double()
        errors[repair] = torch.einsum("edf,efg,edg->e", gap, gram, gap)
    assert bool((errors["least_squares"][enough] < 0.9 * errors["none"][enough]).all())
    assert torch.equal(errors["least_squares"][~enough], errors["none"][~enough])


def test_statistics_of_another_model_are_refused(checkpoint, context):
    model = checkpoint()
    wide = checkpoint("qwen3_moe", moe_intermediate_size=64)
    with pytest.raises(StageFailed, match="the statistics are of 8 experts of 64 channels, the model has 8 of 32"):
        heapr(Heapr(ratio=0.5, **FINE), made_up(wide), model, context())


def test_scores_that_are_not_numbers_stop_the_stage(checkpoint, context):
    model = checkpoint()
    stats = made_up(model)
    stats[1]["gh2"][2, 7] = torch.nan
    with pytest.raises(StageFailed, match="`gh2` of expert 2 holds values that are not numbers") as caught:
        heapr(Heapr(ratio=0.5, **FINE), stats, model, context())
    assert (caught.value.where, caught.value.hint) == ("layer 1", "write `dtype: float32` in the calibrate stage")


def test_a_gram_of_fewer_tokens_than_channels_repairs_nothing(checkpoint, context):
    """Expert 3 saw 31 tokens and keeps 16 channels, fewer than twice as many: its `down` stays, and it is counted."""
    model = checkpoint()
    stats = made_up(model)
    for s in stats.values():
        s.count_E.fill_(32)
        s.count_E[3] = 31
        h_ETF = torch.randn(8, 40, 32, generator=torch.Generator().manual_seed(3)).double()
        s.extra["ph_cov"] = h_ETF.mT @ h_ETF
    found = {}
    for repair in ("none", "least_squares"):
        ctx = context(repair)
        heapr(Heapr(ratio=0.5, repair=repair, **FINE), stats, model, ctx)
        found[repair] = ctx.finish(model)
    assert "`down` of 14 of 16 experts was refitted, 2 had too few tokens for that" in ctx.notes
    for layer in model.facts.moe_layers:
        plain, refit = (family_of(m.config).read_experts(m, layer).down_DF for m in found.values())
        assert [torch.equal(plain[e], refit[e]) for e in range(8)] == [e == 3 for e in range(8)]


def test_what_the_score_takes_of_a_large_model():
    """Qwen3-30B-A3B: 48 layers of 128 experts, 2048 by 768."""
    facts = facts_of({"model_type": "qwen3_moe", "num_hidden_layers": 48, "num_experts": 128})
    assert memory_words(facts) == (
        "the score reads two vectors of each expert, 75.5 MB in all; "
        "two matrices of each, as the definition has it, take 206,158.4 MB"
    )


def test_what_widths_take_once_loaded(checkpoint):
    """4 MiB a channel; 12 of 32 channels stay in the first layer, 6 at most in an expert, and all 16 in the second."""
    facts = dataclasses.replace(checkpoint().facts, hidden=2**20 // 3 // 4 * 4, dtype="float32")
    kept = torch.arange(8) < torch.tensor([[6], [4], [0], [2]])
    assert loaded_words({0: kept, 1: torch.ones(2, 8, dtype=torch.bool)}, facts) == (
        "the routed experts take 112.0 MiB once loaded; padded to the widest of each layer they would take 160.0 MiB, "
        "to the old width 192.0 MiB"
    )


# -- what cannot work is said before anything runs


def test_problems(checkpoint):
    facts = checkpoint().facts

    def told(**given):
        return [(p.option, p.hint) for p in Heapr(**{"ratio": 0.5, **given}).problems(facts)]

    assert told(align=16) == []
    assert told(align=24) == [("align", "write `align: 16`")]
    assert told() == [("align", "write `align: 32`")]
    assert told(align=8, scope="global") == [("scope", "write `widths: ragged`")]
    assert told(align=8, scope="global", widths="pad") == []
    free = {"align": 8, "widths": "ragged"}
    assert told(align=8, widths="per_layer") == [("scope", "write `scope: global`")]
    assert told(**free, scope="layer", floor=17) == [("floor", "lower `ratio` or `floor`")]
    assert told(**free, scope="layer", floor=9) == []
    assert told(**free, scope="layer", ceiling=15) == [("ceiling", "raise `ceiling`")]
    assert told(**free, scope="layer", ceiling=17) == []
    assert told(**free, scope="expert", ceiling=15) == [("ceiling", "raise `ceiling`")]
    assert told(**free, scope="layer", layer_floor=0.1) == [
        ("layer_floor", "leave it out, or write `scope: global`"),
    ]  # fmt: skip
    assert told(**free, scope="global", layer_floor=0.6) == [("layer_floor", "lower `ratio` or `layer_floor`")]
    assert told(align=8, floor=17) == [("floor", "lower `ratio`, or write `floor: 16` or less")]


def test_scores_that_cannot_be_added_up_choose_no_width_of_a_layer(checkpoint):
    (problem,) = MoeSlimming(ratio=0.5, scope="global", widths="per_layer", **FINE).problems(checkpoint().facts)
    assert (problem.option, problem.hint) == ("widths", "write `widths: ragged`")


def test_an_alignment_under_which_nothing_stays(checkpoint):
    """8 experts of 32 channels, 3 % of them left: not one block of 16."""
    (problem,) = Heapr(ratio=0.97, align=16, scope="layer", widths="ragged").problems(checkpoint().facts)
    assert problem.message == "`align: 16` leaves no block of the channels that stay"
    assert problem.hint == "lower `ratio` or `align`"


@pytest.mark.parametrize("widths", ["uniform", "per_layer", "ragged", "pad"])
def test_quantized_experts_are_refused(widths, checkpoint):
    model = sketch_of(checkpoint())
    model = dataclasses.replace(model, facts=dataclasses.replace(model.facts, quantized="compressed-tensors"))
    opt = Heapr(ratio=0.5, widths=widths, scope="global" if widths == "per_layer" else "expert", **FINE)
    said = [problem.message for problem in opt.problems(model.facts)]
    try:
        opt.forecast(model)
    except MoecliError as error:
        said.append(error.message)
    assert said == ["experts are quantized (compressed-tensors) and cannot be read"]


def test_a_width_that_the_shared_experts_cannot_follow(checkpoint):
    """deepseek's config gives the shared width as a multiple of the routed one."""
    facts = checkpoint("deepseek_v3").facts
    (problem,) = Heapr(ratio=0.25, **FINE).problems(facts)
    assert problem.message == (
        "config.json gives the shared experts' width as a multiple of the routed one, and 24 does not divide 32"
    )
    assert problem.hint == "write `ratio: 0.5`"
    assert width_problem(facts, 16) is None
    assert width_config(checkpoint("deepseek_v3").config, 16)["n_shared_experts"] == 2
    with pytest.raises(MoecliError, match="24 does not divide 32"):
        forecast_width(ModelSketch(facts, checkpoint("deepseek_v3").config), 24)
    assert facts_of(width_config(checkpoint("qwen2_moe").config, 24)).shared_width == 40


@pytest.mark.parametrize(("widths", "align", "odd"), [("uniform", 4, True), ("uniform", 8, False), ("pad", 4, False)])
def test_widths_that_cuda_cannot_multiply_are_said(widths, align, odd, checkpoint, context):
    model, ctx = checkpoint(), context()
    heapr(Heapr(ratio=0.4, widths=widths, align=align), made_up(model), model, ctx)
    left = {width for some in ctx.records["kept_channels"].values() for width in some}
    assert any(width % 8 for width in left) == (odd or widths == "pad")
    assert any("16 of 16 experts have a width that is no multiple of 8" in note for note in ctx.notes) == odd
    assert any("zeros in tensors of the old shapes" in note for note in ctx.notes) == (widths == "pad")
