"""Collectors: any split, order and padding of the text gives the same statistics; samples, traces and transitions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import pad

from moecli.core.artifacts import LayerStats
from moecli.core.errors import StageFailed
from moecli.engine.collectors import CATALOGUE, FORWARD, LayerShape, collectors, joined, token_dim
from moecli.engine.collectors.samples import ActSample, TokReservoir, token_key
from moecli.engine.data import Batch
from moecli.engine.stats import channel_variance
from moecli.engine.sweep import sweep
from tests.engine.memory import aliased, open_folder
from tests.engine.texts import random_batches

Maker = Callable[..., Path]
FAMILIES = ("qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss")
SEQUENCES, LENGTH = 5, 9
SHAPE = LayerShape(experts=4, rows=4, hidden=3, score="softmax", width=2, slots=2, before=0)


def observed(source: Any, batches: Sequence[Batch]) -> list[LayerStats]:
    return [layer.observe(collectors(FORWARD)) for layer in sweep(source, batches) if layer.is_moe]


def text() -> Tensor:
    return torch.randint(3, 100, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(5))


@cache
def in_one_piece(folder: Path) -> list[LayerStats]:
    return observed(open_folder(folder), [Batch(text(), torch.ones_like(text()))])


def assert_near(found: Tensor, wanted: Tensor, name: str) -> None:
    if found.is_floating_point():
        size = max(1.0, float(wanted.abs().max()) if wanted.numel() else 0.0)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * size, msg=lambda m: f"{name}: {m}")
    else:
        assert torch.equal(found, wanted), name


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    family=st.sampled_from(FAMILIES),
    order=st.permutations(range(SEQUENCES)),
    sizes=st.lists(st.integers(1, SEQUENCES), min_size=1, max_size=4),
    padding=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=SEQUENCES, max_size=SEQUENCES),
)
def test_split_order_and_padding_change_nothing(
    family: str, order: list[int], sizes: list[int], padding: list[tuple[int, int]], tiny_model: Maker
) -> None:
    """Sums and maxima do not depend on the order of sequences; rows of samples and traces move with their tokens."""
    source, ids = open_folder(tiny_model(family)), text()
    batches, left = [], list(order)
    while left:
        some, left = left[: sizes[len(batches) % len(sizes)]], left[sizes[len(batches) % len(sizes)] :]
        before, after = zip(*(padding[i] for i in some), strict=True)
        width = LENGTH + max(a + b for a, b in zip(before, after, strict=True))
        fit = [(b, width - LENGTH - b) for b in before]
        batches.append(Batch(
            torch.stack([pad(ids[i], sides, value=7) for i, sides in zip(some, fit, strict=True)]),
            torch.stack([pad(torch.ones_like(ids[i]), sides) for i, sides in zip(some, fit, strict=True)]),
        ))  # fmt: skip
    number = torch.arange(SEQUENCES * LENGTH).view(SEQUENCES, LENGTH)[torch.tensor(order)].flatten()
    for found, wanted in zip(observed(source, batches), in_one_piece(tiny_model(family)), strict=True):
        assert found.tokens == wanted.tokens
        for name in FORWARD:
            assert_near(_in_order(name, found, number), _in_order(name, wanted, None), name)


def _in_order(name: str, stats: LayerStats, number: Tensor | None) -> Tensor:
    """The statistic with tokens in the order of the original text; `number` is where each token came from."""
    dim = token_dim(name, FORWARD[name])
    if dim is None:
        return stats[name]
    tokens = torch.arange(stats.tokens)
    here = token_key(tokens).argsort() if FORWARD[name].reduce == "sample" else tokens
    return stats[name].index_select(dim, (here if number is None else number[here]).argsort())


# --- samples --------------------------------------------------------------------------------------


def test_keys_differ_and_look_random() -> None:
    keys = token_key(torch.arange(200_000))
    assert len(keys.unique()) == len(keys)
    assert int(keys.min()) >= 0
    assert int(keys.max()) < 1 << 63
    assert torch.equal(keys, token_key(torch.arange(200_000))), "the same on every machine and in every version"
    assert token_key(torch.tensor([0, 1, 2**40])).tolist() == PINNED
    first = keys.argsort()[:4096].double()
    assert abs(float(first.mean()) - 100_000) < 3 * 200_000 / 12**0.5 / 64
    for bit in range(63):
        assert abs(float(((keys >> bit) & 1).double().mean()) - 0.5) < 0.01


PINNED = [0xE220A8397B1DCDAF >> 1, 0x6E789E6AA1B965F4 >> 1, 908472852733675961]
"""SplitMix64's published first answers from 0, and another."""


class _Few(TokReservoir):
    tokens = 6


@given(cuts=st.lists(st.integers(0, 40), max_size=5), seed=st.integers(0, 3), turned=st.booleans())
def test_a_sample_depends_on_token_numbers_alone(cuts: list[int], seed: int, turned: bool) -> None:
    x_TD = torch.randn(40, 3, generator=torch.Generator().manual_seed(seed))
    kept = token_key(torch.arange(40)).argsort()[:6]
    edges = sorted({0, 40, *cuts})
    parts = [torch.arange(a, b) for a, b in pairwise(edges)]
    found = sampled(x_TD, parts[::-1] if turned else parts)
    assert torch.equal(found["tok_reservoir"], x_TD[kept])
    assert torch.equal(found["tok_reservoir_key"], token_key(kept))


@given(cut=st.integers(0, 40))
def test_samples_of_parts_join_to_the_sample_of_the_whole(cut: int) -> None:
    x_TD = torch.arange(120.0).view(40, 3)
    one, two = (sampled(x_TD, [part]) for part in (torch.arange(cut), torch.arange(cut, 40)))
    whole = sampled(x_TD, [torch.arange(40)])
    for both in (joined(_Few, one, two), joined(_Few, two, one)):
        assert all(torch.equal(both[name], value) for name, value in whole.items())


def sampled(x_TD: Tensor, parts: Sequence[Tensor]) -> dict[str, Tensor]:
    collector = _Few()
    collector.start(SHAPE, torch.device("cpu"))
    for part in parts:
        collector.update(SimpleNamespace(token_T=part, hidden_TD=x_TD[part]))
    return collector.result()


def test_every_expert_is_sampled_on_the_same_tokens(tiny_model: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_folder(tiny_model("gpt_oss"))
    ids = text()
    large = observed(source, [Batch(ids, torch.ones_like(ids))])
    monkeypatch.setattr(ActSample, "tokens", 4)
    few = observed(source, [Batch(part, torch.ones_like(part)) for part in ids.split(2)])
    for small, whole in zip(few, large, strict=True):
        assert small["act_sample"].shape == (8, 4, 32)
        torch.testing.assert_close(small["act_sample"], whole["act_sample"][:, :4], rtol=1e-4, atol=1e-5)
        assert torch.equal(small["act_sample_key"], whole["act_sample_key"][:4])


def test_results_of_two_texts_join_by_kind() -> None:
    one, two = torch.tensor([1, 5]), torch.tensor([3, 2])
    assert joined(CATALOGUE["count"], {"count": one}, {"count": two})["count"].tolist() == [4, 7]
    assert joined(CATALOGUE["absmax"], {"absmax": one}, {"absmax": two})["absmax"].tolist() == [3, 5]
    assert joined(CATALOGUE["topk_w"], {"topk_w": one}, {"topk_w": two})["topk_w"].tolist() == [1, 5, 3, 2]


# --- routes, channels, aliases --------------------------------------------------------------------


def test_transitions_cross_dense_layers_and_layers_that_nobody_observes(tiny_model: Maker) -> None:
    source, batches = open_folder(tiny_model("qwen3_moe", layers=3)), random_batches()
    stats = observed(source, batches)
    for layer in sweep(source, batches):
        last = layer.observe(collectors(["transition"])) if layer.index == 2 else None
    assert torch.equal(last["transition"], stats[2]["transition"])
    before, after = (s["topk_idx"].long() for s in stats[1:])
    wanted = torch.zeros(8, 8, dtype=torch.int64)
    wanted.index_put_((before[:, :, None].expand(-1, 2, 2), after[:, None].expand(-1, 2, 2)), torch.tensor(1), True)
    assert torch.equal(last["transition"], wanted)
    assert stats[0]["transition"].shape == (0, 8)


def test_transitions_from_a_layer_that_ran_elsewhere_are_refused(tiny_model: Maker) -> None:
    for layer in sweep(open_folder(tiny_model("qwen3_moe")), random_batches((1,))):
        if layer.index == 0:
            layer.settle(layer.made())
        else:
            with pytest.raises(StageFailed, match="where the tokens went in the layer before is not known"):
                layer.observe(collectors(["transition"]))


def test_variance_comes_from_two_sums(tiny_model: Maker) -> None:
    source, batches = open_folder(tiny_model("qwen3_moe")), random_batches()
    stats = observed(source, batches)[0]
    for expert in range(8):
        kept = (stats["topk_idx"] == expert).any(-1).nonzero().flatten()
        sampled_at = token_key(torch.arange(stats.tokens)).argsort().argsort()[kept]
        h_TF = stats["act_sample"][expert, sampled_at].double()
        torch.testing.assert_close(channel_variance(stats)[expert], h_TF.var(0, correction=0), rtol=1e-4, atol=1e-7)


def test_an_alias_model_counts_stored_experts(tiny_model: Maker) -> None:
    alias = torch.tensor([0, 1, 1, 2, 3, 0, 0, 4])
    small, large = aliased(open_folder(tiny_model("qwen3_moe")), [6, 1, 3, 4, 7], alias.tolist())
    batches = random_batches()
    left, right = observed(small, batches)[0], observed(large, batches)[0]
    fold = torch.nn.functional.one_hot(alias).T
    for name in ("prob_routed", "gy_mean"):
        wanted = torch.tensordot(fold.to(right[name].dtype), right[name], 1)
        torch.testing.assert_close(left[name], wanted, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert (left["topk_idx"] == -1).any(), "a token with both slots on one stored expert visits it once"
    x_TD = left["tok_reservoir"][token_key(torch.arange(left.tokens)).argsort().argsort()].double()
    for expert in range(5):
        mine = left["topk_idx"] == expert
        gate_T = (left["topk_w"].double() * mine).sum(-1)
        gram_DD = x_TD[mine.any(-1)].T @ x_TD[mine.any(-1)]
        torch.testing.assert_close(left["x_cov"][expert].double(), gram_DD, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(left["px2"][expert], (gate_T[:, None] * x_TD).square().sum(0), rtol=5e-3, atol=1e-3)
    visits = int((left["topk_idx"] >= 0).sum())
    assert visits == int(left.count_E.sum()) == int(left["coactivation"].diagonal().sum())
    assert float(left["topk_w"].double().sum()) == pytest.approx(float(left.gate_sum_E.sum()), rel=1e-3)
    assert torch.equal(left["entropy"], right["entropy"])
