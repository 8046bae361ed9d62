"""Experts of different widths: what is written loads, and computes what zeros in the same places compute.

Where the oracles of channel pruning are shown: masking and slicing give the same logits, and so do padded and narrow
experts (`test_narrow_experts_compute_what_zeros_compute`, and for one width test_slim's
`test_zeros_and_narrow_tensors_compute_the_same`); keeping all is no change (`test_all_channels_kept_is_the_model`);
HEAPr's vectors against its matrices (test_slim's `test_heapr_is_the_definition`); budgets against brute force
(tests/ops/test_channels.py); factors of full rank (tests/methods/test_low_rank.py).
"""

from __future__ import annotations

import json

import pytest
import torch

from moecli.core.artifacts import sketch_of
from moecli.core.errors import MoecliError, StageFailed
from moecli.families import WIDTHS_KEY, facts_of, family_of, padded
from moecli.families.adapter import load_model
from moecli.families.count import count_of
from moecli.io.reader import FolderCheckpoint
from moecli.methods.quantize.rtn import Rtn, rtn
from moecli.methods.slim.heapr import Heapr, heapr
from moecli.runner.export import choose, export
from tests import tiny
from tests.engine.memory import aliased
from tests.methods.test_slim import folder_of, logits, made_up

STACKED = ("gpt_oss", "granitemoe")
BOTH = [(family, widths) for family in tiny.FAMILIES for widths in ("per_layer", "ragged")]
LEGAL = [pair for pair in BOTH if pair != ("gpt_oss", "ragged") and pair != ("granitemoe", "ragged")]
GLOBAL = {"ratio": 0.45, "scope": "global", "align": 4}


def uneven(model):
    """Scores under which layers and experts keep different numbers of channels, and one expert none."""
    stats = made_up(model)
    for number, layer in enumerate(model.facts.moe_layers):
        stats[layer].extra["h2"].mul_(2.0**number * torch.linspace(1e-6, 1, model.facts.experts)[:, None])
    return stats


def slim(model, ctx, **options):
    heapr(Heapr(**(GLOBAL | options)), uneven(model), model, ctx)
    return ctx.finish(model), ctx.records["kept_channels"]


def zeroed(model, kept, context):
    """The source with zeros in the place of all but each expert's best channels, written by hand."""
    ctx, family, stats = context("zeroed"), family_of(model.config), uneven(model)
    with ctx.writer(model) as out:
        for layer in model.facts.moe_layers:
            w, s = family.read_experts(model, layer), stats[layer]
            score = s["h2"] / s.count_E[:, None] * s["gh2"] / s.count_E[:, None]
            for expert, number in enumerate(kept[str(layer)]):
                gone = score[expert].argsort(descending=True, stable=True)[number:]
                w.gate_FD[expert, gone] = 0
                w.up_FD[expert, gone] = 0
                w.down_DF[expert][:, gone] = 0
                for bias in (w.gate_bias_F, w.up_bias_F):
                    if bias is not None:
                        bias[expert, gone] = 0
            ones = [type(w)(*(None if x is None else x[e] for x in w)) for e in range(len(w.gate_FD))]
            out.part(f"layer-{layer}", lambda part, i=layer, ones=ones: family.write_experts(part, model, i, ones))
    return ctx.finish(model)


def loaded(folder):
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model


def run(network):
    tokens = torch.arange(24).reshape(2, 12) * 5 % 100
    with torch.no_grad():
        return network(tokens).logits


def expert_bytes(network):
    """Of the routed experts' parameters in memory."""
    return sum(p.nbytes for name, p in network.named_parameters() if ".experts." in name)


@pytest.mark.parametrize(("family", "widths"), LEGAL)
def test_narrow_experts_compute_what_zeros_compute(family, widths, checkpoint, context, tmp_path):
    model = checkpoint(family)
    narrow, kept = slim(model, context("narrow"), widths=widths)
    shapes = {tuple(found) for found in kept.values()}
    assert all(len(set(found)) == (1 if widths == "per_layer" else len(set(found))) for found in shapes)
    assert len(shapes) > 1, "layers differ"
    assert widths == "per_layer" or min(min(found) for found in shapes) == 0, "one expert is empty"
    pad = zeroed(model, kept, context)

    full = padded(narrow)
    assert {name: full.spec(name) for name in full.names()} == {name: pad.spec(name) for name in pad.names()}
    assert choose(narrow) == "compact"
    export(narrow, tmp_path / "model")
    network = loaded(tmp_path / "model")
    here = load_model(narrow)
    assert torch.equal(run(network), run(here)), "in memory and from the folder alike, to the bit"
    torch.testing.assert_close(run(network), run(load_model(pad)), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(run(network), run(load_model(model)), atol=1e-3)

    written = FolderCheckpoint(tmp_path / "model", facts_of)
    assert family_of(written.config).accounting(written) == []
    stored = sum(written.spec(name).bytes for name in written.names() if is_routed(name))
    assert expert_bytes(network) == expert_bytes(here) == stored < expert_bytes(load_model(model))


def is_routed(name):
    """An expert's tensor on disk, in the names of all families."""
    routed = ".experts." in name or "input_linear" in name or "output_linear" in name
    return routed and "shared" not in name


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_the_expanded_form_is_the_padded_model(family, checkpoint, context, tmp_path):
    narrow, _ = slim(checkpoint(family), context(), widths="per_layer" if family in STACKED else "ragged")
    export(narrow, tmp_path / "model", "expanded")
    written = FolderCheckpoint(tmp_path / "model", facts_of)
    assert WIDTHS_KEY not in written.config
    assert torch.equal(logits(written), run_padded(narrow))


def run_padded(narrow):
    return logits(padded(narrow))


@pytest.mark.parametrize(
    ("family", "widths", "scope"),
    [(f, w, s) for f, w in LEGAL for s in ("global", "layer", "expert") if w == "ragged" or s == "global"],
)
def test_the_forecast_has_the_bytes_of_what_is_written(family, widths, scope, checkpoint, context):
    model, ctx = checkpoint(family), context()
    opt = Heapr(**(GLOBAL | {"widths": widths, "scope": scope}))
    assert list(opt.problems(model.facts)) == []
    heapr(opt, uneven(model), model, ctx)
    sketch, written = opt.forecast(sketch_of(model)), sketch_of(ctx.finish(model))
    assert sketch.bytes == written.bytes < sketch_of(model).bytes
    assert set(sketch.specs) == set(written.specs)
    assert sketch.facts == written.facts


def test_all_channels_kept_is_the_model(checkpoint, context):
    """Oracle (c): K = F changes nothing; protected experts keep everything, and so do their layers."""
    model, ctx = checkpoint(), context()
    heapr(Heapr(ratio=0.02, widths="ragged", scope="expert", align=32), uneven(model), model, ctx)
    assert torch.equal(logits(ctx.finish(model)), logits(model))


def test_ragged_experts_behind_an_alias_map(checkpoint, context, tmp_path):
    """Rows that share an expert find it among the widths."""
    source = tmp_path / "source"
    source.mkdir()
    small = folder_of(aliased(checkpoint(), [6, 1, 3, 4, 7], [0, 1, 1, 2, 3, 0, 0, 4])[0], source)
    narrow, kept = slim(small, context("narrow"), widths="ragged")
    assert all(len(found) == 5 for found in kept.values())
    export(narrow, tmp_path / "model")
    network = loaded(tmp_path / "model")
    assert torch.equal(run(network), run(load_model(narrow)))
    torch.testing.assert_close(run(network), run(load_model(padded(narrow))), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_every_implementation_of_experts_runs_the_widths(implementation, checkpoint, context, tmp_path):
    narrow, _ = slim(checkpoint(), context(), widths="ragged")
    export(narrow, tmp_path / "model")
    network = loaded(tmp_path / "model")
    network.set_experts_implementation(implementation)
    torch.testing.assert_close(run(network), run(load_model(padded(narrow))), rtol=1e-4, atol=1e-5)


def test_a_layer_without_any_channel_gives_nothing(checkpoint, context, tmp_path):
    model, ctx = checkpoint(), context()
    stats = made_up(model)
    stats[model.facts.moe_layers[0]].extra["h2"].zero_()
    heapr(Heapr(**(GLOBAL | {"ratio": 0.5}), widths="ragged"), stats, model, ctx)
    narrow = ctx.finish(model)
    assert set(ctx.records["kept_channels"]["0"]) == {0}
    export(narrow, tmp_path / "model")
    torch.testing.assert_close(run(loaded(tmp_path / "model")), run(load_model(padded(narrow))), rtol=1e-4, atol=1e-5)


def test_saving_is_refused_where_a_layer_has_several_widths(checkpoint, context, tmp_path):
    """Stock conversions would write flat tensors; with one width a layer they write the folder again."""
    for widths in ("ragged", "per_layer"):
        narrow, _ = slim(checkpoint(), context(widths), widths=widths)
        export(narrow, tmp_path / widths)
    with pytest.raises(ValueError, match="not serializable"):
        loaded(tmp_path / "ragged").save_pretrained(tmp_path / "again")
    network = loaded(tmp_path / "per_layer")
    network.save_pretrained(tmp_path / "again")
    assert torch.equal(run(loaded(tmp_path / "again")), run(network))


@pytest.mark.parametrize(("family", "widths"), [("qwen3_moe", "ragged"), ("gpt_oss", "per_layer")])
def test_narrow_experts_are_packed(family, widths, checkpoint, context, tmp_path):
    """Each weight is that of the dense model, rounded."""
    narrow, _ = slim(checkpoint(family), context("narrow"), widths=widths, align=8, floor=8)
    ctx = context("packed")
    rtn(Rtn(bits=4, group_size=8), narrow, None, ctx)
    packed = ctx.finish(narrow)
    export(packed, tmp_path / "model")
    network = loaded(tmp_path / "model")
    here = run(load_model(packed))
    assert (run(network) - here).abs().max() <= here.abs().max() / 256
    assert (here - run(load_model(narrow))).abs().max() > 1e-3
    assert expert_bytes(network) == expert_bytes(load_model(narrow))


def test_an_empty_expert_cannot_be_packed(checkpoint, context):
    narrow, kept = slim(checkpoint(), context("narrow"), widths="ragged")
    assert kept["0"][0] == 0
    with pytest.raises(StageFailed, match=r"`model.layers.0.mlp.experts.0.down_proj.weight` is empty") as caught:
        rtn(Rtn(bits=4, group_size=4), narrow, None, context("packed"))
    assert caught.value.hint == "write `floor: 1` in the `slim/...` stage above"


def test_estimates_of_speed_count_the_mean_expert(checkpoint, context):
    model, ctx = checkpoint(), context()
    narrow, kept = slim(model, ctx, widths="ragged")
    counted, whole = count_of(sketch_of(narrow)), count_of(sketch_of(model))
    for layer, found in kept.items():
        (gate, up, down), full = counted.layers[int(layer)].expert, whole.layers[int(layer)].expert
        assert sum(m.bytes for m in (gate, up, down)) * 8 == sum(m.bytes for m in full) * sum(found) / 32
        assert (gate.inputs, gate.outputs) == (up.inputs, up.outputs) == (64, round(sum(found) / 8))
        assert (down.inputs, down.outputs) == (round(sum(found) / 8), 64)


def test_a_config_with_wrong_widths_says_so(checkpoint, context, tmp_path):
    narrow, _ = slim(checkpoint(), context(), widths="ragged")
    folder = tmp_path / "model"
    export(narrow, folder)
    config = json.loads((folder / "config.json").read_text())
    config[WIDTHS_KEY]["1"][3] += 4
    (folder / "config.json").write_text(json.dumps(config))
    written = FolderCheckpoint(folder, facts_of)
    problems = family_of(written.config).accounting(written)
    assert "`model.layers.1.mlp.experts.3.gate_proj.weight` has shape" in problems[0].message
    (folder / "config.json").write_text(json.dumps(config | {WIDTHS_KEY: {"0": 4}}))
    with pytest.raises(MoecliError, match="must be a list of widths for each layer"):
        FolderCheckpoint(folder, facts_of)


@pytest.mark.parametrize("family", STACKED)
def test_families_that_stack_experts_have_one_width_a_layer(family, checkpoint):
    (problem,) = Heapr(**GLOBAL, widths="ragged").problems(checkpoint(family).facts)
    assert problem.message == f"the experts of a layer of `{family}` share a tensor, so they have one width"
    assert problem.hint == "write `widths: per_layer` and `scope: global`"
