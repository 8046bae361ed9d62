"""Experts run as factors give what the stock module gives with the factors multiplied out."""

from __future__ import annotations

import pytest
import torch

from moecli.families.alias import make_alias
from moecli.families.factored import FACTOR_PARTS, make_factored
from moecli.ops.lowrank import Factored
from tests import tiny

FAMILIES = [family for family in tiny.FAMILIES if family not in ("gpt_oss", "granitemoe")]
"""Those that store experts one by one."""


def experts_of(family):
    net = tiny.build(family)
    return next(m for name, m in net.named_modules() if name.endswith(".experts"))


def fill(experts, seed=0):
    """Random factors in an empty module; the products by projection."""
    rng, found = torch.Generator().manual_seed(seed), {}
    for name in experts.factor_names:
        values = {}
        for part in FACTOR_PARTS:
            old = getattr(getattr(experts, part), name, None)
            if old is None:
                continue
            if part == "rows_at":
                outputs = getattr(experts.left, name).shape[1]
                new = torch.stack([torch.randperm(outputs, generator=rng)[: old.shape[1]] for _ in old])
            else:
                new = 0.3 * torch.randn(old.shape, generator=rng)
            old.data.copy_(new)
            values[part] = new
        found[name] = Factored(*(values.get(part) for part in FACTOR_PARTS)).expanded()
    return found


def visits(hidden, rows, tokens=37, slots=3, seed=1):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=rng)
    index = torch.stack([torch.randperm(rows - 1, generator=rng)[:slots] for _ in range(tokens)])  # the last: no visit
    return x, index, torch.rand(tokens, slots, generator=rng)


@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_two_thin_products_are_the_product(family, base, rows):
    factored, stock = experts_of(family), experts_of(family)
    projections = [{"name": n, "rank": r, "base": base, "rows": rows} for n, r in (("w1", 4), ("w3", 6), ("w2", 3))]
    make_factored(factored, projections)
    found = fill(factored)
    stock.gate_up_proj.data.copy_(torch.cat([found["w1"], found["w3"]], 1))
    stock.down_proj.data.copy_(found["w2"])
    x, index, weight = visits(tiny.HIDDEN, 8)
    with torch.no_grad():
        torch.testing.assert_close(factored(x, index, weight), stock(x, index, weight), rtol=1e-4, atol=1e-5)
        assert factored(x, index, weight).abs().max() > 0.1


def test_router_rows_may_share_factored_experts():
    alone, shared = experts_of("qwen3_moe"), experts_of("qwen3_moe")
    make_alias(shared, 3, 8)
    shared.alias_map = torch.tensor([2, 0, 1, 1, 0, 2, 2, 1])
    projections = [{"name": n, "rank": 4, "base": True, "rows": 2} for n in ("gate_proj", "up_proj", "down_proj")]
    make_factored(shared, projections)
    fill(shared)
    make_factored(alone, projections)
    for part in FACTOR_PARTS:
        for name in alone.factor_names:
            value = getattr(getattr(shared, part), name)
            copied = value if part == "base" else value[shared.alias_map]
            getattr(getattr(alone, part), name).data.copy_(copied)
    x, index, weight = visits(tiny.HIDDEN, 8)
    with torch.no_grad():
        torch.testing.assert_close(shared(x, index, weight), alone(x, index, weight), rtol=1e-4, atol=1e-5)


def test_no_token_gives_nothing():
    experts = experts_of("qwen3_moe")
    make_factored(experts, [{"name": n, "rank": 2, "base": True, "rows": 1} for n in ("g", "u", "d")])
    fill(experts)
    none = torch.zeros(0, 2, dtype=torch.int64)
    assert experts(torch.zeros(0, tiny.HIDDEN), none, none.float()).shape == (0, tiny.HIDDEN)
