"""What a plan will cost: exact output bytes, and estimates of memory and disk, from shapes alone.

The formulas are upper estimates, not measurements: a sweep holds two layers (one computing, one loading) and two
copies of the hidden states of one layer; an evaluation holds the whole dense model; each weight stage writes at
most its whole output beside `model/`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

from moecli.core.artifacts import CalibrationStats, Evaluation
from moecli.core.model import DTYPE_BYTES, ModelSketch
from moecli.io.formats import packed_weights, schemes_of, unpacked_spec
from moecli.io.gpt_oss_layout import as_packed_specs
from moecli.io.gptq_layout import gptq_specs
from moecli.runner.plan import SOURCE, Plan, Step


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes a run needs. `None` where the headers of the source were not at hand."""

    source_bytes: int | None
    output_bytes: int | None
    """Exact: tensor bytes of `model/`, without file headers."""
    source_parameters: int | None
    peak_memory_bytes: int | None
    """On the device that computes (GPU memory with a GPU, else main memory)."""
    disk_bytes: int | None
    """Run folder at its largest, before `moecli clean`."""
    loaded_bytes: int | None = None
    """What the model takes once transformers has loaded it: as much as it stores, but for packed weights, which are
    unpacked on the way. None where the run makes no model, an expanded one, or one that transformers does not load."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def estimate(plan: Plan) -> Estimate:
    """Costs of running a whole plan from nothing."""
    if not plan.source.specs:
        return Estimate(None, None, None, None, None)
    output = plan.sketch_of(plan.final)
    output_bytes = _output_bytes(output, plan.export)
    written = [step.sketch.bytes for step in plan.steps if step.writes_weights]
    return Estimate(
        source_bytes=plan.source.bytes,
        output_bytes=output_bytes,
        source_parameters=plan.source.parameters,
        peak_memory_bytes=max((_memory(step, plan) for step in plan.steps), default=0),
        disk_bytes=sum(written) + (output_bytes if plan.final != SOURCE else 0),
        loaded_bytes=_loaded(plan),
    )


def _loaded(plan: Plan) -> int | None:
    """Bytes of the newest model on the way to the last one that has no packed weight."""
    if plan.final == SOURCE or plan.export in ("expanded", "gptq"):
        return None
    index = plan.final
    while index != SOURCE and packed_weights(as_packed_specs(plan.sketch_of(index).specs)):
        index = plan.steps[index].inputs.get("model", SOURCE)
    sketch = plan.sketch_of(index)
    return None if packed_weights(as_packed_specs(sketch.specs)) else sketch.bytes


def _output_bytes(output: ModelSketch, export: str | None) -> int:
    if export == "gptq":
        return sum(spec.bytes for spec in gptq_specs(output.specs, output.config).values())
    return output.bytes + (_dense_bytes(output) if export == "research" else 0)


def _dense_bytes(sketch: ModelSketch) -> int:
    """Bytes of the weights that are packed, written out."""
    schemes = schemes_of(sketch.config)
    return sum(unpacked_spec(name, sketch.specs, schemes).bytes for name in packed_weights(sketch.specs))


def _memory(step: Step, plan: Plan) -> int:
    layer = largest_layer(plan.source)
    if issubclass(step.stage.output, CalibrationStats):
        samples, length = getattr(step.options, "samples", 1), getattr(step.options, "tokens_per_sample", 1)
        facts = step.sketch.facts
        hidden = samples * length * facts.hidden * int(DTYPE_BYTES[facts.dtype])
        return 2 * layer + 2 * hidden
    if issubclass(step.stage.output, Evaluation):
        return max(plan.source.bytes, step.sketch.bytes)
    return 2 * layer


def largest_layer(sketch: ModelSketch) -> int:
    """Bytes of the largest decoder layer, or of everything outside the layers if that is more."""
    sizes: dict[str, int] = defaultdict(int)
    for name, spec in sketch.specs.items():
        match = re.search(r"\blayers\.(\d+)\.", name)
        sizes[match.group(1) if match else "outside"] += spec.bytes
    return max(sizes.values(), default=0)
