"""Keep the set of experts that together reproduce each layer's routed output best on a sample of tokens (NAEE).

For a set K the router sees only the rows in K; loss(K) = sum over sampled tokens of ||z_t - z_t(K)||^2, z the routed
sum without shared experts. Every layer is judged on the inputs of the original model (the paper's `layerwise` form).
The weighted outputs of a set follow from the Gram of all experts' outputs of each token, so a set costs no forward.

`search: exhaustive` tries every set, `greedy` takes the least harmful expert away again and again, `beam` does so with
`beam_width` sets at a time; `auto` is exhaustive up to 20,000 sets, else greedy. Sets are searched, experts are not
scored, so `per_group` pruning of group-limited routers is refused, and `mask`.

For routers that pick two experts the threshold of dynamic skipping, the median over tokens of the second weight over
the first, is recorded per layer as `skip_thresholds`: at inference the second expert may be skipped below it. Nothing
in the checkpoint changes for it.

Source: arXiv 2402.14800, sections 3.2 and 3.3 (ACL 2024). Differs from the authors' code: squared error over tokens,
where theirs adds up un-squared norms of batches and so depends on the batch size. Greedy and beam search are ours.

- run: prune/naee
  with: {keep: 64}
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from moecli.core.artifacts import CalibrationStats, Checkpoint, ExpertWeights
from moecli.core.context import Context
from moecli.core.errors import Problem, StageFailed
from moecli.core.model import ModelFacts
from moecli.core.stage import stage
from moecli.families import Family, RouteRule, family_of, route
from moecli.methods.prune import Prune, drop_experts, protected, reads
from moecli.ops.subset import Loss, beam, exhaustive, replay_loss

MOST_SETS = 20_000
"""`auto` tries every set up to this many."""


class Naee(Prune):
    """Options of `prune/naee`."""

    search: Literal["auto", "exhaustive", "greedy", "beam"] = "auto"
    """How sets of experts are searched."""
    beam_width: PositiveInt = 4
    """Sets that `beam` follows."""
    tokens: PositiveInt = 512
    """Sampled tokens a layer is judged on."""

    def problems(self, model: ModelFacts) -> Iterator[Problem]:
        yield from super().problems(model)
        if self.groups == "mask" or (self.groups == "per_group" and model.groups > 1):
            what = "mask rows" if self.groups == "mask" else f"keep the router's {model.groups} groups equal"
            yield Problem("groups", f"`prune/naee` cannot {what}", hint="write `groups: flatten`")
        if self.search == "exhaustive" and (sets := math.comb(model.experts, self.keep)) > 10**7:
            yield Problem("search", f"`exhaustive` would try {sets:.1e} sets a layer", hint="write `search: greedy`")


@stage("prune/naee", version=1, needs=reads("tok_reservoir"))
def naee(opt: Naee, stats: CalibrationStats, model: Checkpoint, ctx: Context) -> Checkpoint:
    family, score, losses, skips = family_of(model.config), {}, {}, {}
    safe = protected(stats, model, opt, ctx)
    for layer in ctx.track(list(stats), "searching sets of experts"):
        replay = _Replay(family, model, layer, stats[layer]["tok_reservoir"][: opt.tokens], ctx.device)
        kept = _search(_with(safe.get(layer, []), replay.loss), model.facts.experts, opt)
        score[layer] = torch.zeros(model.facts.experts).index_fill_(0, torch.tensor(kept), 1.0)
        losses[str(layer)] = float(replay.loss(torch.tensor([kept]))) / replay.size
        if model.facts.top_k == 2:
            skips[str(layer)] = replay.skip_threshold
    ctx.record("relative_error", losses)
    if skips:
        ctx.record("skip_thresholds", skips)
    return drop_experts(model, stats, score, opt, ctx)


def _search(loss: Loss, experts: int, opt: Naee) -> list[int]:
    how = opt.search
    if how == "auto":
        how = "exhaustive" if math.comb(experts, opt.keep) <= MOST_SETS else "greedy"
    if how == "exhaustive":
        return exhaustive(experts, opt.keep, loss)
    return beam(experts, opt.keep, loss, opt.beam_width if how == "beam" else 1)


def _with(safe: Sequence[int], loss: Loss) -> Loss:
    """The loss of sets that hold all of these experts; infinite for others."""

    def guarded(kept_CK: Tensor) -> Tensor:
        loss_C = loss(kept_CK)
        missing_C = torch.tensor([not set(safe) <= set(kept) for kept in kept_CK.tolist()], device=loss_C.device)
        return loss_C.masked_fill(missing_C, torch.inf)

    return guarded if safe else loss


class _Replay:
    """One layer's routed output under any set of experts, for the sampled tokens. T tokens, C sets of K experts."""

    def __init__(self, family: Family, model: Checkpoint, layer: int, sample_TD: Tensor, device: torch.device) -> None:
        hidden_TD = sample_TD.to(device).float()
        if not len(hidden_TD):
            raise StageFailed("no token was sampled", where=f"layer {layer}", hint="calibrate with more text")
        self._rule: RouteRule = replace(family.rule, groups=1, groups_used=1)
        self._logits_TE = family.router_logits(model, layer, hidden_TD)
        correction = family.router_role(model, layer, "correction")
        self._bias_E = None if correction is None else model.get(correction).to(device).flatten()
        weights = family.read_experts(model, layer)
        on_device = ExpertWeights(*(None if w is None else w.to(device).float() for w in weights))
        output_TED = family.expert_forward(on_device, hidden_TD).transpose(0, 1)
        self._gram_TEE = (output_TED @ output_TED.mT).double()
        whole = family.route(self._logits_TE, self._bias_E)
        self._whole_TE = _dense(whole.weights_Tk, whole.experts_Tk, self._logits_TE.shape[1])
        self._weights_Tk = whole.weights_Tk

    @property
    def size(self) -> float:
        """Squared norm of the layer's routed output."""
        return float(replay_loss(self._gram_TEE, self._whole_TE[None]))

    @property
    def skip_threshold(self) -> float:
        """Median over tokens of the second weight over the first."""
        ordered_Tk = self._weights_Tk.sort(-1, descending=True).values
        return float((ordered_Tk[:, 1] / ordered_Tk[:, 0]).median())

    def loss(self, kept_CK: Tensor) -> Tensor:
        """Squared error of the layer's output for each set, float64 [C]."""
        kept_CK = kept_CK.to(self._logits_TE.device)
        tokens, experts = self._logits_TE.shape
        logits_CTK = self._logits_TE[:, kept_CK].transpose(0, 1)
        bias_SK = None if self._bias_E is None else self._bias_E[kept_CK].repeat_interleave(tokens, 0)
        routing = route(logits_CTK.flatten(0, 1), bias_SK, self._rule)
        index = kept_CK.repeat_interleave(tokens, 0).gather(-1, routing.experts_Tk)
        cut_CTE = _dense(routing.weights_Tk, index, experts).unflatten(0, (len(kept_CK), tokens))
        return replay_loss(self._gram_TEE, cut_CTE - self._whole_TE)


def _dense(weights_Tk: Tensor, index_Tk: Tensor, experts: int) -> Tensor:
    """Weights by expert, zero outside the chosen, [T, E]"""
    empty_TE = torch.zeros(len(weights_Tk), experts, device=weights_Tk.device)
    return empty_TE.scatter_(-1, index_Tk, weights_Tk)
