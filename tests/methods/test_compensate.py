"""Corrections of compressed weights: against the closed form on hooked inputs, both forms, any compressed layer."""

import json

import numpy as np
import pytest
import torch

from moecli.core.artifacts import BitPlan
from moecli.core.errors import MoecliError, StageFailed
from moecli.families import FAMILIES, adapter, family_of, linears_of
from moecli.io.formats import DenseView, corrected_weights, factor_names, packed_names, packed_weights
from moecli.methods import compensate as kind
from moecli.methods.compensate.eora import Eora, eora
from moecli.methods.compensate.lqer import Lqer, lqer
from moecli.methods.compensate.slim import Slim, slim
from moecli.methods.quantize.rtn import Rtn, rtn
from moecli.ops.correction import pooled
from moecli.runner.execute import run as run_plan
from moecli.runner.open import open_recipe, sketch_of
from tests.methods.test_gptq import hooked, text_for

ALL = ("experts", "shared", "attention")
METHODS = {"eora": (Eora, eora), "lqer": (Lqer, lqer), "slim": (Slim, slim)}


def rounded(model, context, name="rtn", **options):
    """The model rounded to nearest, and its sketch as the plan would have it."""
    ctx, opt = context(name), Rtn(**{"bits": 3, "group_size": 8} | options)
    rtn(opt, model, None, ctx)
    return ctx.finish(model), opt.forecast(sketch_of(model))


def corrected_model(model, source, context, method="eora", name="stage", text=None, **options):
    options_of, run = METHODS[method]
    ctx, opt = context(name), options_of(**{"rank": 4} | options)
    run(opt, text or text_for(source, samples=8, tokens=40), model, source, ctx)
    return ctx.finish(model), ctx, opt


@torch.no_grad()
def logits_of(model, ids):
    return adapter.load_model(model, "cpu", torch.float32)(ids).logits


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_is_corrected_and_loads(model_type, checkpoint, context):
    """And `plan` knows what will be written."""
    model = checkpoint(model_type)
    compressed, planned = rounded(model, context)
    scope = [part for part in ALL if part != "shared" or model.facts.shared_width]
    merged, ctx, opt = corrected_model(compressed, model, context, scope=scope, form="merged")
    assert not packed_weights(merged.names()) and merged.config == dict(model.config)
    assert {n: merged.spec(n) for n in merged.names()} == {n: model.spec(n) for n in model.names()}
    forecast = opt.forecast(planned)
    assert forecast.specs == {n: merged.spec(n) for n in merged.names()} and forecast.facts == merged.facts
    ids = text_for(model).ids[:2]
    wanted, before, after = (logits_of(some, ids) for some in (model, compressed, merged))
    assert (after - wanted).norm() < (before - wanted).norm()
    for errors in ctx.records["output_error"].values():
        assert errors.keys() <= set(scope)
        for error in errors.values():
            assert 0 < error["after"] < error["before"]


def test_factors_are_the_closed_form_on_the_inputs_that_really_come(checkpoint, context):
    """Of the first layer; with the ladder's moment for each expert, and attention's own."""
    model = checkpoint()
    text = text_for(model, samples=16, tokens=60)
    compressed, _ = rounded(model, context)
    found, ctx, _ = corrected_model(compressed, model, context, text=text, scope=("experts", "attention"))
    view, family, layer = DenseView(compressed), family_of(model.config), model.facts.moe_layers[0]
    assert layer == 0
    seen = hooked(adapter.load_model(compressed, "cpu", torch.float32), text.ids)
    hidden, index, _ = seen[f"model.layers.{layer}.mlp.experts"]
    hidden = hidden.reshape(-1, hidden.shape[-1]).double()
    own = [hidden[(index == e).any(-1).flatten()] for e in range(model.facts.experts)]
    count = torch.tensor([len(x) for x in own])
    grams, classes = pooled(torch.stack([x.T @ x for x in own]), count)
    assert "own" in classes
    for e, gram in enumerate(grams):
        gate, up, down = family.expert_names(layer, e)
        for name in (gate, up):
            same(found, view, model, name, gram)
        if classes[e] == "own" and len(own[e]) >= 256:
            h = family.inner(family.read_expert(view, layer, e), own[e].float()).double()
            same(found, view, model, down, h.T @ h)
    for part in "qo":
        name = f"model.layers.{layer}.self_attn.{part}_proj"
        x = seen[name].flatten(0, 1).double()
        same(found, view, model, f"{name}.weight", x.T @ x)
    behind = hooked(adapter.load_model(found, "cpu", torch.float32), text.ids)["model.layers.1.self_attn.q_proj"]
    x = behind.flatten(0, 1).double()  # what a corrected first layer makes
    same(found, view, model, "model.layers.1.self_attn.q_proj.weight", x.T @ x)
    total = sum((np.array(list(c.values())).sum() for c in ctx.records["classes"].values()), 0)
    assert total == len(model.facts.moe_layers) * (3 * model.facts.experts + 4)


def same(found, view, model, name, gram):
    """The stored product has the least error that Eckart and Young allow, in the space where inputs are white."""
    lost = model.get(name).double() - view.get(name).double()
    values, vectors = torch.linalg.eigh(gram)
    root = vectors * values.clamp(min=0).sqrt()
    least = torch.linalg.svdvals(lost @ root)[4:].square().sum()
    names = factor_names(name)
    left = (lost - found.get(names.b).double() @ found.get(names.a).double()) @ root
    torch.testing.assert_close(left.square().sum(), least, rtol=1e-4, atol=1e-9)


def test_an_adapter_lies_beside_the_packed_weights_and_is_seen(checkpoint, context):
    model = checkpoint()
    compressed, planned = rounded(model, context)
    found, ctx, opt = corrected_model(compressed, model, context)
    chosen = {x.name for x in linears_of(model.config, sketch_of(model).specs) if x.role == "expert"}
    assert corrected_weights(found.names()) == chosen
    assert set(compressed.names()) < set(found.names()) and found.config == compressed.config
    assert opt.forecast(planned).specs == {n: found.spec(n) for n in found.names()}
    view, bare = DenseView(found), DenseView(compressed)
    assert set(view.names()) == set(model.names())
    for name in chosen:
        a, b = (found.get(factor).float() for factor in factor_names(name))
        wanted = (bare.get(name).float() + b @ a).to(view.get(name).dtype)
        assert torch.equal(view.get(name), wanted)
        torch.testing.assert_close(view.rows(name, 2, 5), wanted[2:5])
    assert ctx.records["adapter_bytes"] == sum(
        found.spec(n).bytes for n in set(found.names()) - set(bare.parent.names())
    )
    ids = text_for(model).ids[:2]
    merged, *_ = corrected_model(compressed, model, context, name="merged", form="merged")
    torch.testing.assert_close(logits_of(found, ids), logits_of(merged, ids), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_full_rank_gives_the_source_back(method, checkpoint, context):
    model = checkpoint()
    compressed, _ = rounded(model, context)
    options = {"renew": False} if method == "slim" else {}
    found, ctx, _ = corrected_model(
        compressed, model, context, method, rank=1000, form="merged", scope=("experts", "attention"), **options
    )
    for name in model.names():
        torch.testing.assert_close(found.get(name), model.get(name), rtol=1e-5, atol=1e-6)
    assert all(e["after"] < 1e-5 for layer in ctx.records["output_error"].values() for e in layer.values())


def test_each_method_weighs_inputs_as_it_says(checkpoint, context):
    """Plain decompositions of the scaled loss, for one expert with tokens of its own and for q."""
    model = checkpoint()
    text = text_for(model, samples=16, tokens=60)
    compressed, _ = rounded(model, context)
    seen = hooked(adapter.load_model(compressed, "cpu", torch.float32), text.ids)
    hidden, index, _ = seen["model.layers.0.mlp.experts"]
    hidden = hidden.reshape(-1, hidden.shape[-1]).double()
    expert = int(torch.bincount(index.flatten()).argmax())
    inputs = {
        family_of(model.config).expert_names(0, expert)[0]: hidden[(index == expert).any(-1).flatten()],
        "model.layers.0.self_attn.q_proj.weight": seen["model.layers.0.self_attn.q_proj"].flatten(0, 1).double(),
    }
    scales = {"lqer": lambda x: x.abs().mean(0).clamp(min=1e-4), "slim": lambda x: x.square().mean(0).sqrt()}
    for method, scale in scales.items():
        options = {"renew": False} if method == "slim" else {}
        found, *_ = corrected_model(
            compressed, model, context, method, name=method, text=text, scope=("experts", "attention"), **options
        )
        for name, x in inputs.items():
            assert len(x) >= 256
            lost, s = (model.get(name) - DenseView(compressed).get(name)).double(), scale(x)
            u, d, vt = torch.linalg.svd(lost * s, full_matrices=False)
            wanted = (u[:, :4] * d[:4]) @ (vt[:4] / s)
            a, b = (found.get(factor).double() for factor in factor_names(name))
            torch.testing.assert_close(b @ a, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 4])
def test_rounding_again_keeps_grid_and_zeros_and_is_never_further_away(bits, checkpoint, context):
    model = checkpoint()
    compressed, _ = rounded(model, context, bits=bits)
    plain, *_ = corrected_model(compressed, model, context, "slim", name="plain", renew=False)
    again, *_ = corrected_model(compressed, model, context, "slim", name="again")
    moved, base, left = 0, DenseView(compressed), {}
    for name in corrected_weights(again.names()):
        if not name.startswith("model.layers.0."):
            continue  # there the two see other inputs
        assert torch.equal(again.get(packed_names(name).scale), compressed.get(packed_names(name).scale))
        a, b = (again.get(factor).float() for factor in factor_names(name))
        fresh = DenseView(again).get(name) - b @ a
        assert (fresh[base.get(name) == 0].abs() < 1e-6).all()
        moved += int(((fresh - base.get(name)).abs() > 1e-6).sum())
        for key, some in (("plain", plain), ("again", again)):
            left[key] = (model.get(name) - DenseView(some).get(name)).abs()
        assert (left["again"] <= left["plain"] + 1e-6).all()
    assert moved > 0


def test_weights_set_to_zero_are_corrected_and_can_stay_zero(checkpoint, context):
    """A sparse model: nothing is packed, so the correction is added up; before that its zeros stay."""
    model, family = checkpoint(), None
    family = family_of(model.config)
    ctx = context("sparse")
    with ctx.writer(model) as out:
        for layer in model.facts.moe_layers:
            experts = [family.read_expert(model, layer, e) for e in range(model.facts.experts)]
            new = [e._replace(gate_FD=torch.where(e.gate_FD.abs() > 0.1, e.gate_FD, 0)) for e in experts]
            out.part(f"layer-{layer}", lambda part, new=new, layer=layer: family.write_experts(part, model, layer, new))
    sparse = ctx.finish(model)
    for method in METHODS:
        found, ctx, _ = corrected_model(sparse, model, context, method, name=method, form="merged")
        errors = ctx.records["output_error"]
        assert all(0 < e["experts"]["after"] < e["experts"]["before"] for e in errors.values())
        name = family.expert_names(0, 0)[0]
        rest, pruned = found.get(name) - sparse.get(name), sparse.get(name) == 0
        if method == "slim":  # what was not pruned takes back what the correction changed
            torch.testing.assert_close(found.get(name)[~pruned], model.get(name)[~pruned])
            assert 0.1 < pruned.double().mean() < 0.9 and (rest[pruned] != 0).all()
        else:
            assert torch.linalg.matrix_rank(rest.double(), rtol=1e-4) == 4
    (problem,) = Eora(rank=4).problems(sparse.facts)
    assert problem.option == "form" and "merged" in problem.hint


def test_a_stopped_run_goes_on_with_what_it_had(checkpoint, context, monkeypatch):
    model = checkpoint()
    compressed, _ = rounded(model, context)
    for method in ("eora", "slim"):
        for form in ("adapter", "merged"):
            whole, ctx, opt = corrected_model(compressed, model, context, method, name=f"{method}-{form}", form=form)
            stopped = context(f"{method}-{form}-stopped")
            solve, calls = kind._Layer.correct, []

            def stop(self, solve=solve, calls=calls):
                calls.append(self.index)
                if len(calls) == 2:
                    raise KeyboardInterrupt
                solve(self)

            run = METHODS[method][1]
            with monkeypatch.context() as patch:
                patch.setattr(kind._Layer, "correct", stop)
                with pytest.raises(KeyboardInterrupt):
                    run(opt, text_for(model, samples=8, tokens=40), compressed, model, stopped)
            run(opt, text_for(model, samples=8, tokens=40), compressed, model, stopped)
            assert stopped.records == ctx.records and stopped.notes == ctx.notes
            again = stopped.finish(compressed)
            assert all(torch.equal(again.get(n), whole.get(n)) for n in whole.names())


def test_experts_without_tokens_lean_on_the_others_and_are_counted(checkpoint, context):
    model = checkpoint()
    compressed, _ = rounded(model, context)
    text = text_for(model, samples=1, tokens=6)
    found, ctx, _ = corrected_model(compressed, model, context, text=text)
    for counts in ctx.records["classes"].values():
        assert counts == {"pooled": 3 * model.facts.experts}
    assert any("pooled" in note for note in ctx.notes)
    for name in corrected_weights(found.names()):
        before, after = ((model.get(name) - DenseView(some).get(name)).norm() for some in (compressed, found))
        assert after <= before * (1 + 1e-5)


def test_models_that_do_not_match_are_refused(checkpoint, context):
    model, other = checkpoint(), checkpoint(experts=4)
    compressed, planned = rounded(model, context)
    with pytest.raises(StageFailed, match="the source has 4 experts, the compressed model 8") as caught:
        corrected_model(compressed, other, context)
    assert "use: {source: ID}" in caught.value.hint
    with pytest.raises(StageFailed, match="its source a `mixtral`"):
        corrected_model(compressed, checkpoint("mixtral"), context, name="other")
    twice = Eora(rank=4).forecast(planned)
    with pytest.raises(MoecliError, match="corrected already"):
        Eora(rank=4).forecast(twice)
    (problem,) = Eora(rank=10**6).problems(compressed.facts)
    assert problem.option == "rank"
    (problem,) = Eora(rank=4, scope=("shared",)).problems(compressed.facts)
    assert problem.option == "scope"


def test_experts_in_one_tensor_have_no_adapter(checkpoint, context):
    model = checkpoint("granitemoe")
    compressed, planned = rounded(model, context)
    for refused in (
        lambda: Eora(rank=4).forecast(planned),
        lambda: corrected_model(compressed, model, context),
    ):
        with pytest.raises(MoecliError, match="one tensor holds") as caught:
            refused()
        assert caught.value.hint == "write `form: merged`"


def test_weights_that_are_not_finite_are_refused(checkpoint, context):
    model = checkpoint()
    compressed, _ = rounded(model, context)
    name, ctx = family_of(model.config).expert_names(1, 3)[0], context("broken")
    with ctx.writer(model) as out:
        out.part("one", lambda part: part.put(name, torch.full_like(model.get(name), float("nan"))))
    with pytest.raises(StageFailed, match="not finite") as caught:
        corrected_model(compressed, ctx.finish(model), context)
    assert caught.value.where == "layer 1"


def test_an_unchanged_model_is_said_to_be_so(checkpoint, context):
    model = checkpoint()
    _, ctx, _ = corrected_model(model, model, context, form="merged")
    assert any("nothing to correct" in note for note in ctx.notes)


def test_experts_with_bits_of_their_own_are_corrected_in_their_own_grid(checkpoint, context):
    model = checkpoint()
    experts, layers = model.facts.experts, model.facts.moe_layers
    plan = BitPlan({layer: torch.tensor([(2, 4) if e % 2 else (3, 3) for e in range(experts)]) for layer in layers})
    ctx, opt = context("mixed"), Rtn(bits=3, group_size=8)
    rtn(opt, model, plan, ctx)
    compressed = ctx.finish(model)
    whole, *_ = corrected_model(compressed, model, context, "slim", name="whole", rank=1000, form="merged")
    found, *_ = corrected_model(compressed, model, context, "slim", name="some")
    family = family_of(model.config)
    for expert, bits in ((0, 3), (1, 2)):
        name = family.expert_names(0, expert)[0]
        a, b = (found.get(factor).float() for factor in factor_names(name))
        scale = found.get(packed_names(name).scale)[..., None]
        codes = ((DenseView(found).get(name) - b @ a).unflatten(-1, (-1, 8)) / scale).flatten(-2)
        torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-3)
        assert -(2 ** (bits - 1)) <= codes.round().min() and codes.round().max() < 2 ** (bits - 1)
        torch.testing.assert_close(whole.get(name), model.get(name), rtol=1e-4, atol=1e-5)


def recipe(tmp_path, tiny_model, correct):
    rows = [" ".join(["cat", "dog", "eel", "fox"][(i * j) % 4] for j in range(60)) for i in range(1, 20)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    text = str(tmp_path / "text.jsonl")
    stages = [
        {"run": "calibrate/statistics", "with": {"dataset": text, "samples": 4, "tokens_per_sample": 32}},
        {"run": "prune/frequency", "id": "pruned", "with": {"keep": 4}},
        {"run": "quantize/rtn", "with": {"bits": 3, "group_size": 16}},
        {"run": "eval/perplexity", "id": "rounded", "with": {"dataset": text, "window": 32}},
        {"run": "compensate/eora", "with": {"rank": 6, "scope": ["experts", "attention"]}} | correct,
        {"run": "eval/fidelity", "with": {"dataset": text, "window": 32}, "use": {"source": "pruned"}},
    ]
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({"recipe": 1, "model": str(tiny_model("qwen3_moe")), "stages": stages}))
    return open_recipe(path)


def test_a_recipe_corrects_a_pruned_and_rounded_model(tiny_model, tmp_path):
    """The pruned model is what was lost from; evaluations see the correction, the export has it beside the weights."""
    result = run_plan(recipe(tmp_path, tiny_model, {"use": {"source": "pruned"}}), tmp_path / "run")
    assert result.report.verification.status == "passed"
    checks = {check.name: check for check in result.report.verification.checks}
    assert checks["adapter"].passed
    assert (tmp_path / "run" / "model" / "adapter" / "adapter_model.safetensors").is_file()
    folder = sum(f.stat().st_size for f in (tmp_path / "run" / "model").rglob("*.safetensors"))
    assert abs(result.report.size.after.bytes - folder) < 0.1 * folder
    notes = [note for stage in result.report.stages for note in stage.notes]
    assert any("a correction of rank 6" in note for note in notes)


def test_without_it_the_recipe_says_which_line_is_missing(tiny_model, tmp_path):
    with pytest.raises(StageFailed, match="the source has 8 experts, the compressed model 4") as caught:
        run_plan(recipe(tmp_path, tiny_model, {}), tmp_path / "run")
    assert "use: {source: ID}" in caught.value.hint


@pytest.mark.parametrize("format", ["fp8", "mxfp4"])
def test_small_floats_are_corrected_and_not_rounded_again(format, checkpoint, context):
    model = checkpoint(dtype="bfloat16")
    ctx, opt = context("floats"), Rtn(format=format)
    rtn(opt, model, None, ctx)
    compressed, planned = ctx.finish(model), opt.forecast(sketch_of(model))
    for form in ("adapter", "merged"):
        found, ctx, used = corrected_model(compressed, model, context, name=form, form=form)
        errors = ctx.records["output_error"]
        assert all(0 < layer["experts"]["after"] < layer["experts"]["before"] for layer in errors.values())
        assert used.forecast(planned).specs == {n: found.spec(n) for n in found.names()}
    with pytest.raises(StageFailed, match="only integers are rounded again") as caught:
        corrected_model(compressed, model, context, "slim", name="slim")
    assert caught.value.hint == "write `renew: false`"
