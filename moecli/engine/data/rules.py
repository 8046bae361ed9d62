"""How documents become samples: `pack`, `truncate`, and the rules of published calibration code.

A rule is a function of (encoder, texts, samples, length, seed) and draws lists of token ids. The first `samples` of
them are what its authors take; drawing on gives more by the same rule, as long as the text has something new.

Rules of authors tokenise with the tokenizer's own special tokens, see empty documents, and draw with Python's
`random` under the seed of their script. The seed of the recipe is added to it: 0 is the authors' draw.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, Protocol

import torch

from moecli.engine.data.reading import Rendered

BLANK_LINE = "\n\n"
_DOCUMENTS_AT_ONCE = 256
_MISSES = 1000
"""Windows in a row that are too short before a text counts as used up."""


class Encoder(Protocol):
    """What a rule asks of a tokenizer."""

    eos: list[int]
    """The token between documents; empty where the tokenizer has none."""

    def one(self, text: str) -> list[int]:
        """Ids of one text, with the tokenizer's own special tokens."""
        ...

    def many(self, texts: Iterable[str], special: bool) -> Iterator[list[int]]:
        """Ids of each text, with or without special tokens."""
        ...


class TokenizerEncoder:
    """A tokenizer of transformers. Text of a chat template gets no second set of special tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.eos: list[int] = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def one(self, text: str) -> list[int]:
        return self._encode([text], special=True)[0]

    def many(self, texts: Iterable[str], special: bool) -> Iterator[list[int]]:
        documents = list(texts)
        for start in range(0, len(documents), _DOCUMENTS_AT_ONCE):
            yield from self._encode(documents[start : start + _DOCUMENTS_AT_ONCE], special)

    def _encode(self, texts: list[str], special: bool) -> list[list[int]]:
        ids: list[list[int]] = []
        for rendered, some in groupby(texts, lambda text: isinstance(text, Rendered)):
            plain = [str(text) for text in some]
            ids += self._tokenizer(plain, add_special_tokens=special and not rendered, verbose=False)["input_ids"]
        return ids


Rule = Callable[[Encoder, Sequence[str], int, int, int], Iterator[list[int]]]
"""(encoder, texts, samples, length, seed) -> samples, each of `length` tokens (`truncate`: at most)."""


def pack(encoder: Encoder, texts: Sequence[str], samples: int, length: int, seed: int) -> Iterator[list[int]]:
    """Documents in an order drawn from the seed, joined with EOS, cut into consecutive blocks: nothing is padded,
    and documents may straddle blocks.
    """
    rest: list[int] = []
    for document in encoder.many(_shuffled(texts, seed), special=False):
        rest += document + encoder.eos
        full = len(rest) // length * length
        yield from _cut(rest, length)
        rest = rest[full:]


def truncate(encoder: Encoder, texts: Sequence[str], samples: int, length: int, seed: int) -> Iterator[list[int]]:
    """One document a sample, in an order drawn from the seed, with special tokens; what is too long is cut."""
    for document in encoder.many(_shuffled(texts, seed), special=True):
        if document:
            yield document[:length]


def _shuffled(texts: Sequence[str], seed: int) -> list[str]:
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    return [texts[i] for i in order]


def _cut(ids: Sequence[int], length: int) -> Iterator[list[int]]:
    """Consecutive whole blocks; the remainder is dropped."""
    for start in range(0, len(ids) - length + 1, length):
        yield list(ids[start : start + length])


# --- rules of authors -----------------------------------------------------------------------------


def blocks_of_stream(
    encoder: Encoder, texts: Sequence[str], samples: int, length: int, seed: int, *, keep: float = 1.0
) -> Iterator[list[int]]:
    """Documents joined by a blank line, the first `keep` of all characters, tokenised once, cut into consecutive
    blocks; `random.sample` takes them without replacement. What is left follows in an order of the same generator.

    HEAPr (LLIKKE/HEAPr, utils/data_utils.py). The authors take what there is when blocks run out; here that is an
    error, as for every rule.
    """
    text = BLANK_LINE.join(texts)
    blocks = list(_cut(encoder.one(text[: int(len(text) * keep)]), length))
    rng = random.Random(seed)
    chosen = rng.sample(range(len(blocks)), min(samples, len(blocks)))
    left = sorted(set(range(len(blocks))) - set(chosen))
    rng.shuffle(left)
    yield from (blocks[index] for index in [*chosen, *left])


def crops_of_stream(
    encoder: Encoder, texts: Sequence[str], samples: int, length: int, seed: int
) -> Iterator[list[int]]:
    """Documents joined by a blank line, tokenised once; crops start at `random.randint(0, tokens - length - 1)`,
    with replacement, so they may overlap.

    GPTQ's `get_wikitext2`; CAMERA (xuyuzhuang11/CAMERA, datautils.py).
    """
    ids = encoder.one(BLANK_LINE.join(texts))
    rng = random.Random(seed)
    while len(ids) > length:
        start = rng.randint(0, len(ids) - length - 1)
        yield ids[start : start + length]


def crops_of_documents(
    encoder: Encoder, texts: Sequence[str], samples: int, length: int, seed: int
) -> Iterator[list[int]]:
    """Draw documents with `random.randint(0, documents - 1)` until one has more than `length` tokens, then crop it at
    `random.randint(0, tokens - length - 1)`; each document is tokenised by itself, with replacement.

    GPTQ's `get_c4`, Wanda (locuslab/wanda, lib/data.py), Super Experts. Where published code accepts exactly
    `length` tokens it fails on the crop, so a run of theirs that ended has drawn the same as this.
    """
    rng = random.Random(seed)
    short: set[int] = set()
    while len(short) < len(texts):
        document = rng.randint(0, len(texts) - 1)
        ids = [] if document in short else encoder.one(texts[document])
        if len(ids) <= length:
            short.add(document)
            continue
        start = rng.randint(0, len(ids) - length - 1)
        yield ids[start : start + length]


def windows_of_characters(
    encoder: Encoder, texts: Sequence[str], samples: int, length: int, seed: int
) -> Iterator[list[int]]:
    """Documents joined by a blank line; windows of 10 * length characters start at
    `random.randint(0, characters - length - 1)`, each is tokenised by itself and its first `length` tokens are taken.

    SVD-LLM's loader as D2-MoE has it (preprocess/get_scale.py). A window with too few tokens is drawn again; the
    authors' loop skips it and never hands out its last sample, so they run a little less text. Their function
    leaves `random` as its script seeded it; 42 is the default of its `seed`.
    """
    text = BLANK_LINE.join(texts)
    rng = random.Random(seed)
    misses = 0
    while len(text) > length and misses < _MISSES:
        start = rng.randint(0, len(text) - length - 1)
        ids = encoder.one(text[start : start + 10 * length])[:length]
        misses = misses + 1 if len(ids) < length else 0
        if misses == 0:
            yield ids


def blocks_of_shuffled(
    encoder: Encoder, texts: Sequence[str], samples: int, length: int, seed: int
) -> Iterator[list[int]]:
    """Documents in the order of `Dataset.shuffle(seed)`, each tokenised by itself; the first 16 * samples of them,
    1,000 at a time, are joined without separator and cut into consecutive blocks, remainders dropped.

    NAEE (Lucky-Lance/Expert_Sparsity, data/build.py).
    """
    import numpy as np

    order = np.random.default_rng(seed).permutation(len(texts)).tolist()
    for some in (order[: 16 * samples], order[16 * samples :]):
        for start in range(0, len(some), 1000):
            ids = encoder.many((texts[i] for i in some[start : start + 1000]), special=True)
            yield from _cut([token for document in ids for token in document], length)


@dataclass(frozen=True, slots=True)
class Preset:
    """Calibration data as the authors of a method take it."""

    rule: Rule
    dataset: str
    samples: int
    length: int
    """Tokens of a sample."""
    seed: int


_WIKITEXT2 = "Salesforce/wikitext[wikitext-2-raw-v1](train)"
_WIKITEXT103 = "Salesforce/wikitext[wikitext-103-raw-v1](train)"
_C4_0 = "allenai/c4[en/c4-train.00000-of-01024.json.gz]"
_C4_1 = "allenai/c4[en/c4-train.00001-of-01024.json.gz]"
_C4_VALIDATION = "allenai/c4[en/c4-validation.00000-of-00008.json.gz]"

PRESETS: dict[str, Preset] = {
    "heapr_wiki": Preset(blocks_of_stream, _WIKITEXT2, 128, 2048, 0),
    "heapr_c4": Preset(partial(blocks_of_stream, keep=0.1), _C4_1, 128, 2048, 0),
    "camera_wiki": Preset(crops_of_stream, _WIKITEXT2, 128, 2048, 1234),
    "gptq_wiki": Preset(crops_of_stream, _WIKITEXT2, 128, 2048, 0),
    "gptq_c4": Preset(crops_of_documents, _C4_0, 128, 2048, 0),
    "super_c4": Preset(crops_of_documents, _C4_VALIDATION, 256, 2048, 0),
    "d2_wiki103": Preset(windows_of_characters, _WIKITEXT103, 256, 2048, 42),
    "naee_c4": Preset(blocks_of_shuffled, _C4_0, 128, 2048, 42),
}
"""By name: the rule with data, numbers and seed of the paper's code. Each of them can be replaced in a recipe."""

RULES: dict[str, Rule] = {"pack": pack, "truncate": truncate, **{name: p.rule for name, p in PRESETS.items()}}
