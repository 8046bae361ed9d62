"""The report of a run as data (`report.json`), and the page a terminal or a pull request shows (`report.md`).

The runner gathers plain values; everything shown later is a pure function of them. Whatever a run did not do is
None or empty here, and each page says so in words instead of leaving a hole.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from moecli.core.artifacts import Evaluation
from moecli.core.errors import MoecliError, SurroundingsError
from moecli.io.durable import write_text

SCHEMA = 2
"""Version of `report.json`. Raised when an older reader could misread a newer file."""

Part = Literal["experts", "attention", "router", "shared", "embeddings", "other"]
PARTS: tuple[Part, ...] = get_args(Part)
"""Parts of a model whose bytes are reported, in the order of tables and figures."""

CLEAR_ERRORS = 2.0
"""A difference counts as clear when it is larger than this many standard errors of the difference."""

Reading = Literal["better", "worse", "changed", "no clear change", "not compared"]


class Record(BaseModel):
    """Frozen, no unknown names; infinities survive JSON as strings."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        serialize_by_alias=True,
        validate_by_alias=True,
        validate_by_name=True,
        ser_json_inf_nan="strings",
        use_attribute_docstrings=True,
    )


class SourceRecord(Record):
    """The model a run started from."""

    name: str
    kind: Literal["hub", "folder", "demo"] = "hub"
    revision: str | None = None
    digest: str | None = None


class Environment(Record):
    """Where a run happened."""

    python: str
    torch: str
    transformers: str
    device: str
    packages: dict[str, str] = {}
    """Further packages that matter to the numbers, name -> version."""


class StageRecord(Record):
    """One stage of the recipe as it was run."""

    name: str
    id: str
    key: str
    cached: bool
    seconds: float
    """What the stage took when it ran: for a cached stage, in the earlier run."""
    peak_cpu_bytes: int | None = None
    peak_gpu_bytes: int | None = None
    notes: tuple[str, ...] = ()
    papers: tuple[str, ...] = ()
    """arXiv numbers such as `2510.13999`."""


class SizeSide(Record):
    """A model's size. `parameters` counts weights as the model uses them, however they are packed."""

    bytes: int
    parameters: int
    experts: tuple[int, ...] = ()
    """Experts stored, per MoE layer."""
    router_rows: tuple[int, ...] = ()
    """Rows of the router, per MoE layer."""
    by_part: dict[Part, int] = {}
    """Bytes by part of the model."""


class SizeRecord(Record):
    """Size before and after; `after` is None when the run stopped before it wrote a model."""

    before: SizeSide
    after: SizeSide | None = None

    @property
    def ratio(self) -> float | None:
        """How many times smaller the files are."""
        return self.before.bytes / self.after.bytes if self.after and self.after.bytes else None


class Paired(Record):
    """A difference between two models on the same documents, with what the documents can tell about it."""

    scale: Literal["difference", "ratio"]
    """`ratio` for perplexities: after divided by before."""
    estimate: float
    """On that scale, like everything below; for several tasks their mean (of logarithms for ratios)."""
    stderr: float | None = None
    low: float | None = None
    high: float | None = None
    """95 % interval; None where the documents do not tell (fewer than two, or all with the same difference)."""
    items: int
    """Documents."""
    p: float | None = None
    """Exact two-sided p of McNemar's test, for metrics of right and wrong."""
    lost: int | None = None
    """Documents that went from right to wrong."""
    gained: int | None = None
    """Documents that went from wrong to right."""
    detectable: float | None = None
    """Smallest true difference that would be found four times in five, with as many flips as were seen."""

    @property
    def clear(self) -> bool:
        """Whether the interval leaves no change out; without one, whether several documents show the same change."""
        nothing = 1.0 if self.scale == "ratio" else 0.0
        if self.low is None or self.high is None:
            return self.items > 1 and self.estimate != nothing
        return not self.low <= nothing <= self.high


class MetricRow(Record):
    """One metric of one task on the source model and on the result."""

    task: str
    metric: str
    before: float | None = None
    before_stderr: float | None = None
    after: float | None = None
    after_stderr: float | None = None
    samples: int | None = None
    higher_is_better: bool | None = None
    paired: Paired | None = None
    """The comparison document by document, where both evaluations kept their documents."""

    @property
    def delta(self) -> float | None:
        return None if self.before is None or self.after is None else self.after - self.before

    @property
    def delta_stderr(self) -> float | None:
        """Standard error of the difference, paired where it is known.

        Otherwise as if both evaluations were independent, sqrt(se_before^2 + se_after^2). They answer the same
        questions, so the true error is usually smaller: a clear change here is clear.
        """
        if self.paired is not None and self.paired.scale == "difference":
            return self.paired.stderr
        if self.before_stderr is None or self.after_stderr is None:
            return None
        return math.hypot(self.before_stderr, self.after_stderr)

    @property
    def reading(self) -> Reading:
        """The difference in words: by the paired interval, else by standard errors; without either every difference
        counts as clear."""
        if self.delta is None or math.isnan(self.delta):
            return "not compared"
        if not self._is_clear(self.delta):
            return "no clear change"
        if self.higher_is_better is None:
            return "changed"
        return "better" if (self.delta > 0) == self.higher_is_better else "worse"

    def _is_clear(self, delta: float) -> bool:
        if self.paired is not None:
            return self.paired.clear
        return abs(delta) > CLEAR_ERRORS * (self.delta_stderr or 0.0)


class Calibration(Record):
    """How the calibration statistics came about."""

    source: dict[str, Any] = {}
    """As `CalibrationStats.source` has it: data set, samples, tokens, seed, dtype."""
    tokens: int
    """Tokens that went through each MoE layer."""


class Dendrogram(Record):
    """Clusters of one layer: SciPy's linkage matrix [E-1, 4] and the group of each expert [E]."""

    linkage: tuple[tuple[float, float, float, float], ...]
    groups: tuple[int, ...]


class Series(Record):
    """One line of a chart: points in the order they are joined; None leaves a gap."""

    name: str
    x: tuple[float, ...]
    y: tuple[float | None, ...]
    error: tuple[float, ...] = ()
    """Half the length of each point's bar, one standard error; empty without."""

    @model_validator(mode="after")
    def _equally_long(self) -> Self:
        if len(self.x) != len(self.y) or (self.error and len(self.error) != len(self.x)):
            raise ValueError(f"`{self.name}` has {len(self.x)} x, {len(self.y)} y and {len(self.error)} errors")
        return self


class Chart(Record):
    """A figure that a stage asks for: `ctx.record("charts", [...])` with mappings of these values."""

    title: str
    """What it shows; charts of several stages under one title are drawn as one."""
    caption: str
    """How to read it: what was measured, on what, what is better."""
    x_label: str
    y_label: str
    log_x: bool = False
    log_y: bool = False
    series: tuple[Series, ...]


class Figures(Record):
    """Data of the figures, by layer index; expert ids are those of the source model."""

    load: dict[int, tuple[int, ...]] = {}
    """Tokens routed to each expert [E]."""
    dendrograms: dict[int, Dendrogram] = {}
    kept: dict[int, tuple[int, ...]] = {}
    """Experts that still have a router row or lead their group, ascending."""
    groups: dict[int, tuple[int, ...]] = {}
    """Group of each expert [E], -1 for a dropped one."""
    charts: tuple[Chart, ...] = ()
    """What stages measured along a line: error by layer, routing drift, hits against cache."""

    def homes(self, layer: int) -> tuple[int | None, ...]:
        """For each source expert of a layer, the one that holds it now: itself, its group's lead, None if dropped.

        Empty when nothing is known of the layer. Without `kept`, the smallest member stands for its group.
        """
        groups, kept = self.groups.get(layer), self.kept.get(layer)
        if groups is None:
            experts = len(self.load.get(layer, ())) or max(kept or (-1,)) + 1
            return () if kept is None else tuple(e if e in kept else None for e in range(experts))
        leads: dict[int, int] = {}
        for expert in [*(e for e in kept or () if e < len(groups)), *range(len(groups))]:
            leads.setdefault(groups[expert], expert)
        leads.pop(-1, None)
        return tuple(leads.get(group) for group in groups)


class SpeedEstimate(Record):
    """What a GPU could do at most, by the roofline model (`ops.roofline`): tokens/s, memory. Not measured."""

    gpu: str
    what: Literal["decode", "prefill"]
    batch: int
    tokens: int
    """Of the prompt, or of the context that decode goes on from."""
    before: float
    after: float | None = None
    before_bytes: int
    after_bytes: int | None = None


class Check(Record):
    """One check of the written model."""

    name: str
    passed: bool
    detail: str = ""


class Verification(Record):
    """What `verify` found of the written model."""

    status: Literal["passed", "failed", "skipped"]
    checks: tuple[Check, ...] = ()


class Report(Record):
    """Everything a run leaves to say. `created` is the only time of day in it."""

    schema_version: int = Field(default=SCHEMA, alias="schema")
    name: str
    created_by: str
    """Version of moecli."""
    created: str | None = None
    """ISO 8601, or None."""
    recipe: str
    """The resolved recipe, YAML text."""
    source: SourceRecord
    environment: Environment
    stages: tuple[StageRecord, ...] = ()
    export: Literal["stock", "compact", "expanded", "research", "gptq"] | None = None
    size: SizeRecord | None = None
    metrics: tuple[MetricRow, ...] = ()
    calibration: Calibration | None = None
    figures_data: Figures = Figures()
    verification: Verification | None = None
    estimates: tuple[SpeedEstimate, ...] = ()
    """How fast source and result could run on named GPUs; what was measured is among the metrics."""
    warnings: tuple[str, ...] = ()


# -- files ---------------------------------------------------------------------------------------------------------


def save(report: Report, folder: Path) -> None:
    """Write `report.json`, `report.md` and `report.html` to `folder`, made if missing."""
    from moecli.runner.report_html import render_html
    from moecli.runner.report_words import render_markdown

    folder.mkdir(parents=True, exist_ok=True)
    value = json.loads(report.model_dump_json())
    write_text(folder / "report.json", _compact_json(value) + "\n")
    write_text(folder / "report.md", render_markdown(report))
    write_text(folder / "report.html", render_html(report))


def load(folder: Path) -> Report:
    """Read `report.json` of a folder.

    Raises SurroundingsError when it is missing and MoecliError when it is damaged or newer than this reader.
    """
    path = folder / "report.json"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SurroundingsError(f"no report at {path}", hint="`moecli run RECIPE` writes one when it ends") from None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise MoecliError(f"{path} is not JSON ({error.msg}, line {error.lineno})", hint=_REWRITE) from error
    version = value.get("schema") if isinstance(value, dict) else None
    if isinstance(version, int) and version > SCHEMA:
        raise MoecliError(
            f"{path} has format {version}, this moecli reads up to {SCHEMA}", hint="`pip install --upgrade moecli`"
        )
    try:
        return Report.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(step) for step in first["loc"]) or "the top level"
        raise MoecliError(f"{path} is damaged at {where}: {first['msg']}", hint=_REWRITE) from error


_REWRITE = "`moecli run RECIPE` writes it again, finished stages are not repeated"


def write_card(report: Report, folder: Path) -> None:
    """Write the model card `README.md` beside the weights in `folder`."""
    from moecli.runner.card import render_card

    write_text(folder / "README.md", render_card(report, report.source.name if report.source.kind == "hub" else None))


def _compact_json(value: Any, indent: str = "") -> str:
    """JSON a person can diff: objects and lists of objects spread out, lists of numbers on one line."""
    inner = indent + " "
    if isinstance(value, dict) and value:
        items = [f"{inner}{json.dumps(k)}: {_compact_json(v, inner)}" for k, v in value.items()]
        return "{\n" + ",\n".join(items) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        return "[\n" + ",\n".join(inner + _compact_json(item, inner) for item in value) + f"\n{indent}]"
    return json.dumps(value, ensure_ascii=False)


def metric_rows(before: Evaluation | None, after: Evaluation | None) -> tuple[MetricRow, ...]:
    """Pair two evaluations by task and metric, in order of first appearance; either side may be missing.

    `samples` is the smaller number when the sides differ.
    """
    sides = [{(m.task, m.metric): m for m in side.metrics} if side else {} for side in (before, after)]
    rows = []
    for key in dict.fromkeys([*sides[0], *sides[1]]):
        old, new = sides[0].get(key), sides[1].get(key)
        known = [m for m in (old, new) if m is not None]
        rows.append(
            MetricRow(
                task=key[0],
                metric=key[1],
                before=old.value if old else None,
                before_stderr=old.stderr if old else None,
                after=new.value if new else None,
                after_stderr=new.stderr if new else None,
                samples=min(m.samples for m in known),
                higher_is_better=known[-1].higher_is_better,
            )
        )
    return tuple(rows)
