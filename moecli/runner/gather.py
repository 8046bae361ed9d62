"""What a finished execution says about itself, as a Report."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from moecli import __version__
from moecli.core.artifacts import CalibrationStats, Checkpoint, Evaluation, ExpertPlan
from moecli.core.model import ModelFacts
from moecli.families import Linear, linears_of
from moecli.io.factors import stands_for
from moecli.io.formats import DenseView
from moecli.io.gptq_layout import GptqView
from moecli.runner import lookup
from moecli.runner.compare import pair
from moecli.runner.execute import Execution, Outcome, environment
from moecli.runner.plan import SOURCE
from moecli.runner.report import (
    Calibration,
    Chart,
    Dendrogram,
    Environment,
    Figures,
    MetricRow,
    Part,
    Report,
    Series,
    SizeRecord,
    SizeSide,
    SourceRecord,
    StageRecord,
    Verification,
    metric_rows,
)
from moecli.runner.report_words import bytes_text
from moecli.runner.roofline import estimates
from moecli.runner.sidecar import sidecar_bytes

_PARTS: Mapping[str, Part] = {
    "expert": "experts",
    "attention": "attention",
    "router": "router",
    "shared": "shared",
}


def gather(execution: Execution) -> Report:
    """The report of an execution whose steps are all done."""
    plan, final = execution.plan, execution.plan.final
    origin = execution.origin
    rows, warnings = _metrics(execution)
    if execution.exported.get("kind") == "research":
        warnings.append(_not_smaller(execution.checkpoint(final)))
    env = environment(execution.device)
    return Report(
        name=plan.name or execution.run.path.name,
        created_by=__version__,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        recipe=plan.resolved_recipe(),
        source=SourceRecord(name=origin.name, kind=origin.kind, revision=origin.revision, digest=origin.digest),
        environment=Environment(
            python=env["python"], torch=env["torch"], transformers=env["transformers"], device=env["device"]
        ),
        stages=tuple(_stage(outcome) for outcome in execution.outcomes.values()),
        export=execution.exported.get("kind"),
        size=SizeRecord(
            before=size_of(execution.source),
            after=size_of(_final(execution)) if final != SOURCE else None,
        ),
        metrics=tuple(rows),
        warnings=tuple(dict.fromkeys(warnings)),
        calibration=_calibration(execution),
        figures_data=_figures(execution),
        verification=Verification.model_validate(execution.exported["verification"]) if execution.exported else None,
        estimates=estimates(plan.source, plan.sketch_of(final) if final != SOURCE else None),
    )


def _stage(outcome: Outcome) -> StageRecord:
    manifest = outcome.manifest
    return StageRecord(
        name=outcome.step.stage.name,
        id=outcome.step.label,
        key=outcome.step.key,
        cached=outcome.cached,
        seconds=manifest["seconds"],
        peak_cpu_bytes=manifest["peak_cpu_bytes"],
        peak_gpu_bytes=manifest["peak_gpu_bytes"],
        notes=tuple(manifest["notes"]),
        papers=tuple(dict.fromkeys(re.findall(r"\b\d{4}\.\d{5}\b", lookup.docstring(outcome.step.stage.name)))),
    )


def _final(execution: Execution) -> Checkpoint:
    """The finished checkpoint as it was packed; in GPTQ's layout where it is written so, which takes more bytes."""
    checkpoint, kind = execution.checkpoint(execution.plan.final), execution.exported.get("kind")
    return GptqView(checkpoint) if kind == "gptq" else checkpoint


def _not_smaller(checkpoint: Checkpoint) -> str:
    """What a research export takes on disk, which is more than the report counts."""
    dense = DenseView(checkpoint)
    whole = sum(dense.spec(name).bytes for name in dense.names()) + sidecar_bytes(checkpoint)
    return (
        f"`model/` is a research export and no smaller on disk: it takes {bytes_text(whole)}, dense weights and what "
        "they were packed to; sizes in this report are those of the packed model"
    )


def size_of(checkpoint: Checkpoint) -> SizeSide:
    """Bytes as stored, parameters as used, by part."""
    dense = DenseView(checkpoint)
    specs = {name: dense.spec(name) for name in dense.names()}
    roles = {linear.name: linear for linear in linears_of(checkpoint.config, specs)}
    stored = {name: checkpoint.spec(name).bytes for name in checkpoint.names()}
    by_part: Counter[Part] = Counter()
    factors = stands_for(checkpoint.config)
    for name, size in stored.items():
        by_part[_part(factors[name][0] if name in factors else name, roles)] += size
    replaced = {weight for some in factors.values() for weight in some}
    specs = {name: spec for name, spec in specs.items() if name not in replaced}
    specs |= {name: checkpoint.spec(name) for name in factors}
    facts = checkpoint.facts
    maps = sum(spec.numel for name, spec in specs.items() if name.endswith(".alias_map") or ".rows_at." in name)
    return SizeSide(
        bytes=sum(stored.values()),
        parameters=sum(spec.numel for spec in specs.values()) - maps,
        experts=(facts.experts,) * len(facts.moe_layers),
        router_rows=(facts.router_rows,) * len(facts.moe_layers),
        by_part=dict(by_part),
    )


def _part(name: str, linears: Mapping[str, Linear]) -> Part:
    weight = re.sub(r"_(packed|scale|shape|lora_a|lora_b)$", "", name)
    weight = re.sub(r"\.(qweight|qzeros|scales|g_idx)$", ".weight", weight)
    weight = re.sub(r"_(blocks|scales)$", "", weight)
    if weight in linears and linears[weight].role in _PARTS:
        return _PARTS[linears[weight].role]
    return "embeddings" if re.search(r"embed|lm_head|wte", name) else "other"


def _of_type(execution: Execution, kind: type) -> Iterable[Outcome]:
    return [o for o in execution.outcomes.values() if issubclass(o.step.stage.output, kind)]


def _metrics(execution: Execution) -> tuple[Iterable[MetricRow], list[str]]:
    """Each evaluation beside the same evaluation of the source, and warnings about those that cannot be paired; the
    last one of each task and metric counts."""
    rows: dict[tuple[str, str], MetricRow] = {}
    warnings: list[str] = []
    before: dict[int, Evaluation] = {}
    for index, outcome in execution.outcomes.items():
        if not issubclass(outcome.step.stage.output, Evaluation):
            continue
        found = execution.artifact(index, Evaluation)
        assert isinstance(found, Evaluation)
        if outcome.step.stage.on_source_too and _of_source(outcome):
            before[outcome.step.position] = found
        else:
            old = found.source or before.get(outcome.step.position) or _same_on_source(execution, outcome)
            pairs, said = pair(old, found) if old else ({}, [])
            warnings += said
            for row in metric_rows(old, found):
                key = (row.task, row.metric)
                rows[key] = row.model_copy(update={"paired": pairs.get(key)})
    if not rows:
        for found in before.values():
            rows |= {(row.task, row.metric): row for row in metric_rows(found, None)}
    return rows.values(), warnings


def _of_source(outcome: Outcome) -> bool:
    """Whether every model it was given is the source; a stage may take that beside the one it evaluates."""
    step = outcome.step
    return all(i == SOURCE for name, i in step.inputs.items() if issubclass(step.stage.inputs[name].type, Checkpoint))


def _same_on_source(execution: Execution, outcome: Outcome) -> Evaluation | None:
    """An earlier evaluation with the same options that ran on the source itself."""
    for index, other in execution.outcomes.items():
        same = other.step.identity["options"] == outcome.step.identity["options"]
        if same and other.step.stage is outcome.step.stage and _of_source(other):
            found = execution.artifact(index, Evaluation)
            return found if isinstance(found, Evaluation) else None
    return None


def _calibration(execution: Execution) -> Calibration | None:
    for outcome in _of_type(execution, CalibrationStats):
        stats = execution.artifact(_index(execution, outcome), CalibrationStats)
        assert isinstance(stats, CalibrationStats)
        return Calibration(source=stats.source, tokens=max((s.tokens for s in stats.values()), default=0))
    return None


def _index(execution: Execution, outcome: Outcome) -> int:
    return next(index for index, other in execution.outcomes.items() if other is outcome)


def _figures(execution: Execution) -> Figures:
    load: dict[int, tuple[int, ...]] = {}
    for outcome in list(_of_type(execution, CalibrationStats))[:1]:
        load = {int(layer): tuple(counts) for layer, counts in outcome.manifest["records"].get("load", {}).items()}
    dendrograms: dict[int, Dendrogram] = {}
    for outcome in list(_of_type(execution, ExpertPlan))[:1]:
        plan = execution.artifact(_index(execution, outcome), ExpertPlan)
        assert isinstance(plan, ExpertPlan)
        for layer, layer_plan in plan.items():
            if "linkage" in layer_plan.extra:
                linkage = tuple(tuple(row) for row in layer_plan.extra["linkage"].tolist())
                dendrograms[layer] = Dendrogram(linkage=linkage, groups=tuple(layer_plan.group_E.tolist()))
    kept, groups = fates_of_experts(
        execution.source.facts, [o.manifest["records"] for o in execution.outcomes.values()]
    )
    charts = charts_of((o.step.label, o.manifest["records"]) for o in execution.outcomes.values())
    return Figures(load=load, kept=kept, groups=groups, dendrograms=dendrograms, charts=charts)


_BY_LAYER = {
    "relative_error": ("Error by layer", "Relative error of each layer's output, as the stage measured it; lower is "
                       "better.", "relative error"),
}  # fmt: skip
"""Records of the form {layer: number} -> title, caption and axis of the chart that they become."""


def charts_of(records: Iterable[tuple[str, Mapping[str, Any]]]) -> tuple[Chart, ...]:
    """What stages recorded for charts, by (label, records); charts of one title become one, with all of their lines."""
    found: dict[str, Chart] = {}
    for label, record in records:
        made = [Chart.model_validate_json(json.dumps(value)) for value in record.get("charts", [])]
        for name, (title, caption, axis) in _BY_LAYER.items():
            if by_layer := record.get(name):
                layers = sorted(by_layer, key=int)
                line = Series(name=label, x=tuple(map(float, layers)), y=tuple(by_layer[n] for n in layers))
                made.append(Chart(title=title, caption=caption, x_label="layer", y_label=axis, series=(line,)))
        for chart in made:
            earlier = found.get(chart.title, chart)
            lines = chart.series if earlier is chart else (*earlier.series, *chart.series)
            found[chart.title] = earlier.model_copy(update={"series": lines})
    return tuple(found.values())


ByLayer = dict[int, tuple[int, ...]]


def fates_of_experts(facts: ModelFacts, records: Iterable[Mapping[str, Any]]) -> tuple[ByLayer, ByLayer]:
    """(kept, groups) in expert ids of the source, through every stage that pruned or merged.

    `kept`: the source expert that leads each expert left. `groups`: for each source expert the one it became part of,
    -1 when it was dropped. Stages record `kept`, or `groups` and `leads`, in the ids they found.
    """
    kept: ByLayer = {}
    groups: ByLayer = {}
    everyone = tuple(range(facts.experts))
    for record in records:
        found = {int(layer): ids for layer, ids in record.get("kept", {}).items()}
        for layer, ids in found.items():
            kept[layer] = tuple(kept.get(layer, everyone)[i] for i in ids)
            new = {old: index for index, old in enumerate(ids)}
            groups[layer] = tuple(new.get(g, -1) for g in groups.get(layer, everyone))
        for key, group in record.get("groups", {}).items():
            layer = int(key)
            kept[layer] = tuple(kept.get(layer, everyone)[i] for i in record["leads"][key])
            groups[layer] = tuple(group[g] if g >= 0 else -1 for g in groups.get(layer, everyone))
    return kept, groups
