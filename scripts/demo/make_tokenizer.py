"""Train the demo model's tokenizer: byte-level BPE in which every digit stands alone.

python -m scripts.demo.make_tokenizer --out moecli/demo/model
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from scripts.demo.corpus import DOMAINS, END, documents, stream

VOCABULARY = 1536
DOCUMENTS_PER_DOMAIN = 4000
PIECES = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def sample() -> Iterator[str]:
    """The text the merges are learned from."""
    for domain in DOMAINS:
        yield from islice(documents(stream("tokenizer", domain), domain), DOCUMENTS_PER_DOMAIN)


def train_tokenizer() -> Tokenizer:
    """Learn the merges; `<|endoftext|>` gets id 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample(), trainer)
    return tokenizer


def main() -> None:
    """Train and save in the transformers layout."""
    from transformers import PreTrainedTokenizerFast

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(),
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(out)
    print(f"{len(tokenizer)} tokens in {out}")


if __name__ == "__main__":
    main()
