"""Corrections as PEFT files: what is written, that verification notices damage, and what PEFT makes of them."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from moecli.core.artifacts import BitPlan, CalibrationText
from moecli.families import adapter, facts_of
from moecli.io.formats import DenseView, corrected_weights, factor_names, packed_weights
from moecli.io.overlay import OverlayCheckpoint, OverlayWriter
from moecli.io.reader import FolderCheckpoint
from moecli.methods.quantize.rtn import Rtn, rtn
from moecli.ops.correction import correction
from moecli.runner.adapters import CONFIG, FOLDER, WEIGHTS
from moecli.runner.export import choose, export
from moecli.runner.gather import size_of
from moecli.runner.verify import verify
from tests.methods.conftest import HandContext


@pytest.fixture
def corrected_model(tiny_model, tmp_path):
    """`corrected_model(roles)`: a rounded model with factors of rank 4 beside its weights of these roles."""

    def make(roles, plan=None):
        source = FolderCheckpoint(tiny_model("qwen3_moe"), facts_of)
        ctx = HandContext(tmp_path / "stages" / "quantize-rtn" / "0")
        rtn(Rtn(bits=3, group_size=16), source, plan, ctx)
        packed = ctx.finish(source)
        names = [x.name for x in adapter.family_of(source.config).linears(source) if x.role in roles]
        dense = DenseView(packed)
        with OverlayWriter(tmp_path / "corrected", packed) as out:
            for name in names:
                lost = source.get(name) - dense.get(name)
                found = correction(lost[None], torch.ones(1, lost.shape[-1]), 4)
                names_of = factor_names(name)

                def write(part, found=found, names_of=names_of, dtype=lost.dtype):
                    part.put(names_of.a, found.a_ErC[0].to(dtype))
                    part.put(names_of.b, found.b_ERr[0].to(dtype))

                out.part(name, write)
        return OverlayCheckpoint(tmp_path / "corrected", packed), source

    return make


def test_the_folder_holds_the_packed_model_and_the_factors_beside_it(corrected_model, tmp_path):
    model, _ = corrected_model(("expert", "attention"))
    export(model, tmp_path / "model")
    folder = FolderCheckpoint(tmp_path / "model", facts_of)
    assert set(folder.names()) == set(model.parent.names())
    stored = load_file(tmp_path / "model" / FOLDER / WEIGHTS)
    assert len(stored) == 2 * len(corrected_weights(model.names()))
    for module in ("self_attn.q_proj", "mlp.experts.3.down_proj"):
        names = factor_names(f"model.layers.1.{module}.weight")
        for letter, name in (("A", names.a), ("B", names.b)):
            assert torch.equal(
                stored[f"base_model.model.model.layers.1.{module}.lora_{letter}.weight"], model.get(name)
            )
    config = json.loads((tmp_path / "model" / FOLDER / CONFIG).read_text())
    assert config["r"] == config["lora_alpha"] == 4 and config["rank_pattern"] == {}
    assert len(config["target_modules"]) == len(stored) // 2
    assert verify(tmp_path / "model", model).status == "passed"
    factors = sum(value.nbytes for value in stored.values())
    assert size_of(model).bytes == size_of(model.parent).bytes + factors


def test_damage_is_noticed(corrected_model, tmp_path):
    model, _ = corrected_model(("attention",))
    export(model, tmp_path / "model")
    file = tmp_path / "model" / FOLDER / WEIGHTS
    stored = load_file(file)
    first, second, *_ = stored
    save_file(stored | {first: stored[first] + 1}, file)
    assert problems_of(model, tmp_path) == [f"`{first}` of the adapter differs from the stage that wrote it"]
    save_file({name: value for name, value in stored.items() if name != second} | {"more": stored[first] + 0}, file)
    assert problems_of(model, tmp_path) == [
        f"`{second}` is missing from the adapter", "`more` is in the adapter, but no stage wrote it",
    ]  # fmt: skip
    file.unlink()
    assert problems_of(model, tmp_path) == [f"`{FOLDER}/{WEIGHTS}` is missing"]


def problems_of(model, tmp_path):
    found = verify(tmp_path / "model", model, free_bytes=0)
    assert [check.status for check in found.checks if check.name == "adapter"] == ["failed"]
    return list(found.problems)


def test_expanded_weights_have_the_correction_in_them(corrected_model, tmp_path):
    model, _ = corrected_model(("expert", "attention"))
    export(model, tmp_path / "model", "expanded")
    folder = FolderCheckpoint(tmp_path / "model", facts_of)
    assert not (tmp_path / "model" / FOLDER).exists() and not packed_weights(folder.names())
    dense = DenseView(model)
    assert all(torch.equal(folder.get(name), dense.get(name)) for name in dense.names())
    assert verify(tmp_path / "model", model, kind="expanded").status == "passed"


def test_the_compact_form_has_its_factors_beside_it_too(corrected_model, tmp_path):
    """Experts of different bits."""
    plan = BitPlan({layer: torch.tensor([[2, 2], [4, 4]] * 4) for layer in (0, 1)})
    model, _ = corrected_model(("expert",), plan)
    assert choose(model) == "compact"
    export(model, tmp_path / "model")
    assert verify(tmp_path / "model", model, free_bytes=0).problems == ()
    assert len(load_file(tmp_path / "model" / FOLDER / WEIGHTS)) == 2 * len(corrected_weights(model.names()))


def test_peft_computes_what_moecli_computes(corrected_model, tmp_path):
    """Attention of the exported folder, packed, as transformers and PEFT load it."""
    peft = pytest.importorskip("peft", reason="the package `peft` is not installed")
    from transformers import AutoModelForCausalLM

    model, _ = corrected_model(("attention",))
    export(model, tmp_path / "model")
    ids = CalibrationText(torch.arange(5, 45)[None], torch.ones(1, 40), "").ids
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
        before = base(ids).logits
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "model" / FOLDER)
        found = loaded(ids).logits
    wanted = adapter.load_model(model, "cpu", torch.float32)(ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert (before - wanted).abs().max() > 1e-2
