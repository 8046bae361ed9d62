"""Round channels of routed experts to three numbers of bits, by rank of their energy in the layer (CAMERA-Q).

A channel is row k of an expert's gate and up with column k of its down, the paper's micro-expert. Its energy is that of
`slim/camera-p`: ((1 - alpha) sum_t (g_t h_tk)^2 + alpha max_t |g_t h_tk|^2) ||down_k||^2 over the tokens routed to it.
All channels of a layer's experts are ranked together; the first part (`shares`) gets the first number of bits
(`tiers`), and so on. **How the paper splits them is not verified**: its example has 3, 2 and 1 bits, the options of its
released driver 8, 4 and 2 in shares of 0.1, 0.3 and 0.6, and the quantizer is not released; so both are options. An
expert has whole groups of `down_group_size` channels in each tier, so that columns of down that share a scale have one
number of bits.

For research: what is written is dense, each weight the nearest value of its grid (symmetric, as `quantize/rtn` rounds;
the paper rounds by GPTQ).
A packed form would hold an expert's channels sorted by energy, gate, up and down alike, which changes nothing that it
computes, and no loader knows one. Here channels stay in their places. The report says what the packed form would take:
`packed`. Attention, dense layers and shared experts are rounded to nearest as well, with `bits`, `attention_bits` and
`shared_bits`, and written dense too.

Source: arXiv 2508.02322, CAMERA-Q.

- run: quantize/camera-q
  with: {tiers: [4, 3, 2], shares: [0.25, 0.5, 0.25]}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from moecli.core.artifacts import CalibrationStats, Checkpoint, ExpertWeights, LayerStats, PartWriter
from moecli.core.context import Context
from moecli.core.errors import Problem
from moecli.core.model import DTYPE_BYTES, ModelFacts, ModelSketch, TensorSpec
from moecli.core.stage import stage
from moecli.families import family_of
from moecli.io.formats import packed_specs
from moecli.methods.quantize import Bits, Packing, Quantize
from moecli.methods.slim import scored
from moecli.ops.channels import camera_energy, tiers
from moecli.ops.pack import dequantize, quantize_rtn
from moecli.ops.tiers import rounded_columns, rounded_rows

STATISTICS = ("ph2", "phmax")


class CameraQ(Quantize):
    """Options of `quantize/camera-q`."""

    tiers: Annotated[tuple[Bits, Bits, Bits], Field(strict=False)] = (4, 3, 2)
    """Bits of the channels of highest energy, of those in the middle, and of the others; in place of `bits`, which is
    for what is no routed expert."""
    shares: Annotated[tuple[float, float, float], Field(strict=False)] = (0.25, 0.5, 0.25)
    """Part of a layer's channels in each of them."""
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Weight of the largest activation against the sum of squares."""
    down_group_size: PositiveInt = 32
    """Channels that share a scale in down, and have the same bits."""
    shrink: bool = False
    """Search each scale among 80 smaller ones for the least |error|^2.4, in place of the largest weight's."""

    def problems(self, model: ModelFacts) -> Iterator[Problem]:
        yield from super().problems(model)
        if not self.tiers[0] > self.tiers[1] > self.tiers[2]:
            yield Problem("tiers", f"bits must fall, got {list(self.tiers)}", hint="write `tiers: [4, 3, 2]`")
        if min(self.shares) < 0 or abs(sum(self.shares) - 1) > 1e-6:
            yield Problem("shares", f"must be parts of 1, got {list(self.shares)}",
                          hint="write `shares: [0.25, 0.5, 0.25]`")  # fmt: skip
        if model.expert_width % self.down_group_size:
            fits = next((g for g in (128, 64, 32, 16, 8) if model.expert_width % g == 0), None)
            yield Problem(
                "down_group_size", f"{self.down_group_size} does not divide the expert width {model.expert_width}",
                hint=f"write `down_group_size: {fits}`" if fits else None,
            )  # fmt: skip
        if self.servable != "research":
            yield Problem("servable", "channels with bits of their own have no packed form",
                          hint="leave `servable` out")  # fmt: skip

    def forecast(self, model: ModelSketch) -> ModelSketch:
        Packing(self, model.config, model.specs, None)
        return model


@stage("quantize/camera-q", version=1, needs=STATISTICS)
def camera_q(opt: CameraQ, stats: CalibrationStats, model: Checkpoint, ctx: Context) -> Checkpoint:
    def energy(s: LayerStats, norm_EF: Tensor) -> Tensor:
        return camera_energy(s["ph2"], s["phmax"], norm_EF, opt.alpha)

    score = scored(stats, STATISTICS, model, ctx, energy)
    tier = tiers(score, opt.shares, opt.down_group_size)
    work = Packing(opt, model.config, {name: model.spec(name) for name in model.names()}, None)
    family = family_of(model.config)
    with ctx.writer(model) as out:
        for layer in ctx.track(sorted({x.layer for x in work.targets}), "rounding"):

            def write(part: PartWriter, layer: int = layer) -> None:
                for linear in work.targets:
                    if linear.layer == layer and linear.role != "expert":
                        part.put(linear.name, _nearest(opt, model.get(linear.name, ctx.device), work.bits[linear.name]))
                if layer in tier:
                    experts = rounded(opt, family.read_experts(model, layer), score[layer], tier[layer], ctx.device)
                    family.write_experts(part, model, layer, experts)

            out.part(f"layer-{layer:03d}", write)
    _report(opt, tier, work, model, ctx)
    return out.checkpoint


def rounded(
    opt: CameraQ, experts: ExpertWeights, score_EF: Tensor, tier_EF: Tensor, device: torch.device
) -> list[ExpertWeights]:
    """The experts of a layer [E, ...], each channel at the bits of its tier and in its old place. Expert by expert."""
    order_EF = score_EF.argsort(dim=1, descending=True, stable=True)
    found = []
    for e in range(len(tier_EF)):
        one = ExpertWeights(*(None if value is None else value[e].to(device) for value in experts))
        tier_1F, order_1F = tier_EF[e : e + 1].to(device), order_EF[e : e + 1].to(device)
        gate_FD, up_FD = (
            rounded_rows(value[None], tier_1F, opt.tiers, opt.group_size, opt.shrink)[0] for value in one[:2]
        )
        down_DF = rounded_columns(one.down_DF[None], order_1F, tier_1F, opt.tiers, opt.down_group_size, opt.shrink)[0]
        found.append(one._replace(gate_FD=gate_FD, up_FD=up_FD, down_DF=down_DF))
    return found


def _nearest(opt: CameraQ, weight: Tensor, bits: int) -> Tensor:
    return dequantize(*quantize_rtn(weight, bits, opt.group_size, opt.shrink))


def packed_bits(opt: CameraQ, tier_EF: Tensor, hidden: int, scale_bytes: float) -> tuple[int, int]:
    """Bits of a layer's routed experts: of their codes alone, and with their scales."""
    counts = [int((tier_EF == tier).sum()) for tier in range(len(opt.tiers))]
    codes = sum(3 * hidden * count * bits for count, bits in zip(counts, opt.tiers, strict=True))
    scales = 2 * tier_EF.numel() * (hidden // opt.group_size) + hidden * (tier_EF.numel() // opt.down_group_size)
    return codes, codes + round(8 * scale_bytes * scales)


def _report(opt: CameraQ, tier: Mapping[int, Tensor], work: Packing, model: Checkpoint, ctx: Context) -> None:
    facts = model.facts
    sizes = [packed_bits(opt, tier_EF, facts.hidden, DTYPE_BYTES[facts.dtype]) for tier_EF in tier.values()]
    codes, whole = (sum(values) for values in zip(*sizes, strict=True))
    weights = 3 * facts.hidden * sum(tier_EF.numel() for tier_EF in tier.values())
    packed = whole // 8 + sum(spec.bytes for spec in _beside(opt, work, model))
    ctx.record("packed", {"bytes": packed, "expert_bits": codes / weights, "expert_bits_stored": whole / weights})
    counts: Sequence[int] = [sum(int((t == i).sum()) for t in tier.values()) for i in range(len(opt.tiers))]
    words = ", ".join(f"{count} have {bits}" for count, bits in zip(counts, opt.tiers, strict=True))
    ctx.note(
        f"for research, not servable: weights are dense values of their grids. Of {sum(counts)} channels {words} bits; "
        f"{codes / weights:.3f} bits a weight of routed experts, {whole / weights:.3f} with scales; packed the model "
        f"would take {packed / 2**20:,.1f} MiB"
    )


def _beside(opt: CameraQ, work: Packing, model: Checkpoint) -> Iterator[TensorSpec]:
    """Everything but routed experts, as it would stand on disk when packed."""
    experts = {linear.name for linear in work.targets if linear.role == "expert"}
    others = {linear.name: linear for linear in work.targets if linear.role != "expert"}
    for name in model.names():
        if name in others:
            yield from packed_specs(name, model.spec(name), work.bits[name], opt.group_size).values()
        elif name not in experts:
            yield model.spec(name)
