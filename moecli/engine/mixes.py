"""Many mixes of one model's experts, rounded to different numbers of bits, judged in one sweep over its layers.

    values = divergences(checkpoint, batches, [{0: [2, 4, 3, 3], ...}, ...], rounding=rounding)

The text goes through the layers once for the source and once for each mix, all side by side: a layer is read once, its
experts are rounded once to each number of bits, and between two mixes only experts whose bits differ are copied into
place. No logits are stored, neither the source's nor a mix's: both sides of a piece of text meet at the head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from moecli.core.artifacts import Checkpoint
from moecli.engine.data import Batch
from moecli.engine.rounding import Rounding, rounded_experts
from moecli.engine.scorer import pieces, rows_per_piece
from moecli.engine.sweep import Sweep, SweptLayer, Track, sweep
from moecli.ops.scoring import divergence

Mix = Mapping[int, Sequence[int]]
"""{MoE layer: bits of each stored expert}"""

_PROJECTIONS = ("gate_up_proj", "down_proj")


@torch.no_grad()
def divergences(
    checkpoint: Checkpoint,
    batches: Sequence[Batch],
    mixes: Sequence[Mix],
    *,
    rounding: Rounding,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    track: Track | None = None,
) -> list[float]:
    """Mean KL(source || mix) in nats a token of each mix, over the counted tokens of `batches`.

    Softmax in float32, sums in float64. Rounded values are in the model's dtype. Errors as of `sweep`.
    """
    swept = sweep(checkpoint, [*batches] * (1 + len(mixes)), device=device, dtype=dtype, track=track)
    sequences = sum(len(batch.input_ids) for batch in batches)
    for layer in swept:
        if layer.is_moe:
            mixer = _Mixer(layer, [mix[layer.index] for mix in mixes], sequences, rounding)
            with mixer:
                layer.watch(mixer.restart)
    return _means(swept, batches, len(mixes), checkpoint.facts.vocab)


class _Mixer:
    """Puts each mix's experts in place before its part of the text comes. The source's part comes first."""

    def __init__(self, layer: SweptLayer, bits: Sequence[Sequence[int]], sequences: int, rounding: Rounding) -> None:
        self._layer, self._bits, self._sequences = layer, bits, sequences
        experts = layer.parts.experts
        levels = sorted({b for some in bits for b in some})
        self._weights = {name: getattr(experts, name) for name in _PROJECTIONS}
        twins = {b: rounded_experts(experts, b, rounding) for b in levels}
        self._values = {name: {b: getattr(twin, name) for b, twin in twins.items()} for name in _PROJECTIONS}
        for name, weight in self._weights.items():
            self._values[name][_SOURCE] = nn.Parameter(weight.detach().clone(), requires_grad=False)
        self._present = [_SOURCE] * len(next(iter(self._weights.values())))

    def __enter__(self) -> None:
        self._hook = self._layer.module.register_forward_pre_hook(self._before)

    def __exit__(self, *exc: object) -> None:
        self._hook.remove()

    def restart(self) -> None:
        self._seen = 0

    def _before(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        mix = self._seen // self._sequences
        self._seen += len(args[0])
        wanted = self._bits[mix - 1] if mix else [_SOURCE] * len(self._present)
        for expert, (now, then) in enumerate(zip(self._present, wanted, strict=True)):
            if now != then:
                for name, weight in self._weights.items():
                    weight.data[expert].copy_(self._values[name][then].data[expert])
        self._present = list(wanted)


_SOURCE = 0
"""Stands for the bits of an expert as the checkpoint has it."""


def _means(swept: Sweep, batches: Sequence[Batch], mixes: int, vocabulary: int) -> list[float]:
    flow = swept.flow
    flow.shelf.settle()
    share = len(flow.batches) // (1 + mixes)  # micro-batches of one side; all sides are cut alike
    total_M = torch.zeros(mixes, dtype=torch.float64, device=flow.device)
    piece = max(1, rows_per_piece(vocabulary) // 2)
    with swept.head() as head:
        for part in range(share):
            counted = flow.batches[part].counted.flatten().nonzero()[:, 0].to(flow.device)
            source_ND = flow.here(part).flatten(0, 1)
            for _, rows in pieces(counted, piece):
                logp_RV = head(source_ND[rows]).log_softmax(-1, dtype=torch.float32)
                for mix in range(mixes):
                    mixed_ND = flow.here((mix + 1) * share + part).flatten(0, 1)
                    logq_RV = head(mixed_ND[rows]).log_softmax(-1, dtype=torch.float32)
                    total_M[mix] += divergence(logp_RV, logq_RV).double().sum()
    flow.shelf.close()
    return (total_M / sum(int(batch.counted.sum()) for batch in batches)).tolist()
