"""The sweep on a CUDA device against the CPU, and its memory against one layer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from moecli.engine import fused as fused_module
from moecli.engine.collectors import FORWARD, collectors
from moecli.engine.data import Batch
from moecli.engine.fetch import fetched
from moecli.engine.loader import Loader
from moecli.engine.memory import Plan
from moecli.engine.sweep import sweep
from moecli.families.adapter import decoder_layers, empty_model, load_model, tensor_map
from moecli.io.formats import put_packed, quantization_config
from moecli.io.overlay import OverlayWriter
from moecli.ops.pack import dequantize, quantize_rtn
from tests import tiny
from tests.engine.memory import aliased, open_folder
from tests.engine.texts import random_batches
from tests.ops.grouped_cases import compare, compare_gram

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
Maker = Callable[..., Path]
STATISTICS = [name for name in FORWARD if name != "count"]


def run(source: Any, batches: list[Batch], device: str) -> tuple[dict[int, Any], list[torch.Tensor]]:
    swept = sweep(source, batches, device=device)
    stats = {s.index: s.observe(collectors(FORWARD)) for s in swept if s.is_moe}
    return stats, [logits.float().cpu() for logits in swept.logits()]


def assert_close(left: tuple, right: tuple, rtol: float, atol: float) -> None:
    for layer, stats in left[0].items():
        assert stats.tokens == right[0][layer].tokens
        found, wanted = ({n: side[0][layer][n] for n in STATISTICS} for side in (left, right))
        torch.testing.assert_close(found, wanted, rtol=rtol, atol=atol)
    torch.testing.assert_close(left[1], right[1], rtol=rtol, atol=atol)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_fp32_equals_the_cpu(family: str, tiny_model: Maker) -> None:
    source, batches = open_folder(tiny_model(family)), random_batches()
    on_cpu, on_gpu = run(source, batches, "cpu"), run(source, batches, "cuda")
    assert all(torch.equal(s.count_E, on_gpu[0][i].count_E) for i, s in on_cpu[0].items())
    assert_close(on_gpu, on_cpu, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3", "granitemoe"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_those_of_the_whole_model_on_the_device(family: str, dtype: str, tiny_model: Maker) -> None:
    """Bit for bit in fp32, where the stock modules run. In bf16 norms and routed sums round in another order, which
    moves last bits, and with them a token at the border between two experts.
    """
    source, batches = open_folder(tiny_model(family, dtype=dtype)), random_batches()
    model = load_model(source, "cuda")
    with torch.no_grad():
        expected = [model(input_ids=b.input_ids.cuda(), attention_mask=b.attention_mask.cuda()).logits for b in batches]
    swept = sweep(source, batches, device="cuda")
    for layer in swept:
        if layer.is_moe:
            layer.observe(collectors(FORWARD))
    for found, wanted in zip(swept.logits(), expected, strict=True):
        if dtype == "bfloat16":
            assert relative_error(found, wanted) < 1e-2
        else:
            assert torch.equal(found, wanted)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Any wait for the device is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mode itself warns that it does not see everything
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3", "granitemoe"])
def test_fused_statistics_equal_the_stock_modules(
    family: str, padded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One layer of bf16 weights: the same inputs and the same routing, so only roundings differ."""
    folder = tiny.make(family, tmp_path, dtype="bfloat16", hidden_size=256)
    source, batches = open_folder(folder), random_batches((4, 2), length=32)
    if not padded:
        batches = [Batch(b.input_ids, torch.ones_like(b.attention_mask)) for b in batches]
    discrete = ("count", "topk_idx", "coactivation", "transition")

    def first(fast: bool) -> Any:
        with monkeypatch.context() as patch:
            if not fast:
                patch.setattr(fused_module, "suits", lambda tensor: False)
            for layer in sweep(source, batches, device="cuda"):
                if layer.is_moe:
                    return layer.observe(collectors(FORWARD)), layer.outputs()
        raise AssertionError

    (found, after), (wanted, stock) = first(True), first(False)
    # Norms differ in the last bit, so a token at the border between two experts may change sides.
    assert int((found.count_E - wanted.count_E).abs().sum()) <= 4
    assert float((found["topk_idx"] != wanted["topk_idx"]).double().mean()) < 0.02
    errors = {name: relative_error(found[name], wanted[name]) for name in FORWARD if name not in discrete}
    assert {name: e for name, e in errors.items() if e > (1e-2 if name == "act_sample" else 5e-3)} == {}
    assert max(relative_error(a, b) for a, b in zip(after, stock, strict=True)) < 5e-3


def test_a_layer_is_observed_without_waiting_for_the_device(tiny_model: Maker) -> None:
    source = open_folder(tiny_model("qwen3_moe", dtype="bfloat16"))
    batches = random_batches((2, 2), length=16)
    for layer in sweep(source, batches, device="cuda"):
        layer.observe(collectors(FORWARD))  # compiles, and tries the norms
        some = collectors(FORWARD)
        with no_waiting():
            layer._observe(some)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "width"), [(37, 72), (1000, 768), (64, 2048)])
def test_kernels_equal_their_twins(dtype: torch.dtype, tokens: int, width: int) -> None:
    from moecli.ops.kernels import grouped as fast

    compare(fast, dtype, "cuda", tokens, width)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "width"), [(37, 72), (1000, 768), (3000, 300)])
def test_gram_kernel_equals_its_twin(dtype: torch.dtype, tokens: int, width: int) -> None:
    from moecli.ops.kernels import gram as fast

    compare_gram(fast, dtype, "cuda", tokens, width)


def test_large_tensors_come_whole() -> None:
    for count in (5, 1 << 18, 5 * (16 << 20) // 4 + 7):
        source = torch.arange(count, device="cuda").float().view(-1, 1)
        assert torch.equal(fetched(source), source.cpu())
    turned = torch.randn(700, 900, device="cuda").T
    assert torch.equal(fetched(turned), turned.cpu())


def test_alias_statistics(tiny_model: Maker) -> None:
    small, _ = aliased(open_folder(tiny_model("qwen3_moe")), [6, 1, 3, 4, 7], [0, 1, 1, 2, 3, 0, 0, 4])
    batches = random_batches()
    assert_close(run(small, batches, "cuda"), run(small, batches, "cpu"), rtol=1e-3, atol=1e-3)


def test_two_runs_give_the_same_bytes(tiny_model: Maker) -> None:
    source, batches = open_folder(tiny_model("qwen3_moe", dtype="bfloat16")), random_batches()
    assert_close(run(source, batches, "cuda"), run(source, batches, "cuda"), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_layers_read_ahead_are_the_whole_models_layers(family: str, dtype: str, tiny_model: Maker) -> None:
    source = open_folder(tiny_model(family, dtype=dtype))
    whole = decoder_layers(load_model(source, "cuda"))[1]
    model = empty_model(source.config)
    names = tensor_map(model, source)
    loader = Loader(model, source, names, torch.device("cuda"), ahead=True)
    for index, stock in enumerate(whole):
        layer = loader.load(index)
        mine, wanted = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (layer, stock))
        assert mine.keys() == wanted.keys()
        assert [n for n in mine if mine[n].dtype != wanted[n].dtype or not torch.equal(mine[n], wanted[n])] == []
        loader.free(index)
    loader.close()


def test_packed_weights_are_read_ahead(tiny_model: Maker, tmp_path: Path) -> None:
    source = open_folder(tiny_model("qwen3_moe"))
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    codes, scale = quantize_rtn(source.get(name), bits=4, group_size=32)
    config = {**source.config, "quantization_config": quantization_config(4, 32)}
    with OverlayWriter(tmp_path / "packed", source, config=config) as out:
        out.part("layer", lambda part: put_packed(part, name, codes, scale, 4))
    for layer in sweep(out.checkpoint, random_batches(), device="cuda"):
        if layer.index == 1:
            found = layer.module.mlp.experts.gate_up_proj[5, 32:].cpu()
    assert torch.equal(found, dequantize(codes, scale))


@pytest.mark.parametrize("home", ["pinned", "file"])
def test_where_states_wait_changes_no_bit(home: str, tiny_model: Maker) -> None:
    source, batches = open_folder(tiny_model("qwen3_moe", dtype="bfloat16")), random_batches((4, 3))

    def logits(home: str) -> list[torch.Tensor]:
        swept = sweep(source, batches, device="cuda", plan=Plan(home, 2, True, 1 << 20))
        for layer in swept:
            layer.observe(collectors(["gean_sum"]))
        return list(swept.logits())

    assert all(torch.equal(a, b) for a, b in zip(logits(home), logits("device"), strict=True))


def test_a_device_that_is_too_small_takes_fewer_sequences(tmp_path: Path) -> None:
    """Room for the weights and one or two sequences, by a limit on what torch may take."""
    folder = tiny.make("qwen3_moe", tmp_path, dtype="bfloat16", hidden_size=1024, top_k=8)
    ids = torch.randint(3, 100, (16, 256), generator=torch.Generator().manual_seed(0))
    batches = [Batch(ids, torch.ones_like(ids))]
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    swept = sweep(open_folder(folder), batches, device="cuda", plan=Plan("pinned", 16, True, 0))
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (80 << 20)) / total)
    try:
        tokens = [layer.observe(collectors(["ean_sum"])).tokens for layer in swept]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert tokens == [16 * 256] * 2
    assert swept.notes[0].startswith("layer 0 ran out of memory; from there at most 8 sequences at a time")


@pytest.mark.parametrize("home", ["pinned", "device"])
def test_memory_is_bounded_by_two_layers(home: str, tmp_path: Path, record_property: Any) -> None:
    """Eight layers of 64 experts: the peak is the layer that computes and the one that is read, not eight."""
    folder = tiny.make(
        "qwen3_moe", tmp_path, layers=8, experts=64, dtype="bfloat16", hidden_size=512,
        moe_intermediate_size=256,
    )  # fmt: skip
    source, batches = open_folder(folder), random_batches((4,), length=64)
    layer_bytes = sum(source.spec(n).bytes for n in source.names() if n.startswith("model.layers.0."))

    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for layer in sweep(source, batches, device="cuda", plan=Plan(home, 4, True, 1 << 20)):
        layer.observe(collectors(["gean_sum", "y_mean"]))
    peak = torch.cuda.max_memory_allocated() - before
    record_property("layer_mib", layer_bytes / 2**20)
    record_property("peak_mib", peak / 2**20)
    assert peak < 2 * layer_bytes + (96 << 20) < 8 * layer_bytes
