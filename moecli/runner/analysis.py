"""`moecli analyse`: how a model routes named texts, alone or beside the model it was made from.

The document (`analysis.json`) holds `model` and, with `against`, `base`: each as `engine.analysis` has it. Both are
run on the same tokens. The page (`analysis.md`) is a pure function of the document.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from moecli import __version__
from moecli.core.artifacts import Checkpoint
from moecli.core.errors import UsageError
from moecli.engine.analysis import Analysis, Settings, analyse, experts_within, hit_rate, layer_mean
from moecli.engine.data import tokenise
from moecli.families.adapter import load_tokenizer
from moecli.io.durable import write_text
from moecli.ops.usage import COMMON
from moecli.runner.open import open_model
from moecli.runner.report import load as load_report
from moecli.runner.report_words import bytes_text, markdown_table

SCHEMA = 1
BUDGETS = (1, 2, 4)
"""Sizes of cache that the page compares, in times what the base reads for a token."""
SHOWN = 5
"""Rows of the tables of pairs, texts and tokens."""

Document = dict[str, Any]


def named_texts(specs: Sequence[str]) -> dict[str, str]:
    """Data sets by name: `NAME=DATA`, or the text itself as its own name. UsageError for a name that comes twice."""
    found: dict[str, str] = {}
    for spec in specs:
        match = re.fullmatch(r"([\w-]+)=(.+)", spec)
        name, data = match.groups() if match else (spec, spec)
        if name in found:
            raise UsageError(f"two data sets are called `{name}`", hint=f"write `--data other={data}`")
        found[name] = data
    return found


def places(model: str, against: str | None) -> tuple[str, str | None]:
    """What to open: of a run folder its model, against the one that the run started from unless told otherwise."""
    folder = Path(model)
    if not (folder / "recipe.yaml").is_file():
        return model, against
    if not (folder / "model" / "config.json").is_file():
        raise UsageError(f"the run `{model}` has written no model yet", hint=f"`moecli status {model}`")
    return str(folder / "model"), against or load_report(folder / "report").source.name


def run(
    model: str,
    against: str | None,
    data: Mapping[str, str],
    *,
    samples: int,
    tokens_per_sample: int,
    field: str = "text",
    settings: Settings | None = None,
    device: torch.device | str = "cpu",
    dtype: str | None = None,
    batch_size: int = 8,
    track: Callable[[Sequence[int], str], Any] | None = None,
) -> tuple[Document, dict[str, Analysis]]:
    """The document, and what is too large for it by side. UsageError when the two models do not share a vocabulary."""
    sides: dict[str, Checkpoint] = {"model": open_model(model)[1]}
    if against is not None:
        sides["base"] = open_model(against)[1]
    reader = sides.get("base", sides["model"])
    if len({side.facts.vocab for side in sides.values()}) > 1:
        sizes = " and ".join(f"{side.facts.vocab:,}" for side in sides.values())
        raise UsageError(f"`{model}` and `{against}` do not share a vocabulary: {sizes} tokens")
    settings = settings or Settings()
    texts = {
        name: tokenise(
            spec, reader, samples=samples, tokens_per_sample=tokens_per_sample, field=field, seed=settings.seed
        )
        for name, spec in data.items()
    }
    found = {
        side: analyse(
            checkpoint, texts, settings, device=device, dtype=getattr(torch, dtype) if dtype else None,
            batch_size=batch_size, track=track,
        )
        for side, checkpoint in sides.items()
    }  # fmt: skip
    tokenizer = load_tokenizer(reader)
    for analysis in found.values():
        for layer in analysis.document["layers"].values():
            layer["token"] = [None if i < 0 else tokenizer.decode([i]) for i in layer.pop("token_id")]
    document: Document = {
        "schema": SCHEMA, "created_by": __version__, "name": model, "against": against, "data": dict(data),
        **{side: analysis.document for side, analysis in found.items()},
    }  # fmt: skip
    return json.loads(json.dumps(document)), found  # layers are keyed by text, as whoever reads the file finds them


def save(document: Document, found: Mapping[str, Analysis], folder: Path) -> None:
    """Write `analysis.json`, `analysis.md`, and `pairs.safetensors` with counts of pairs and transitions."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "analysis.json", json.dumps(document, ensure_ascii=False, allow_nan=False) + "\n")
    write_text(folder / "analysis.md", render(document))
    tensors = {
        f"{side}.{kind}.{layer}": counts
        for side, analysis in found.items()
        for kind in ("coactivation", "transition")
        for layer, counts in getattr(analysis, kind).items()
    }
    save_file(tensors, folder / "pairs.safetensors")


# -- the page


def render(document: Document) -> str:
    """The page as Markdown."""
    model, base = document["model"], document.get("base")
    texts = ", ".join(f"{t['name']} ({t['samples']:,} x {t['tokens_per_sample']:,} tokens)" for t in model["texts"])
    beside = f", beside {document['against']}" if base else ""
    sections = [
        f"# Routing of {document['name']}{beside}\n\nTexts: {texts}. Computed in {model['dtype']}.",
        f"## In short\n\n{_summary(model, base)}",
        f"## Caches of experts\n\n{_caches(model, base)}",
        f"## Super Experts\n\n{_super(model, base)}",
        f"## Layers\n\n{_layers(model)}",
        f"## Experts that go together\n\n{_pairs(model)}",
        f"## Experts with a subject\n\n{_subjects(model)}",
    ]
    notes = [f"- {note}" for note in model["notes"]]
    return "\n\n".join([*sections, *(["## Notes\n\n" + "\n".join(notes)] if notes else [])]) + "\n"


def summary_rows(model: Document, base: Document | None) -> list[list[str]]:
    """What | base | model: means over layers, and SRP with its interval."""
    sides = [side for side in (base, model) if side is not None]
    rows = [
        [label, *(_number(layer_mean(side, name)) for side in sides)]
        for label, name in (
            ("load entropy", "entropy"), ("load imbalance", "imbalance"), ("load CV", "cv"), ("load Gini", "gini"),
            ("routing entropy", "routing_entropy"), ("top-k mass", "top_k_mass"),
        )
    ]  # fmt: skip
    for window in model["locality"]["srp"]["model"]:
        rows.append([f"SRP {window}", *(_srp(side["locality"]["srp"]["model"].get(window)) for side in sides)])
    return rows


def _summary(model: Document, base: Document | None) -> str:
    head = ["", "base", "model"] if base else ["", "model"]
    legend = (
        "Means over MoE layers; entropy is 1 when all experts are used alike. SRP m: how well experts switched on or "
        "off for m tokens at a time serve the text, with its 95 % interval and, behind it, how far it is above "
        "independent routing."
    )
    return f"{markdown_table(head, summary_rows(model, base), right=(1, 2))}\n\n{legend}"


def _srp(found: Document | None) -> str:
    if not found:
        return "–"
    above = found["srp"] - found["baseline"]
    return f"{found['srp']:.3f} [{found['low']:.3f}, {found['high']:.3f}] ({above:+.3f})"


def cache_rows(model: Document, base: Document | None) -> Iterator[list[str]]:
    """Cache | curve | base | model: hit rates in a layer's cache of equal bytes."""
    sides = [side for side in (base, model) if side is not None]
    first = sides[0]
    active = first["top_k"] * first["locality"]["cache"]["expert_bytes"]
    for times in BUDGETS:
        for curve in model["locality"]["cache"]["model"]:
            cells = [_hits(side, curve, times * active) for side in sides]
            yield [f"{bytes_text(times * active)} ({times}x)", "LRU" if curve == "lru" else f"SCH {curve}", *cells]


def _hits(side: Document, curve: str, size: float) -> str:
    held = experts_within(side, size)
    rate, error = hit_rate(side, curve, held)
    return f"{rate:.3f}{f' ± {error:.3f}' if error is not None else ''} ({held})"


def _caches(model: Document, base: Document | None) -> str:
    head = ["bytes in each layer", "cache", *(["base"] if base else []), "model"]
    of = model["locality"]["cache"]
    legend = (
        "Share of expert visits that find their expert in the cache, over "
        f"{model['locality']['cache_samples']} samples, ± one standard error; in brackets the "
        "experts that the cache holds. Times are of what the "
        f"{'base' if base else 'model'} reads for one token. SCH F is the best that F tokens of look-ahead allow, LRU "
        f"keeps what was used last. An expert of the model takes {bytes_text(of['expert_bytes'])}."
    )
    return f"{markdown_table(head, cache_rows(model, base), right=(2, 3))}\n\n{legend}"


def _super(model: Document, base: Document | None) -> str:
    lines = []
    for name, side in (("base", base), ("model", model)):
        if side is None:
            continue
        rows = [
            [layer, str(e), _number(side["layers"][layer]["absmax"][e]),
             _number(side["layers"][layer]["absmax_first"][e]), _number(side["layers"][layer]["absmax_kurtosis"])]
            for layer, experts in side["super_experts"].items() for e in experts
        ]  # fmt: skip
        head = ["layer", "expert", "largest output", "of first tokens", "kurtosis in the layer"]
        table = markdown_table(head, rows, right=range(5)) if rows else "None."
        lines.append(f"{name.capitalize()}: {len(rows)}\n\n{table}" if base else table)
    rule = (
        "Experts of the first three quarters of the layers whose largest output is above the 99.5th percentile and "
        "above a tenth of the largest of all (arXiv 2507.23279)."
    )
    return "\n\n".join([*lines, rule])


def _layers(model: Document) -> str:
    windows = list(model["locality"]["srp"]["model"])
    shown = windows[min(1, len(windows) - 1)] if windows else None
    head = ["layer", "experts", "entropy", "imbalance", "CV", "Gini", "routing entropy", "top-k mass",
            *([f"SRP {shown}"] if shown else []), "largest output", "kurtosis"]  # fmt: skip
    rows = []
    for layer, found in model["layers"].items():
        srp = [_number(model["locality"]["srp"]["layers"][layer][shown].get("srp"))] if shown else []
        numbers = [_number(found[n]) for n in ("entropy", "imbalance", "cv", "gini", "routing_entropy", "top_k_mass")]
        largest = [_number(max(found["absmax"])), _number(found["absmax_kurtosis"])]
        rows.append([layer, str(found["experts"]), *numbers, *srp, *largest])
    return markdown_table(head, rows, right=range(len(head)))


def _pairs(model: Document) -> str:
    every = [(pair["pmi"], layer, pair) for layer, found in model["layers"].items() for pair in found["pairs"]]
    rows = [
        [layer, ", ".join(map(str, pair["experts"])), f"{pair['tokens']:,}", _number(pair["lift"]), _number(pmi)]
        for pmi, layer, pair in sorted(every, key=lambda item: -item[0])[:SHOWN]
    ]  # fmt: skip
    table = markdown_table(["layer", "experts", "tokens", "lift", "PMI"], rows, right=range(5))
    return (
        f"{table}\n\nOf pairs that met on {COMMON} tokens or more; PMI adds 0.5 to their count. All counts, and those "
        "of one layer to the next, are in `pairs.safetensors`."
    )


def _subjects(model: Document) -> str:
    tokens = [
        (share, layer, str(e), repr(found["token"][e]))
        for layer, found in model["layers"].items()
        for e, share in enumerate(found["token_share"])
        if share is not None and found["token"][e] is not None
    ]
    rows = [
        [layer, e, token, f"{100 * share:.0f} %"] for share, layer, e, token in sorted(tokens, reverse=True)[:SHOWN]
    ]
    table = markdown_table(["layer", "expert", "token", "of its visits"], rows, right=(0, 1, 3))
    words = f"Tokens that fill the largest share of one expert's visits, of those seen 20 times or more:\n\n{table}"
    if len(model["texts"]) < 2:
        return words
    domains = [
        (ratio, layer, str(e), found["domain"][e], found["domain_divergence"][e])
        for layer, found in model["layers"].items()
        for e, ratio in enumerate(found["domain_ratio"])
        if ratio is not None
    ]
    mean = fmean(item[4] for item in domains)
    rows = [
        [layer, e, name, _number(ratio), _number(kl)]
        for ratio, layer, e, name, kl in sorted(domains, reverse=True)[:SHOWN]
    ]
    head = ["layer", "expert", "text", "times its overall share", "KL in nats"]
    table = markdown_table(head, rows, right=(0, 1, 3, 4))
    return f"{table}\n\nMean divergence of an expert's texts from those of all visits: {mean:.4f} nats.\n\n{words}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}" if abs(value) >= 1000 else f"{value:.3f}"
