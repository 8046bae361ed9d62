"""Experts as factors: each method against its formula, losses as told, exports that load, and what is refused."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from moecli.core.artifacts import sketch_of
from moecli.core.errors import RecipeError, StageFailed
from moecli.families.adapter import load_model
from moecli.io.factors import FACTORS_KEY, unfactored
from moecli.methods.eval.lm_eval import LmEval
from moecli.methods.matrices import MATRICES
from moecli.methods.slim.d2_moe import D2Moe, d2_moe
from moecli.methods.slim.mc_smoe_second import McSmoeSecond, mc_smoe_second
from moecli.methods.slim.svd_llm import SvdLlm, svd_llm
from moecli.runner.execute import run as run_plan
from moecli.runner.open import open_recipe
from tests.methods.test_slim import folder_of
from tests.methods.test_sparse import Mixed, experts_of, made_up, text_of

D, F, E = 64, 32, 8


def inputs_of(model, text, layer=0):
    """Inputs, gated activations and tokens of each expert of a layer, in float64 from the stock modules."""
    net, seen = load_model(model), {}
    net.model.layers[layer].mlp.experts.register_forward_hook(lambda _, a, __: seen.update(x=a[0], index=a[1]))
    with torch.no_grad():
        net(input_ids=text.ids)
    x, w, found = seen["x"].double(), experts_of(model, layer), []
    for e in range(len(w.gate_FD)):
        mine = x[(seen["index"] == e).any(1)]
        gate, up = (mine @ m[e].double().T for m in (w.gate_FD, w.up_FD))
        found.append((mine, torch.nn.functional.silu(gate) * up))
    return x, found


def moment(mine, pool=None):
    """The rungs, written out."""
    n, size = mine.shape
    own = mine.T @ mine / max(n, 1)
    if n >= 2 * size:
        return own
    if pool is None:
        pool = torch.eye(size, dtype=torch.float64) * (own.diagonal().mean() if n else 1)
    share = size / (size + n)
    return (1 - share) * own + share * pool


def whitened_cut(weight, c, rank):
    root = torch.linalg.cholesky(c)
    u, s, vt = torch.linalg.svd(weight @ root, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank] @ torch.linalg.inv(root), float(s[rank:].square().sum())


@pytest.mark.parametrize("method", ["svd-llm", "d2-moe frequency", "d2-moe mean"])
def test_it_is_the_whitened_svd_of_each_matrix(method, checkpoint, context):
    model, ctx = checkpoint(), context()
    text = text_of(model, samples=16)
    name, _, base = method.partition(" ")
    if name == "svd-llm":
        svd_llm(SvdLlm(kept=0.5, form="expanded"), text, model, ctx)
        rank = int(0.5 * D * F / (D + F))
    else:
        d2_moe(D2Moe(kept=0.6, base=base, form="expanded"), text, model, ctx)
        rank = int((0.6 - 1 / E) * D * F / (D + F))
    small, weights = ctx.finish(model), experts_of(model, 0)
    x, tokens = inputs_of(model, text)
    pool = x.T @ x / len(x)
    lost = total = 0
    few = [len(mine) < 2 * D for mine, _ in tokens]
    assert any(few) and not all(len(mine) < 2 * F for mine, _ in tokens)
    counts = torch.tensor([len(mine) for mine, _ in tokens]).double()
    for field, into in MATRICES.items():
        share = counts / counts.sum() if base == "frequency" else torch.full((E,), 1 / E, dtype=torch.float64)
        matrix = getattr(weights, field).double()
        shared = sum(s * m for s, m in zip(share, matrix, strict=True)) if base else torch.zeros_like(matrix[0])
        for e, (mine, h) in enumerate(tokens):
            c = moment(mine, pool) if into == "x" else moment(h)
            wanted, loss = whitened_cut(matrix[e] - shared, c, rank)
            got = getattr(experts_of(small, 0), field)[e].double()
            torch.testing.assert_close(got, wanted + shared, rtol=1e-3, atol=1e-4)
            lost, total = lost + loss, total + float(((matrix[e] @ c) * matrix[e]).sum())
    assert ctx.records["relative_error"]["0"] == pytest.approx((lost / total) ** 0.5, rel=1e-4)
    assert "the factors are multiplied out: the model takes as many bytes as before" in ctx.notes


def test_low_rank_and_rows_is_a_plain_svd_and_the_worst_rows(checkpoint, context):
    model, ctx = checkpoint(), context()
    stats = made_up(model)
    mc_smoe_second(McSmoeSecond(rank=6, rows=0.2, form="expanded"), stats, model, ctx)
    small, squares = ctx.finish(model), [0.0, 0.0]
    for field, into in MATRICES.items():
        for e in range(E):
            weight = getattr(experts_of(model, 1), field)[e].double()
            u, s, vt = torch.linalg.svd(weight, full_matrices=False)
            wanted = (u[:, :6] * s[:6]) @ vt[:6]
            count = int(stats[1].count_E[e])
            mean = stats[1][f"{into}2"][e] / count if count else torch.ones(weight.shape[1]).double()
            score = ((weight - wanted).square() * mean).sum(1)
            for row in score.argsort(descending=True)[: int(0.2 * len(weight))]:
                wanted[row] = weight[row]
            got = getattr(experts_of(small, 1), field)[e].double()
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
            squares[0] += float(((weight - wanted).square() * mean).sum())
            squares[1] += float((weight.square() * mean).sum())
    assert ctx.records["relative_error"]["1"] == pytest.approx((squares[0] / squares[1]) ** 0.5, rel=1e-4)
    assert any("without the paper's training" in note for note in ctx.notes)


METHODS = {
    "svd-llm": lambda model, form, ctx: svd_llm(SvdLlm(kept=0.5, form=form), text_of(model), model, ctx),
    "d2-moe": lambda model, form, ctx: d2_moe(D2Moe(kept=0.5, form=form), text_of(model), model, ctx),
    "mc-smoe-second": lambda model, form, ctx: mc_smoe_second(
        McSmoeSecond(rank=6, rows=0.2, form=form), made_up(model), model, ctx
    ),
}
OPTIONS = {"svd-llm": SvdLlm(kept=0.5), "d2-moe": D2Moe(kept=0.5), "mc-smoe-second": McSmoeSecond(rank=6, rows=0.2)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
def test_the_expanded_form_is_the_compact_one_multiplied_out(method, dtype, checkpoint, context):
    model, made = checkpoint("qwen3_moe", dtype=dtype), {}
    for form in ("compact", "expanded"):
        ctx = context(form)
        METHODS[method](model, form, ctx)
        made[form] = ctx.finish(model)
    view = unfactored(made["compact"])
    assert view.facts == made["expanded"].facts == model.facts
    for name in model.names():
        assert torch.equal(view.get(name), made["expanded"].get(name))
    told = OPTIONS[method].forecast(sketch_of(model))
    assert {n: made["compact"].spec(n) for n in made["compact"].names()} == dict(told.specs)
    assert (made["compact"].facts, made["compact"].config) == (told.facts, told.config)
    held = sum(made["compact"].spec(n).numel for n in made["compact"].names() if n not in model)
    weights = sum(model.spec(n).numel for n in model.names() if n not in made["compact"])
    kept = {"svd-llm": 0.5, "d2-moe": 0.5, "mc-smoe-second": 6 * (D + F) / (D * F) + 0.2}[method]
    assert 0.4 < held / weights <= kept + 0.01  # indices of rows


@pytest.mark.parametrize("method", METHODS)
def test_more_numbers_are_nearer(method, checkpoint, context):
    model, errors = checkpoint(), []
    for size in (0.3, 0.6, 0.9):
        ctx = context(str(size))
        if method == "mc-smoe-second":
            mc_smoe_second(McSmoeSecond(rank=int(20 * size), rows=0.0), made_up(model), model, ctx)
        else:
            stage, options = {"svd-llm": (svd_llm, SvdLlm), "d2-moe": (d2_moe, D2Moe)}[method]
            stage(options(kept=size), text_of(model), model, ctx)
        errors.append(ctx.records["relative_error"]["0"])
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > errors[2] > 0


def test_svd_llm_does_better_on_its_inputs_than_a_plain_svd(checkpoint, context):
    model, text = checkpoint(), text_of(checkpoint(), samples=32)
    ctx, plain = context("whitened"), context("plain")
    svd_llm(SvdLlm(kept=0.5, form="expanded"), text, model, ctx)
    mc_smoe_second(McSmoeSecond(rank=10, rows=0.0, form="expanded"), made_up(model), model, plain)
    small, other, losses = ctx.finish(model), plain.finish(model), []
    _, tokens = inputs_of(model, text)
    for some in (small, other):
        after, before = experts_of(some, 0), experts_of(model, 0)
        losses.append(sum(float((mine.float() @ (after.up_FD[e] - before.up_FD[e]).T).square().sum())
                          for e, (mine, _) in enumerate(tokens)))  # fmt: skip
    assert losses[0] < losses[1]


# -- what is refused


@pytest.mark.parametrize(
    ("options", "option", "message", "hint"),
    [
        (SvdLlm(kept=0.04), "kept", "factors of rank 1 hold 0.0469 of the numbers of 32 x 64 matrices",
         "write `kept: 0.047` or more"),
        (D2Moe(kept=0.15), "kept",
         "factors of rank 1 hold 0.172 of the numbers of 32 x 64 matrices, 0.125 of them the shared ones",
         "write `kept: 0.172` or more"),
        (McSmoeSecond(rank=32), "rank", "rank 32 and 0.1 of the rows hold no less than a 32 x 64 matrix",
         "write `rank: 19` or less"),
        (McSmoeSecond(rank=1, rows=0.99), "rank", "rank 1 and 0.99 of the rows hold no less than a 32 x 64 matrix",
         "lower `rows`"),
    ],
)  # fmt: skip
def test_ranks_that_make_no_sense_are_told_before_anything_runs(options, option, message, hint, checkpoint):
    (problem,) = options.problems(checkpoint().facts)
    assert (problem.option, problem.message, problem.hint) == (option, message, hint)


def test_the_least_that_is_hinted_at_works(checkpoint):
    for options in (SvdLlm(kept=0.047), D2Moe(kept=0.172), McSmoeSecond(rank=19)):
        assert list(options.problems(checkpoint().facts)) == []
        assert options.shape(E, F, D)["rank"] >= 1


def test_one_expert_alone_leaves_no_difference_to_store(checkpoint):
    (problem,) = D2Moe(kept=0.9).problems(dataclasses.replace(checkpoint().facts, experts=1))
    assert "1 of them the shared ones" in problem.message
    assert problem.hint is None


def test_inputs_that_are_no_numbers_stop_the_stage(checkpoint, context, tmp_path):
    def spoil(name, value):
        return value.fill_(torch.nan) if name == "model.embed_tokens.weight" else value

    model = folder_of(Mixed(checkpoint(), spoil), tmp_path)
    with pytest.raises(StageFailed, match="hold values that are not numbers") as caught:
        svd_llm(SvdLlm(kept=0.5), text_of(model), model, context())
    assert caught.value.where == "layer 0"
    stats = made_up(checkpoint())
    stats[0]["x2"][2, 1] = torch.inf
    with pytest.raises(StageFailed, match=r"sums over input 1 of expert 2 \(x\) are not numbers"):
        mc_smoe_second(McSmoeSecond(rank=4), stats, checkpoint(), context("rows"))


def test_fewer_tokens_than_channels_are_counted(checkpoint, context):
    model, ctx = checkpoint(), context()
    svd_llm(SvdLlm(kept=0.5), text_of(model, samples=1, tokens=3), model, ctx)
    said = next(note for note in ctx.notes if "second moments" in note)
    assert "of 32 second moments of experts' inputs 0 are of their own tokens alone" in said
    assert all(torch.isfinite(value).all() for value in experts_of(unfactored(ctx.finish(model)), 1)[:3])


def refused(stages, model, folder):
    (folder / "r.yaml").write_text(json.dumps({"recipe": 1, "model": str(model), "stages": stages}))
    with pytest.raises(RecipeError) as caught:
        open_recipe(folder / "r.yaml")
    return [(d.message, d.hint) for d in caught.value.diagnostics]


TEXT = {"run": "calibrate/text", "with": {"dataset": "nothing.jsonl", "tokens_per_sample": 32}}
SMALL = {"run": "slim/svd-llm", "with": {"kept": 0.5}}


@pytest.mark.parametrize(
    "after",
    [
        {"run": "slim/magnitude", "with": {"ratio": 0.5, "align": 8}},
        {"run": "slim/svd-llm", "with": {"kept": 0.5, "form": "expanded"}},
        {"run": "slim/random", "with": {"ratio": 0.5, "align": 8}},
        {"run": "slim/random", "with": {"ratio": 0.5, "align": 8, "widths": "pad"}},
        {"run": "quantize/rtn", "with": {"group_size": 16}},
        {"run": "slim/sparsegpt"},
        SMALL,
    ],
)
def test_no_stage_changes_factors(after, tiny_model, tmp_path):
    found, *others = refused([TEXT, SMALL, after], tiny_model("qwen3_moe"), tmp_path)
    assert not others
    assert "low-rank factors" in found[0]
    assert "write `form: expanded`" in found[1]


def test_experts_in_one_tensor_need_the_expanded_form(tiny_model, tmp_path):
    (found,) = refused([TEXT, SMALL], tiny_model("gpt_oss"), tmp_path)
    assert found[0].startswith("`gpt_oss` holds all experts of a layer in one tensor")
    assert found[1] == "write `form: expanded`"


def test_a_stock_export_of_factors_is_refused(tiny_model, tmp_path):
    recipe = {"recipe": 1, "model": str(tiny_model("qwen3_moe")), "export": "stock", "stages": [TEXT, SMALL]}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    with pytest.raises(RecipeError) as caught:
        open_recipe(tmp_path / "r.yaml")
    (found,) = caught.value.diagnostics
    assert found.message.endswith("its experts are stored as low-rank factors")


def test_vllm_is_refused_for_factors(checkpoint):
    told = SvdLlm(kept=0.5).forecast(sketch_of(checkpoint()))
    (problem,) = LmEval(tasks=["arc_easy"], backend="vllm").problems(told.facts)
    assert problem.message == "vLLM does not load compact models of moecli"


# -- whole recipes


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3"])
@pytest.mark.parametrize("method", METHODS)
def test_a_recipe_exports_factors_that_load(method, family, tiny_model, tmp_path):
    rows = [json.dumps({"text": f"some words {i} " * 20}) for i in range(9)]
    (tmp_path / "text.jsonl").write_text("\n".join(rows))
    calibrate = {"dataset": str(tmp_path / "text.jsonl"), "samples": 4, "tokens_per_sample": 32}
    options = {"rank": 6, "rows": 0.2} if method == "mc-smoe-second" else {"kept": 0.5}
    stages = [{"run": "calibrate/statistics", "with": calibrate}, {"run": f"slim/{method}", "with": options}]
    (tmp_path / "r.yaml").write_text(json.dumps({"recipe": 1, "model": str(tiny_model(family)), "stages": stages}))
    result = run_plan(open_recipe(tmp_path / "r.yaml"), tmp_path / "run")
    assert (result.report.export, result.report.verification.status) == ("compact", "passed")
    assert result.report.verification.checks[-1].detail.startswith("largest difference 0,")
    config = json.loads((result.model / "config.json").read_text())
    assert len(config[FACTORS_KEY]) == 2
    size, options = result.report.size, {"mc-smoe-second": 6 * (D + F) / (D * F) + 0.2}
    assert size.after.bytes < size.before.bytes
    for before, after in (
        (size.before.by_part["experts"], size.after.by_part["experts"]),
        (3 * 2 * E * D * F, 3 * 2 * E * D * F - size.before.parameters + size.after.parameters),
    ):
        assert 0.4 < after / before <= options.get(method, 0.5) + 0.02


def test_merged_experts_become_factors(tiny_model, tmp_path):
    """MC-SMoE as a whole: cluster, merge, calibrate anew, second step; the alias map stays."""
    rows = [json.dumps({"text": f"some words {i} " * 20}) for i in range(9)]
    (tmp_path / "text.jsonl").write_text("\n".join(rows))
    calibrate = {"run": "calibrate/statistics",
                 "with": {"dataset": str(tmp_path / "text.jsonl"), "samples": 4, "tokens_per_sample": 32}}  # fmt: skip
    stages = [calibrate, {"run": "cluster/m-smoe", "with": {"keep": 4}}, {"run": "merge/weighted"}, calibrate,
              {"run": "slim/mc-smoe-second", "with": {"rank": 6}}]  # fmt: skip
    (tmp_path / "r.yaml").write_text(json.dumps({"recipe": 1, "model": str(tiny_model("mixtral")), "stages": stages}))
    result = run_plan(open_recipe(tmp_path / "r.yaml"), tmp_path / "run")
    assert (result.report.export, result.report.verification.status) == ("compact", "passed")
