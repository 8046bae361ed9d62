"""What is done in a run folder, and why a stage would run again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moecli.io.store import RunFolder, StageFolder
from moecli.runner.execute import code_digest
from moecli.runner.plan import Plan, Step

State = Literal["done", "partial", "will run"]


@dataclass(frozen=True, slots=True)
class StepStatus:
    """One step's state with the reason in words."""

    step: Step
    state: State
    reason: str


def status(plan: Plan, run_dir: Path) -> list[StepStatus]:
    """The state of every step of a plan in a run folder; reads manifests only, takes no lock, writes nothing."""
    if not run_dir.exists():
        return [StepStatus(step, "will run", "never run") for step in plan.steps]
    run = RunFolder(run_dir, create=False)
    finished = [folder.manifest() for folder in run.stages() if folder.complete]
    return [_status(step, run.stage(step.folder_name, step.key), finished) for step in plan.steps]


def _status(step: Step, folder: StageFolder, finished: list[dict[str, Any]]) -> StepStatus:
    if folder.complete:
        manifest = folder.manifest()
        if manifest.get("source_sha256") != code_digest(step.stage.name):
            return StepStatus(step, "done", f"its code changed since; `--redo {step.stage.name}` runs it again")
        return StepStatus(step, "done", f"{manifest['seconds']:.1f} s")
    earlier = [m["identity"] for m in finished if m["identity"]["stage"] == step.stage.name]
    changes = "; ".join(_changes(_nearest(earlier, step.identity), step.identity)) if earlier else "never run"
    if folder.work.exists():
        return StepStatus(step, "partial", "stopped before its end; finished parts are kept")
    return StepStatus(step, "will run", changes)


def _nearest(earlier: list[dict[str, Any]], identity: Mapping[str, Any]) -> dict[str, Any]:
    return min(earlier, key=lambda other: len(list(_changes(other, identity))))


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """What differs between two identities, as `keep 64 -> 48`."""
    for name in ("version", "seed"):
        if old[name] != new[name]:
            yield f"{name} {old[name]} -> {new[name]}"
    for name in dict.fromkeys([*old["options"], *new["options"]]):
        before, after = old["options"].get(name), new["options"].get(name)
        if before != after:
            hashed = str(before).startswith("sha256:") or str(after).startswith("sha256:")
            yield f"{name}: its content changed" if hashed else f"{name} {before} -> {after}"
    for name in dict.fromkeys([*old["inputs"], *new["inputs"]]):
        if old["inputs"].get(name) != new["inputs"].get(name):
            yield f"input `{name}` changed"
