"""Run lm-eval tasks on the model in memory.

Log-likelihoods are lm-eval's own; so are the results files, stored untouched. `include` names a folder with task
files of your own; tasks found there need no network.

Source: EleutherAI lm-evaluation-harness.

- run: eval/lm-eval
  with: {tasks: [arc_easy, hellaswag]}
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt

from moecli.core.artifacts import Checkpoint, Evaluation, Metric
from moecli.core.context import Context
from moecli.core.errors import StageFailed, SurroundingsError
from moecli.core.stage import Options, RunSetting, SourcePath, stage
from moecli.families.adapter import load_model, load_tokenizer


class LmEval(Options):
    """Options of `eval/lm-eval`."""

    tasks: Annotated[list[str], Field(min_length=1)]
    """Task or group names; see `lm_eval ls tasks`."""
    include: Annotated[str | None, SourcePath()] = None
    """Folder with task files of your own, or `demo` for the embedded model's."""
    limit: PositiveInt | None = None
    """First documents of each task only."""
    num_fewshot: NonNegativeInt | None = None
    """Examples in the prompt; the task's own number by default."""
    max_length: PositiveInt | None = None
    """Longest context in tokens; the model's positions, at most 2048, by default."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision to compute in; `auto` is the checkpoint's. Many CPUs are much faster in `float32`."""
    bootstrap_iters: NonNegativeInt = 1000
    """Resamples for standard errors of metrics without a closed form."""
    batch_size: Annotated[PositiveInt, RunSetting()] = 16
    """Sequences per forward pass."""

    def ready(self) -> None:
        if importlib.util.find_spec("lm_eval") is None:
            raise SurroundingsError("lm-eval is not installed", hint="`pip install 'moecli[eval]'`")
        with _quiet():
            _load_tasks(self)


@stage("eval/lm-eval", version=1, on_source_too=True)
def lm_eval(opt: LmEval, model: Checkpoint, ctx: Context) -> Evaluation:
    with _reporting_to(ctx):
        results, settings = _evaluate(opt, model, ctx)
    return Evaluation(tuple(metrics(results)), settings, _files(results))


def _evaluate(opt: LmEval, model: Checkpoint, ctx: Context) -> tuple[dict[str, Any], dict[str, Any]]:
    """lm-eval's result and the settings that must agree between runs that are compared."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    manager = _tasks(opt)
    max_length = opt.max_length or min(model.facts.max_positions, 2048)
    dtype = model.facts.dtype if opt.dtype == "auto" else opt.dtype
    loaded = load_model(model, ctx.device, getattr(torch, dtype))
    lm = HFLM(pretrained=loaded, tokenizer=load_tokenizer(model), batch_size=opt.batch_size,
              max_length=max_length, device=str(ctx.device))  # fmt: skip
    results = simple_evaluate(
        model=lm, tasks=list(opt.tasks), task_manager=manager, num_fewshot=opt.num_fewshot, limit=opt.limit,
        bootstrap_iters=opt.bootstrap_iters, log_samples=True, random_seed=ctx.seed, numpy_random_seed=ctx.seed,
        torch_random_seed=ctx.seed, fewshot_random_seed=ctx.seed,
    )  # fmt: skip
    if results is None:
        raise StageFailed("lm-eval returned no results")
    settings = {"tasks": list(opt.tasks), "limit": opt.limit, "num_fewshot": opt.num_fewshot, "max_length": max_length,
                "dtype": dtype, "batch_size": opt.batch_size}  # fmt: skip
    return results, settings


def metrics(results: Mapping[str, Any]) -> list[Metric]:
    """lm-eval's result table as metrics; a standard error of "N/A" becomes None.

    Perplexities of rolling tasks have no standard error in lm-eval.
    """
    found = []
    for task, row in sorted(results["results"].items()):
        samples = (
            results["n-samples"].get(task, {}).get("effective") or row.get("sample_count") or row.get("sample_len") or 0
        )
        if isinstance(samples, Mapping):
            samples = next(iter(samples.values()))
        for key, value in row.items():
            name, _, filtered = key.partition(",")
            if not filtered or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = row.get(f"{name}_stderr,{filtered}")
            stderr = float(stderr) if isinstance(stderr, int | float) and math.isfinite(stderr) else None
            label = name if filtered == "none" else f"{name} ({filtered})"
            better = results["higher_is_better"].get(task, {}).get(name)
            found.append(Metric(task, label, float(value), stderr, int(samples), better))
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval and `datasets` draw bars and log notices on stderr; not now."""
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    with ExitStack() as undo:
        for name in ("lm_eval", "datasets"):
            log = logging.getLogger(name)
            undo.callback(log.setLevel, log.level)
            log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            if shown:
                datasets.enable_progress_bars()


@contextmanager
def _reporting_to(ctx: Context) -> Iterator[None]:
    """Quiet, and lm-eval's bars become our progress."""
    from unittest.mock import patch

    from lm_eval import evaluator
    from lm_eval.api import model, task
    from lm_eval.models import huggingface

    class Bar(_Bar):
        progress = ctx.progress

    with _quiet(), ExitStack() as undo:
        for module in (huggingface, model, task):
            if hasattr(module, "tqdm"):
                undo.enter_context(patch.object(module, "tqdm", Bar))
        # It would ask git for the commit of the current folder, which is not lm-eval's.
        undo.enter_context(patch.object(evaluator, "get_git_commit_hash", lambda: None))
        yield


class _Bar:
    """What lm-eval uses of tqdm."""

    progress: Callable[[str, int, int], None]

    def __init__(self, iterable: Iterable[Any] = (), total: int | None = None, desc: str = "", **_: Any) -> None:
        self.items = list(iterable)
        self.total, self.done = total if total is not None else len(self.items), 0
        self.label = (desc or "preparing").removeprefix("Running ")

    def __iter__(self) -> Iterator[Any]:
        for item in self.items:
            yield item
            self.update()

    def update(self, count: int = 1) -> None:
        self.done += count
        if self.total:
            type(self).progress(self.label, self.done, self.total)

    def close(self) -> None:
        pass


def _load_tasks(opt: LmEval) -> None:
    """Build each task with its data, as the evaluation will. SurroundingsError names the one that fails."""
    manager = _tasks(opt)
    for task in opt.tasks:
        try:
            manager.load(task)
        except Exception as error:  # task files hold code and data of their own, and may fail in any way
            said = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise SurroundingsError(f"lm-eval cannot load the task `{task}`: {said}") from error


def _tasks(opt: LmEval) -> Any:
    from lm_eval.tasks import TaskManager

    include = _demo_tasks() if opt.include == "demo" else opt.include
    if include is not None and not Path(include).is_dir():
        raise SurroundingsError(f"there is no folder `{include}` with lm-eval tasks")
    manager = TaskManager(include_path=[include] if include else None, include_defaults=include is None)
    unknown = [task for task in opt.tasks if task not in manager.all_tasks]
    if unknown and include is not None:
        manager = TaskManager(include_path=[include], include_defaults=True)
        unknown = [task for task in unknown if task not in manager.all_tasks]
    if unknown:
        import difflib

        near = difflib.get_close_matches(unknown[0], manager.all_tasks, 1)
        raise SurroundingsError(
            f"lm-eval knows no task `{unknown[0]}`" + (f" in `{opt.include}`" if opt.include else ""),
            hint=f"did you mean `{near[0]}`?" if near else "name its folder with `include`",
        )
    return manager


def _demo_tasks() -> str:
    from moecli.io.sources import resolve

    return str(resolve("demo").folder.parent / "tasks")


def _files(results: Mapping[str, Any]) -> dict[str, str]:
    """lm-eval's results as JSON text, samples apart so that the first stays small."""
    from lm_eval.utils import handle_non_serializable

    def text(value: object) -> str:
        return json.dumps(value, indent=1, default=handle_non_serializable, ensure_ascii=False)

    files = {"results.json": text({k: v for k, v in results.items() if k != "samples"})}
    for task, rows in results.get("samples", {}).items():
        files[f"samples_{task}.jsonl"] = "".join(
            json.dumps(row, default=handle_non_serializable, ensure_ascii=False) + "\n" for row in rows
        )
    return files
