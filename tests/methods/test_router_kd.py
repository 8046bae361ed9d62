"""Router KD: the loss by hand, one step by hand, and only routers move."""

import json

import pytest
import torch

from moecli.core.artifacts import CalibrationStats, CalibrationText, Checkpoint, ExpertPlan, LayerPlan
from moecli.core.errors import StageFailed
from moecli.families import family_of
from moecli.families.adapter import load_model
from moecli.io.store import RunFolder
from moecli.methods.merge.weighted import Weighted, weighted
from moecli.methods.router.kd import Kd, kd, summed_divergence
from moecli.methods.router.row_drop import RowDrop, row_drop
from moecli.runner.execute import Execution
from moecli.runner.execute import run as run_plan
from moecli.runner.open import open_recipe

GROUPS = torch.tensor([0, 1, 1, 0, 2, 3, 2, 2])
SHARES = torch.tensor([0.5, 0.25, 0.75, 0.5, 0.2, 1.0, 0.3, 0.5])
LEADS = torch.tensor([0, 2, 4, 5])


def plan_for(model):
    return ExpertPlan({layer: LayerPlan(GROUPS, SHARES, LEADS) for layer in model.facts.moe_layers})


def text(samples=4, length=12, padded=False):
    ids = torch.randint(4, 100, (samples, length), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 7:] = 0
    return CalibrationText(ids, mask, "digest")


def merged(model, context, stock=False):
    ctx = context("merged")
    weighted(Weighted(), plan_for(model), model, None, ctx)
    alias = ctx.finish(model)
    if not stock:
        return alias
    ctx = context("dropped")
    row_drop(RowDrop(), plan_for(model), alias, None, ctx)
    return ctx.finish(alias)


def divergence(p_logits, q_logits, mask):
    """KL(p || q) of each position whose next token counts, one at a time"""
    total = 0.0
    for b in range(len(mask)):
        for s in range(mask.shape[1] - 1):
            if mask[b, s + 1]:
                p, q = p_logits[b, s].double().softmax(-1), q_logits[b, s].double().softmax(-1)
                total += float((p * (p.log() - q.log())).sum())
    return total


@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_the_divergence_is_summed_over_tokens_whose_successor_exists(tau, monkeypatch):
    monkeypatch.setattr("moecli.methods.router.kd.HEAD_TOKENS", 5)
    p, q = torch.randn(2, 2, 9, 20, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, 5:] = 0
    assert float(summed_divergence(p, q, mask, tau)) == pytest.approx(divergence(p / tau, q / tau, mask), rel=1e-5)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_one_step_is_the_step_of_the_whole_model(model_type, checkpoint, context):
    """AdamW's first step moves each number by the learning rate against the sign of its gradient."""
    source = checkpoint(model_type)
    model, sample, ctx = merged(source, context), text(padded=True), context("kd")
    kd(Kd(learning_rate=1e-3, accumulate=2), model, source, sample, ctx)
    trained = ctx.finish(model)
    network, teacher = load_model(model), load_model(source)
    arguments = {"input_ids": sample.ids, "attention_mask": sample.mask}
    with torch.no_grad():
        wanted = teacher(**arguments).logits
    family, layer = family_of(model.config), model.facts.moe_layers[0]
    name = family.router_role(model, layer, "weight")
    ends = (f".{layer}.mlp.gate.weight", f".{layer}.mlp.router.weight")
    (row,) = [p for n, p in network.named_parameters() if n.endswith(ends)]
    row.requires_grad_(True)
    logits = network(**arguments).logits
    log_p, log_q = wanted.log_softmax(-1), logits.log_softmax(-1)
    every = (log_p.exp() * (log_p - log_q)).sum(-1)[:, :-1]
    loss = every[sample.mask[:, 1:] != 0].mean()
    loss.backward()
    sure = row.grad.abs() > 1e-5  # where rounding cannot turn the sign
    moved = trained.get(name) - model.get(name)
    assert sure.any()
    assert torch.allclose(moved[sure], -1e-3 * row.grad[sure].sign(), rtol=1e-2)
    assert ctx.records["kd_loss"] == [pytest.approx(float(loss.detach()), rel=1e-4)]


@pytest.mark.parametrize("stock", [False, True])
def test_only_rows_move_and_the_model_comes_closer(stock, checkpoint, context):
    source = checkpoint()
    model, ctx = merged(source, context, stock), context("kd")
    kd(Kd(learning_rate=3e-3, epochs=15, accumulate=1), model, source, text(), ctx)
    trained, family = ctx.finish(model), family_of(model.config)
    rows = {n for layer in model.facts.moe_layers for n in family.router_names(layer, model)}
    for name in model.names():
        assert torch.equal(trained.get(name), model.get(name)) == (name not in rows)
    losses = ctx.records["kd_loss"]
    assert sum(losses[-2:]) < 0.95 * sum(losses[:2])
    sample = text()
    with torch.no_grad():
        p, before, after = (load_model(c)(sample.ids).logits for c in (source, model, trained))
    assert divergence(p, after, sample.mask) < divergence(p, before, sample.mask)


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_small_steps_add_up_in_half_precision(dtype, checkpoint, context):
    """Rows are bf16, whose steps are far larger than the learning rate: fp32 masters collect."""
    source = checkpoint(dtype="bfloat16")
    model, ctx = merged(source, context), context("kd")
    kd(Kd(learning_rate=2e-4, epochs=10, accumulate=1, dtype=dtype), model, source, text(), ctx)
    trained = ctx.finish(model)
    name = family_of(model.config).router_role(model, 0, "weight")
    assert trained.get(name).dtype == torch.bfloat16
    assert (trained.get(name) != model.get(name)).float().mean() > 0.3


def test_other_embeddings_than_the_sources_are_refused(checkpoint, context):
    source = checkpoint()
    ctx = context("other")
    with ctx.writer(source) as out:
        out.part(
            "embed", lambda part: part.put("model.embed_tokens.weight", source.get("model.embed_tokens.weight") * 2)
        )
    with pytest.raises(StageFailed, match=r"`model\.embed_tokens\.weight` differs from the source's"):
        kd(Kd(), ctx.finish(source), source, text(), context("kd"))


@pytest.mark.parametrize(
    ("model_type", "options", "kind"),
    [
        ("qwen3_moe", {"bits": 2, "group_size": 16}, "stock"),
        ("qwen3_moe", {"bits": 3, "group_size": 32}, "compact"),
        ("deepseek_v3", {"bits": 2, "group_size": 16, "shared_bits": 4}, "stock"),
        ("gpt_oss", {"format": "mxfp4", "attention_bits": 16}, "stock"),
    ],
)
def test_routers_learn_what_rounding_left_and_codes_stay(model_type, options, kind, tiny_model, tmp_path):
    rows = [json.dumps({"text": f"some words {i} " * 20}) for i in range(9)]
    (tmp_path / "text.jsonl").write_text("\n".join(rows))
    stages = [
        {
            "run": "calibrate/text",
            "with": {"dataset": str(tmp_path / "text.jsonl"), "samples": 8, "tokens_per_sample": 32},
        },
        {"run": "quantize/rtn", "with": options},
        {"run": "router/kd", "with": {"learning_rate": 3e-3, "epochs": 6, "accumulate": 1}},
    ]
    recipe = {"recipe": 1, "model": str(tiny_model(model_type, dtype="bfloat16")), "export": kind, "stages": stages}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    execution = Execution(
        opened := open_recipe(tmp_path / "r.yaml"), RunFolder(tmp_path / "steps"), torch.device("cpu")
    )
    for index in range(3):
        execution.step(index)
    rounded, trained = (execution.artifact(index, Checkpoint) for index in (1, 2))
    family = family_of(trained.config)
    routers = {
        name
        for layer in trained.facts.moe_layers
        for name, tensor in family.router_names(layer, trained).items()
        if tensor.role != "correction"
    }
    for name in trained.names():
        same = torch.equal(trained.get(name).view(-1).view(torch.uint8), rounded.get(name).view(-1).view(torch.uint8))
        assert same == (name not in routers), name
    losses = execution.step(2).manifest["records"]["kd_loss"]
    assert sum(losses[-4:]) < 0.95 * sum(losses[:4])
    result = run_plan(opened, tmp_path / "run")
    assert (result.report.export, result.report.verification.status) == (kind, "passed")


def test_statistics_without_text_are_refused(checkpoint, context):
    source = checkpoint()
    with pytest.raises(StageFailed, match="have no text of their own"):
        kd(Kd(), merged(source, context), source, CalibrationStats({}), context("kd"))
