"""Round routers to 8 bits with the clip ratios that keep the best experts' probabilities (EAQuant's router alignment).

One symmetric scale for each router row, r max|w| / ((2^bits - 1) / 2), r one of 101 ratios in [0.35, 1], chosen by

    KL = mean over tokens of sum over i in top_t of p_ti (log p_ti - log q_ti)

p and q the softmax over all rows before and after rounding, top_t the k' best experts before, not renormalised, so that
KL may be negative. k' = k with `top: 0` (`kl_top0`) and grows to all experts with `top: 1`. Sigmoid routers are
compared by the softmax of their logits all the same; top_t then goes by the scores that choose, correction bias
included.

How ratios are searched (`search`): published code adds the one KL to the score of every row, so that all rows get the
same ratio, which `joint` is. `each` goes on from there row by row while the others stay, which never raises KL.
`weights` takes each row's least squared error of weights and looks at no token.

Layers run in order and each is fitted on what those with rounded routers before it make, on the 4,096 tokens of
`tok_reservoir`. The values of the grid are written in the router's own type and shape, so everything loads as before
and nothing is smaller: what a router in 8 bits would save is a thousandth of a model. EAQuant rounds inputs of the
router too; here they stay.

It stands among the `router/...` stages for what it changes: which experts are chosen. It may stand above or below
`quantize/...`.

Source: arXiv 2506.13329.

- run: router/eaquant-align
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from moecli.core.artifacts import Artifact, CalibrationText, Checkpoint, Packed, PartWriter
from moecli.core.context import Context
from moecli.core.stage import Options, RunSetting, stage
from moecli.engine.collectors import collectors
from moecli.engine.data import batches_of
from moecli.engine.sweep import SweptLayer, sweep
from moecli.methods.router import Router, logits_of
from moecli.ops.alignment import Inputs, clipped, divergence, each, joint, nearest

SAMPLE = "tok_reservoir"


class EaquantAlign(Options):
    """Options of `router/eaquant-align`."""

    bits: Literal[2, 3, 4, 8] = 8
    """Bits of the grid."""
    top: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Which experts of a token count: the chosen ones (0), all (1), or as far between."""
    search: Literal["joint", "each", "weights"] = "joint"
    """One clip ratio for all rows of a layer by KL, one for each by KL, or one for each by its weights alone."""
    batch_size: Annotated[PositiveInt, RunSetting()] = 8
    """Sequences per forward pass."""


@stage("router/eaquant-align", version=1)
def eaquant_align(opt: EaquantAlign, text: CalibrationText, model: Checkpoint, ctx: Context) -> Checkpoint:
    found: dict[int, Aligned] = {}
    swept = sweep(model, batches_of(text, opt.batch_size), device=ctx.device, track=ctx.track, statistics=(SAMPLE,))
    with ctx.writer(model) as out:
        for layer in swept:
            if not layer.is_moe:
                continue
            name = f"layer-{layer.index:03d}"
            router = Router(model, layer.index, ctx.device)

            def write(part: PartWriter, layer: SweptLayer = layer, router: Router = router, name: str = name) -> None:
                weight_ED, aligned = _aligned(opt, layer, router)
                part.put(router.roles["weight"], router.stored("weight", weight_ED))
                ctx.part(f"found-{name}", Aligned, lambda: aligned)

            out.part(name, write)
            layer.rewrite(out.read_part(name))
            found[layer.index] = ctx.part(f"found-{name}", Aligned, _never)
    for line in swept.report():
        ctx.note(line)
    _report(opt, found, ctx)
    return out.checkpoint


def _never() -> Aligned:
    raise RuntimeError("a layer is written after what was found of it")


class Aligned(Artifact):
    """What rounding did to one router."""

    def __init__(self, plain: float, chosen: float, moved: float, least: float) -> None:
        self.plain, self.chosen, self.moved, self.least = plain, chosen, moved, least
        """KL of plain rounding, KL with the ratios, share of tokens with other experts, smallest ratio."""

    def pack(self) -> Packed:
        return Packed({}, {"plain": self.plain, "chosen": self.chosen, "moved": self.moved, "least": self.least})

    @classmethod
    def unpack(cls, packed: Packed) -> Self:
        return cls(**packed.meta)


def _aligned(opt: EaquantAlign, layer: SweptLayer, router: Router) -> tuple[Tensor, Aligned]:
    """The rounded rows [E, D] in the type that is stored, and what they do to the sampled tokens."""
    x_TD = layer.observe(collectors([SAMPLE]))[SAMPLE].to(router.rows["weight"].device).float()
    seen = _inputs(opt, router, x_TD)
    weight_ED = router.rows["weight"].to(router.dtype("weight"))
    match opt.search:
        case "joint":
            ratio_E = joint(weight_ED, seen, opt.bits)
        case "each":
            ratio_E = each(weight_ED, seen, opt.bits)
        case "weights":
            ratio_E = nearest(weight_ED, opt.bits)
    plain_TE = seen.logits(clipped(weight_ED, torch.ones_like(ratio_E), opt.bits))
    rounded_ED = clipped(weight_ED, ratio_E, opt.bits)
    rounded_TE = seen.logits(rounded_ED)
    correction = router.rows.get("correction")
    before, after = (
        router.family.route(z, correction).experts_Tk.sort(-1).values for z in (seen.logits_TE, rounded_TE)
    )
    moved = (before != after).any(-1).double().mean()
    return rounded_ED, Aligned(
        float(divergence(seen, plain_TE)), float(divergence(seen, rounded_TE)), float(moved), float(ratio_E.min())
    )


def _inputs(opt: EaquantAlign, router: Router, x_TD: Tensor) -> Inputs:
    logits_TE = logits_of(router.rows, x_TD)
    facts, rows = router.family.facts, logits_TE.shape[-1]
    score_TE = logits_TE.sigmoid() if facts.score == "sigmoid" else logits_TE.softmax(-1)
    score_TE = score_TE + router.rows.get("correction", 0)
    count = min(rows, facts.top_k + round(opt.top * (rows - facts.top_k)))
    return Inputs(x_TD, router.rows.get("bias"), score_TE.topk(count, dim=-1).indices, logits_TE)


def _report(opt: EaquantAlign, found: Mapping[int, Aligned], ctx: Context) -> None:
    ctx.record("router_kl", {str(layer): some.pack().meta for layer, some in found.items()})
    plain, chosen, moved = (
        sum(values) / len(found) for values in zip(*((x.plain, x.chosen, x.moved) for x in found.values()), strict=True)
    )
    ctx.note(
        f"routers rounded to {opt.bits} bits: the divergence of the best experts' probabilities is {plain:.2e} nats a "
        f"token when plainly rounded and {chosen:.2e} with clip ratios down to "
        f"{min(x.least for x in found.values()):.2f}; {moved:.1%} of tokens go to other experts (means of "
        f"{len(found)} layers, each on what rounded routers before it make)"
    )
