"""The commands: each reads its arguments, calls the runner, and prints a table or a JSON document.

Everything heavy is imported inside the command that needs it: `--help` imports neither torch nor
transformers.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from moecli.cli import stats
from moecli.core.errors import ExitCode, SurroundingsError, UsageError

if TYPE_CHECKING:
    from moecli.core.stage import Options
    from moecli.engine.ranks import Ranks
    from moecli.runner.execute import RunResult
    from moecli.runner.open import OpenedRecipe

app = typer.Typer(
    name="moecli", add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
    help="Smaller Mixture-of-Experts models from a recipe, and a report that says what it cost.",
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip

Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file (YAML).", show_default=False)]
Run = Annotated[str, typer.Argument(metavar="RUN", help="A run folder, such as runs/quickstart.", show_default=False)]
Runs = Annotated[
    list[str], typer.Argument(metavar="RUN...", help="Run folders, or the folder of a sweep.", show_default=False)
]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a hub id, or `demo`.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Change one value, such as stages.1.with.keep=48. Repeatable."),
]
RunDir = Annotated[
    str | None,
    typer.Option("--run-dir", metavar="DIR", help="Run folder; runs/<recipe file name> by default."),
]
Device = Annotated[
    Literal["cpu", "cuda"] | None, typer.Option("--device", help="Where to compute; the GPU if there is one.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]


@app.callback(invoke_without_command=True)
def moecli(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        from moecli import __version__

        typer.echo(f"moecli {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit


@app.command()
def run(
    recipe: Recipe,
    run_dir: RunDir = None,
    set_: Sets = None,
    until: Annotated[str | None, typer.Option(metavar="STAGE", help="Stop after this stage.")] = None,
    redo: Annotated[str | None, typer.Option(metavar="STAGE", help="Forget what this stage made, first.")] = None,
    device: Device = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run what is not done yet; goes on where an earlier run stopped."""
    with _work(), _joined(device) as ranks:
        from moecli.runner.open import open_recipe

        opened = open_recipe(recipe, set_ or ())
        result = _run(opened, _run_dir(recipe, run_dir), until, redo, device, quiet or not ranks.leads, ranks)
    if ranks.leads:
        _print_result(result, json_)


@app.command()
def plan(recipe: Recipe, run_dir: RunDir = None, set_: Sets = None, json_: Json = False) -> None:
    """Show wiring, sizes, memory and disk; reads no weight."""
    with _work():
        from moecli.cli import show

        planned = show.planned(recipe, set_ or ())
        folder = _run_dir(recipe, run_dir)
        document = show.plan_document(planned, folder)
    _emit(document, lambda: show.plan_text(document), json_)


@app.command()
def check(recipe: Recipe, set_: Sets = None, json_: Json = False) -> None:
    """Validate a recipe: every problem at once, with line and column."""
    with _work():
        from moecli.cli import show

        planned = show.planned(recipe, set_ or ())
    stages = len(planned.recipe.stages)
    document = {"path": recipe, "stages": stages, "exit_code": 0, "problems": []}
    _emit(document, lambda: f"{recipe}: {stages} stage{'s' if stages != 1 else ''}, no problems", json_)


@app.command()
def status(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or the recipe of one.", show_default=False)],
    run_dir: RunDir = None,
    set_: Sets = None,
    json_: Json = False,
) -> None:
    """Show what is done, and why a stage would run again."""
    with _work():
        from moecli.cli import show

        path = Path(run)
        if path.is_dir():
            recipe, folder = _recipe_of(path), path
        else:
            recipe, folder = run, _run_dir(run, run_dir)
        document = show.status_document(show.planned(recipe, set_ or ()), folder)
    _emit(document, lambda: show.status_text(document), json_)


@app.command()
def clean(
    run: Run,
    keep_stats: Annotated[bool, typer.Option("--keep-stats", help="Keep calibration statistics.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    json_: Json = False,
) -> None:
    """Drop what stages left behind; model/ and report/ stay."""
    with _work():
        from moecli.cli import show
        from moecli.io.store import RunFolder

        folder = RunFolder(run, create=False)
        if folder.store is not None:
            shared = os.path.relpath(folder.store)
            raise UsageError(f"`{run}` shares its stages with the other points of `{shared}`",
                             hint=f"`moecli clean {shared}` drops those of all points")  # fmt: skip
        if not (folder.path / "sweep.json").is_file():
            _recipe_of(folder.path)
        with folder.lock():
            gone: list[Any] = [s for s in folder.stages() if not (keep_stats and s.name.startswith("calibrate/"))]
            removed = [{"stage": s.name, "key": s.key, "bytes": s.bytes()} for s in gone]
            if folder.parts.path.is_dir() and not keep_stats:
                removed.append({"stage": "shared parts", "key": "", "bytes": folder.parts.bytes()})
                gone.append(folder.parts)
            for item in [] if dry_run else gone:
                item.remove()
    document = {"run": run, "dry_run": dry_run, "removed": removed, "bytes": sum(s["bytes"] for s in removed)}
    _emit(document, lambda: show.clean_text(document), json_)


@app.command()
def methods(
    name: Annotated[
        str | None, typer.Argument(metavar="[KIND/NAME]", help="One stage, or one kind.", show_default=False)
    ] = None,
    json_: Json = False,
) -> None:
    """List stages, or show one stage's options."""
    from moecli.cli import show
    from moecli.runner import lookup

    kinds = dict.fromkeys(stage.partition("/")[0] for stage in lookup.names())
    if name is None or name in kinds:
        listed = show.methods_document(name)
        _emit(listed, lambda: show.methods_text(listed), json_)
        return
    with _work():
        stage = show.find_stage(name)
        document = show.method_document(stage)
    _emit(document, lambda: show.method_text(document), json_)


@app.command()
def schema(json_: Json = False) -> None:
    """Print the JSON Schema of recipes, for editors."""
    with _work():
        from moecli.recipe.schema import json_schema
        from moecli.runner import lookup

        document = json_schema({name: _options_of(name) for name in lookup.names()})
    _emit(document, lambda: json.dumps(document, ensure_ascii=False, indent=1), json_)


@app.command()
def inspect(
    model: Model,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
    json_: Json = False,
) -> None:
    """Show layers, experts, router rule and sizes of a model."""
    with _work():
        from moecli.cli import show

        document = show.inspect_document(model, revision)
    _emit(document, lambda: show.inspect_text(document), json_)


@app.command()
def verify(
    model: Model,
    against: Annotated[str | None, typer.Option(metavar="SOURCE", help="The model it was made from.")] = None,
    json_: Json = False,
) -> None:
    """Load a model in a fresh process and account for every tensor."""
    with _work():
        from moecli.cli import show

        document = show.verify_document(model, against)
    _emit(document, lambda: show.verify_text(document), json_)
    if document["status"] == "failed":
        raise typer.Exit(int(ExitCode.FAILED))


@app.command("eval")
def evaluate(
    model: Model,
    tasks: Annotated[
        str,
        typer.Option(metavar="A,B", help="lm-eval tasks or groups; quick, moe-papers-8, knowledge, trust, reasoning."),
    ],
    include: Annotated[str | None, typer.Option(metavar="DIR", help="Folder with task files of your own.")] = None,
    limit: Annotated[int | None, typer.Option(help="First documents of each task only.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples in the prompt.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences per forward pass.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Longest context in tokens.")] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"] | None, typer.Option(help="Precision to compute in.")
    ] = None,
    backend: Annotated[Literal["memory", "streamed", "vllm"] | None, typer.Option(help="What runs the model.")] = None,
    chat_template: Annotated[bool, typer.Option("--chat-template", help="Ask as in a conversation.")] = False,
    seed: Annotated[int, typer.Option(help="Decides everything random.")] = 0,
    run_dir: RunDir = None,
    device: Device = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run lm-eval tasks on a model."""
    given = {
        "include": include, "limit": limit, "num_fewshot": num_fewshot, "batch_size": batch_size,
        "max_length": max_length, "dtype": dtype, "backend": backend, "chat_template": chat_template or None,
    }  # fmt: skip
    options: dict[str, Any] = {"tasks": [task.strip() for task in tasks.split(",") if task.strip()]}
    options |= {name: value for name, value in given.items() if value is not None}
    values = {"recipe": 1, "model": model, "seed": seed, "stages": [{"run": "eval/lm-eval", "with": options}]}
    with _work(), _joined(device) as ranks:
        from moecli.recipe.schema import from_values
        from moecli.runner import lookup
        from moecli.runner.open import open_loaded

        opened = open_loaded(from_values(values, _options_of, lookup.names()))
        folder = Path(run_dir) if run_dir else Path("runs") / f"eval-{_name_of(model)}"
        result = _run(opened, folder, None, None, device, quiet or not ranks.leads, ranks)
    if ranks.leads:
        _print_result(result, json_)


@app.command()
def compare(
    a: Annotated[
        str,
        typer.Argument(metavar="A", help="A run, one evaluation in it, or lm-eval's results.", show_default=False),
    ],
    b: Annotated[
        str | None, typer.Argument(metavar="[B]", help="The same; without it A's source and A.", show_default=False)
    ] = None,
    json_: Json = False,
) -> None:
    """Compare two evaluations document by document."""
    with _work():
        from moecli.cli.compare import comparison_text
        from moecli.runner.compare import compare as compared
        from moecli.runner.compare import load_sides

        found = compared(*load_sides(a, b))
    _emit(found.as_json(), lambda: comparison_text(found), json_)


@app.command()
def analyse(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A folder, a hub id, `demo`, or a run folder.", show_default=False)
    ],
    against: Annotated[
        str | None, typer.Option(metavar="BASE", help="Another model, beside it; of a run the one it started from.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]DATA", help="Text to route, as in recipes. Repeat it to compare texts."),
    ] = None,
    field: Annotated[str, typer.Option(help="Column that holds the text.")] = "text",
    samples: Annotated[int, typer.Option(min=1, help="Samples of each text.")] = 64,
    tokens_per_sample: Annotated[int, typer.Option(min=1, help="Tokens in each sample.")] = 512,
    cache_samples: Annotated[int, typer.Option(min=1, help="Samples that caches are simulated on.")] = 32,
    pooled_samples: Annotated[int, typer.Option(min=0, help="Samples for one cache of all layers; 0 for none.")] = 4,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, typer.Option(help="Precision; the checkpoint's by default.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per forward pass.")] = 8,
    seed: Annotated[int, typer.Option(help="Decides everything random.")] = 0,
    out: Annotated[str | None, typer.Option(metavar="DIR", help="Folder to write; runs/analyse-MODEL.")] = None,
    device: Device = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show how a model uses its experts, and how well caches of them would do."""
    with _work():
        from moecli.cli.analyse import analysed, analysed_text

        where, why = _device(device)
        if not quiet:
            _note(f"device {where} ({why})")
        document, folder = analysed(
            model, against, data or (), out, device=where, quiet=quiet, field=field, samples=samples,
            tokens_per_sample=tokens_per_sample, cache_samples=cache_samples, pooled_samples=pooled_samples,
            dtype=dtype, batch_size=batch_size, seed=seed,
        )  # fmt: skip
    _emit(document, lambda: analysed_text(document, folder), json_)


@app.command()
def sweep(
    file: Annotated[str, typer.Argument(metavar="SWEEP", help="A sweep file (YAML).", show_default=False)],
    run_dir: Annotated[
        str | None, typer.Option("--run-dir", metavar="DIR", help="Folder of the sweep; runs/<file name> by default.")
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="Only show the points.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what each point would do.")] = False,
    slurm: Annotated[
        str | None, typer.Option(metavar="FILE", help="Only write a SLURM array job, a task for each point.")
    ] = None,
    point: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Only this point. Repeatable.")] = None,
    device: Device = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run every recipe of a matrix that is not done yet, over shared statistics."""
    from moecli.cli import sweeps

    folder = _run_dir(file, run_dir)
    with _work():
        from moecli.runner import points as running
        from moecli.runner import sweep as sweeping

        loaded = sweeping.load(file)
    if list_:
        document = sweeps.list_document(loaded)
        _emit(document, lambda: sweeps.list_text(document), json_)
        return
    with _work():
        from moecli.cli.show import model_sketch

        points = running.chosen_points(running.plan_points(loaded, model_sketch), point or ())
        if dry_run:
            document = sweeps.survey_document(running.survey(points, folder), folder)
        elif slurm is not None:
            document = sweeps.write_slurm(loaded, folder, slurm, device)
        else:
            document = _sweep(loaded, points, folder, device, quiet)
            if not point:
                document["report"] = sweeps.pages_of(folder)
    _emit(document, lambda: sweeps.text_of(document), json_)
    if code := document.get("exit_code"):
        raise typer.Exit(code)


def _sweep(loaded: Any, points: Any, folder: Path, device: str | None, quiet: bool) -> dict[str, Any]:
    from moecli.cli import sweeps
    from moecli.cli.render import progress
    from moecli.runner.points import exit_code, run_points

    where, why = _device(device)
    with contextlib.nullcontext() if quiet else progress(sys.stderr) as listener:
        if not quiet:
            _note(f"device {where} ({why}); {len(points)} points in {folder}")
        results = []
        for result in run_points(loaded, points, folder, device=where, listener=listener):
            results.append(result)
            _note(sweeps.result_line(result, len(results), len(points)))
    return sweeps.results_document(loaded, folder, results, int(exit_code(results)))


@app.command()
def table(
    runs: Runs,
    format_: Annotated[Literal["md", "csv", "latex"], typer.Option("--format", help="How to write it.")] = "md",
    expected: Annotated[
        str | None, typer.Option(metavar="FILE", help="Numbers that should come out: YAML with the key `expected`.")
    ] = None,
    metric: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Only `METRIC` or `TASK.METRIC`. Repeatable.")
    ] = None,
    json_: Json = False,
) -> None:
    """Put runs side by side; exit code 1 when an expected number is missed."""
    with _work():
        from moecli.runner import several
        from moecli.runner import table as tables

        found = several.load(runs, metric or ())
        compared = tables.compare_expected(found, expected)
    document = tables.document(found, compared)
    _emit(document, lambda: tables.render(found, compared, format_).rstrip("\n"), json_)
    if not all(one.agrees for one in compared):
        raise typer.Exit(int(ExitCode.FAILED))


@app.command()
def report(
    runs: Runs,
    out: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Folder for the page of several runs; runs/report, or the sweep's own."),
    ] = None,
    json_: Json = False,
) -> None:
    """Write the pages of a run again, or put several runs on one page with their frontier."""
    with _work():
        from moecli.runner.points import is_sweep

        if len(runs) == 1 and not is_sweep(Path(runs[0])):
            if out is not None:
                raise UsageError("`--out` is for the page of several runs", hint="leave it out, or name more runs")
            document = _one_report(runs[0])
        else:
            from moecli.runner import several
            from moecli.runner.table import document as values

            found = several.load(runs)
            folder = Path(out) if out else Path(runs[0] if len(runs) == 1 else "runs") / "report"
            document = {"report": str(several.write_pages(found, folder)), "data": values(found, [])}
    _emit(document, lambda: document["report"], json_)


def _one_report(run: str) -> dict[str, Any]:
    from moecli.runner import report as pages

    folder = Path(run) / "report"
    found = pages.load(folder)
    pages.save(found, folder)
    return {"report": str(folder / "report.html"), "data": json.loads(found.model_dump_json())}


@app.command()
def init(
    file: Annotated[str | None, typer.Argument(metavar="[FILE]", help="Where to write it.", show_default=False)] = None,
    from_: Annotated[str, typer.Option("--from", metavar="NAME", help="Which one to start from.")] = "demo",
    json_: Json = False,
) -> None:
    """Print a commented recipe to start from, or write it to a file."""
    from moecli.cli.starters import STARTERS
    from moecli.recipe.near import did_you_mean, near

    if from_ not in STARTERS:
        known = ", ".join(f"`{name}`" for name in STARTERS)
        raise UsageError(f"no recipe named `{from_}`", hint=did_you_mean(near(from_, STARTERS), f"there are {known}"))
    text = STARTERS[from_]
    if file is not None:
        try:
            with Path(file).open("x", encoding="utf-8") as out:
                out.write(text)
        except FileExistsError:
            raise UsageError(f"`{file}` exists already, nothing was written") from None
        except FileNotFoundError:
            raise UsageError(f"there is no folder `{Path(file).parent}`") from None
        _note(f"wrote {file}; `moecli plan {file}` shows what it does")
    document = {"name": from_, "file": file, "recipe": text, "names": list(STARTERS)}
    if json_ or file is None:
        _emit(document, lambda: text.rstrip("\n"), json_)


@app.command()
def doctor(json_: Json = False) -> None:
    """Say what works on this machine."""
    with _work():
        from moecli.cli.doctor import examine, findings_text

        findings = examine()
    good = all(finding.state != "missing" for finding in findings)
    document = {"ok": good, "checks": [finding._asdict() for finding in findings]}
    _emit(document, lambda: findings_text(findings), json_)
    if not good:
        raise typer.Exit(int(ExitCode.SURROUNDINGS))


app.add_typer(stats.app)


# -- shared


def _run(
    opened: OpenedRecipe, folder: Path, until: str | None, redo: str | None, device: str | None, quiet: bool,
    ranks: Ranks,
) -> RunResult:  # fmt: skip
    from moecli.cli.render import progress
    from moecli.runner.execute import run as execute

    where, why = _device(device)
    if quiet:
        return execute(opened, folder, device=where, until=until, redo=redo, ranks=ranks)
    several = f", {ranks.size} processes" if ranks.size > 1 else ""
    _note(f"device {where} ({why}{several}); run folder {folder}")
    with progress(sys.stderr) as listener:
        return execute(opened, folder, device=where, until=until, redo=redo, listener=listener, ranks=ranks)


@contextlib.contextmanager
def _joined(device: str | None) -> Iterator[Ranks]:
    """The processes that torchrun started for this run; only the first one says anything."""
    import torch

    from moecli.engine.ranks import joining

    with joining("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu") as ranks:
        yield ranks


def _device(asked: str | None) -> tuple[str, str]:
    """Where to compute, and why there."""
    import torch

    has_gpu = torch.cuda.is_available()
    if asked == "cuda" and not has_gpu:
        raise SurroundingsError("there is no CUDA device", hint="`--device cpu`, or `moecli doctor` for what is there")
    if asked != "cpu" and has_gpu:
        return "cuda", torch.cuda.get_device_name()
    return "cpu", "as asked" if asked else "no CUDA device"


def _print_result(result: RunResult, as_json: bool) -> None:
    from moecli.cli import show

    document = show.result_document(result)
    _emit(document, lambda: show.result_text(result), as_json)


def _name_of(model: str) -> str:
    """What to call a model: its folder's name, the run's for the `model` of a run."""
    path = Path(model)
    return path.absolute().parent.name if path.name == "model" and path.is_dir() else path.name


def _run_dir(recipe: str, given: str | None) -> Path:
    return Path(given) if given else Path("runs") / Path(recipe).stem


def _recipe_of(folder: Path) -> str:
    """The recipe a run folder keeps."""
    path = folder / "recipe.yaml"
    if not path.is_file():
        raise UsageError(f"`{folder}` is not a run folder: it has no recipe.yaml")
    return str(path)


def _options_of(name: str) -> type[Options]:
    from moecli.runner import lookup

    return lookup.find(name).options


def _emit(document: Any, text: Callable[[], str], as_json: bool) -> None:
    """The command's one answer, on stdout."""
    typer.echo(json.dumps(document, ensure_ascii=False, indent=1) if as_json else text())


def _note(text: str) -> None:
    typer.echo(text, err=True)


@contextlib.contextmanager
def _work() -> Iterator[None]:
    """What libraries print while we work goes to stderr: stdout is for the answer."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
