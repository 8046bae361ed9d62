"""The three forms of a finished model load where they should and compute what the chain of stages computes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moecli.core.errors import UsageError
from moecli.families.adapter import load_model
from moecli.io.formats import DenseView
from moecli.runner.export import choose, export
from moecli.runtime.modeling_file import AUTO_MAP, FILE_NAME, modeling_source
from tests.runner.chains import alias_of, merged, opened, pruned, quantized

TOKENS = torch.arange(24).reshape(2, 12) * 5 % 100
LAYOUTS = ["qwen3_moe", "mixtral", "gpt_oss", "granitemoe", "deepseek_v3", "ernie4_5_moe"]


def loaded_logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        return model(TOKENS).logits


def chain_logits(checkpoint) -> torch.Tensor:
    with torch.no_grad():
        return load_model(DenseView(checkpoint))(TOKENS).logits


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("family", LAYOUTS)
def test_a_merged_model_is_exported_compact_and_computes_the_same(family, tiny_model, tmp_path):
    source = opened(tiny_model(family))
    layers = source.facts.moe_layers
    chain = merged(source, tmp_path / "chain", dict(zip(layers, (3, 5), strict=True)))
    assert choose(chain) == "compact"
    export(chain, tmp_path / "model")
    assert torch.equal(loaded_logits(tmp_path / "model"), chain_logits(chain))
    assert (chain_logits(chain) - chain_logits(source)).abs().max() > 1e-3
    config = config_of(tmp_path / "model")
    assert config["auto_map"] == AUTO_MAP
    assert config["quantization_config"]["experts"] == {str(layers[0]): 3, str(layers[1]): 5}
    assert (tmp_path / "model" / FILE_NAME).read_text() == modeling_source()


@pytest.mark.parametrize("family", LAYOUTS)
def test_expanded_gives_each_row_its_own_copy(family, tiny_model, tmp_path):
    source = opened(tiny_model(family))
    chain = merged(source, tmp_path / "chain", 3)
    export(chain, tmp_path / "model", "expanded")
    written = opened(tmp_path / "model")
    assert set(written.names()) == set(source.names())
    assert "moecli_experts" not in written.config
    expected = chain_logits(chain)  # which adds up the copies in another order
    assert (loaded_logits(tmp_path / "model") - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_expanded_copies_the_experts_that_the_alias_map_names(tiny_model, tmp_path):
    chain = merged(opened(tiny_model("qwen3_moe")), tmp_path / "chain", 3)
    export(chain, tmp_path / "model", "expanded")
    written = opened(tmp_path / "model")
    for row, expert in enumerate(alias_of(1, 8, 3)):
        name = "model.layers.1.mlp.experts.{}.down_proj.weight"
        assert torch.equal(written.get(name.format(row)), chain.get(name.format(expert)))


@pytest.mark.parametrize("family", LAYOUTS)
def test_a_pruned_model_is_exported_stock(family, tiny_model, tmp_path):
    source = opened(tiny_model(family, n_group=1, topk_group=1) if family == "deepseek_v3" else tiny_model(family))
    chain = pruned(source, tmp_path / "chain", [0, 2, 3, 7])
    assert choose(chain) == "stock"
    export(chain, tmp_path / "model")
    assert torch.equal(loaded_logits(tmp_path / "model"), chain_logits(chain))
    assert "auto_map" not in config_of(tmp_path / "model")
    assert not (tmp_path / "model" / FILE_NAME).exists()


@pytest.mark.parametrize("family", LAYOUTS)
def test_a_merged_and_packed_model_is_exported_compact(family, tiny_model, tmp_path):
    chain = merged(opened(tiny_model(family, dtype="bfloat16")), tmp_path / "merged", 4)
    chain = quantized(chain, tmp_path / "quantized")
    export(chain, tmp_path / "model")
    assert torch.equal(loaded_logits(tmp_path / "model"), chain_logits(chain))
    again = DenseView(opened(tmp_path / "model"))
    assert torch.equal(chain_logits(again), chain_logits(chain))
    assert opened(tmp_path / "model").facts.quantized == "moecli"


def test_one_packing_for_all_experts_is_stock_and_two_are_compact(tiny_model, tmp_path):
    source = opened(tiny_model("qwen3_moe", dtype="bfloat16"))
    uniform = quantized(source, tmp_path / "uniform", 4)
    assert choose(uniform) == "stock"
    export(uniform, tmp_path / "stock")
    assert torch.equal(loaded_logits(tmp_path / "stock"), chain_logits(uniform))
    assert config_of(tmp_path / "stock")["quantization_config"] == uniform.config["quantization_config"]

    mixed = quantized(source, tmp_path / "mixed", 4, per_layer={1: 8})
    assert choose(mixed) == "compact"
    export(mixed, tmp_path / "compact")
    assert torch.equal(loaded_logits(tmp_path / "compact"), chain_logits(mixed))
    with pytest.raises(UsageError, match="transformers reads one packing for all experts") as caught:
        export(mixed, tmp_path / "refused", "stock")
    assert caught.value.hint == "write `export: compact`, or give all experts the same bits and group size"
    assert not (tmp_path / "refused").exists()


def test_a_stock_form_of_an_aliased_model_is_refused_with_what_to_do(tiny_model, tmp_path):
    chain = merged(opened(tiny_model("qwen3_moe")), tmp_path / "chain", {0: 3, 1: 5})
    with pytest.raises(UsageError, match="8 router rows share 3 to 5 experts in each layer") as caught:
        export(chain, tmp_path / "model", "stock")
    assert caught.value.hint == "put `- run: router/row-drop` below the merge, or write `export: compact`"


@pytest.mark.parametrize("kind", ["compact", "expanded"])
def test_the_same_checkpoint_gives_the_same_bytes(kind, tiny_model, tmp_path):
    chain = merged(opened(tiny_model("qwen3_moe")), tmp_path / "chain", 3)
    for name in ("one", "two"):
        export(chain, tmp_path / name, kind, {"NOTES.md": "seen"})
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert "NOTES.md" in files
    assert files == sorted(path.name for path in (tmp_path / "two").iterdir())
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_compact_export_can_be_exported_again(tiny_model, tmp_path):
    chain = merged(opened(tiny_model("qwen3_moe", dtype="bfloat16")), tmp_path / "merged", 4)
    chain = quantized(chain, tmp_path / "quantized")
    export(chain, tmp_path / "model")
    export(opened(tmp_path / "model"), tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "model" / "config.json").read_text()
    assert torch.equal(loaded_logits(tmp_path / "again"), loaded_logits(tmp_path / "model"))
    export(opened(tmp_path / "model"), tmp_path / "expanded", "expanded")
    assert (loaded_logits(tmp_path / "expanded") - loaded_logits(tmp_path / "model")).abs().max() <= 0.05
    assert not (tmp_path / "expanded" / FILE_NAME).exists()


@pytest.mark.parametrize("family", ["granitemoe", "gpt_oss"])
def test_packed_stacks_of_experts_are_compact(family, tiny_model, tmp_path):
    chain = quantized(opened(tiny_model(family, dtype="bfloat16")), tmp_path / "chain")
    assert choose(chain) == "compact"
    export(chain, tmp_path / "model")
    assert torch.equal(loaded_logits(tmp_path / "model"), chain_logits(chain))
    with pytest.raises(UsageError, match="has no packed form for experts that one tensor a layer holds") as caught:
        export(chain, tmp_path / "refused", "stock")
    assert caught.value.hint == "write `export: compact`"
    export(opened(tmp_path / "model"), tmp_path / "expanded", "expanded")
    assert torch.equal(loaded_logits(tmp_path / "expanded"), chain_logits(chain))


def test_experts_saved_as_they_are_in_memory_are_packed_as_stacks(tiny_model, tmp_path):
    """`save_pretrained(save_original_format=False)`: a per-expert family whose file has fused tensors."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model("mixtral", dtype="bfloat16"))
    model.save_pretrained(tmp_path / "source", save_original_format=False)
    chain = quantized(opened(tmp_path / "source"), tmp_path / "chain")
    assert "model.layers.0.mlp.experts.gate_up_proj_packed" in chain
    export(chain, tmp_path / "model")
    assert torch.equal(loaded_logits(tmp_path / "model"), chain_logits(chain))
