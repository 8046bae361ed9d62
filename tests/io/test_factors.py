"""Experts stored as factors read as the weights they stand for."""

from __future__ import annotations

import pytest
import torch

from moecli.core.artifacts import sketch_of
from moecli.families import facts_of
from moecli.families.products import factor_config
from moecli.io.factors import FACTORS_KEY, factor_specs, factor_tensors, put_factors, unfactored
from moecli.io.overlay import OverlayWriter
from moecli.io.reader import FolderCheckpoint
from moecli.ops.lowrank import Factored

RANK, ROWS = 3, 2


def factored(source, folder, base=True, rows=ROWS, dtype=torch.float32, seed=0):
    """Every expert as random factors, and these by (layer, projection)."""
    rng, found = torch.Generator().manual_seed(seed), {}
    config = factor_config(source.config, source, lambda o, i: {"rank": RANK, "base": base, "rows": rows})
    with OverlayWriter(folder, source, config=config) as out:

        def write(part):
            for layer, entry in config[FACTORS_KEY].items():
                for index, projection in enumerate(entry["projections"]):
                    facts, e = source.facts, entry["experts"]
                    o, i = (facts.hidden, facts.expert_width)[:: 1 if index == 2 else -1]
                    draw = lambda *shape: 0.2 * torch.randn(shape, generator=rng).to(dtype)  # noqa: E731
                    at = torch.stack([torch.randperm(o, generator=rng)[:rows].sort().values for _ in range(e)])
                    values = Factored(
                        draw(e, o, RANK), draw(e, RANK, i), draw(o, i) if base else None,
                        draw(e, rows, i) if rows else None, at if rows else None,
                    )  # fmt: skip
                    put_factors(part, entry, projection["name"], values)
                    found[int(layer), projection["name"]] = values

        out.part("all", write)
    return out.checkpoint, found


@pytest.mark.parametrize(("family", "names"), [("qwen3_moe", ("gate_proj", "up_proj", "down_proj")),
                                               ("mixtral", ("w1", "w3", "w2"))])  # fmt: skip
@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("rows", [0, 2])
def test_a_view_reads_the_products_under_the_old_names(family, names, base, rows, tiny_model, tmp_path):
    source = FolderCheckpoint(tiny_model(family), facts_of)
    small, found = factored(source, tmp_path / "small", base, rows)
    view = unfactored(small)
    assert tuple(view.names()) == tuple(source.names())
    assert {n: view.spec(n) for n in view.names()} == {n: source.spec(n) for n in source.names()}
    assert (view.config, view.facts) == (source.config, source.facts)
    block = {"qwen3_moe": "mlp", "mixtral": "block_sparse_moe"}[family]
    for layer in (0, 1):
        for name in names:
            dense = found[layer, name].expanded()
            for expert in (0, 5):
                weight = f"model.layers.{layer}.{block}.experts.{expert}.{name}.weight"
                assert torch.equal(view.get(weight), dense[expert])
                assert torch.equal(view.rows(weight, 3, 7), dense[expert, 3:7])
                assert view.origin(weight) == ("own", weight)
    norm = "model.norm.weight"
    assert torch.equal(view.get(norm), source.get(norm))
    assert view.origin(norm) == ("source", norm)
    with pytest.raises(KeyError):
        view.get("model.layers.0.mlp.experts.8.gate_proj.weight")


def test_specs_are_told_without_a_weight(tiny_model, tmp_path):
    source = FolderCheckpoint(tiny_model("mixtral", dtype="bfloat16"), facts_of)
    small, _ = factored(source, tmp_path / "small", dtype=torch.bfloat16)
    specs = dict(sketch_of(source).specs)
    for entry in small.config[FACTORS_KEY].values():
        specs = factor_specs(specs, entry)
    assert specs == {n: small.spec(n) for n in small.names()}
    assert list(specs) == list(small.names())


def test_names_of_what_is_there(tiny_model):
    source = FolderCheckpoint(tiny_model("qwen3_moe"), facts_of)
    config = factor_config(source.config, source, lambda o, i: {"rank": 2, "base": o > i, "rows": int(o < i)})
    entry = config[FACTORS_KEY]["1"]
    prefix = "model.layers.1.mlp.experts"
    assert factor_tensors(entry, "down_proj") == {
        part: f"{prefix}.{part}.down_proj" for part in ("left", "right", "base")
    }
    assert list(factor_tensors(entry, "up_proj")) == ["left", "right", "rows", "rows_at"]


def test_a_checkpoint_without_factors_is_returned_as_it_is(tiny_model):
    source = FolderCheckpoint(tiny_model("qwen3_moe"), facts_of)
    assert unfactored(source) is source


def test_experts_in_one_tensor_have_no_factors(tiny_model):
    from moecli.core.errors import MoecliError

    source = FolderCheckpoint(tiny_model("granitemoe"), facts_of)
    with pytest.raises(MoecliError, match="holds all experts of a layer in one tensor") as caught:
        factor_config(source.config, source, lambda o, i: {"rank": 2, "base": False, "rows": 0})
    assert caught.value.hint == "write `form: expanded`"
