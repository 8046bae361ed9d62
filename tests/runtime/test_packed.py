"""Experts stay packed in memory: what the model computes, what it takes, what is refused."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from moecli.ops import packed as twin
from moecli.ops.pack import pack_rows, quantize_rtn
from moecli.runtime.packed import PackedProjection, kept, run_packed
from tests.runtime.compact import EXPERTS, FAMILIES, TOKENS, logits, make_model, write_compact

GROUP = 32
TWIN = SimpleNamespace(
    FEW=16,
    product=lambda x, p, e, visits=None, out=None: _into(out, twin.product, x, p, e),
    gated_product=lambda x, p, e, visits=None, out=None: _into(out, twin.gated_product, x, p, e),
    combined_product=lambda x, p, e, w, visits=None: twin.combined_product(x, p, e, w),
    combined=lambda y, w: (y.unflatten(0, w.shape) * w[..., None]).sum(1),
    sort_visits=lambda expert, experts: None,
)
"""The kernels' twins under the kernels' signature."""


def _into(out, run, x, packed, expert):
    own = expert >= 0
    if out is None:
        out = x.new_full((len(expert), len(run(x, packed, expert.clamp(min=0))[0])), torch.nan)
    out[own] = run(x, packed, expert.clamp(min=0))[own]
    return out


def packed_model(folder, **options):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    config.quantization_config["memory"] = "packed"
    model, info = AutoModelForCausalLM.from_pretrained(folder, config=config, output_loading_info=True, **options)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def projections(model):
    return [module for module in model.modules() if isinstance(module, PackedProjection)]


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_model_computes_what_it_computes_when_loaded_dense(family, bits, tmp_path):
    folder = write_compact(
        make_model(tmp_path / "source", family, torch.bfloat16), tmp_path / "compact", {0: 4, 1: EXPERTS}, bits, GROUP
    )
    model = packed_model(folder)
    assert len(projections(model)) == 4
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, logits(folder))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_what_the_kernels_are_given_makes_the_stock_result(family, tmp_path, monkeypatch):
    folder = write_compact(make_model(tmp_path / "source", family), tmp_path / "compact", {0: 4, 1: EXPERTS}, 3, GROUP)
    model = packed_model(folder)
    calls = []

    def forward(self, hidden, index, weight):
        calls.append(len(hidden))
        return run_packed(self, TWIN, hidden, self.alias_map[index] if hasattr(self, "alias_map") else index, weight)

    for module in model.modules():
        if hasattr(module, "stock"):
            monkeypatch.setattr(type(module), "forward", forward)
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, logits(folder), rtol=1e-4, atol=1e-5)
    assert calls


def test_experts_take_their_bits(tmp_path):
    folder = write_compact(
        make_model(tmp_path / "source", "qwen3_moe", torch.bfloat16), tmp_path / "compact", {0: 8, 1: 8}, 4, GROUP
    )
    model = packed_model(folder)
    assert not any(".experts." in name for name, _ in model.named_parameters())
    assert all(p.pieces()[0][1].low.dtype == torch.int32 for p in projections(model))
    assert sum(b.numel() * b.element_size() for p in projections(model) for b in p.buffers()) < 2.2 * 8 * (
        3 * 32 * 32 * 4 * 4 // 8 + 3 * 32 * 2 * 2 + 2 * 8
    ), "rows of 32 are filled up to a block of 128"


def test_a_dtype_asked_for_is_that_of_the_products_only(tmp_path):
    folder = write_compact(
        make_model(tmp_path / "source", "mixtral", torch.bfloat16), tmp_path / "compact", {0: 8, 1: 8}, 4, GROUP
    )
    model = packed_model(folder, dtype=torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, logits(folder, dtype=torch.float32))


def test_bits_may_differ_by_expert():
    rng = torch.Generator().manual_seed(0)
    weights = [torch.randn(6, 64, generator=rng) for _ in range(4)]
    experts, dense = [], []
    for bits, weight in zip((4, 2, 4, 3), weights, strict=True):
        codes, scale = quantize_rtn(weight, bits, GROUP)
        experts.append([(pack_rows(codes, bits), scale, torch.tensor([6, 64]))])
        dense.append(codes * scale.repeat_interleave(GROUP, 1))
    projection = PackedProjection(kept(experts))
    assert torch.equal(projection.dense(torch.float32), torch.stack(dense))
    x, expert = torch.randn(3, 64, generator=rng), torch.tensor([3, 0, 1, 2, 1, 3])
    found = projection.product(TWIN, x, expert)
    wanted = torch.stack([dense[e] @ x[s // 2] for s, e in enumerate(expert.tolist())])
    torch.testing.assert_close(found, wanted)
    share = torch.rand(3, 2, generator=rng)
    mixed = projection.combined(TWIN, x.repeat_interleave(2, 0), expert, share)
    torch.testing.assert_close(mixed, (wanted.unflatten(0, (3, 2)) * share[..., None]).sum(1))


def test_a_layer_may_be_dense_beside_packed_ones(tmp_path):
    source = make_model(tmp_path / "source")
    folder = write_compact(source, tmp_path / "compact", {0: EXPERTS, 1: EXPERTS}, 4, GROUP)
    tensors = load_file(folder / "model.safetensors")
    stock = {n: t for n, t in load_file(source / "model.safetensors").items() if "layers.1.mlp.experts." in n}
    others = {n: t for n, t in tensors.items() if "layers.1.mlp.experts." not in n}
    save_file(others | stock, folder / "model.safetensors", {"format": "pt"})
    model = packed_model(folder)
    assert len(projections(model)) == 2
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, logits(folder))


def test_what_cannot_stay_packed_is_refused(tmp_path):
    source = make_model(tmp_path / "source")
    folder = write_compact(source, tmp_path / "compact", {0: EXPERTS, 1: EXPERTS}, 4, GROUP)
    with pytest.raises(ValueError, match="not serializable"):
        packed_model(folder).save_pretrained(tmp_path / "again")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["memory"] = "half"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="`memory` of a checkpoint's experts is `dense` or `packed`, got `half`"):
        logits(folder)


def test_matrices_of_one_expert_agree_in_bits():
    some = [(torch.zeros(4, 4, dtype=torch.int32), torch.ones(4, 1), torch.tensor([4, 32])),
            (torch.zeros(4, 2, dtype=torch.int32), torch.ones(4, 1), torch.tensor([4, 32]))]  # fmt: skip
    with pytest.raises(ValueError, match="expert 0 has matrices of 2 and 4 bits side by side"):
        kept([some])
