"""Text that reaches experts evenly: visits as the model makes them, and what is kept of a pool."""

import json

import pytest
import torch

from moecli.families import adapter
from moecli.methods.calibrate.balanced import Balanced, balanced_text, visits
from moecli.methods.calibrate.text import Text, text
from moecli.ops.balance import unevenness
from tests.methods.test_gptq import hooked, text_for


@pytest.fixture
def dataset(tmp_path):
    words = ["a", "be", "cat", "dog", "eel", "fox", "gnu", "hen"]
    rows = [" ".join(words[(i * j + j // (1 + i)) % 8] for j in range(1, 60)) for i in range(1, 40)]
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return str(path)


def test_visits_are_what_the_router_does(checkpoint, context, dataset):
    model, some = checkpoint(), None
    some = text_for(model, samples=5, tokens=12)
    some.mask[2, 7:] = 0
    opt = Balanced(dataset=dataset, samples=1, tokens_per_sample=12, batch_size=2)
    found = visits(opt, some, model, context())
    seen = hooked(adapter.load_model(model, "cpu", torch.float32), some.ids)
    for at, layer in enumerate(model.facts.moe_layers):
        index = seen[f"model.layers.{layer}.mlp.experts"][1].view(5, 12, -1)
        for n in range(5):
            kept = index[n, : 7 if n == 2 else 12].flatten()
            assert found[n, at].tolist() == torch.bincount(kept, minlength=model.facts.experts).tolist()


def test_the_pool_is_drawn_by_the_same_rule_and_the_most_even_part_is_kept(checkpoint, context, dataset):
    model, ctx = checkpoint(), context()
    options = {"dataset": dataset, "samples": 4, "tokens_per_sample": 24}
    opt = Balanced(**options, pool=3)
    found = balanced_text(opt, model, ctx)
    first = text(Text(**options), model, context("text"))
    whole = text(Text(**options | {"samples": 12}), model, context("whole"))
    assert found.ids.shape == (4, 24) and found.digest != first.digest
    rows = [row.tolist() for row in whole.ids]
    assert all(row.tolist() in rows for row in found.ids)
    before, after = (unevenness(visits(opt, some, model, context("seen")).sum(0)) for some in (first, found))
    assert ctx.records["unevenness"] == pytest.approx({"first": before, "chosen": after})
    assert after < before
    assert any("of 12 samples 4 were chosen" in note for note in ctx.notes)


def test_text_that_is_used_up_leaves_the_first_samples(checkpoint, context, dataset):
    model, ctx = checkpoint(), context()
    options = {"dataset": dataset, "samples": 39, "tokens_per_sample": 16, "packing": "truncate"}
    found = balanced_text(Balanced(**options, pool=4), model, ctx)
    assert found.digest == text(Text(**options), model, context("text")).digest
    assert any("of 39 samples 39 were chosen" in note for note in ctx.notes)
