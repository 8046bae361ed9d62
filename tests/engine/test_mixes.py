"""Mixes judged in one sweep against whole models that hold each mix's weights."""

from __future__ import annotations

import copy

import pytest
import torch

from moecli.engine.data import Batch
from moecli.engine.mixes import divergences
from moecli.engine.rounding import one_by_one
from moecli.families import adapter, facts_of
from moecli.families.adapter import load_model
from moecli.io.reader import FolderCheckpoint
from moecli.ops.pack import dequantize, quantize_rtn
from tests.tiny import FAMILIES


def rounding(weight, bits):
    return dequantize(*quantize_rtn(weight, bits, 8))


def batches_for(model, padding=False):
    ids = torch.randint(5, model.facts.vocab, (5, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padding:
        mask[1, 7:] = 0
    return [Batch(ids[:3], mask[:3]), Batch(ids[3:], mask[3:])]


def mixes_for(model, count, seed=0):
    rng = torch.Generator().manual_seed(seed)
    layers, experts = model.facts.moe_layers, model.facts.experts
    return [{i: torch.randint(2, 5, (experts,), generator=rng).tolist() for i in layers} for _ in range(count)]


def whole(model, batches, mixes):
    source = load_model(model, dtype=torch.float32)
    found = []
    for mix in mixes:
        twin = copy.deepcopy(source)
        layers = adapter.decoder_layers(twin)[1]
        for index, bits_E in mix.items():
            experts = adapter.moe_parts(layers[index]).experts
            for name in ("gate_up_proj", "down_proj"):
                weight = getattr(experts, name).data
                for expert, bits in enumerate(bits_E):
                    one = weight[expert].mT if experts.is_transposed else weight[expert]
                    one = rounding(one.contiguous(), bits)
                    weight[expert] = one.mT if experts.is_transposed else one
        total = tokens = 0
        for batch in batches:
            given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
            with torch.no_grad():
                p, q = (net(**given).logits.double().log_softmax(-1) for net in (source, twin))
            kl = (p.exp() * (p - q)).sum(-1)[batch.counted]
            total, tokens = total + kl.sum().item(), tokens + len(kl)
        found.append(total / tokens)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_each_mix_is_as_far_as_the_whole_model_with_its_weights(family, tiny_model):
    model = FolderCheckpoint(tiny_model(family), facts_of)
    batches, mixes = batches_for(model), mixes_for(model, 3)
    found = divergences(model, batches, mixes, rounding=one_by_one(rounding), dtype=torch.float32)
    assert found == pytest.approx(whole(model, batches, mixes), rel=1e-3, abs=1e-7)
    assert min(found) > 1e-5 and len(set(found)) == 3


def test_padding_is_not_counted(tiny_model):
    model = FolderCheckpoint(tiny_model("qwen3_moe"), facts_of)
    batches, mixes = batches_for(model, padding=True), mixes_for(model, 2)
    found = divergences(model, batches, mixes, rounding=one_by_one(rounding), dtype=torch.float32)
    assert found == pytest.approx(whole(model, batches, mixes), rel=1e-3)


def test_the_order_of_mixes_does_not_matter(tiny_model):
    model = FolderCheckpoint(tiny_model("mixtral"), facts_of)
    batches, mixes = batches_for(model), mixes_for(model, 4)
    found = divergences(model, batches, mixes, rounding=one_by_one(rounding), dtype=torch.float32)
    turned = divergences(model, batches, mixes[::-1], rounding=one_by_one(rounding), dtype=torch.float32)
    assert found == turned[::-1]


def test_a_layer_that_runs_out_of_memory_is_judged_again(tiny_model, monkeypatch):
    """Half as many sequences at a time, from the source's experts on."""
    model = FolderCheckpoint(tiny_model("qwen3_moe"), facts_of)
    batches, mixes = batches_for(model), mixes_for(model, 2)
    calm = divergences(model, batches, mixes, rounding=one_by_one(rounding), dtype=torch.float32)
    from moecli.engine.sweep import SweptLayer

    forward, calls = SweptLayer._forward, []

    def failing(self, index, hidden=None):
        calls.append(index)
        if len(calls) == 4:  # the second micro-batch of the first mix
            raise torch.OutOfMemoryError("full")
        return forward(self, index, hidden)

    monkeypatch.setattr(SweptLayer, "_forward", failing)
    assert divergences(model, batches, mixes, rounding=one_by_one(rounding), dtype=torch.float32) == pytest.approx(
        calm, rel=1e-4
    )
    assert len(calls) > 4
