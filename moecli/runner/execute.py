"""Run the steps of a plan that are not done yet, write `model/`, verify it, and report."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from moecli import __version__
from moecli.core.artifacts import Artifact, CalibrationStats, Checkpoint, CheckpointWriter, Evaluation
from moecli.core.errors import StageFailed, SurroundingsError, UsageError
from moecli.core.stage import Options
from moecli.engine.ranks import ALONE, Ranks, own_device, together
from moecli.io.durable import disk_errors
from moecli.io.overlay import OverlayCheckpoint, OverlayWriter
from moecli.io.store import KEY_DIGITS, RunFolder, SharedParts, StageFolder
from moecli.runner import lookup
from moecli.runner.open import OpenedRecipe
from moecli.runner.plan import SOURCE, Plan, Step, key_of

T = TypeVar("T")
A = TypeVar("A", bound=Artifact)

RUN_FORMAT = 1
"""Version of a run's `manifest.json`. Raised when an older reader could misread a newer one."""

EXPORT = "export"
"""What `--redo` calls the writing of `model/`, and the folder of its manifest."""

Event = dict[str, Any]
Listener = Callable[[Event], None]
"""Gets every event as it is written to events.jsonl."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one step left behind in this run."""

    step: Step
    cached: bool
    manifest: Mapping[str, Any]


@dataclass
class StageContext:
    """The Context of one running stage."""

    step: Step
    folder: StageFolder
    device: torch.device
    seed: int
    emit: Listener
    parts: SharedParts
    notes: list[str] = field(default_factory=list)
    records: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._task: tuple[str, int] | None = None
        self._started = 0.0
        self.rng = torch.Generator().manual_seed(int(self.step.key[:15], 16))
        self.input_keys: Mapping[str, str] = self.step.identity["inputs"]

    def part(self, name: str, kind: type[A], make: Callable[[], A]) -> A:
        return self.folder.part(name, kind, make)

    def has_part(self, name: str) -> bool:
        return self.folder.has_part(name)

    def shared_part(self, key: str, kind: type[A], make: Callable[[], A]) -> A:
        return self.parts.part(key, kind, make)

    def has_shared_part(self, key: str) -> bool:
        return self.parts.has(key)

    def track(self, items: Sequence[T], label: str) -> Iterator[T]:
        for done, item in enumerate(items):
            self.progress(label, done, len(items))
            yield item
        self.progress(label, len(items), len(items))

    def progress(self, label: str, done: int, total: int) -> None:
        if self._task != (label, total) or done == 0:
            self._task, self._started = (label, total), time.monotonic()
        elapsed = time.monotonic() - self._started
        eta = elapsed / done * (total - done) if done else None
        self.emit(
            {
                "event": "progress",
                "stage": self.step.label,
                "label": label,
                "done": done,
                "total": total,
                "eta_s": eta,
            }
        )

    def note(self, text: str) -> None:
        self.notes.append(text)
        self.emit({"event": "note", "stage": self.step.label, "text": text})

    def record(self, name: str, value: Any) -> None:
        self.records[name] = value

    def writer(self, parent: Checkpoint, config: Mapping[str, Any] | None = None) -> CheckpointWriter:
        return OverlayWriter(self.folder.work, parent, config)


class FollowerContext(StageContext):
    """The Context of a stage on a rank that does not write: the first rank keeps the parts and says what there is to
    say. What reads or writes files of the run is a bug here.
    """

    def part(self, name: str, kind: type[A], make: Callable[[], A]) -> A:
        raise _followers_bug(f"part `{name}`")

    has_part = has_shared_part = shared_part = writer = part  # type: ignore[assignment]

    def progress(self, label: str, done: int, total: int) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def record(self, name: str, value: Any) -> None:
        pass


def _followers_bug(what: str) -> RuntimeError:
    return RuntimeError(f"{what} was asked for on a rank that writes nothing; use `told` or `leads`")


class Execution:
    """One run of a plan in one folder."""

    def __init__(
        self,
        opened: OpenedRecipe,
        run: RunFolder,
        device: torch.device,
        listener: Listener | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.plan, self.source, self.origin = opened.plan, opened.source, opened.origin
        self.run, self.device, self.ranks = run, device, ranks
        self._listener = listener
        self.outcomes: dict[int, Outcome] = {}
        self.exported: Mapping[str, Any] = {}
        """Manifest of the export, empty while there is none."""

    def emit(self, event: Event) -> None:
        stamped = {"time": round(time.time(), 3), **event}
        self.run.append_event(stamped)
        if self._listener:
            self._listener(stamped)

    def folder(self, step: Step) -> StageFolder:
        return self.run.stage(step.folder_name, step.key)

    def step(self, index: int) -> Outcome:
        """Run one step, or take what is there."""
        step = self.plan.steps[index]
        folder = self.folder(step)
        if folder.complete:
            outcome = self._taken(step, folder)
        else:
            with self.alone(step):
                made = folder.complete  # by another run of the sweep, while this one waited
                outcome = self._taken(step, folder) if made else Outcome(step, False, self._run(step, folder))
        self.outcomes[index] = outcome
        return outcome

    def _taken(self, step: Step, folder: StageFolder) -> Outcome:
        self._tell(step, False)
        self.emit({"event": "stage_cached", "stage": step.label, "key": step.key})
        return Outcome(step, True, folder.manifest())

    def alone(self, step: Step) -> AbstractContextManager[None]:
        """Keeps other runs of a sweep from making the same. Calibrations wait for each other: one uses what another
        has collected."""
        name = "calibrate" if step.stage.kind == "calibrate" else f"{step.folder_name}-{step.key[:KEY_DIGITS]}"

        def waiting() -> None:
            self.emit({"event": "note", "stage": step.label, "text": "another run of the sweep is making it; waiting"})

        return self.run.alone(name, waiting)

    def _run(self, step: Step, folder: StageFolder) -> dict[str, Any]:
        self._tell(step, True)
        self.emit({"event": "stage_started", "stage": step.label, "key": step.key})
        folder.begin()
        ctx = StageContext(step, folder, self.device, self.plan.recipe.seed, self.emit, self.run.parts)
        _reset_peaks(self.device)
        started = time.monotonic()
        artifact = self._call(step, ctx)
        if not isinstance(artifact, Checkpoint):
            folder.save(artifact)
        manifest = {
            "identity": step.identity,
            "source_sha256": code_digest(step.stage.name),
            "seconds": round(time.monotonic() - started, 3),
            **_peaks(self.device),
            "notes": ctx.notes,
            "records": ctx.records,
            "moecli": __version__,
        }
        folder.finish(manifest)
        self.emit({"event": "stage_finished", "stage": step.label, "seconds": manifest["seconds"]})
        return manifest

    def follow(self, index: int) -> None:
        """Do this rank's share of a step. The first rank says whether there is any, and when."""
        step = self.plan.steps[index]
        if step.stage.every_rank and self.ranks.told(bool):
            ctx = FollowerContext(
                step, self.folder(step), self.device, self.plan.recipe.seed, lambda event: None, self.run.parts
            )
            self._call(step, ctx)

    def _tell(self, step: Step, runs: bool) -> None:
        if step.stage.every_rank:
            self.ranks.told(lambda: runs)

    def _call(self, step: Step, ctx: StageContext) -> Artifact:
        """The stage itself, with what it fails of in words."""
        inputs = {name: self.artifact(i, step.stage.inputs[name].type) for name, i in step.inputs.items()}
        missing = {name: None for name, wanted in step.stage.inputs.items() if wanted.optional and name not in inputs}
        try:
            with together(self.ranks if step.stage.every_rank else ALONE):
                return step.stage.run(step.options, **inputs, **missing, ctx=ctx)
        except StageFailed as error:
            where = f", {error.where}" if error.where else ""
            raise StageFailed(f"{step.label} stopped{where}: {error.message}", hint=error.hint) from error
        except torch.cuda.OutOfMemoryError as error:
            hint = "lower `batch_size` of this stage, or pass `--device cpu`; finished layers are saved"
            raise SurroundingsError(f"{step.label} ran out of GPU memory ({error})", hint=hint) from error
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            hint = "lower `batch_size` or `samples` of this stage; finished layers are saved"
            raise SurroundingsError(f"{step.label} ran out of memory", hint=hint) from error

    def artifact(self, index: int, kind: type[Artifact]) -> Artifact:
        """What a finished step made, read from its folder: of this kind, or of a more special one."""
        if index == SOURCE:
            return self.source
        step = self.plan.steps[index]
        if step.writes_weights:
            return self.checkpoint(index)
        made = step.stage.output
        return self.folder(step).load(made if issubclass(made, kind) else kind)

    def checkpoint(self, index: int) -> Checkpoint:
        """The source, or the overlay a weight stage wrote over its own input."""
        if index == SOURCE:
            return self.source
        step = self.plan.steps[index]
        parent = next(i for name, i in step.inputs.items() if issubclass(step.stage.inputs[name].type, Checkpoint))
        return OverlayCheckpoint(self.folder(step).path, self.checkpoint(parent))


def _is_out_of_memory(error: Exception) -> bool:
    """Torch says it in a RuntimeError of its allocator."""
    return isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


@dataclass(frozen=True, slots=True)
class RunResult:
    """Where everything is."""

    run_dir: Path
    model: Path | None
    report: Any
    """`runner.report.Report`, None when `until` stopped the run before the end."""


def run(
    opened: OpenedRecipe, run_dir: Path, *, device: torch.device | str = "cpu",
    until: str | None = None, redo: str | None = None, listener: Listener | None = None, store: Path | None = None,
    ranks: Ranks = ALONE,
) -> RunResult:  # fmt: skip
    """Run a plan in `run_dir`. `until` stops after the named stage; `redo` first forgets what every stage of that
    name made, or the export. `store` is a folder that keeps the stages of several runs.

    Raises SurroundingsError when another run holds the folder or it cannot be written, StageFailed when a stage
    or the verification of `model/` fails; finished work is kept.

    With several `ranks` all of them call this with the same arguments. The first does everything but the shares that
    stages of `every_rank` give the others; these write nothing and return when it is done.
    """
    plan = opened.plan
    stop = len(plan.steps) if until is None else named_step(plan, until) + 1
    device = own_device(device)
    if not ranks.leads:
        ranks.told(bool)  # the folder is there
        follower = Execution(opened, RunFolder(run_dir, create=False), device, ranks=ranks)
        for index in range(stop):
            follower.follow(index)
        return RunResult(run_dir, None, None)
    forget = [] if redo is None else forgotten(plan, redo)
    _check_ready(plan.steps[:stop], run_dir, forget)
    folder = RunFolder(run_dir)
    with folder.lock():
        if store is not None:
            folder.join(store)
        execution = Execution(opened, folder, device, listener, ranks)
        folder.write_text("recipe.yaml", plan.resolved_recipe())
        ranks.told(lambda: True)
        for stage_folder in folder.stages():
            if redo == EXPORT and stage_folder.name == EXPORT:
                stage_folder.remove()
        for step in forget:
            execution.folder(step).remove()
        if any(issubclass(step.stage.output, CalibrationStats) for step in forget):
            folder.parts.remove()  # or the stage would be made of the same parts again
        for index in range(stop):
            execution.step(index)
            if index == plan.final:
                with execution.run.alone(f"export-{plan.key_of(index)[:KEY_DIGITS]}", lambda: None):
                    _export(execution)
        if stop < len(plan.steps):
            return RunResult(run_dir, None, None)
        return _finish(execution)


def named_step(plan: Plan, name: str) -> int:
    """Index of the last step with this id, name, or method name. Raises UsageError when there is none."""
    matches = [i for i, step in enumerate(plan.steps) if not step.baseline and name in names_of(step)]
    if not matches:
        known = ", ".join(dict.fromkeys(f"`{step.label}`" for step in plan.steps if not step.baseline))
        raise UsageError(f"the recipe has no stage `{name}`", hint=f"its stages are {known}")
    return matches[-1]


def forgotten(plan: Plan, name: str) -> list[Step]:
    """Steps whose result `--redo` drops: those of this name, evaluations with the same one on the source."""
    if name == EXPORT:
        return []
    named_step(plan, name)
    positions = {step.position for step in plan.steps if not step.baseline and name in names_of(step)}
    return [step for step in plan.steps if step.position in positions]


def _check_ready(steps: Sequence[Step], run_dir: Path, forget: Sequence[Step]) -> None:
    """What is not on this machine is said before anything is made on disk, and only for stages that will run."""
    run = RunFolder(run_dir, create=False) if run_dir.is_dir() else None
    asked: list[Options] = []
    for step in steps:
        done = run is not None and step not in forget and run.stage(step.folder_name, step.key).complete
        if not done and step.options not in asked:
            asked.append(step.options)
            step.options.ready()


def names_of(step: Step) -> tuple[str, ...]:
    """Everything `--until` and `--redo` may call a step: id, full name, kind, method."""
    kind, _, method = step.stage.name.partition("/")
    return (step.label, step.stage.name, kind, method)


def _export(execution: Execution) -> None:
    """Write `model/` from the last weight stage and verify it, unless exactly that is there already."""
    from moecli.io.reader import digest
    from moecli.runner.export import choose, export
    from moecli.runner.verify import verify

    plan = execution.plan
    checkpoint = execution.checkpoint(plan.final)
    kind = plan.recipe.export
    kind = choose(checkpoint) if kind == "auto" else kind
    identity = {"stage": "export", "version": 1, "kind": kind, "inputs": {"model": plan.key_of(plan.final)}}
    folder = execution.run.stage(EXPORT, key_of(identity))
    target = execution.run.path / "model"
    if folder.complete and (target / "config.json").exists() and digest(target) == folder.manifest()["digest"]:
        execution.emit({"event": "stage_cached", "stage": "export", "key": key_of(identity)})
        execution.exported = folder.manifest()
        return
    if folder.complete:
        folder.remove()
    execution.emit({"event": "stage_started", "stage": "export", "key": key_of(identity)})
    started = time.monotonic()
    folder.begin()
    export(checkpoint, target, kind)
    execution.emit({"event": "note", "stage": "export", "text": f"verifying {kind} export in a fresh process"})
    verification = verify(target, checkpoint, source=execution.source, kind=kind)
    if verification.problems:
        failed = _set_aside(target)
        raise StageFailed(
            f"the export does not verify: {verification.problems[0]}",
            hint=f"`moecli verify {failed}` lists all problems",
        )
    seconds = round(time.monotonic() - started, 3)
    folder.finish({"identity": identity, "kind": kind, "digest": digest(target), "seconds": seconds,
                   "verification": verification.as_json(), "moecli": __version__})  # fmt: skip
    execution.exported = folder.manifest()
    execution.emit({"event": "stage_finished", "stage": "export", "seconds": seconds})


def _set_aside(model: Path) -> Path:
    """A model that does not verify must not be found under the name of one that does."""
    failed = model.with_name(f"{model.name}.failed")
    if failed.exists():
        shutil.rmtree(failed)
    return model.rename(failed)


def _finish(execution: Execution) -> RunResult:
    from moecli.runner.gather import gather
    from moecli.runner.report import save, write_card

    run = execution.run
    report = gather(execution)
    model = run.path / "model" if execution.plan.final != SOURCE else None
    with disk_errors(run.path):
        save(report, run.path / "report")
        _save_evaluation_files(execution)
        if model is not None:
            write_card(report, model)
    run.write_text("manifest.json", json.dumps(manifest(execution), indent=1) + "\n")
    execution.emit({"event": "run_finished", "report": str(run.path / "report" / "report.html")})
    return RunResult(run.path, model, report)


def _save_evaluation_files(execution: Execution) -> None:
    """`report/<stage>/`: the files that evaluations left, lm-eval's own among them, as they made them."""
    for index, outcome in execution.outcomes.items():
        if issubclass(outcome.step.stage.output, Evaluation):
            found = execution.artifact(index, Evaluation)
            assert isinstance(found, Evaluation)
            for name, text in found.files.items():
                folder = re.sub(r"[^\w.-]+", "-", outcome.step.label).strip("-")
                execution.run.write_text(f"report/{folder}/{name}", text)


def manifest(execution: Execution) -> dict[str, Any]:
    """Versions, seed, keys, timings and peaks of a run, per stage and in total (cached stages as when they ran)."""
    stages = [
        {"label": o.step.label, "stage": o.step.stage.name, "key": o.step.key, "cached": o.cached,
         **{name: o.manifest.get(name) for name in ("seconds", "peak_cpu_bytes", "peak_gpu_bytes")}}
        for o in execution.outcomes.values()
    ]  # fmt: skip
    ran = [outcome.manifest for outcome in execution.outcomes.values()]
    total = {
        "seconds": round(sum(m["seconds"] for m in ran) + execution.exported.get("seconds", 0), 3),
        "peak_cpu_bytes": max((m["peak_cpu_bytes"] for m in ran), default=None),
        "peak_gpu_bytes": max((m["peak_gpu_bytes"] for m in ran if m["peak_gpu_bytes"] is not None), default=None),
    }
    return {"format": RUN_FORMAT, "environment": environment(execution.device, execution.ranks.size),
            "seed": execution.plan.recipe.seed, "source_key": execution.plan.source_key, "stages": stages,
            "total": total}  # fmt: skip


def environment(device: torch.device, processes: int = 1) -> dict[str, str]:
    """Versions and device of this process, and how many of the kind there are."""
    from importlib.metadata import version

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    several = f" x {processes}" if processes > 1 else ""
    return {"moecli": __version__, "python": platform.python_version(), "torch": torch.__version__,
            "transformers": version("transformers"), "device": f"{device.type} ({name}){several}"}  # fmt: skip


def code_digest(stage_name: str) -> str:
    """sha256 of a stage's source file: recorded, not keyed, so that `status` can say that the code changed."""
    return hashlib.sha256(lookup.source_path(stage_name).read_bytes()).hexdigest()


def _reset_peaks(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peaks(device: torch.device) -> dict[str, int | None]:
    """Peak memory: of the process so far on the CPU, of this stage on the GPU."""
    unit = 1 if sys.platform == "darwin" else 1024
    gpu = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {
        "peak_cpu_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "peak_gpu_bytes": gpu,
    }
