"""What rounding one expert does, against the literal reading: the whole model with that expert's weights replaced."""

import pytest
import torch

from moecli.engine.backward import backward_sweep
from moecli.engine.collectors import collectors
from moecli.engine.data import Batch
from moecli.engine.rounding import RoundingErrors, SlopedRoundingErrors, one_by_one
from moecli.engine.sweep import sweep
from moecli.families import adapter, family_of
from moecli.ops.pack import dequantize, quantize_rtn
from tests.engine.memory import aliased, open_folder
from tests.engine.texts import random_batches

BITS, GROUP = (2, 4), 16
FAMILIES = ("qwen3_moe", "mixtral", "deepseek_v3", "granitemoe", "gpt_oss")


def rounding(weight_NK, bits):
    return dequantize(*quantize_rtn(weight_NK, bits, GROUP))


def rounded_in_place(model, source, layer, expert, bits):
    """The whole model's own expert, rounded as its on-disk matrices are; undoes it when called again."""
    experts = adapter.moe_parts(adapter.decoder_layers(model)[1][layer]).experts
    kept = {name: value.detach().clone() for name, value in experts.named_parameters()}
    weights = family_of(source.config).read_expert(source, layer, expert)
    new = [rounding(weight, bits) for weight in weights[:3]]
    with torch.no_grad():
        both = torch.stack(new[:2], 1).flatten(0, 1) if not experts.is_concatenated else torch.cat(new[:2])
        experts.gate_up_proj[expert] = both.mT if experts.is_transposed else both
        experts.down_proj[expert] = new[2].mT if experts.is_transposed else new[2]

    def undo():
        with torch.no_grad():
            for name, value in experts.named_parameters():
                value.copy_(kept[name])

    return undo


def block_outputs(model, layer, batch):
    """[B, S, D], padding 0"""
    block = adapter.moe_parts(adapter.decoder_layers(model)[1][layer]).block
    seen = []

    def see(module, args, out):
        seen.append(out[0] if isinstance(out, tuple) else out)

    handle = block.register_forward_hook(see)
    with torch.no_grad():
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    handle.remove()
    return seen[0].reshape(*batch.input_ids.shape, -1).double() * batch.attention_mask[..., None]


def literal(model, source, batches, weight=None):
    """{layer: [batches, E, bits] squared errors of the MoE block's output}, times `weight` by layer and batch."""
    found = {}
    for layer in source.facts.moe_layers:
        exact = [block_outputs(model, layer, batch) for batch in batches]
        table = torch.zeros(len(batches), source.facts.experts, len(BITS), dtype=torch.float64)
        for expert in range(source.facts.experts):
            for at, bits in enumerate(BITS):
                undo = rounded_in_place(model, source, layer, expert, bits)
                for b, batch in enumerate(batches):
                    error = exact[b] - block_outputs(model, layer, batch)
                    table[b, expert, at] = (error if weight is None else error * weight[layer][b]).square().sum()
                undo()
        found[layer] = table
    return found


def padded(batches):
    """The same, with the end of the first sequence padding."""
    mask = batches[0].attention_mask.clone()
    mask[0, -4:] = 0
    return [Batch(batches[0].input_ids, mask), *batches[1:]]


@pytest.mark.parametrize("family", FAMILIES)
def test_errors_are_those_of_the_model_with_one_rounded_expert(family, tiny_model):
    source, batches = open_folder(tiny_model(family)), padded(random_batches((2, 1), length=12))
    ends = torch.tensor([20, 32])
    assert [int(b.attention_mask.sum()) for b in batches] == [20, 12]
    wanted = literal(adapter.load_model(source, "cpu", torch.float32), source, batches)
    for layer in sweep(source, batches):
        if layer.is_moe:
            collector = RoundingErrors(layer.parts.experts, BITS, one_by_one(rounding), ends)
            found = layer.observe([collector])["rounding_errors"]
            assert float(found.max()) > 0
            torch.testing.assert_close(found, wanted[layer.index], rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_sloped_errors_are_weighed_with_the_gradient_of_the_whole_model(family, tiny_model):
    source, batches = open_folder(tiny_model(family)), padded(random_batches((2, 1), length=12))
    model = adapter.load_model(source, "cpu", torch.float32)
    weight = {layer: [slopes(model, layer, batch) for batch in batches] for layer in source.facts.moe_layers}
    wanted = literal(model, source, batches, weight)
    swept = backward_sweep(source, batches)
    for layer in swept.back():
        if layer.is_moe:
            collector = SlopedRoundingErrors(layer.parts.experts, BITS, one_by_one(rounding), torch.tensor([32]))
            stats = layer.observe([collector])
            total = wanted[layer.index].sum(0, keepdim=True)
            assert int(stats.count_E.sum()) == 32 * layer.shape.slots and float(total.max()) > 0
            torch.testing.assert_close(stats["rounding_errors"], total, rtol=2e-3, atol=1e-4 * float(total.max()))


def slopes(model, layer, batch):
    """Gradient of the summed cross entropy at the layer's output, float64 [B, S, D], by autograd."""
    module, kept = adapter.decoder_layers(model)[1][layer], []

    def keep(_, args, out):
        value = out[0] if isinstance(out, tuple) else out
        value.retain_grad()
        kept.append(value)

    handle = module.register_forward_hook(keep)
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    handle.remove()
    wanted = batch.input_ids[:, 1:].masked_fill((batch.attention_mask[:, 1:] * batch.attention_mask[:, :-1]) == 0, -100)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), wanted.flatten(), reduction="sum")
    loss.backward()
    return kept[0].grad.double()


def test_two_slots_on_one_stored_expert_are_one_error(tiny_model):
    """An alias model: the error of both visits together, which the sum of their weights makes."""
    alias = [0, 1, 1, 2, 3, 0, 0, 4]
    source = aliased(open_folder(tiny_model("qwen3_moe")), [6, 1, 3, 4, 7], alias)[0]
    batches = random_batches((3,), length=10)
    for layer in sweep(source, batches):
        collector = RoundingErrors(layer.parts.experts, BITS, one_by_one(rounding), torch.tensor([30]))
        found = layer.observe([collector])["rounding_errors"]
        assert found.shape == (1, 5, 2) and bool((found > 0).all())


def test_weighed_errors_need_a_way_back(tiny_model):
    source = open_folder(tiny_model("qwen3_moe"))
    for layer in sweep(source, random_batches((1,), length=6)):
        with pytest.raises(TypeError, match="collected by a backward sweep"):
            layer.observe([SlopedRoundingErrors(layer.parts.experts, BITS, one_by_one(rounding), torch.tensor([6]))])


def test_the_way_back_shows_what_the_way_there_shows(tiny_model):
    """Statistics that need no gradient, before and after those that do."""
    source, batches = open_folder(tiny_model("qwen3_moe")), padded(random_batches((2, 1), length=12))
    names = ("x_cov", "h_cov", "x_cov_pool")
    wanted = {layer.index: layer.observe(collectors(names)) for layer in sweep(source, batches)}
    plain = {layer.index: layer.input_grads() for layer in backward_sweep(source, batches).back()}
    for layer in backward_sweep(source, batches).back():
        for some in (names, ("gh2", *names)):
            found = layer.observe(collectors(some))
            for name in names:
                torch.testing.assert_close(found[name], wanted[layer.index][name], rtol=1e-5, atol=1e-6)
            assert torch.equal(found.count_E, wanted[layer.index].count_E)
            assert all(torch.equal(a, b) for a, b in zip(layer.input_grads(), plain[layer.index], strict=True))
        with pytest.raises(ValueError, match="`prob_routed` needs logits, which the way back lacks"):
            layer.observe(collectors(("prob_routed",)))
