"""What commands answer, as a JSON-able document and as text made from that document."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moecli.cli.render import table_text
from moecli.core.errors import UsageError

if TYPE_CHECKING:
    from moecli.core.model import ModelSketch
    from moecli.core.stage import Stage
    from moecli.runner.execute import RunResult
    from moecli.runner.plan import Plan

Document = dict[str, Any]


def planned(recipe: str, sets: list[str] | tuple[str, ...]) -> Plan:
    """The plan of a recipe file; of a hub model only config and headers are fetched.

    Raises RecipeError with every problem, SurroundingsError when the model cannot be had.
    """
    from moecli.runner.open import load_recipe
    from moecli.runner.plan import make_plan

    loaded = load_recipe(recipe, sets)
    sketch, digest = model_sketch(loaded.model, loaded.revision)
    return make_plan(loaded, sketch, digest)


def model_sketch(model: str, revision: str | None) -> tuple[ModelSketch, str]:
    """A model's facts and, where headers could be read, its tensors; and its key."""
    from moecli.core.model import ModelSketch
    from moecli.families import facts_of
    from moecli.io.sources import resolve_config

    found = resolve_config(model, revision)
    return ModelSketch(facts_of(found.config), found.config, found.specs), found.digest


# -- plan and status


def plan_document(plan: Plan, run_dir: Path) -> Document:
    """Steps with their wiring and state, and what the run will cost."""
    from moecli.runner.estimate import estimate
    from moecli.runner.plan import SOURCE
    from moecli.runner.roofline import estimates
    from moecli.runner.status import status

    states = status(plan, run_dir)
    steps = [
        {
            "stage": step.stage.name,
            "label": step.label,
            "key": step.key,
            "inputs": {name: plan.label_of(index) for name, index in step.inputs.items()},
            "state": state.state,
            "reason": state.reason,
            "experts": step.sketch.facts.experts,
            "bytes": step.sketch.bytes if step.sketch.specs else None,
        }
        for step, state in zip(plan.steps, states, strict=True)
    ]
    costs = estimate(plan).as_json()
    free = shutil.disk_usage(_existing(run_dir)).free
    return {
        "model": plan.recipe.model,
        "run_dir": str(run_dir),
        "steps": steps,
        "export": plan.export,
        "estimate": costs,
        "disk_free_bytes": free,
        "speed_estimates": [
            one.model_dump(mode="json")
            for one in estimates(plan.source, None if plan.final == SOURCE else plan.sketch_of(plan.final))
        ],
    }


def _existing(path: Path) -> Path:
    """The folder itself, or the nearest one above that is there."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def plan_text(document: Document) -> str:
    """The steps as a table, then what they need."""
    from moecli.runner.report_words import bytes_text

    def size(value: int | None) -> str:
        return "unknown" if value is None else bytes_text(value)

    rows = [
        [
            str(number),
            step["label"],
            ", ".join(f"{name} = {origin}" for name, origin in step["inputs"].items()),
            str(step["experts"]),
            size(step["bytes"]),
            step["state"],
            step["reason"],
        ]
        for number, step in enumerate(document["steps"], 1)
    ]
    table = table_text(["", "stage", "takes", "experts", "model after", "state", ""], rows, right=(0, 3, 4))
    costs, free = document["estimate"], document["disk_free_bytes"]
    lines = [
        f"model    {document['model']}: {size(costs['source_bytes'])} -> {size(costs['output_bytes'])}",
        *([f"export   {document['export']}"] if document["export"] else []),
        *([f"loaded   {size(costs['loaded_bytes'])} in memory"] if costs["loaded_bytes"] is not None else []),
        f"memory   {size(costs['peak_memory_bytes'])} at most",
        f"disk     {size(costs['disk_bytes'])} at most in {document['run_dir']}, {size(free)} free",
    ]
    if costs["disk_bytes"] is not None and costs["disk_bytes"] > free:
        lines.append(f"warning: the run needs up to {size(costs['disk_bytes'])} of disk, {size(free)} free")
    return "\n".join([table, "", *lines, *_speed_lines(document["speed_estimates"])])


def _speed_lines(found: list[Document]) -> list[str]:
    """What named GPUs could do at most, before and after."""
    from moecli.runner.report import SpeedEstimate
    from moecli.runner.report_words import estimates_table, estimates_text

    if not found:
        return []
    rows = [SpeedEstimate.model_validate(one) for one in found]
    head, cells = estimates_table(rows)
    return ["", table_text(head, cells, right=range(1, len(head))), "", estimates_text(rows)]


def status_document(plan: Plan, run_dir: Path) -> Document:
    """What is done in a run folder."""
    from moecli.runner.status import status

    steps = [
        {
            "stage": s.step.stage.name,
            "label": s.step.label,
            "key": s.step.key,
            "state": s.state,
            "reason": s.reason,
        }
        for s in status(plan, run_dir)
    ]
    model = run_dir / "model"
    return {
        "run_dir": str(run_dir),
        "steps": steps,
        "model": str(model) if (model / "config.json").exists() else None,
    }


def status_text(document: Document) -> str:
    """`cluster/hc-smoe  will run: keep 64 -> 48`"""
    rows = [[step["label"], step["state"], step["reason"]] for step in document["steps"]]
    model = document["model"] or "not written yet"
    return table_text(["stage", "state", ""], rows) + f"\n\nmodel    {model}"


def clean_text(document: Document) -> str:
    """What went, or would go."""
    from moecli.runner.report_words import bytes_text

    rows = [[item["stage"], item["key"], bytes_text(item["bytes"])] for item in document["removed"]]
    said = "would free" if document["dry_run"] else "freed"
    total = f"{said} {bytes_text(document['bytes'])} in {document['run']}"
    return f"{table_text(['stage', 'key', 'size'], rows, right=(2,))}\n\n{total}" if rows else "nothing to drop"


# -- methods


def methods_document(kind: str | None) -> Document:
    """Every stage, or those of one kind, with the first line of its documentation; nothing is imported."""
    from moecli.runner import lookup

    names = [name for name in lookup.names() if kind in (None, name.partition("/")[0])]
    return {"methods": [{"name": name, "summary": lookup.summary(name)} for name in names]}


def methods_text(document: Document) -> str:
    """Stages by kind."""
    rows = [[item["name"], item["summary"]] for item in document["methods"]]
    return table_text(["stage", ""], rows) + "\n\n`moecli methods KIND/NAME` shows options, formula and paper"


def find_stage(name: str) -> Stage:
    """A stage by name, or by its method's name where only one kind has it. UsageError with near names."""
    from moecli.recipe.near import did_you_mean, near_stage
    from moecli.runner import lookup

    names = lookup.names()
    same = [full for full in names if full.partition("/")[2] == name]
    if name not in names and len(same) != 1:
        hint = did_you_mean(near_stage(name, names), "`moecli methods` lists them")
        raise UsageError(f"unknown stage `{name}`", hint=hint)
    return lookup.find(name if name in names else same[0])


def method_document(stage: Stage) -> Document:
    """One stage: documentation, inputs, output, options with type, default and meaning."""
    from moecli.runner import lookup

    schema = stage.options.model_json_schema(by_alias=True)
    needed = schema.get("required", [])
    options = [
        {
            "name": name,
            "type": type_words(field, schema.get("$defs", {})),
            "required": name in needed,
            "default": field.get("default"),
            "doc": " ".join(field.get("description", "").split()),
        }
        for name, field in schema.get("properties", {}).items()
    ]
    inputs = {
        name: given.type.__name__ + (" (optional)" if given.optional else "") for name, given in stage.inputs.items()
    }
    return {
        "name": stage.name, "version": stage.version, "doc": lookup.docstring(stage.name), "inputs": inputs,
        "output": stage.output.__name__, "options": options, "file": str(lookup.source_path(stage.name)),
    }  # fmt: skip


def method_text(document: Document) -> str:
    """Documentation, then wiring, then the table of options."""
    takes = ", ".join(f"{name}: {kind}" for name, kind in document["inputs"].items()) or "nothing"
    rows = [
        [
            option["name"],
            option["type"],
            "required" if option["required"] else value_text(option["default"]),
            option["doc"],
        ]
        for option in document["options"]
    ]
    table = table_text(["option", "type", "default", ""], rows) if rows else "no options"
    return f"{document['name']}\n\n{document['doc']}\n\ntakes  {takes}\nmakes  {document['output']}\n\n{table}"


def value_text(value: Any) -> str:
    """A default as a recipe would write it."""
    import json

    if value is None:
        return "-"
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def type_words(field: Mapping[str, Any], defs: Mapping[str, Any]) -> str:
    """A JSON Schema type in words: "whole number above 0", "list of text"."""
    if "$ref" in field:
        return type_words(defs[field["$ref"].rpartition("/")[2]], defs)
    if "const" in field or "enum" in field:
        values = field.get("enum", [field.get("const")])
        return " or ".join(str(value) for value in values)
    for several in ("anyOf", "oneOf"):
        if several in field:
            return " or ".join(type_words(member, defs) for member in field[several] if member.get("type") != "null")
    kind = field.get("type")
    if kind == "array":
        inner = field.get("items") or {}
        return f"list of {type_words(inner, defs)}" if inner else "list"
    if kind == "object" and field.get("properties"):
        return f"mapping of {', '.join(field['properties'])}"
    words = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false"}
    return " ".join([words.get(str(kind), "mapping"), *_bounds(field)])


def _bounds(field: Mapping[str, Any]) -> Iterator[str]:
    words = {"exclusiveMinimum": "above", "minimum": "from", "exclusiveMaximum": "below", "maximum": "to"}
    for key, word in words.items():
        if key in field:
            yield f"{word} {field[key]}"


# -- models


def inspect_document(model: str, revision: str | None) -> Document:
    """Facts and sizes of a model, from config and headers; by part only where the weights are at hand."""
    from dataclasses import asdict

    sketch, digest = model_sketch(model, revision)
    size = {"bytes": sketch.bytes, "parameters": sketch.parameters, "by_part": {}} if sketch.specs else None
    if size is not None and (parts := _sizes_on_disk(model)):
        size = parts
    return {"model": model, "digest": digest, "facts": asdict(sketch.facts), "tensors": len(sketch.specs), "size": size}


def _sizes_on_disk(model: str) -> Document | None:
    """Bytes, parameters and bytes by part of a local model; None for one on the hub."""
    from moecli.families import facts_of
    from moecli.io.reader import FolderCheckpoint
    from moecli.io.sources import resolve
    from moecli.runner.gather import size_of

    if model != "demo" and not Path(model).expanduser().is_dir():
        return None
    side = size_of(FolderCheckpoint(resolve(model).folder, facts_of))
    return {"bytes": side.bytes, "parameters": side.parameters, "by_part": dict(side.by_part)}


def inspect_text(document: Document) -> str:
    """Facts line by line, then the table of sizes."""
    from moecli.runner.report_words import bytes_text, count_text

    facts = document["facts"]
    rows = [
        ["family", facts["model_type"]],
        ["layers", f"{facts['layers']}, {len(facts['moe_layers'])} of them with experts"],
        ["experts", f"{facts['experts']} per layer, {facts['top_k']} per token"],
        ["router", router_words(facts)],
        [
            "widths",
            f"model {facts['hidden']}, expert {facts['expert_width']}, shared {facts['shared_width'] or '-'}",
        ],
        ["vocabulary", f"{facts['vocab']}, {facts['max_positions']} positions"],
        ["dtype", facts["dtype"] + (f", quantized ({facts['quantized']})" if facts["quantized"] else "")],
    ]
    size = document["size"]
    if size is None:
        return table_text(["", document["model"]], [*rows, ["size", "unknown, the weights are not at hand"]])
    rows.append(["size", f"{bytes_text(size['bytes'])}, {count_text(size['parameters'])} parameters"])
    rows += [
        [f"  {part}", f"{bytes_text(count)} ({100 * count / size['bytes']:.1f} %)"]
        for part, count in sorted(size["by_part"].items(), key=lambda item: -item[1])
    ]
    return table_text(["", document["model"]], rows)


def router_words(facts: Mapping[str, Any]) -> str:
    """`softmax, weights of the chosen sum to 1, best of 4 of 8 groups`"""
    words = [facts["score"].replace("_", " ")]
    words += ["weights of the chosen sum to 1"] if facts["renormalized"] else []
    words += [f"best {facts['groups_used']} of {facts['groups']} groups"] if facts["groups"] > 1 else []
    if facts["router_rows"] != facts["experts"]:
        words.append(f"{facts['router_rows']} rows on {facts['experts']} experts")
    return ", ".join(words)


def verify_document(model: str, against: str | None) -> Document:
    """What `runner.verify` finds of a model, and what became of each tensor of `against`."""
    from moecli.io.sources import resolve
    from moecli.runner.verify import verify_folder

    found = verify_folder(resolve(model).folder, resolve(against).folder if against else None)
    return {"model": model, "against": against, **found.as_json(), "problems": list(found.problems),
            "accounting": dict(found.accounting)}  # fmt: skip


def verify_text(document: Document) -> str:
    """One line a check, then the verdict."""
    rows = [[c["name"], "passed" if c["passed"] else "failed", c["detail"]] for c in document["checks"]]
    problems = [f"- {problem}" for problem in document["problems"]]
    return "\n".join([table_text(["check", "", ""], rows), "", *problems, f"{document['model']}: {document['status']}"])


# -- results


def result_document(result: RunResult) -> Document:
    """Where everything is, with sizes and metrics."""
    report = result.report
    page = result.run_dir / "report" / "report.html"
    document: Document = {
        "run_dir": str(result.run_dir),
        "model": str(result.model) if result.model else None,
        "report": str(page) if report is not None else None,
    }
    if report is not None:
        document["size"] = report.size.model_dump(mode="json") if report.size else None
        document["metrics"] = [row.model_dump(mode="json") for row in report.metrics]
    return document


def result_text(result: RunResult) -> str:
    """Size, experts, and every metric before and after; then the path of the page."""
    from moecli.runner.report_words import metric_name, size_rows, value_text

    report = result.report
    if report is None:
        return f"stopped as asked; `moecli status {result.run_dir}` shows what is left"
    rows = [list(row) for row in size_rows(report.size)] if report.size else []
    rows += [
        [f"{row.task} {metric_name(row)}", value_text(row.before, row.before_stderr),
         value_text(row.after, row.after_stderr), value_text(row.delta, row.delta_stderr, signed=True)]
        for row in report.metrics
    ]  # fmt: skip
    table = table_text(["", "before", "after", "left or difference"], rows, right=(1, 2, 3))
    places = [f"model    {result.model}"] if result.model else []
    return "\n".join([table, "", *places, f"report   {result.run_dir / 'report' / 'report.html'}"])
