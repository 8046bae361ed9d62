"""Text to token batches: where it comes from, which rows, and how rows become samples of equal length.

Data sets are named by text, one or several with commas between them:

    texts.jsonl                 json (a list, or one row a line), jsonl, parquet or txt, also with .gz; or a folder
    demo                        the calibration text that comes with the package
    org/name[config](split)     a hub data set; the split is `train` where none is written
    org/name[data/a.jsonl.gz]   one file of a hub data set's repository
    ...@revision                a branch, tag or commit of a hub data set; a run records the commit
    ...:n                       the first n rows only
    ...*w                       this one's share of the samples, next to the others' (1 where none is written)

in this order, such as `chats.jsonl:500*3, allenai/c4[en/c4-train.00000-of-01024.json.gz]@main:10000*7`. A file that
exists under the whole text is that file. `TextSource` is the same as separate fields.

A txt file is one document. A row with `messages` is rendered by the tokenizer's chat template. How documents become
samples, `pack`, `truncate` and the rules of published code, is in `engine.data.rules`.
"""

from __future__ import annotations

from moecli.engine.data.reading import check_there, documents, read_rows
from moecli.engine.data.rules import PRESETS, RULES
from moecli.engine.data.sources import TextSource, identity, parse, pinned, sources_of, spec_text
from moecli.engine.data.tokens import Batch, batches_of, digest_of, shares, tokenise

__all__ = [
    "PRESETS", "RULES", "Batch", "TextSource", "batches_of", "check_there", "digest_of", "documents", "identity",
    "parse", "pinned", "read_rows", "shares", "sources_of", "spec_text", "tokenise",
]  # fmt: skip
