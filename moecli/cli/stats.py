"""`moecli stats`: calibration statistics of runs and files, shown, merged and compared."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moecli.cli.render import table_text
from moecli.core.errors import UsageError

if TYPE_CHECKING:
    from moecli.core.artifacts import CalibrationStats, LayerStats

Document = dict[str, Any]
PLACE = "A run folder (its latest calibration), the folder of a calibrate stage, or a .safetensors file of statistics."

app = typer.Typer(
    name="stats", add_completion=False, rich_markup_mode=None, help="Show, merge and compare calibration statistics.",
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


def _place(name: str) -> Any:
    return typer.Argument(metavar=name, help=PLACE, show_default=False)


@app.callback(invoke_without_command=True)
def stats(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit


@app.command()
def show(
    place: Annotated[str, _place("RUN_OR_FILE")],
    layer: Annotated[int | None, typer.Option(metavar="N", help="Every expert of this layer.")] = None,
    json_: Json = False,
) -> None:
    """Show coverage by layer, or every expert of one layer."""
    found = load(place)
    if layer is None:
        document = stats_document(place, found)
        _emit(document, stats_text(document), json_)
        return
    if layer not in found:
        raise UsageError(f"`{place}` has no layer {layer}", hint=f"its layers are {' '.join(map(str, found))}")
    document = layer_document(place, layer, found[layer])
    _emit(document, layer_text(document), json_)


@app.command()
def merge(
    first: Annotated[str, _place("A")],
    second: Annotated[str, _place("B")],
    out: Annotated[str, typer.Option("-o", "--out", metavar="OUT", help="File to write, named *.safetensors.")],
    domains: Annotated[
        bool, typer.Option("--domains", help="Each is a domain of its own: scores of EASY-EP count alike.")
    ] = False,
    json_: Json = False,
) -> None:
    """Put statistics over different text of one model together."""
    from moecli.engine.stats import merged
    from moecli.io.store import save_artifact

    target = Path(out)
    if target.suffix != ".safetensors":
        raise UsageError(f"`--out` must end in .safetensors, got `{out}`", hint=f"`-o {out}.safetensors`")
    if target.exists() or target.with_suffix(".json").exists():
        raise UsageError(f"`{out}` exists already, nothing was written")
    found = merged(load(first), load(second), domains)
    save_artifact(target.parent, target.stem, found)
    document = {"first": first, "second": second, **stats_document(out, found)}
    _emit(document, f"{stats_text(document)}\n\nwrote {target} and {target.with_suffix('.json')}", json_)


@app.command()
def diff(first: Annotated[str, _place("A")], second: Annotated[str, _place("B")], json_: Json = False) -> None:
    """Compare statistics entry by entry, per token."""
    document = diff_document(first, second, load(first), load(second))
    _emit(document, diff_text(document), json_)


def _emit(document: Document, text: str, as_json: bool) -> None:
    import json

    typer.echo(json.dumps(document, ensure_ascii=False, indent=1) if as_json else text)


# -- where statistics are


def load(place: str) -> CalibrationStats:
    """The statistics of a run, of a stage's folder, or of a file. UsageError when there are none, or several."""
    from moecli.core.artifacts import CalibrationStats
    from moecli.io.store import load_artifact

    folder, name = _artifact_at(place)
    return load_artifact(folder, name, CalibrationStats)


def _artifact_at(place: str) -> tuple[Path, str]:
    path = Path(place)
    if path.is_dir():
        return (path if (path / "artifact.json").is_file() else _stage_of(path)), "artifact"
    if path.is_file() and path.suffix in (".safetensors", ".json"):
        return path.parent, path.stem
    raise UsageError(f"there are no statistics in `{place}`", hint="name a run folder or a .safetensors file")


def _stage_of(run: Path) -> Path:
    """The folder of the run's one finished calibration; of several, the one that was made or used last."""
    from moecli.io.store import RunFolder

    folder = RunFolder(run, create=False)
    found = [s.path for s in folder.stages() if s.complete and s.name.startswith("calibrate/")]
    used = [path for event in folder.events() for path in found if str(event.get("key", "")).startswith(path.name)]
    if not found:
        raise UsageError(f"`{run}` holds no finished calibration")
    if used:
        return used[-1]
    if len(found) > 1:
        listed = ", ".join(f"`{path}`" for path in found)
        raise UsageError(f"`{run}` holds {len(found)} finished calibrations", hint=f"name one of {listed}")
    return found[0]


# -- documents and their text


def stats_document(place: str, found: CalibrationStats) -> Document:
    """Where the statistics come from, coverage by layer, and what there is of each layer."""
    layers = [
        {"layer": layer, "tokens": s.tokens, **_coverage(s), "statistics": _statistics(s)} for layer, s in found.items()
    ]
    return {"path": place, "source": found.source, "layers": layers}


def _coverage(layer: LayerStats) -> Document:
    count = layer.count_E
    return {"experts": len(count), "unused": int((count == 0).sum()), "fewest": int(count.min()),
            "median": int(count.median()), "most": int(count.max())}  # fmt: skip


def _statistics(layer: LayerStats) -> list[Document]:
    from moecli.engine.stats import collector_of, names_in

    return [
        {"name": name, "dtype": str(layer[name].dtype).removeprefix("torch."), "shape": list(layer[name].shape),
         "combines": getattr(collector_of(name), "reduce", None)}
        for name in names_in(layer)
    ]  # fmt: skip


def stats_text(document: Document) -> str:
    """Source, statistics, then the table of layers."""
    source = [[name.replace("_", " "), _short(value)] for name, value in document["source"].items()]
    names = ["layer", "tokens", "experts", "unused", "fewest", "median", "most"]
    rows = [[str(layer[name]) for name in names] for layer in document["layers"]]
    first = document["layers"][0]["statistics"] if document["layers"] else []
    kinds = [[s["name"], s["dtype"], str(s["shape"]), s["combines"] or "-"] for s in first]
    return "\n\n".join([
        table_text(["", document["path"]], source),
        table_text(["statistic", "dtype", "shape of a layer", "combines by"], kinds),
        table_text([*names[:4], "fewest tokens", "median", "most"], rows, right=tuple(range(7))),
    ])  # fmt: skip


def layer_document(place: str, number: int, layer: LayerStats) -> Document:
    """Every statistic with one value an expert; wider ones by the norm of each expert's entry."""
    from moecli.engine.stats import names_in

    experts = len(layer.count_E)
    columns = {
        name if layer[name].dim() == 1 else f"|{name}|": _by_expert(layer, name)
        for name in names_in(layer)
        if layer[name].dim() and len(layer[name]) == experts
    }
    rows = [{"expert": e, **{name: values[e] for name, values in columns.items()}} for e in range(experts)]
    return {"path": place, "layer": number, "tokens": layer.tokens, "experts": rows}


def _by_expert(layer: LayerStats, name: str) -> list[int | float]:
    values = layer[name]
    return list(values.tolist()) if values.dim() == 1 else list(values.double().flatten(1).norm(dim=1).tolist())


def layer_text(document: Document) -> str:
    """One row an expert."""
    names = list(document["experts"][0])
    rows = [[_number(expert[name]) for name in names] for expert in document["experts"]]
    head = f"{document['path']}, layer {document['layer']}, {document['tokens']} tokens"
    return f"{head}\n\n{table_text(names, rows, right=tuple(range(len(names))))}"


def diff_document(first: str, second: str, a: CalibrationStats, b: CalibrationStats) -> Document:
    """How far every statistic of every layer is apart."""
    from dataclasses import asdict

    from moecli.engine.stats import compared

    changes = compared(a, b)
    names = [n for n in dict.fromkeys([*a.source, *b.source]) if a.source.get(n) != b.source.get(n)]
    return {
        "first": first, "second": second, "equal": all(change.equal for change in changes),
        "source": {name: [a.source.get(name), b.source.get(name)] for name in names},
        "changes": [asdict(change) for change in changes],
    }  # fmt: skip


def diff_text(document: Document) -> str:
    """What differs in the sources, then one row a statistic."""
    source = [[name.replace("_", " "), _short(a), _short(b)] for name, (a, b) in document["source"].items()]
    rows = [
        [str(c["layer"]), c["name"], "equal" if c["equal"] else f"{c['relative']:.3g}",
         "-" if c["expert"] is None else str(c["expert"])]
        for c in document["changes"]
    ]  # fmt: skip
    table = table_text(["layer", "statistic", "relative difference", "largest at"], rows, right=(0, 2, 3))
    head = [table_text(["", document["first"], document["second"]], source)] if source else []
    return "\n\n".join([*head, table, *(["every entry is equal"] if document["equal"] else [])])


def _number(value: int | float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.6g}"


def _short(value: Any) -> str:
    text = f"{len(value)} runs" if isinstance(value, list) else "-" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
