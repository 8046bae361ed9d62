"""What `moecli sweep` and `moecli table` say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moecli.cli.render import duration_text, table_text

if TYPE_CHECKING:
    from moecli.runner.points import PointResult, PointStatus
    from moecli.runner.sweep import Sweep

Document = dict[str, Any]


def list_document(sweep: Sweep) -> Document:
    """The points with what their axes stand at."""
    points = [{"name": point.name, "axes": dict(point.labels)} for point in sweep.points]
    return {"sweep": sweep.name, "file": sweep.path, "points": points}


def list_text(document: Document) -> str:
    """One line a point, one column an axis."""
    axes = list(dict.fromkeys(axis for point in document["points"] for axis in point["axes"]))
    rows = [
        [str(i), point["name"], *(point["axes"].get(a, "") for a in axes)] for i, point in enumerate(document["points"])
    ]
    return table_text(["", "point", *axes], rows, right=(0,))


def survey_document(statuses: Sequence[PointStatus], folder: Path) -> Document:
    """What each point would do; a stage that several points need counts once."""
    points = [
        {
            "name": s.point.name,
            "state": s.state,
            "steps": [
                {"label": step.step.label, "key": step.step.key, "state": step.state, "reason": step.reason,
                 "shared_with": s.shared.get(step.step.key)}
                for step in s.steps
            ],
        }
        for s in statuses
    ]  # fmt: skip
    states = {step["key"]: step["state"] for point in points for step in point["steps"]}
    kinds = {s.step.key: s.step for status in statuses for s in status.steps}
    waiting = [key for key, state in states.items() if state != "done"]
    return {
        "folder": str(folder),
        "points": points,
        "stages": {
            "needed": sum(len(point["steps"]) for point in points),
            "different": len(states),
            "to_run": len(waiting),
            "calibrations_to_run": sum(kinds[key].stage.kind == "calibrate" for key in waiting),
            "baselines_to_run": sum(kinds[key].baseline for key in waiting),
        },
    }


def survey_text(document: Document) -> str:
    """A line for each point with the stages that are its own to run, then the sums."""
    from moecli.runner.report_words import plural

    rows = []
    for point in document["points"]:
        own = [s["label"] for s in point["steps"] if s["state"] != "done" and not s["shared_with"]]
        rows.append(
            [
                point["name"],
                point["state"],
                ", ".join(own) or ("nothing" if point["state"] == "done" else "export and report only"),
            ]
        )
    n = document["stages"]
    sums = (
        f"{len(rows)} points need {n['needed']} stages, {n['different']} of them different; {n['to_run']} will run"
        f" ({plural(n['calibrations_to_run'], 'calibration')},"
        f" {plural(n['baselines_to_run'], 'evaluation')} of the source)"
    )
    return f"{table_text(['point', 'state', 'will run'], rows)}\n\n{sums}"


def write_slurm(sweep: Sweep, folder: Path, file: str, device: str | None) -> Document:
    """The array job in `file`; the folder is made, for the logs of its tasks."""
    from moecli.io.durable import write_text
    from moecli.io.store import RunFolder
    from moecli.runner.points import slurm_script, write_index

    RunFolder(folder)
    write_index(sweep, folder)
    write_text(Path(file), slurm_script(sweep, folder, device))
    return {"slurm": file, "folder": str(folder), "points": len(sweep.points)}


def result_line(result: PointResult, number: int, of: int) -> str:
    """What became of a point, on stderr as it happens."""
    took = f" in {duration_text(result.seconds)}" if result.state != "done before" else ""
    line = f"{result.name}: {result.state}{took} ({number} of {of})"
    if result.state != "failed":
        return line
    return line + f"\nerror: {result.message}" + (f"\nhint: {result.hint}" if result.hint else "")


def results_document(sweep: Sweep, folder: Path, results: Sequence[PointResult], code: int) -> Document:
    """What became of every point."""
    points = [
        {"name": r.name, "state": r.state, "seconds": round(r.seconds, 1), "message": r.message, "hint": r.hint}
        for r in results
    ]
    return {"sweep": sweep.name, "folder": str(folder), "exit_code": code, "results": points, "report": None}


def results_text(document: Document) -> str:
    """How many points are done, and which failed."""
    failed = [point for point in document["results"] if point["state"] == "failed"]
    lines = [f"{point['name']} failed: {point['message']}" for point in failed]
    done = len(document["results"]) - len(failed)
    lines.append(f"{done} of {len(document['results'])} points done in {document['folder']}")
    if failed:
        lines.append("the same command tries the others again")
    if document["report"]:
        lines.append(f"report   {document['report']}")
    return "\n".join(lines)


def text_of(document: Document) -> str:
    """The answer of `moecli sweep`, whatever was asked of it."""
    if "slurm" in document:
        return f"wrote {document['slurm']}: {document['points']} tasks; `sbatch {document['slurm']}` starts them"
    return results_text(document) if "results" in document else survey_text(document)


def pages_of(folder: Path) -> str | None:
    """The pages of all points that have a report; None when none has."""
    from moecli.runner.points import reported
    from moecli.runner.several import load, write_pages

    return str(write_pages(load([folder]), folder / "report")) if reported(folder) else None
