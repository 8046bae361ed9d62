"""The table of who reads which packed experts: every form has one answer, and wrong ones are never let through."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from moecli.io.servable import (
    CHANNEL,
    MIXES,
    TABLE,
    Form,
    answer,
    in_words,
    loaders_of,
    markdown,
    why_not,
)

INT4 = Form("int", (4,), (32,))


def form_for(row) -> Form:
    """Some form that a row speaks of."""
    return Form(
        format=(row.formats or ("int",))[0],
        bits=(row.bits or (4,))[:1],
        groups=(row.groups or (16,))[-1:],
        mix=(row.mix or ("none",))[-1],
        symmetric=row.symmetric is not False,
        stacked=bool(row.stacked),
        dtype=(row.dtypes or ("float32",))[0],
    )


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row.loader}-{row.verdict}-{row.formats}-{row.mix}"[:60])
def test_no_row_is_hidden_behind_another(row):
    """Rows are asked in order: each answers for something."""
    bits = row.bits or (1, 2, 3, 4, 8)
    groups = row.groups or (CHANNEL, 16, 32, 128)
    forms = (
        replace(form_for(row), bits=(b,), groups=(g,), mix=mix, format=format, dtype=dtype)
        for b, g, mix, format, dtype in product(
            bits, groups, row.mix or ("none", *MIXES), row.formats or ("int",), row.dtypes or ("bfloat16", "float32")
        )
    )
    assert any(answer(form, row.loader) == row for form in forms)


@pytest.mark.parametrize("row", [row for row in TABLE if row.verdict != "works"], ids=lambda row: row.note[:40])
def test_what_is_wrong_or_refused_is_never_servable(row):
    """quantize.md 8.7.6: each row that loads and computes wrongly."""
    form, asked = form_for(row), "hf" if row.loader == "transformers" else "vllm"
    against = why_not(form, asked)
    assert against is not None and against.verdict != "works"
    assert row.loader in loaders_of(asked)
    assert why_not(form, "research") is None


@pytest.mark.parametrize(
    ("form", "hf", "vllm"),
    [
        (INT4, "works", "works"),
        (replace(INT4, bits=(8,), groups=(CHANNEL,)), "works", "works"),
        (replace(INT4, bits=(3,)), "works", "refused"),
        (replace(INT4, bits=(1,)), "wrong", "refused"),
        (replace(INT4, bits=(1, 2, 3), mix="expert"), "wrong", "wrong"),
        (replace(INT4, groups=(16,)), "works", "refused"),
        (replace(INT4, symmetric=False), "refused", "works"),
        (replace(INT4, bits=(2, 4), mix="expert"), "wrong", "wrong"),
        (replace(INT4, bits=(4, 8), mix="layer"), "wrong", "works"),
        (replace(INT4, bits=(4, 8), mix="projection"), "wrong", "refused"),
        (replace(INT4, bits=(4, 16), mix="expert"), "wrong", "wrong"),
        (replace(INT4, stacked=True), "refused", "refused"),
        (Form("fp8", (8,), (CHANNEL,)), "works", "refused"),
        (Form("fp8_block", (8,), (128,)), "refused", "refused"),
        (Form("fp8_dynamic", (8,), (CHANNEL,)), "wrong", "works"),
        (Form("mxfp4", (4,), (32,)), "works", "works"),
        (Form("mxfp4", (4,), (32,), dtype="float32"), "refused", "works"),
        (Form("nvfp4", (4,), (16,)), "wrong", "works"),
    ],
)
def test_answers(form, hf, vllm):
    assert answer(form, "transformers").verdict == hf
    assert answer(form, "vllm").verdict == vllm
    assert (why_not(form, "hf") is None) == (hf == "works")
    assert (why_not(form, "vllm") is None) == (hf == vllm == "works")


def test_what_no_row_speaks_of_is_refused():
    unheard = replace(INT4, bits=(5,))
    assert answer(unheard, "transformers").verdict == answer(unheard, "vllm").verdict == "refused"


def test_forms_in_words():
    assert in_words(INT4) == "4 bits in groups of 32"
    assert in_words(replace(INT4, bits=(1,))) == "1 bit in groups of 32"
    mix = replace(INT4, bits=(2, 4), groups=(CHANNEL, 64), mix="layer")
    assert in_words(mix) == "2 and 4 bits in rows and groups of 64, which differ by layer"
    assert in_words(Form("fp8", (8,), (CHANNEL,))) == "FP8 in rows"


def test_docs_hold_the_table():
    """`python scripts/servable_table.py` writes it there."""
    from pathlib import Path

    page = (Path(__file__).parents[2] / "docs" / "formats.md").read_text()
    assert markdown() in page
