"""Statistics that were collected before: those of another run, or of several put together by `moecli stats merge`.

They must be of the model that stands at this place of the recipe, tokenizer included, and hold what the stages below
need. What they were made of is in them and reaches the report. Statistics of one run bring their text along; merged
ones have none, so a stage below that runs text itself needs a `calibrate/text` then.

- run: calibrate/stored
  with: {file: merged.safetensors}
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from moecli.core.artifacts import CalibrationStats, Checkpoint
from moecli.core.context import Context
from moecli.core.errors import Problem, StageFailed, SurroundingsError
from moecli.core.model import ModelFacts
from moecli.core.stage import Options, SourcePath, stage
from moecli.engine.stats import names_in
from moecli.io.store import load_artifact


class Stored(Options):
    """Options of `calibrate/stored`."""

    file: Annotated[str, SourcePath()]
    """A `.safetensors` file of statistics, with the `.json` beside it."""
    statistics: Literal["auto"] | list[str] = "auto"
    """What the file must hold besides counts and gate sums; `auto` is what the stages below need."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision they were computed in; `auto` is the checkpoint's."""

    def resolve(self, needs: tuple[str, ...]) -> Self:
        return self.model_copy(update={"statistics": list(needs)}) if self.statistics == "auto" else self

    def identity(self, digest: Any) -> dict[str, Any]:
        """The `.json` says what the tensors are of."""
        beside = Path(self.file).expanduser().with_suffix(".json")
        return {"about": digest(beside)} if beside.is_file() else {}

    def problems(self, model: ModelFacts) -> Iterator[Problem]:
        path = Path(self.file).expanduser()
        if path.suffix != ".safetensors":
            yield Problem("file", f"`file` must name a .safetensors file of statistics, got `{self.file}`")
            return
        if not path.is_file():
            yield Problem("file", f"`{self.file}` does not exist", hint="`moecli stats merge A B -o FILE` writes one")
            return
        about = _about(path)
        if about is None:
            yield Problem("file", f"`{self.file}` has no statistics' .json beside it", hint="copy both files")
            return
        source, layers = about
        found = source.get("model_type")
        if found != model.model_type or layers != set(model.moe_layers):
            yield Problem(
                "file", f"the statistics are of a {found} model with {len(layers)} MoE layers, the model here is "
                f"{model.model_type} with {len(model.moe_layers)}",
                hint="calibrate with this model",
            )  # fmt: skip


def _about(path: Path) -> tuple[dict[str, Any], set[int]] | None:
    """`source` and layers of stored statistics; None when the file beside them says neither."""
    try:
        content = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        return dict(content["meta"]["source"]), {int(layer) for layer in content["meta"]["tokens"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None


@stage("calibrate/stored", version=1)
def stored(opt: Stored, model: Checkpoint, ctx: Context) -> CalibrationStats:
    path = Path(opt.file).expanduser()
    stats = load_artifact(path.parent, path.stem, CalibrationStats)
    if stats.source.get("model") != ctx.input_keys["model"]:
        raise StageFailed(
            f"the statistics in `{opt.file}` are of another model or tokenizer ({_short(stats.source.get('model'))}, "
            f"the model here is {_short(ctx.input_keys['model'])})",
            hint="calibrate with this model, or name the file of a run that did",
        )
    wanted = model.facts.dtype if opt.dtype == "auto" else opt.dtype
    if stats.source.get("dtype") != wanted:
        made = stats.source.get("dtype")
        raise StageFailed(
            f"the statistics in `{opt.file}` were computed in {made}, expected {wanted}",
            hint=f"write `dtype: {made}`",
        )
    _require(opt, stats)
    ctx.record("load", {str(layer): s.count_E.tolist() for layer, s in stats.items()})
    return stats


def _require(opt: Stored, stats: CalibrationStats) -> None:
    for layer, found in stats.items():
        if missing := [name for name in opt.statistics if name not in names_in(found)]:
            listed = ", ".join(f"`{name}`" for name in missing)
            raise SurroundingsError(
                f"`{opt.file}` does not hold {listed} (layer {layer})",
                hint="collect them with `calibrate/statistics`, which uses what its run folder has already",
            )


def _short(key: Any) -> str:
    return "unknown" if key is None else str(key)[:12]
