"""How far the model has moved from the source, on text and without tasks: what it says, and layer by layer why.

Both models go through the text side by side, one layer at a time, so neither is whole in memory. Every token is
scored once, in rolling windows. Metrics, over tokens, with standard errors over documents:

    kl               mean of KL(source || model) over the vocabulary, nats per token; also its median and tail
    top1_agreement   share of tokens where both find the same next token most likely
    token_perplexity, bits_per_byte    of both models; the latter is eval/perplexity's rolling one

For the report, in the record `fidelity` by layer and as two charts, each value twice: `original`, the layer on the
source's own hidden states (what its weights alone change), and `propagated`, on the model's (with everything that
changed before it):

    output_error     ||y' - y|| / ||y||, y the residual stream after the layer
    block_error      the same for what the MoE block adds to the stream; absent for dense layers
    routing          drift of the router's choices: `ops.drift.Drift` says what each number is

Routing is compared in the source's expert ids. A router row of the model stands for the row of the source with the
same number when both have as many rows (also under an alias map), else for the one source row with the same bits
(pruning and row-drop copy rows), else for its group's lead in the cluster plan. Where none of these holds, routing
drift is not defined and the report says so. Which stored expert is home to a source expert: the row's own, the alias
map's, and for merged experts whose map is gone the cluster plan's group where its leads are the rows left. Experts that
only merged ones without a plan swallowed count as having no home.

Source: usual definitions; KL to the base model as in arXiv 2407.09141 ("Accuracy is Not All You Need").

- run: eval/fidelity
  with: {dataset: test.jsonl}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pydantic import PositiveInt
from torch import Tensor

from moecli.core.artifacts import Checkpoint, Column, Evaluation, ExpertPlan, Items, LayerPlan, Metric
from moecli.core.context import Context
from moecli.core.errors import Problem, StageFailed
from moecli.core.model import ModelFacts
from moecli.core.stage import stage
from moecli.engine.lockstep import Lockstep, PairScores, Pass
from moecli.families import ALIAS_KEY, family_of
from moecli.families.adapter import dense, load_tokenizer, tokenizer_digest
from moecli.methods.eval import Documents, OnText, metric_of, prefix_of, window_problem
from moecli.ops.drift import Drift, RelativeError, RowMap

TASK = "fidelity"
PERCENTILES = (50, 90, 99)


class Fidelity(OnText):
    """Options of `eval/fidelity`."""

    window: PositiveInt | None = None
    """Tokens in a window; the model's positions, at most 2048, by default."""

    def problems(self, model: ModelFacts) -> Iterator[Problem]:
        return window_problem(self.window, model)


@stage("eval/fidelity", version=1)
def fidelity(opt: Fidelity, model: Checkpoint, source: Checkpoint, plan: ExpertPlan | None, ctx: Context) -> Evaluation:
    length = opt.window or min(model.facts.max_positions, 2048)
    documents = _same_windows(opt.texts(), source, model, length)
    dtype = opt.dtype_of(source)
    pair = Lockstep(
        source, model, documents.windows, batch_size=opt.batch_size, device=ctx.device,
        dtype=getattr(torch, dtype), track=ctx.track,
    )  # fmt: skip
    maps = {layer: row_map(source, model, layer, (plan or {}).get(layer)) for layer in source.facts.moe_layers}
    by_layer = {str(layer): found.result() for layer, found in pair.layers(_maker(maps, ctx.device))}
    ctx.record("fidelity", by_layer)
    ctx.record("charts", list(_charts(by_layer)))
    if lost := [str(layer) for layer, rows in maps.items() if rows is None]:
        ctx.note(
            f"routing drift is not defined in layers {' '.join(lost)}: "
            "it is not known which source experts their router rows stand for"
        )
    for line in pair.report():
        ctx.note(line)
    settings = {
        "dataset": opt.dataset, "window": length, "documents": len(documents.texts), "dtype": dtype,
        "tokenizer": tokenizer_digest(load_tokenizer(source)),
    }  # fmt: skip
    return _evaluation(documents, pair.scores(), settings)


# --- the same text for both -----------------------------------------------------------------------


def _same_windows(texts: Sequence[str], source: Checkpoint, model: Checkpoint, length: int) -> Documents:
    """StageFailed when the two tokenizers do not make the same tokens of these texts."""
    first = load_tokenizer(source)
    ids = [first.encode(text) for text in texts]
    if source.side_files() != model.side_files():
        _refuse_other_tokens(first, load_tokenizer(model), ids, texts)
    documents = Documents.encoded(texts, ids, prefix_of(first), length)
    if not documents.windows:
        raise StageFailed("the text has no tokens", hint="name more text as `dataset`")
    return documents


def _refuse_other_tokens(source: Any, model: Any, ids: Sequence[Sequence[int]], texts: Sequence[str]) -> None:
    hint = "only models that share a tokenizer can be compared token by token"
    before, after = source.get_vocab(), model.get_vocab()
    for token in sorted(before.keys() | after.keys()):
        if before.get(token) != after.get(token):
            said = [f"token {n}" if n is not None else "unknown" for n in (before.get(token), after.get(token))]
            raise StageFailed(f"the tokenizers differ: `{token}` is {said[0]} in the source, {said[1]} here", hint=hint)
    if prefix_of(source) != prefix_of(model):
        raise StageFailed("the tokenizers differ: texts begin with other tokens", hint=hint)
    for number, (text, wanted) in enumerate(zip(texts, ids, strict=True)):
        found = model.encode(text)
        if found != wanted:
            raise StageFailed(
                f"the tokenizers differ: document {number} is {len(wanted)} tokens in the source, {len(found)} here"
                if len(found) != len(wanted)
                else f"the tokenizers differ: they make other tokens of document {number}",
                hint=hint,
            )


# --- layers ---------------------------------------------------------------------------------------


def row_map(source: Checkpoint, model: Checkpoint, layer: int, plan: LayerPlan | None = None) -> RowMap | None:
    """What became of the source's experts in this layer, see the module; None when nothing tells."""
    experts, rows = source.facts.router_rows, model.facts.router_rows
    source_R = torch.arange(experts) if rows == experts else _same_rows(source, model, layer)
    if source_R is None and plan is not None and plan.experts == rows:
        source_R = plan.lead_K
    if source_R is None:
        return None
    if str(layer) in (model.config.get(ALIAS_KEY) or {}):
        stored_R = model.get(family_of(model.config).alias_name(layer)).cpu().long()
    else:
        stored_R = torch.arange(rows)
    home_E = torch.full((experts,), -1, dtype=torch.int64)
    home_E[source_R] = stored_R
    if plan is not None and len(plan.group_E) == experts and torch.equal(plan.lead_K, source_R):
        home_E = plan.group_E.long()
    return RowMap(source_R, stored_R, home_E, family_of(model.config).experts_in(layer))


def _same_rows(source: Checkpoint, model: Checkpoint, layer: int) -> Tensor | None:
    """int64 [R] the source row with the bits of each row of the model; None unless each has exactly one of its own."""
    before, after = _row_bits(source, layer), _row_bits(model, layer)
    known = {bits: index for index, bits in enumerate(before)}
    found = [known.get(bits, -1) for bits in after]
    if len(known) < len(before) or -1 in found or len(set(found)) < len(found):
        return None
    return torch.tensor(found)


def _row_bits(checkpoint: Checkpoint, layer: int) -> list[bytes]:
    """Everything the router holds of each row, weight, bias and correction, as bytes."""
    opened = dense(checkpoint)
    tensors = family_of(checkpoint.config).router_tensors(opened, layer).items()
    rows = checkpoint.facts.router_rows
    parts = [opened.get(name).movedim(axis, 0).reshape(rows, -1).float() for name, axis in tensors]
    return [row.tobytes() for row in torch.cat(parts, dim=1).numpy()]


class _Layer:
    """One layer of the report's record: errors and drift on original and on propagated inputs."""

    def __init__(self, rows: RowMap | None) -> None:
        self._errors: dict[str, dict[str, RelativeError]] = {}
        self._rows = rows
        self._drift: dict[str, Drift] = {}

    def add(self, source: Pass, original: Pass, propagated: Pass) -> None:
        for inputs, found in (("original", original), ("propagated", propagated)):
            self._error("output_error", inputs, source.output_TD, found.output_TD)
            self._error("block_error", inputs, source.block_TD, found.block_TD)
            if self._rows is not None and source.index_Tk is not None and found.index_Tk is not None:
                drift = self._drift.setdefault(inputs, Drift(self._rows))
                drift.add(*((p.index_Tk, p.weight_Tk, p.logits_TE) for p in (source, found)))

    def _error(self, name: str, inputs: str, wanted: Tensor | None, found: Tensor | None) -> None:
        if wanted is not None and found is not None:
            self._errors.setdefault(name, {}).setdefault(inputs, RelativeError()).add(wanted, found)

    def result(self) -> dict[str, Any]:
        errors = {name: {inputs: e.result() for inputs, e in some.items()} for name, some in self._errors.items()}
        routing = {inputs: drift.result() for inputs, drift in self._drift.items()}
        return errors | ({"routing": routing} if routing else {})


def _charts(by_layer: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The record as figures of the report."""
    inputs = {"original": "on the source's inputs", "propagated": "on its own inputs"}
    for title, y_label, caption, value in (
        ("Distance from the source by layer", "relative error",
         "||y' - y|| / ||y|| of the hidden states after each layer; lower is better.",
         lambda found, which: found["output_error"][which]),
        ("Routing drift by layer", "Jaccard of the chosen experts",
         "Overlap of the experts that source and result choose, in the source's experts; 1 is no drift.",
         lambda found, which: found["routing"][which]["jaccard"] if "routing" in found else None),
    ):  # fmt: skip
        series = []
        for which, name in inputs.items():
            points = {float(layer): value(found, which) for layer, found in by_layer.items()}
            shown = {x: y for x, y in points.items() if y is not None}
            series += [{"name": name, "x": list(shown), "y": list(shown.values())}] if shown else []
        if series:
            yield {"title": title, "caption": caption, "x_label": "layer", "y_label": y_label, "series": series}


def _maker(maps: Mapping[int, RowMap | None], device: torch.device) -> Any:
    moved = {layer: None if rows is None else rows.to(device) for layer, rows in maps.items()}
    return lambda layer: _Layer(moved.get(layer))


# --- scores ---------------------------------------------------------------------------------------


def _evaluation(documents: Documents, scores: Sequence[PairScores], settings: Mapping[str, Any]) -> Evaluation:
    before = documents.loglikelihoods((s.source_T for s in scores), "the source")
    after = documents.loglikelihoods(s.model_T for s in scores)
    tokens = tuple(map(float, documents.tokens))
    columns = {
        "kl": Column("mean", tuple(documents.sums(s.divergence_T for s in scores)), tokens),
        "top1_agreement": Column("mean", tuple(documents.sums(s.same_T for s in scores)), tokens),
        **_likelihoods(after, documents, tokens),
    }
    metrics = [metric_of(TASK, name, column, name == "top1_agreement") for name, column in columns.items()]
    metrics[1:1] = _tail(np.concatenate([s.divergence_T.numpy() for s in scores]), len(documents.texts))
    of_source = _likelihoods(before, documents, tokens)
    items, items_of_source = (Items(TASK, documents.names, documents.names, some) for some in (columns, of_source))
    source = Evaluation(
        tuple(metric_of(TASK, name, column) for name, column in of_source.items()), settings, items=(items_of_source,)
    )
    return Evaluation(tuple(metrics), settings, items=(items,), source=source)


def _likelihoods(sums: Sequence[float], documents: Documents, tokens: tuple[float, ...]) -> dict[str, Column]:
    return {
        "token_perplexity": Column("perplexity", tuple(sums), tokens),
        "bits_per_byte": Column("bits", tuple(sums), tuple(map(float, documents.bytes))),
    }


def _tail(divergence_T: Any, documents: int) -> list[Metric]:
    """Percentiles over tokens; they have no simple standard error over documents."""
    values = [(f"kl percentile {q}", float(np.percentile(divergence_T, q))) for q in PERCENTILES]
    values.append(("kl largest", float(divergence_T.max())))
    return [Metric(TASK, name, value, None, documents, False) for name, value in values]
