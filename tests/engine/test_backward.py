"""A swept way back is autograd through the whole model; one micro-batch in one layer is all its graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moecli.core.errors import StageFailed, UsageError
from moecli.engine import backward as module
from moecli.engine.backward import Room, backward_sweep, next_tokens
from moecli.engine.collectors.gradients import GRADIENTS
from moecli.engine.data import Batch
from moecli.engine.memory import Plan
from moecli.families.adapter import load_model
from tests import tiny
from tests.engine import gradient_oracle
from tests.engine.memory import MemoryCheckpoint, aliased, open_folder
from tests.engine.texts import random_batches

Maker = Callable[..., Path]
NAMES = tuple(kind.name for kind in GRADIENTS)


def found_in(source: Any, batches: list[Batch], **options: Any) -> tuple[float, dict[int, dict[str, torch.Tensor]]]:
    swept = backward_sweep(source, batches, **options)
    if options.get("dtype") == torch.float64:  # on the way there: grouped products know no float64
        swept._model.set_experts_implementation("eager")
    stats = {layer.index: layer.observe(kind() for kind in GRADIENTS) for layer in swept.back() if layer.is_moe}
    values = {i: {n: s[n] for n in ("count", "gate_sum", *NAMES)} | {"n": s.tokens} for i, s in stats.items()}
    return swept.loss, dict(sorted(values.items()))


def assert_same(found: Any, expected: Any, rtol: float) -> None:
    """Relative to the largest value of each statistic: single channels may be anything near 0."""
    assert found[0] == pytest.approx(expected[0], rel=rtol)
    assert list(found[1]) == list(expected[1])
    for layer, stats in found[1].items():
        for name in (*NAMES, "gate_sum"):
            wanted = expected[1][layer][name].double()
            assert float(wanted.abs().max()) > 0
            near = max(rtol, 1e-6) if name == "gate_sum" else rtol  # weights are read as float32
            torch.testing.assert_close(
                stats[name].double(), wanted, rtol=0, atol=near * float(wanted.abs().max()), msg=f"{layer} {name}"
            )
        assert torch.equal(stats["count"].double(), expected[1][layer]["count"].double())


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 2e-5), (torch.float64, 1e-11)])
def test_gradients_are_those_of_the_whole_model(
    family: str, dtype: torch.dtype, rtol: float, tiny_model: Maker
) -> None:
    if dtype == torch.float64 and family not in ("qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss"):
        pytest.skip("float64 is compared on four families")
    source, batches = open_folder(tiny_model(family)), random_batches((4, 1), length=16)
    expected = gradient_oracle.statistics(load_model(source, dtype=dtype), source, batches)
    found = found_in(source, batches, dtype=dtype)
    assert_same(found, expected, rtol)
    assert {stats["n"] for stats in found[1].values()} == {sum(int(b.attention_mask.sum()) for b in batches)}


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_an_alias_model_counts_a_token_once(family: str, tiny_model: Maker) -> None:
    """Two slots of a token on one stored expert are one visit: the expanded model is given one expert in its place."""
    alias = [0, 1, 1, 2, 3, 0, 0, 4]
    small, large = aliased(open_folder(tiny_model(family)), [6, 1, 3, 4, 7], alias)
    batches = random_batches((4,), length=12)
    loss, stats = found_in(small, batches)
    expected = gradient_oracle.statistics(load_model(large), large, batches)
    assert loss == pytest.approx(expected[0], rel=1e-5)
    twice = 0
    for layer, found in stats.items():
        folded = {
            n: v.new_zeros(5, *v.shape[1:]).index_add(0, torch.tensor(alias), v) for n, v in expected[1][layer].items()
        }
        here = int(folded["count"].sum()) - int(found["count"].sum())
        twice += here
        for name in ("hgh", "gate_sum"):  # linear in the gradient: one visit with both weights is both visits
            torch.testing.assert_close(found[name].double(), folded[name], rtol=1e-4, atol=1e-5)
        for name in ("gh2", "hgh2"):
            torch.testing.assert_close(found[name][4], folded[name][4], rtol=1e-4, atol=1e-6)  # of one router row
            assert torch.allclose(found[name], folded[name], rtol=1e-3, atol=1e-6) == (here == 0)
    assert twice > 0


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_batches_order_padding_and_chunks_change_nothing(
    family: str, tiny_model: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_folder(tiny_model(family))
    ids = torch.randint(3, 100, (4, 12), generator=torch.Generator().manual_seed(1))
    one = [Batch(ids, torch.ones_like(ids))]
    expected = found_in(source, one)

    split = [Batch(part, torch.ones_like(part)) for part in ids.split(1)]
    turned = [Batch(ids.flip(0), torch.ones_like(ids))]
    right = torch.nn.functional.pad(ids, (0, 5), value=7)
    left = torch.nn.functional.pad(ids, (4, 0), value=7)
    padded = [
        Batch(right[:2], (torch.arange(17) < 12).long().expand(2, 17)),
        Batch(left[2:], (torch.arange(16) >= 4).long().expand(2, 16)),
    ]
    small = Plan("memory", 2, False, 0)
    for other, plan in ((split, None), (turned, None), (padded, None), (one, small)):
        assert_same(found_in(source, other, plan=plan), expected, 1e-4)
    monkeypatch.setattr(module, "HEAD_BYTES", 5 * 4 * tiny.VOCAB)  # five tokens a chunk
    assert_same(found_in(source, one), expected, 1e-4)


def test_tokens_left_out_are_in_the_loss_and_in_no_statistic(tiny_model: Maker) -> None:
    source, batches = open_folder(tiny_model("mixtral")), random_batches((3,))
    left_out = batches[0].input_ids % 3 == 0
    found = found_in(source, [Batch(batches[0].input_ids, batches[0].attention_mask, left_out)])
    model = load_model(source)
    expected = gradient_oracle.statistics(model, source, batches, left_out)
    assert int((left_out & (batches[0].attention_mask != 0)).sum()) > 0
    assert_same(found, expected, 2e-5)


def test_states_may_wait_in_files(tiny_model: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, batches = open_folder(tiny_model("qwen3_moe")), random_batches((3, 2))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    expected = found_in(source, batches, plan=Plan("memory", 2, False, 0))
    size = 3 * 20 * tiny.HIDDEN * 4
    for room in (Room(0, 0), Room(0, size)):
        swept = backward_sweep(source, batches, plan=Plan("file", 2, False, 1 << 20), room=room)
        stats = {s.index: s.observe(kind() for kind in GRADIENTS) for s in swept.back() if s.is_moe}
        assert swept.loss == expected[0]
        assert all(torch.equal(stats[i][name], expected[1][i][name]) for i in stats for name in NAMES)
        assert swept._kept.held["memory"] <= room.memory < swept._kept.files
        assert any("in files" in line for line in swept.report())
    assert list(tmp_path.iterdir()) == []


def test_running_out_of_memory_halves_and_loses_nothing(tiny_model: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    source, batches = open_folder(tiny_model("mixtral")), random_batches((5, 3))
    expected = found_in(source, batches)
    pull, failures = module.BackLayer._pull, iter([(1, 1), (0, 2)])
    at = [next(failures)]

    def fail_twice(self: Any, index: int, state: torch.Tensor) -> torch.Tensor:
        if at and at[0] == (self.index, index):
            at[:] = [f for f in [next(failures, None)] if f]
            raise torch.OutOfMemoryError("out of memory")
        return pull(self, index, state)

    monkeypatch.setattr(module.BackLayer, "_pull", fail_twice)
    swept = backward_sweep(source, batches)
    stats = {s.index: s.observe(kind() for kind in GRADIENTS) for s in swept.back()}
    found = {i: {n: s[n] for n in ("count", "gate_sum", *NAMES)} for i, s in sorted(stats.items())}
    assert_same((swept.loss, found), expected, 1e-5)
    assert len(swept.notes) == 2
    assert "from there at most 2 sequences" in swept.notes[0]
    assert "from there at most 1 sequence at" in swept.notes[1]


def test_one_sequence_that_does_not_fit(tiny_model: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(self: Any, index: int, state: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(module.BackLayer, "_pull", never)
    with pytest.raises(StageFailed, match="out of memory with one sequence at a time") as caught:
        found_in(open_folder(tiny_model("mixtral")), random_batches((2,)))
    assert caught.value.where == "layer 1, backward"


def test_gradients_of_hidden_states_are_those_of_the_whole_model(tiny_model: Maker) -> None:
    source, batches = open_folder(tiny_model("deepseek_v3")), random_batches((4,))
    model, kept = load_model(source), []

    def keep(layer: Any, args: Any, out: torch.Tensor) -> None:
        out.retain_grad()
        kept.append(out)

    for layer in model.model.layers:
        layer.register_forward_hook(keep)
    gradient_oracle._loss(model, batches[0]).backward()
    for layer in backward_sweep(source, batches).back():
        torch.testing.assert_close(layer.output_grads()[0], kept[layer.index].grad, rtol=1e-4, atol=1e-6)
        if layer.index:
            torch.testing.assert_close(layer.input_grads()[0], kept[layer.index - 1].grad, rtol=1e-4, atol=1e-6)


def test_the_way_there_is_a_sweep(tiny_model: Maker) -> None:
    """Both ways in one go, and the way back alone, give the same; observing twice changes nothing."""
    source, batches = open_folder(tiny_model("qwen3_moe")), random_batches()
    swept = backward_sweep(source, batches)
    there = [layer.observe().count_E for layer in swept]
    for layer in swept.back():
        first, second = (layer.observe(kind() for kind in GRADIENTS) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in NAMES)
        assert torch.equal(first.count_E, there[layer.index])
        real = {n.split(".")[2] for n, p in swept._model.named_parameters() if not p.is_meta}
        assert real == {str(layer.index)}
        assert not any(p.requires_grad for p in layer.module.parameters())
    with pytest.raises(RuntimeError, match="a sweep goes back once"):
        next(swept.back())


def test_a_way_there_that_stopped_has_no_way_back(tiny_model: Maker) -> None:
    swept = backward_sweep(open_folder(tiny_model("qwen3_moe")), random_batches())
    for _ in swept:
        break
    with pytest.raises(RuntimeError, match="0 of 2 layers have run"):
        next(swept.back())


def test_targets_are_next_tokens_that_are_there() -> None:
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8], [5, 6, 7, 8]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 0, 0]])
    none = module.IGNORED
    wanted = [[6, 7, 8, none], [none, 7, 8, none], [6, none, none, none]]
    assert next_tokens(Batch(ids, mask)).tolist() == wanted


def test_float16_is_refused(tiny_model: Maker) -> None:
    with pytest.raises(UsageError, match="gradients leave the range of float16"):
        backward_sweep(open_folder(tiny_model("qwen3_moe")), random_batches(), dtype=torch.float16)


def test_a_model_whose_loss_is_no_number_is_refused(tiny_model: Maker) -> None:
    source = MemoryCheckpoint.of(open_folder(tiny_model("qwen3_moe")))
    source.tensors["model.norm.weight"] = source.tensors["model.norm.weight"] * float("nan")
    with pytest.raises(StageFailed, match="the loss on the calibration text is not a number"):
        next(backward_sweep(source, random_batches()).back())


def test_text_without_a_next_token_is_refused(tiny_model: Maker) -> None:
    with pytest.raises(StageFailed, match="no token of the calibration text has a next one"):
        next(backward_sweep(open_folder(tiny_model("qwen3_moe")), random_batches((3,), length=1)).back())


def test_a_forward_sweep_does_not_feed_gradients(tiny_model: Maker) -> None:
    layers = iter(backward_sweep(open_folder(tiny_model("qwen3_moe")), random_batches()))
    layer = next(layers)
    with pytest.raises(TypeError, match="`gh2` is collected by a backward sweep"):
        layer.observe([GRADIENTS[0]()])
