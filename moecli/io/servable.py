"""Who loads which packed experts, and whether they then compute what was meant: asked before a file is written.

Three answers: a loader computes what the numbers say (`works`), says that it cannot (`refused`), or loads without a
word and computes something else (`wrong`). What is `wrong` or `refused` in stock transformers is never written as a
stock checkpoint. Versions: transformers 5.17 and 5.23, vLLM 0.32 and 0.33 with compressed-tensors 0.17 (of packed
experts its CPU build runs, with AMX, 4 bits in groups other than 32 and gpt_oss's MXFP4: most of its rows are `read`).

`python scripts/servable_table.py` writes the table into docs/formats.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

Format = Literal["int", "fp8", "fp8_block", "mxfp4", "fp8_dynamic", "int8_dynamic", "nvfp4"]
"""The last three are written by others; they stand in the table so that nobody adds them unawares."""
Loader = Literal["transformers", "vllm"]
Mix = Literal["none", "layer", "projection", "expert"]
"""What routed experts differ by: nothing; layers; gate and up from down; one expert from another."""
Servable = Literal["hf", "vllm", "research"]
Verdict = Literal["works", "refused", "wrong"]

CHANNEL = -1
"""As a group size: one scale for each output channel."""
MARLIN_GROUPS = (CHANNEL, 32, 64, 128)
MIXES: tuple[Mix, ...] = ("layer", "projection", "expert")


@dataclass(frozen=True, slots=True)
class Form:
    """How all routed experts of a model are stored."""

    format: Format
    bits: tuple[int, ...]
    """Every number of bits that occurs, 16 for experts that stay dense; rising."""
    groups: tuple[int, ...]
    """Every group size that occurs, CHANNEL for one scale a row."""
    mix: Mix = "none"
    symmetric: bool = True
    stacked: bool = False
    """One tensor holds all experts of a layer."""
    dtype: str = "bfloat16"
    """Of the model, torch's name."""


class Row(NamedTuple):
    """One row. What is None counts for all; the first row of a loader that fits a form is its answer."""

    loader: Loader
    verdict: Verdict
    note: str
    """What happens, as the end of "<loader> ..."."""
    source: str
    """Where that was seen: `run` with versions and the relative error of the logits, or `read` with the file."""
    formats: tuple[Format, ...] | None = None
    bits: tuple[int, ...] | None = None
    groups: tuple[int, ...] | None = None
    mix: tuple[Mix, ...] | None = ("none",)
    symmetric: bool | None = True
    stacked: bool | None = False
    dtypes: tuple[str, ...] | None = None
    hint: str | None = None
    """What to type instead."""

    def fits(self, form: Form) -> bool:
        """Whether this row speaks of the form."""
        return (
            (self.formats is None or form.format in self.formats)
            and (self.bits is None or set(form.bits) <= set(self.bits))
            and (self.groups is None or set(form.groups) <= set(self.groups))
            and (self.mix is None or form.mix in self.mix)
            and self.symmetric in (None, form.symmetric)
            and self.stacked in (None, form.stacked)
            and (self.dtypes is None or form.dtype in self.dtypes)
        )


_CT = "transformers/integrations/compressed_tensors.py"
_MOE = "vllm/.../compressed_tensors_moe.py"
_WNA16 = "vllm/.../fused_moe/oracle/int_wna16.py"
_ONE = "give all experts the same bits and group size"

TABLE: tuple[Row, ...] = (
    Row("transformers", "works", "decodes gpt_oss's to dense experts while loading", "run: 5.23, error 0", ("mxfp4",),
        stacked=True),
    Row("transformers", "refused", "has no packed form for experts that one tensor a layer holds", f"read: {_CT}",
        formats=None, mix=None, symmetric=None, stacked=True),
    Row("transformers", "works", "decodes them to dense experts while loading",
        "run: 5.17 and 5.23, error 0", ("int",), (2, 3, 4, 8)),
    Row("transformers", "wrong", "decodes 1 bit to 0 and -1, where it means 1 and -1", "run: 5.23, error 0.05",
        ("int",), (1,), hint="write `bits: 2`"),
    Row("transformers", "refused", "ends with an error of conversion", "run: 5.17", ("int",),
        symmetric=False, hint="write symmetric codes"),
    Row("transformers", "wrong", "reads one packing for all experts and says so only where shapes disagree",
        "run: 5.17, errors from 0.12; 5.23, error 1.4 or refused", ("int", "mxfp4", "fp8"),
        mix=MIXES, hint=_ONE),
    Row("transformers", "works", "decodes them to dense experts while loading", "run: 5.17 and 5.23, error 0",
        ("mxfp4",), dtypes=("bfloat16",)),
    Row("transformers", "refused", "makes attention bfloat16, which no other dtype multiplies", "run: 5.23",
        ("mxfp4",), hint="set `model` to a bfloat16 copy of it"),
    Row("transformers", "works", "decodes them to dense experts while loading", "run: 5.23, error 0", ("fp8",)),
    Row("transformers", "refused", "multiplies each weight with a scale of another shape", "run: 5.17 and 5.23",
        ("fp8_block",), hint="write `format: fp8`"),
    Row("transformers", "wrong", "rounds the inputs of attention but not those of experts",
        "run: 5.17, error 0.04; 5.23, errors 0.06 to 0.34", ("fp8_dynamic",), hint="write `format: fp8`"),
    Row("transformers", "refused", "ends with an error of conversion", "run: 5.17", ("int8_dynamic",),
        hint="write `format: int` with `bits: 8`"),
    Row("transformers", "wrong", "ignores the scale of the whole tensor", "run: 5.17, error 1.35", ("nvfp4",),
        hint="write `format: mxfp4`"),
    Row("vllm", "works", "runs gpt_oss's packed", "run: CPU build of 0.32", ("mxfp4",), stacked=True),
    Row("vllm", "refused", "has no packed form for experts that one tensor a layer holds", f"read: {_MOE}",
        mix=None, symmetric=None, stacked=True),
    Row("vllm", "works", "runs them packed: Marlin, if 128 divides the model width; with AMX on a CPU",
        "run: CPU build of 0.32", ("int",), (4,), (64, 128)),
    Row("vllm", "works", "runs them packed: Marlin, if 128 divides the model width", f"read: {_WNA16}", ("int",),
        (4, 8), MARLIN_GROUPS),
    Row("vllm", "refused", "needs its Humming backend for 2 and 3 bits, which is no part of it",
        f"read: {_WNA16}", ("int",), (2, 3), hint="write `bits: 4` or `bits: 8`"),
    Row("vllm", "refused", "runs 4 and 8 bits in groups of 32, 64 or 128 only", f"read: {_WNA16}",
        ("int",), hint="write `group_size: 32`, 64 or 128, and `bits: 4` or `bits: 8`"),
    Row("vllm", "works", "runs them packed", f"read: {_MOE}", ("int",), (4,), MARLIN_GROUPS, symmetric=False),
    Row("vllm", "works", "looks the packing up layer by layer", f"read: {_MOE}", ("int",), (4, 8), MARLIN_GROUPS,
        mix=("layer",)),
    Row("vllm", "refused", "wants gate, up and down packed in one way", f"read: {_MOE}, ValueError", ("int",),
        mix=("projection",), hint=_ONE),
    Row("vllm", "wrong", "takes the packing of a layer's first expert for all of them", f"read: {_MOE}", ("int",),
        mix=MIXES, hint=_ONE),
    Row("vllm", "works", "runs them packed", "read: vllm/.../compressed_tensors_moe_w4a4_mxfp4.py", ("mxfp4",)),
    Row("vllm", "refused", "runs FP8 experts with rounded inputs only", "run: 0.32, fp8 in rows: ValueError",
        ("fp8", "fp8_block"), hint="write `format: int` with `bits: 8`"),
    Row("vllm", "works", "runs them packed", f"read: {_MOE}", ("fp8_dynamic", "int8_dynamic", "nvfp4")),
)  # fmt: skip


def answer(form: Form, loader: Loader) -> Row:
    """What becomes of such experts in a loader. What no row speaks of counts as refused."""
    fits = (row for row in TABLE if row.loader == loader and row.fits(form))
    return next(fits, Row(loader, "refused", "was never seen to load them", "nobody tried", mix=None))


def loaders_of(servable: Servable) -> tuple[Loader, ...]:
    """Who must compute rightly. vLLM's users load with transformers too, so `vllm` asks for both."""
    return {"research": (), "hf": ("transformers",), "vllm": ("transformers", "vllm")}[servable]  # type: ignore[return-value]


def why_not(form: Form, servable: Servable) -> Row | None:
    """The row that speaks against serving such experts; None when they can be served."""
    answers = (answer(form, loader) for loader in loaders_of(servable))
    return next((row for row in answers if row.verdict != "works"), None)


def in_words(form: Form) -> str:
    """`4 bits in groups of 128`, `2 and 4 bits in rows, by expert`."""
    names = {"fp8": "FP8 in rows", "fp8_block": "FP8 in blocks of 128", "mxfp4": "MXFP4"}
    groups = " and ".join("rows" if size == CHANNEL else f"groups of {size}" for size in form.groups)
    bits = f"{' and '.join(map(str, form.bits))} bit{'' if form.bits == (1,) else 's'}"
    said = names.get(form.format, f"{bits} in {groups}")
    return said if form.mix == "none" else f"{said}, which differ by {form.mix}"


def markdown() -> str:
    """The table as docs show it."""
    head = "| experts | bits | groups | differ by | symmetric | dtype | loader | answer | what happens | seen |"
    lines = [head, "|" + "---|" * 10]
    for row in TABLE:
        formats = ", ".join(row.formats or ("any",))
        experts = f"one tensor a layer: {formats}" if row.stacked else formats
        groups = ", ".join("row" if size == CHANNEL else str(size) for size in row.groups or ()) or "any"
        symmetric = {None: "any", True: "yes", False: "no"}[row.symmetric]
        cells = (
            experts, ", ".join(map(str, row.bits or ())) or "any", groups, ", ".join(row.mix or ()) or "any", symmetric,
            ", ".join(row.dtypes or ()) or "any", row.loader, f"**{row.verdict}**", row.note, row.source,
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
