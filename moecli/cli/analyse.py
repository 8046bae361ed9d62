"""What `moecli analyse` does between its arguments and its answer."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moecli.cli.render import table_text
from moecli.core.errors import UsageError

if TYPE_CHECKING:
    from moecli.runner.execute import Listener

Document = dict[str, Any]
STAGE = "analyse"


def analysed(
    model: str,
    against: str | None,
    data: Sequence[str],
    out: str | None,
    *,
    device: str,
    quiet: bool,
    **options: Any,
) -> tuple[Document, Path]:
    """Run it, write its files, and return the document with the folder. UsageError when no text is named."""
    from moecli.cli.render import progress
    from moecli.engine.analysis import Settings
    from moecli.runner import analysis

    name = Path(model).name
    if not data and model != "demo":
        raise UsageError("`analyse` needs a text to route", hint="`--data texts.jsonl`, or `--data demo`")
    model, against = analysis.places(model, against)
    seed = options.pop("seed")
    settings = Settings(
        cache_samples=options.pop("cache_samples"), pooled_samples=options.pop("pooled_samples"), seed=seed
    )
    folder = Path(out) if out else Path("runs") / f"analyse-{name}"
    with contextlib.nullcontext() if quiet else progress(sys.stderr) as listener:
        track = _tracker(listener) if listener else None
        texts = analysis.named_texts(data or ["demo"])
        document, found = analysis.run(model, against, texts, settings=settings, device=device, track=track, **options)
    analysis.save(document, found, folder)
    return document, folder


def _tracker(listener: Listener) -> Callable[[Sequence[Any], str], Iterator[Any]]:
    """Progress of a sweep as a run's stage shows it."""

    def track(items: Sequence[Any], label: str) -> Iterator[Any]:
        began = time.monotonic()
        listener({"event": "stage_started", "stage": STAGE})
        for done, item in enumerate(items):
            left = (time.monotonic() - began) / done * (len(items) - done) if done else None
            listener(
                {"event": "progress", "stage": STAGE, "label": label, "done": done, "total": len(items), "eta_s": left}
            )
            yield item
        listener({"event": "stage_finished", "stage": STAGE, "seconds": time.monotonic() - began})

    return track


def analysed_text(document: Document, folder: Path) -> str:
    """Means and cache rates as tables, then where the rest is."""
    from moecli.runner.analysis import cache_rows, summary_rows

    model, base = document["model"], document.get("base")
    sides = ["base", "model"] if base else ["model"]
    summary = table_text(["", *sides], summary_rows(model, base), right=(1, 2))
    caches = table_text(["cache in each layer", "", *sides], list(cache_rows(model, base)), right=(2, 3))
    found = sum(map(len, model["super_experts"].values()))
    lines = [
        f"super experts  {found}",
        f"page           {folder / 'analysis.md'}",
        f"data           {folder / 'analysis.json'}",
    ]
    return "\n\n".join([summary, caches, "\n".join(lines)])
