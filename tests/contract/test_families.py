"""Every family keeps its promises: the on-disk side agrees with what transformers computes and loads."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moecli.core.artifacts import Checkpoint, ExpertWeights, PartWriter
from moecli.core.model import ModelSketch
from moecli.families import (
    Family,
    accounting,
    alias_config,
    facts_of,
    family_of,
    forecast_alias,
    forecast_keep,
    forecast_row_drop,
    route,
)
from moecli.io.overlay import OverlayCheckpoint, OverlayWriter
from moecli.io.reader import FolderCheckpoint
from moecli.io.writer import export_folder
from moecli.runner import verify
from tests import tiny

EXPERTS = 8
KEPT = (0, 2, 5, 7)
"""Two of each half, so that two routing groups stay two groups; 0 keeps its number, the others move."""

TinyModel = Callable[..., Path]
families = pytest.mark.parametrize("model_type", tiny.FAMILIES)


def tokens(rows: int = 2, length: int = 24) -> Tensor:
    return torch.randint(4, 100, (rows, length), generator=torch.Generator().manual_seed(1))


def load(folder: Path) -> Any:
    """Stock transformers; nothing may be missing, unexpected or mismatched."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, experts_implementation="eager")
    assert {key: value for key, value in info.items() if value} == {}
    return model.eval()


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    return model(tokens(), use_cache=False).logits


def open_model(folder: Path) -> tuple[FolderCheckpoint, Family]:
    ckpt = FolderCheckpoint(folder, facts_of)
    return ckpt, family_of(ckpt.config)


def change(
    folder: Path, ckpt: Checkpoint, config: Mapping[str, Any], write: Callable[[PartWriter, int], None]
) -> OverlayCheckpoint:
    """An overlay with one part for each MoE layer."""
    with OverlayWriter(folder, ckpt, config) as out:
        for layer in ckpt.facts.moe_layers:
            out.part(f"layer-{layer}", lambda part, layer=layer: write(part, layer))
    return out.checkpoint


def prune(folder: Path, ckpt: Checkpoint, kept: Sequence[int]) -> OverlayCheckpoint:
    family = family_of(ckpt.config)

    def write(part: PartWriter, layer: int) -> None:
        family.keep_experts(part, ckpt, layer, kept)
        family.keep_router_rows(part, ckpt, layer, kept)

    return change(folder, ckpt, family.shrink_config(ckpt.config, len(kept)), write)


def specs_of(ckpt: Checkpoint) -> dict[str, Any]:
    return {name: ckpt.spec(name) for name in ckpt.names()}


Change = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


@contextmanager
def at_experts(model: Any, family: Family, change: Callable[[int], Change]) -> Iterator[None]:
    """Replace what goes into `experts`: (hidden, index, weights) -> the same three."""

    def hook(layer: int) -> Callable[..., Any]:
        def replace_inputs(module: Any, args: Any, kwargs: Any) -> Any:
            named = dict(zip(("hidden", "index", "weights"), (*args, *kwargs.values()), strict=True))
            return change(layer)(**named), {}

        return replace_inputs

    modules = {layer: model.get_submodule(family.experts_module(layer)) for layer in family.facts.moe_layers}
    handles = [m.register_forward_pre_hook(hook(layer), with_kwargs=True) for layer, m in modules.items()]
    yield
    for handle in handles:
        handle.remove()


def router_logits(ckpt: Checkpoint, family: Family, layer: int, hidden_TD: Tensor) -> tuple[Tensor, Tensor | None]:
    """Logits from the tensors on disk, and the correction bias."""
    tensors = {role: family.router_role(ckpt, layer, role) for role in ("weight", "bias", "correction")}
    weight, bias, correction = (ckpt.get(name) if name else None for name in tensors.values())
    return torch.nn.functional.linear(hidden_TD, weight, bias), correction


def assert_same_routing(got: Any, index_Tk: Tensor, weights_Tk: Tensor) -> None:
    """Equal as sets of (expert, weight): the order of slots is free."""
    order, wanted = got.experts_Tk.sort(-1), index_Tk.sort(-1)
    assert torch.equal(order.values, wanted.values)
    torch.testing.assert_close(got.weights_Tk.gather(-1, order.indices), weights_Tk.gather(-1, wanted.indices).float())


# -- reading -----------------------------------------------------------------------------


@families
def test_the_checkpoint_agrees_with_its_config(model_type: str, tiny_model: TinyModel) -> None:
    ckpt, family = open_model(tiny_model(model_type))
    assert accounting(ckpt) == []
    assert family.extra_tensors(ckpt) == []
    assert (family.facts.experts, family.facts.router_rows, family.facts.top_k) == (EXPERTS, EXPERTS, 2)


@families
def test_own_forward_equals_the_module(model_type: str, tiny_model: TinyModel) -> None:
    ckpt, family = open_model(tiny_model(model_type))
    model, layer = load(tiny_model(model_type)), family.facts.moe_layers[-1]
    module = model.get_submodule(family.experts_module(layer))
    # Large enough to reach gpt_oss's clamp.
    x_TD = 4 * torch.randn(5, tiny.HIDDEN, generator=torch.Generator().manual_seed(2))
    stacked = family.expert_forward(family.read_experts(ckpt, layer), x_TD)
    for expert in range(EXPERTS):
        with torch.no_grad():
            wanted = module(x_TD, torch.full((5, 1), expert), torch.ones(5, 1))
        own = family.expert_forward(family.read_expert(ckpt, layer, expert), x_TD)
        torch.testing.assert_close(own, wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(stacked[expert], own, rtol=1e-5, atol=1e-5)


@families
def test_route_equals_what_the_router_hands_to_its_experts(model_type: str, tiny_model: TinyModel) -> None:
    ckpt, family = open_model(tiny_model(model_type))
    seen = []

    def compare(layer: int) -> Change:
        def check(hidden: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            assert_same_routing(family.route(*router_logits(ckpt, family, layer, hidden)), index, weights)
            seen.append(layer)
            return hidden, index, weights

        return check

    model = load(tiny_model(model_type))
    with at_experts(model, family, compare):
        logits_of(model)
    assert seen == list(family.facts.moe_layers)


@families
def test_linears_name_every_matrix_with_its_role(model_type: str, tiny_model: TinyModel) -> None:
    ckpt, family = open_model(tiny_model(model_type))
    linears = list(family.linears(ckpt))
    names = [linear.name for linear in linears]
    matrices = {n for n in ckpt.names() if len(ckpt.spec(n).shape) == 2 and n.endswith(".weight")}
    assert {n for n in names if len(ckpt.spec(n).shape) == 2} == matrices - {"model.embed_tokens.weight"}
    of_role = {role: {x.name for x in linears if x.role == role} for role in {x.role for x in linears}}
    moe = family.facts.moe_layers
    each = [n for layer in moe for e in range(EXPERTS) for n in family.expert_names(layer, e)]
    assert of_role["expert"] == {n for n in each if len(ckpt.spec(n).shape) == 3 or n.endswith(".weight")}
    assert of_role.get("shared", set()) == {n for layer in moe for n in family.shared_names(layer)}
    weights = {family.router_role(ckpt, layer, "weight") for layer in moe}
    assert of_role["router"] - weights == {n for n in names if n.endswith("shared_expert_gate.weight")}
    assert weights <= of_role["router"]
    assert all("mlp." in n or "feed_forward." in n for n in of_role.get("dense", ()))


# -- writing -----------------------------------------------------------------------------


@families
def test_write_then_read_is_the_identity(model_type: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    ckpt, family = open_model(tiny_model(model_type))

    def write(part: PartWriter, layer: int) -> None:
        experts = [family.read_expert(ckpt, layer, e) for e in range(EXPERTS)]
        family.write_experts(part, ckpt, layer, [ExpertWeights(*map(_double, e)) for e in experts])

    written = change(tmp_path / "overlay", ckpt, ckpt.config, write)
    assert list(written.names()) == list(ckpt.names())
    assert set(written.written()) == {
        n for layer in family.facts.moe_layers for e in range(EXPERTS) for n in family.expert_names(layer, e)
    }
    assert all(torch.equal(written.get(name), ckpt.get(name)) for name in ckpt.names())


def _double(tensor: Tensor | None) -> Tensor | None:
    """Arithmetic in float64 is rounded back to the file's dtype."""
    return None if tensor is None else tensor.double()


@families
def test_dropping_nothing_gives_identical_logits(model_type: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    ckpt, _ = open_model(tiny_model(model_type))
    pruned = prune(tmp_path / "overlay", ckpt, range(EXPERTS))
    export_folder(pruned, tmp_path / "model")
    assert torch.equal(logits_of(load(tmp_path / "model")), logits_of(load(tiny_model(model_type))))


@families
def test_a_pruned_model_loads_and_equals_the_original_routed_among_the_kept(
    model_type: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    ckpt, family = open_model(tiny_model(model_type))
    pruned = prune(tmp_path / "overlay", ckpt, KEPT)
    export_folder(pruned, tmp_path / "model")
    kept = torch.tensor(KEPT)

    def among_kept(layer: int) -> Change:
        def reroute(hidden: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logits_TE, bias_E = router_logits(ckpt, family, layer, hidden)
            bias_K = None if bias_E is None else bias_E.flatten()[kept]
            routing = family_of(pruned.config).route(logits_TE[:, kept], bias_K)
            return hidden, kept[routing.experts_Tk], routing.weights_Tk

        return reroute

    original = load(tiny_model(model_type))
    with at_experts(original, family, among_kept):
        wanted = logits_of(original)
    got = logits_of(load(tmp_path / "model"))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert (got - logits_of(original)).abs().max() > 1e-3


@pytest.mark.parametrize("model_type", ["deepseek_v3", "glm4_moe", "minimax_m2", "lfm2_moe", "gpt_oss"])
def test_a_pruned_model_equals_the_original_with_dropped_experts_masked(
    model_type: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """Nothing of ours computes here: a bias of -1e9 keeps stock routers away from the dropped experts.

    Exact for independent (sigmoid) scores and for softmax over the chosen. Not for ernie4_5_moe: its bias is
    added to softmax probabilities, which grow when experts go, so the selection among the kept ones shifts.
    """
    ckpt, family = open_model(tiny_model(model_type))
    pruned = prune(tmp_path / "overlay", ckpt, KEPT)
    export_folder(pruned, tmp_path / "model")
    masked = load(tiny_model(model_type))
    named = dict(masked.named_parameters()) | dict(masked.named_buffers())
    biases = [t for n, t in named.items() if n.endswith(("correction_bias", "expert_bias", "router.bias"))]
    assert len(biases) == len(family.facts.moe_layers)
    dropped = [e for e in range(EXPERTS) if e not in KEPT]
    with torch.no_grad():
        for bias in biases:
            bias[..., dropped] = -1e9
    torch.testing.assert_close(logits_of(load(tmp_path / "model")), logits_of(masked), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "granitemoe", "gpt_oss"])
def test_masked_logits_route_as_cut_ones(model_type: str, tiny_model: TinyModel) -> None:
    _, family = open_model(tiny_model(model_type))
    logits_TE = torch.randn(50, EXPERTS, generator=torch.Generator().manual_seed(3))
    kept = torch.tensor(KEPT)
    masked_TE = torch.full_like(logits_TE, float("-inf"))
    masked_TE[:, kept] = logits_TE[:, kept]
    whole, cut = family.route(masked_TE), route(logits_TE[:, kept], None, family.rule)
    assert_same_routing(whole, kept[cut.experts_Tk], cut.weights_Tk)


@families
def test_in_memory_names_on_disk_prune_alike(model_type: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    """Checkpoints saved with `save_original_format=False` hold fused tensors under in-memory names."""
    load(tiny_model(model_type)).save_pretrained(tmp_path / "fused", save_original_format=False)
    fused, family = open_model(tmp_path / "fused")
    ckpt, _ = open_model(tiny_model(model_type))
    assert accounting(fused) == []
    layer = family.facts.moe_layers[0]
    for expert in (0, EXPERTS - 1):
        pairs = zip(family.read_expert(fused, layer, expert), family.read_expert(ckpt, layer, expert), strict=True)
        assert all(a is b is None or torch.equal(a, b) for a, b in pairs)
    for name, source in (("a", fused), ("b", ckpt)):
        export_folder(prune(tmp_path / f"overlay-{name}", source, KEPT), tmp_path / name)
    assert torch.equal(logits_of(load(tmp_path / "a")), logits_of(load(tmp_path / "b")))


# -- forecasts ---------------------------------------------------------------------------


@families
def test_forecasts_equal_what_really_happens(model_type: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    ckpt, _ = open_model(tiny_model(model_type, dtype="bfloat16"))
    sketch = ModelSketch(ckpt.facts, ckpt.config, specs_of(ckpt), planned=4)

    pruned = prune(tmp_path / "pruned", ckpt, KEPT)
    forecast = forecast_keep(sketch, len(KEPT))
    assert forecast == ModelSketch(pruned.facts, pruned.config, specs_of(pruned))

    merged = merge(tmp_path / "merged", ckpt, [0, 1, 2, 3, 0, 1, 2, 3])
    forecast = forecast_alias(sketch, 4)
    assert forecast == ModelSketch(merged.facts, merged.config, specs_of(merged))
    assert (forecast.facts.experts, forecast.facts.router_rows) == (4, EXPERTS)
    assert accounting(merged) == []

    dropped = drop_rows(tmp_path / "dropped", merged, [0, 1, 6, 7])
    assert forecast_row_drop(forecast) == ModelSketch(dropped.facts, dropped.config, specs_of(dropped))
    assert forecast_row_drop(forecast).specs == forecast_keep(sketch, 4).specs
    without = forecast_keep(ModelSketch(ckpt.facts, ckpt.config), 4)
    assert without == replace(forecast_keep(sketch, 4), specs={})


def merge(folder: Path, ckpt: Checkpoint, group_E: list[int]) -> OverlayCheckpoint:
    family = family_of(ckpt.config)
    groups = range(max(group_E) + 1)

    def write(part: PartWriter, layer: int) -> None:
        firsts = [family.read_expert(ckpt, layer, group_E.index(g)) for g in groups]
        family.write_experts(part, ckpt, layer, firsts)
        part.put(family.alias_name(layer), torch.tensor(group_E))

    return change(folder, ckpt, alias_config(ckpt.config, dict.fromkeys(ckpt.facts.moe_layers, len(groups))), write)


def drop_rows(folder: Path, ckpt: Checkpoint, leads: list[int]) -> OverlayCheckpoint:
    family = family_of(ckpt.config)

    def write(part: PartWriter, layer: int) -> None:
        family.keep_router_rows(part, ckpt, layer, leads)
        part.drop(family.alias_name(layer), "rows match")

    return change(folder, ckpt, family.shrink_config(ckpt.config, len(leads)), write)


# -- a process that knows nothing of ours ------------------------------------------------

_LOADER = """
import json, sys
from transformers import AutoModelForCausalLM
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
print(json.dumps([sorted(key for key, value in info.items() if value), "moecli" in sys.modules]))
"""


def test_a_pruned_model_loads_in_a_fresh_process(tiny_model: TinyModel, tmp_path: Path) -> None:
    ckpt, _ = open_model(tiny_model("qwen3_moe"))
    export_folder(prune(tmp_path / "overlay", ckpt, KEPT), tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["num_local_experts"] == len(KEPT)
    done = verify.run_python(_LOADER, [str(tmp_path / "model")], tmp_path, os.environ)
    assert json.loads(done.stdout.splitlines()[-1]) == [[], False]
