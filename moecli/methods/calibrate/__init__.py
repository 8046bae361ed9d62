"""Look at what a model does on text, and keep the numbers later stages need.

`calibrate/statistics` keeps statistics and the text they come from; `calibrate/text` the text alone, for recipes whose
stages run it through the model themselves.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any, Literal, Self

from pydantic import PositiveInt, model_validator

from moecli.core.artifacts import CalibrationText, Checkpoint
from moecli.core.context import Context
from moecli.core.errors import MoecliError, Problem
from moecli.core.model import ModelFacts
from moecli.core.stage import Options
from moecli.engine.data import PRESETS, TextSource, check_there, shares, sources_of, spec_text, tokenise
from moecli.engine.data import identity as data_identity
from moecli.engine.data.sources import pinned
from moecli.families.adapter import load_tokenizer
from moecli.io.sources import digest_path


class TextOptions(Options):
    """Which text, and how it is cut into samples."""

    dataset: str | list[TextSource]
    """Local files, `demo` or hub data sets `org/name[config](split)@revision:rows*weight`, with commas between them; or
    a list of mappings with the same parts."""
    samples: PositiveInt = 128
    """Sequences to run."""
    tokens_per_sample: PositiveInt = 2048
    """Tokens in each sequence."""
    field: str = "text"
    """Column that holds the text. Where it is `text` and a row has none, its conversation `messages` is rendered."""
    packing: Literal[
        "pack", "truncate", "heapr_wiki", "heapr_c4", "camera_wiki", "gptq_wiki", "gptq_c4", "super_c4", "d2_wiki103",
        "naee_c4",
    ] = "pack"  # fmt: skip
    """`pack` joins documents and cuts equal blocks; `truncate` takes one document per sample and pads; the others are
    rules of published code, with its data set, samples and length where the recipe names none."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        """A preset brings data and numbers; data sets that all say their `samples` say the sum."""
        if not isinstance(values, dict):
            return values
        name, given = values.get("packing"), values.get("dataset")
        if isinstance(name, str) and name in PRESETS:
            own = PRESETS[name]
            return {"dataset": own.dataset, "samples": own.samples, "tokens_per_sample": own.length, **values}
        counts = [s.get("samples") if isinstance(s, dict) else None for s in given] if isinstance(given, list) else []
        if counts and all(type(count) is int and count > 0 for count in counts):
            return {"samples": sum(counts), **values}
        return values

    @property
    def sources(self) -> tuple[TextSource, ...]:
        """The data sets. UsageError when the text does not read as any."""
        return sources_of(self.dataset)

    def resolve(self, needs: tuple[str, ...]) -> Self:
        """Hub data sets get the commit their revision stands for."""
        return self if list(self.source_problems()) else self.model_copy(update={"dataset": self._pinned()})

    def _pinned(self) -> str | list[TextSource]:
        found = pinned(self.sources)
        if found == self.sources:
            return self.dataset
        return spec_text(found) if isinstance(self.dataset, str) else list(found)

    def identity(self, digest: Any) -> dict[str, Any]:
        if list(self.source_problems()):
            return {}
        return {"dataset": data_identity(self.sources, digest)}

    def ready(self) -> None:
        for source in self.sources:
            check_there(source)

    def problems(self, model: ModelFacts) -> Iterator[Problem]:
        yield from self.source_problems()
        if self.tokens_per_sample > model.max_positions:
            yield Problem(
                "tokens_per_sample",
                f"`tokens_per_sample` must be at most the model's {model.max_positions} positions, "
                f"got {self.tokens_per_sample}",
                hint=f"write `tokens_per_sample: {model.max_positions}`",
            )

    def source_problems(self) -> Iterator[Problem]:
        """What is wrong with the data sets as they are written."""
        try:
            sources = self.sources
        except MoecliError as error:
            yield Problem("dataset", error.message, hint=error.hint)
            return
        if not sources:
            yield Problem("dataset", "`dataset` names no data set")
            return
        asked = sum(source.samples or 0 for source in sources)
        if asked > self.samples or (asked < self.samples and all(source.samples for source in sources)):
            yield Problem("samples", f"the data sets ask for {asked} samples, `samples` is {self.samples}",
                          hint=f"write `samples: {asked}`")  # fmt: skip
            return
        for source, count in zip(sources, shares(sources, self.samples), strict=True):
            if count == 0:
                yield Problem("dataset", f"`{source.dataset}` gets none of {self.samples} samples",
                              hint="raise `samples` or its weight")  # fmt: skip


def text_of(opt: TextOptions, model: Checkpoint, ctx: Context, draw: int = 0) -> CalibrationText:
    """The draw's samples, tokenised once for all stages of the run that want them."""
    tokenizer = {name: digest_path(path) for name, path in sorted(model.side_files().items())}
    key = key_of(
        data=data_identity(opt.sources, digest_path), tokenizer=tokenizer, samples=opt.samples, field=opt.field,
        tokens_per_sample=opt.tokens_per_sample, packing=opt.packing, seed=ctx.seed, draw=draw,
    )  # fmt: skip

    def make() -> CalibrationText:
        return tokenise(
            opt.dataset, model, samples=opt.samples, tokens_per_sample=opt.tokens_per_sample,
            field=opt.field, packing=opt.packing, seed=ctx.seed, draw=draw,
        )  # fmt: skip

    return ctx.shared_part(f"tokens-{key}", CalibrationText, make)


def special_tokens(model: Checkpoint) -> list[int]:
    """Ids of the tokens that the model's tokenizer calls special, ascending."""
    return sorted(load_tokenizer(model).all_special_ids)


def key_of(**values: Any) -> str:
    """A name for shared parts: 32 hexadecimal digits of these values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]
