"""Run lm-eval tasks: log-likelihoods and answers are lm-eval's own, and so are the results files, stored untouched.

`tasks` takes names of tasks, of lm-eval's groups, and of ours: `quick`, `moe-papers-8` (the eight zero-shot tasks of
expert-merging papers), `knowledge` (offline proxies of LLM-KICK), `trust` (proxies only, not DecodingTrust),
`reasoning` (answers are generated). `include` names a folder with task files of your own; tasks found there need no
network, and a group takes `arc_easy` or `local_arc_easy` from it before the packaged one.

Kept of every document: what it contributed to each metric, so that two runs can be compared document by document
(`moecli compare`). Tasks that generate also give, each as a mean over documents: `answer_tokens`, the tokens of the
answer's text; `repetition`, the share of its 4-grams of tokens that occurred in it before; and with `backend: memory`
`truncated`, whether the answer was cut at the longest length instead of ending.

`backend: memory` holds the model on the device; `streamed` runs layer by layer, for models larger than the device, and
generates nothing; `vllm` hands the model to vLLM. A log-likelihood that is not a number stops the evaluation.

Source: EleutherAI lm-evaluation-harness; groups: arXiv 2310.01382 (LLM-KICK), 2403.15447 (Decoding Compressed Trust),
2504.02010 (reasoning, tokens per answer).

- run: eval/lm-eval
  with: {tasks: [arc_easy, hellaswag]}
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, NonNegativeInt, PositiveInt

from moecli.core.artifacts import Checkpoint, Column, Evaluation, Items, Metric
from moecli.core.context import Context
from moecli.core.errors import Problem, StageFailed, SurroundingsError
from moecli.core.model import ModelFacts
from moecli.core.stage import Options, RunSetting, SourcePath, stage
from moecli.families import FACTORED
from moecli.families.adapter import load_model, load_tokenizer, tokenizer_digest
from moecli.io.harness import evaluation_of
from moecli.io.reader import FolderCheckpoint
from moecli.io.writer import export_folder
from moecli.ops.paired import detectable

GROUPS: Mapping[str, tuple[str, ...]] = {
    "quick": ("arc_easy", "piqa", "winogrande"),
    "moe-papers-8": (
        "arc_challenge", "arc_easy", "boolq", "hellaswag", "mmlu", "openbookqa", "rte", "winogrande",
    ),
    "knowledge": ("triviaqa", "nq_open", "webqs", "mmlu", "squad_completion", "ifeval"),
    "trust": (
        "crows_pairs_english", "bbq", "winogender_all", "toxigen", "ethics_cm", "moral_stories",
        "discrim_eval_explicit", "truthfulqa_mc2",
    ),
    "reasoning": ("gsm8k_cot", "hendrycks_math500", "aime24", "bbh_cot_fewshot_temporal_sequences"),
}  # fmt: skip
"""Our names for several tasks; they win over lm-eval's."""

_PROXIES = {
    "knowledge": "offline proxies of LLM-KICK: no judge, and no FreebaseQA, which lm-eval does not have",
    "trust": "proxies for trust from lm-eval, not DecodingTrust",
}
_LOCAL = "local_"
_GRAM = 4


class LmEval(Options):
    """Options of `eval/lm-eval`."""

    tasks: Annotated[list[str], Field(min_length=1)]
    """Task or group names: `quick`, `moe-papers-8`, `knowledge`, `trust`, `reasoning`, or see `lm_eval ls tasks`."""
    include: Annotated[str | None, SourcePath()] = None
    """Folder with task files of your own, or `demo` for the embedded model's."""
    limit: PositiveInt | None = None
    """First documents of each task only."""
    num_fewshot: NonNegativeInt | None = None
    """Examples in the prompt; the task's own number by default."""
    chat_template: bool = False
    """Ask as in a conversation, with the tokenizer's chat template."""
    max_length: PositiveInt | None = None
    """Longest context in tokens; the model's positions, at most 2048, by default."""
    backend: Literal["memory", "streamed", "vllm"] = "memory"
    """What runs the model: transformers in memory, layer by layer, or vLLM."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision to compute in; `auto` is the checkpoint's. Many CPUs are much faster in `float32`."""
    bootstrap_iters: NonNegativeInt = 1000
    """Resamples for standard errors of metrics without a closed form."""
    batch_size: Annotated[PositiveInt, RunSetting()] = 16
    """Sequences per forward pass."""

    def resolve(self, needs: tuple[str, ...]) -> Self:
        """Our groups as the tasks they stand for."""
        return self.model_copy(update={"tasks": expanded(self.tasks, self.include)})

    def problems(self, model: ModelFacts) -> Iterator[Problem]:
        if self.backend == "vllm" and (model.router_rows != model.experts or model.quantized in ("moecli", FACTORED)):
            yield Problem(
                "backend", "vLLM does not load compact models of moecli", hint="write `backend: memory` or `streamed`"
            )

    def ready(self) -> None:
        if importlib.util.find_spec("lm_eval") is None:
            raise SurroundingsError("lm-eval is not installed", hint="`pip install 'moecli[eval]'`")
        if self.backend == "vllm" and importlib.util.find_spec("vllm") is None:
            raise SurroundingsError("vLLM is not installed", hint="`pip install vllm`, or write `backend: memory`")
        with _quiet():
            _load_tasks(self)


@stage("eval/lm-eval", version=2, on_source_too=True)
def lm_eval(opt: LmEval, model: Checkpoint, ctx: Context) -> Evaluation:
    opt = opt.resolve(())
    manager = _tasks(opt)
    tokenizer = load_tokenizer(model)
    with _reporting_to(ctx), _backend(opt, model, tokenizer, ctx) as lm:
        watch = _Watch()
        watch.attach(lm)
        results = _evaluate(opt, lm, manager, ctx)
    found = evaluation_of(results, results["samples"], _settings(opt, model, tokenizer, results, ctx), _files(results))
    found = _with_answers(found, results, tokenizer, watch)
    for note in _notes(opt, found):
        ctx.note(note)
    return found


def expanded(tasks: Sequence[str], include: str | None) -> list[str]:
    """Our groups as their tasks, each once; those that the folder `include` has under `local_...` by that name."""
    local = _names_in(Path(include)) if include is not None and include != "demo" else set()
    names: dict[str, None] = {}
    for task in tasks:
        for name in GROUPS.get(task, (task,)):
            taken = task in GROUPS and name not in local and _LOCAL + name in local
            names[_LOCAL + name if taken else name] = None
    return list(names)


def _names_in(folder: Path) -> set[str]:
    """Tasks and groups that the task files of a folder define, without asking lm-eval."""
    defines = re.compile(r"^(?:task|group):\s*['\"]?([\w.-]+)['\"]?\s*(?:#.*)?$", re.MULTILINE)
    texts = (file.read_text(encoding="utf-8", errors="replace") for file in folder.rglob("*.yaml"))
    return {name for text in texts for name in defines.findall(text)}


def _evaluate(opt: LmEval, lm: Any, manager: Any, ctx: Context) -> dict[str, Any]:
    from lm_eval.evaluator import simple_evaluate

    results = simple_evaluate(
        model=lm, tasks=list(opt.tasks), task_manager=manager, num_fewshot=opt.num_fewshot, limit=opt.limit,
        bootstrap_iters=opt.bootstrap_iters, log_samples=True, apply_chat_template=opt.chat_template,
        random_seed=ctx.seed, numpy_random_seed=ctx.seed, torch_random_seed=ctx.seed, fewshot_random_seed=ctx.seed,
    )  # fmt: skip
    if results is None:
        raise StageFailed("lm-eval returned no results")
    return dict(results)


def _settings(
    opt: LmEval, model: Checkpoint, tokenizer: Any, results: Mapping[str, Any], ctx: Context
) -> dict[str, Any]:
    """What lm-eval does not record of a model object, and what only we know."""
    import hashlib

    template = str(tokenizer.chat_template) if opt.chat_template else None
    return {
        "backend": "hf" if opt.backend == "memory" else opt.backend,
        "batch_size": opt.batch_size,
        "dtype": _dtype(opt, model),
        "max_length": _max_length(opt, model),
        "tokenizer": tokenizer_digest(tokenizer),
        "template": template and hashlib.sha256(template.encode()).hexdigest(),
        "environment": {
            "transformers": results.get("transformers_version"), "device": ctx.device.type, "torch": torch.__version__,
        },
    }  # fmt: skip


def _dtype(opt: LmEval, model: Checkpoint) -> str:
    return model.facts.dtype if opt.dtype == "auto" else opt.dtype


def _max_length(opt: LmEval, model: Checkpoint) -> int:
    return opt.max_length or min(model.facts.max_positions, 2048)


def _notes(opt: LmEval, found: Evaluation) -> Iterator[str]:
    for group, words in _PROXIES.items():
        if set(expanded([group], opt.include)) <= set(opt.tasks):
            yield f"the tasks of `{group}` are {words}"
    counts = [len(items.docs) for items in found.items if any(_is_binary(c) for c in items.columns.values())]
    if opt.limit is not None and counts:
        yield resolution(min(counts))


def resolution(documents: int) -> str:
    """What `limit` hides, in words."""
    some, worst = detectable(documents, 0.1), detectable(documents)
    seen = f"{100 * worst:.1f} points" if worst else "any size"
    when = f"{100 * some:.1f} points when one answer in ten flips, " if some else ""
    return (
        f"with `limit` a task has {documents} documents: a true difference in accuracy below {when}{seen} at worst, "
        "is missed more often than one time in five"
    )


def _is_binary(column: Column) -> bool:
    return column.form == "mean" and set(column.values) <= {0.0, 1.0}


# -- the model


@contextmanager
def _backend(opt: LmEval, model: Checkpoint, tokenizer: Any, ctx: Context) -> Iterator[Any]:
    """lm-eval's model of the chosen kind."""
    dtype, max_length = _dtype(opt, model), _max_length(opt, model)
    if opt.backend == "vllm":
        from lm_eval.models.vllm_causallms import VLLM

        with _folder_of(model) as folder:
            yield VLLM(
                pretrained=str(folder), dtype=dtype, max_model_len=max_length, batch_size=opt.batch_size, seed=ctx.seed
            )
    elif opt.backend == "streamed":
        from moecli.engine.streamed import StreamedLM

        yield StreamedLM(
            model, tokenizer, batch_size=opt.batch_size, max_length=max_length, device=ctx.device,
            dtype=getattr(torch, dtype), track=ctx.track, note=ctx.note,
        )  # fmt: skip
    else:
        loaded = load_model(model, ctx.device, getattr(torch, dtype))
        yield _in_memory(
            pretrained=loaded, tokenizer=tokenizer, batch_size=opt.batch_size, max_length=max_length,
            device=str(ctx.device),
        )  # fmt: skip


@contextmanager
def _folder_of(model: Checkpoint) -> Iterator[Path]:
    """A folder with the model in it, written for the time being where it is an overlay."""
    import tempfile

    if isinstance(model, FolderCheckpoint):
        yield model.folder
        return
    with tempfile.TemporaryDirectory(prefix="moecli-vllm-") as folder:
        export_folder(model, Path(folder) / "model")
        yield Path(folder) / "model"


@dataclass
class _Answer:
    """How one generated sequence ended."""

    nan: bool
    ended: bool
    """By an end-of-text token, before the longest length."""
    text: str


def _in_memory(**arguments: Any) -> Any:
    from lm_eval.models.huggingface import HFLM

    class Memory(HFLM):  # type: ignore[misc]
        """HFLM that remembers how each generated sequence ended."""

        ends: Sequence[_Answer] = ()

        def _model_generate(self, context: Any, max_length: int, stop: list[str], **kwargs: Any) -> Any:
            nan_B = torch.zeros(len(context), dtype=torch.bool, device=context.device)

            def look(_module: Any, _inputs: Any, output: Any) -> None:
                nan_B.logical_or_(output.logits[:, -1].isnan().any(-1))

            hook = self.model.register_forward_hook(look)
            try:
                made = super()._model_generate(context, max_length, stop, **kwargs)
            finally:
                hook.remove()
            answers = made[:, context.shape[1] :].tolist()
            self.ends = [
                _Answer(nan, self.eot_token_id in ids or len(ids) < max_length - context.shape[1], self.tok_decode(ids))
                for nan, ids in zip(nan_B.tolist(), answers, strict=True)
            ]
            return made

    return Memory(**arguments)


class _Watch:
    """Stands where lm-eval would cache answers: looks at each one as it is given."""

    def __init__(self) -> None:
        self.truncated: dict[tuple[str, str], bool] = {}
        """(context, answer) -> whether it was cut at the longest length; empty for backends that do not tell."""
        self._asked: Sequence[Any] = ()
        self._lm: Any = None
        self._batch: Sequence[_Answer] = ()
        self._row = 0

    def attach(self, lm: Any) -> None:
        self._lm = lm
        lm.cache_hook = self
        for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
            setattr(lm, kind, self._remembering(getattr(lm, kind)))

    def _remembering(self, answer: Callable[..., Any]) -> Callable[..., Any]:
        def call(requests: Sequence[Any], **settings: Any) -> Any:
            self._asked = requests
            return answer(requests, **settings)

        return call

    def add_partial(self, kind: str, request: Iterable[Any], answer: Any) -> None:
        if kind == "generate_until":
            self._generated(next(iter(request)), answer)
            return
        value = answer[0] if isinstance(answer, tuple) else answer
        if math.isnan(value):
            arguments = tuple(request)
            raise _not_a_number(next((r for r in self._asked if tuple(r.args) == arguments), None))

    def _generated(self, context: str, text: str) -> None:
        batch = getattr(self._lm, "ends", ())
        if not batch:
            return
        if batch is not self._batch:
            self._batch, self._row = batch, 0
        end = batch[self._row]
        self._row += 1
        if end.nan:
            raise _not_a_number(next((r for r in self._asked if r.args[0] == context), None))
        self.truncated[context, text] = not end.ended and end.text == text


def _not_a_number(request: Any) -> StageFailed:
    where = None if request is None else f"task `{request.task_name}`, document {request.doc_id}"
    return StageFailed(
        "the model's logits are NaN",
        where=where,
        hint="`moecli verify MODEL` checks the weights; a wider `dtype` helps where they overflow",
    )


# -- generated answers


def _with_answers(found: Evaluation, results: Mapping[str, Any], tokenizer: Any, watch: _Watch) -> Evaluation:
    """The evaluation with length, repetition and truncation of what was generated, as metrics and items."""
    metrics, items = list(found.metrics), []
    for one in found.items:
        generates = results["configs"].get(one.task, {}).get("output_type") == "generate_until"
        columns = _answer_columns(one, results["samples"][one.task], tokenizer, watch) if generates and one.docs else {}
        metrics += [_metric_of(one.task, name, column) for name, column in columns.items()]
        items.append(replace(one, columns={**one.columns, **columns}))
    return replace(found, metrics=tuple(metrics), items=tuple(items))


def _answer_columns(one: Items, rows: Sequence[Mapping[str, Any]], tokenizer: Any, watch: _Watch) -> dict[str, Column]:
    answers = {str(row["doc_id"]): _answers(row) for row in rows}
    by_doc = [answers[doc.partition(":")[0]] for doc in one.docs]
    ids = [[tokenizer.encode(text, add_special_tokens=False) for _, text in found] for found in by_doc]
    columns = {
        "answer_tokens": Column("mean", tuple(_mean([len(i) for i in found]) for found in ids)),
        "repetition": Column("mean", tuple(_mean([repetition(i) for i in found]) for found in ids)),
    }
    if watch.truncated:
        cut = tuple(_mean([watch.truncated[answer] for answer in found]) for found in by_doc)
        columns["truncated"] = Column("mean", cut)
    return columns


def _answers(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(context, answer), one for each repeat."""
    pairs = zip(row["arguments"], row["resps"], strict=True)
    return [(arguments[0], text) for arguments, texts in pairs for text in texts]


def repetition(ids: Sequence[int], gram: int = _GRAM) -> float:
    """Share of an answer's n-grams that occurred in it before: 1 - distinct / all; 0 when it has none."""
    grams = [tuple(ids[i : i + gram]) for i in range(len(ids) - gram + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _metric_of(task: str, name: str, column: Column) -> Metric:
    mean, count = column.total(), len(column.values)
    spread = math.fsum((v - mean) ** 2 for v in column.values)
    stderr = math.sqrt(spread / (count - 1) / count) if count > 1 else None
    return Metric(task, name, mean, stderr, count, None if name == "answer_tokens" else False)


# -- lm-eval's surroundings


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
            loaded = manager.load(task)["tasks"]
        except Exception as error:  # task files hold code and data of their own, and may fail in any way
            said = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise SurroundingsError(f"lm-eval cannot load the task `{task}`: {said}") from error
        generates = [name for name, one in loaded.items() if one.OUTPUT_TYPE == "generate_until"]
        if generates and opt.backend == "streamed":
            raise SurroundingsError(
                f"`{generates[0]}` generates text, which `backend: streamed` cannot", hint="write `backend: memory`"
            )


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
