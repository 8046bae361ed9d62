"""Rules of published code, each against its description written a second time."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch

from moecli.core.artifacts import CalibrationText
from moecli.engine.data import PRESETS, RULES, tokenise
from moecli.engine.data.rules import TokenizerEncoder, pack
from tests.engine.memory import open_folder
from tests.tiny import make_tokenizer

Ids = list[list[int]]
LENGTH = 7
BOS = 1


class Letters:
    """One token a letter, BOS in front; remembers what it was asked for."""

    def __init__(self) -> None:
        self.eos = [2]
        self.asked: list[str] = []

    def one(self, text: str) -> list[int]:
        self.asked.append(text)
        return [BOS, *map(ord, text)]

    def many(self, texts: Iterable[str], special: bool) -> Iterator[list[int]]:
        return (self.one(text)[0 if special else 1 :] for text in texts)


def words(count: int, seed: int = 5) -> list[str]:
    """Documents of very different lengths, some of them empty."""
    rng = random.Random(seed)
    return ["".join(rng.choices("abcdefgh ", k=rng.choice([0, 3, 6, 7, 20, 50]))) for _ in range(count)]


def draws(name: str, texts: list[str], samples: int, seed: int) -> Ids:
    return list(islice(RULES[name](Letters(), texts, samples, LENGTH, seed), samples))


def test_heapr_takes_blocks_without_replacement() -> None:
    texts = words(40)
    stream = torch.tensor(Letters().one("\n\n".join(texts)))
    blocks = stream[: len(stream) // LENGTH * LENGTH].view(-1, LENGTH)
    random.seed(0)
    chosen = random.sample(range(len(blocks)), 12)
    assert draws("heapr_wiki", texts, 12, 0) == blocks[chosen].tolist()
    assert len(set(chosen)) == 12


def test_heapr_on_c4_takes_a_tenth_of_the_characters() -> None:
    texts = words(300)
    text = "\n\n".join(texts)
    stream = torch.tensor(Letters().one(text[: int(len(text) * 0.1)]))
    random.seed(0)
    total = len(stream) // LENGTH
    expected = stream[: total * LENGTH].view(-1, LENGTH)[random.sample(range(total), 5)]
    assert draws("heapr_c4", texts, 5, 0) == expected.tolist()


def test_heapr_goes_on_with_the_blocks_that_are_left() -> None:
    texts = [chr(97 + i) * 10 for i in range(20)]
    every = list(RULES["heapr_wiki"](Letters(), texts, 6, LENGTH, 0))
    total = (1 + 20 * 10 + 19 * 2) // LENGTH
    assert len(every) == len({tuple(block) for block in every}) == total
    assert every[:6] == draws("heapr_wiki", texts, 6, 0)


@pytest.mark.parametrize(("name", "seed"), [("camera_wiki", 1234), ("gptq_wiki", 0)])
def test_random_starts_in_one_stream(name: str, seed: int) -> None:
    texts = words(30)
    stream = Letters().one("\n\n".join(texts))
    random.seed(seed)
    expected = []
    for _ in range(200):
        i = random.randint(0, len(stream) - LENGTH - 1)
        expected.append(stream[i : i + LENGTH])
    assert draws(name, texts, 200, PRESETS[name].seed) == expected
    assert len({tuple(crop) for crop in expected}) < 200, "with replacement"


@pytest.mark.parametrize("name", ["gptq_c4", "super_c4"])
def test_crops_of_long_documents(name: str) -> None:
    texts = words(30)
    random.seed(0)
    expected = []
    for _ in range(20):
        while True:
            i = random.randint(0, len(texts) - 1)
            ids = Letters().one(texts[i])
            if len(ids) > LENGTH:
                break
        i = random.randint(0, len(ids) - LENGTH - 1)
        expected.append(ids[i : i + LENGTH])
    assert draws(name, texts, 20, 0) == expected


def test_windows_of_characters() -> None:
    texts = words(30)
    joined = "\n\n".join(texts)
    random.seed(42)
    expected = []
    while len(expected) < 15:
        i = random.randint(0, len(joined) - LENGTH - 1)
        ids = Letters().one(joined[i : i + 10 * LENGTH])[:LENGTH]
        if len(ids) == LENGTH:
            expected.append(ids)
    assert draws("d2_wiki103", texts, 15, 42) == expected


def test_naee_shuffles_as_datasets_does() -> None:
    import datasets

    texts = words(2500)
    samples, letters = 100, Letters()
    shuffled = datasets.Dataset.from_dict({"text": texts}).shuffle(seed=42).select(range(16 * samples))["text"]
    expected: Ids = []
    for start in range(0, 16 * samples, 1000):
        chain = list(itertools.chain(*(letters.one(text) for text in shuffled[start : start + 1000])))
        whole = len(chain) // LENGTH * LENGTH
        expected += [chain[i : i + LENGTH] for i in range(0, whole, LENGTH)]
    assert draws("naee_c4", texts, samples, 42) == expected[:samples]


@pytest.mark.parametrize(("name", "calls"), [("heapr_wiki", 1), ("camera_wiki", 1), ("d2_wiki103", 3), ("naee_c4", 9)])
def test_what_is_tokenised_at_once(name: str, calls: int) -> None:
    letters = Letters()
    list(islice(RULES[name](letters, ["a letter or two"] * 9, 3, LENGTH, 0), 3))
    assert len(letters.asked) == calls


@pytest.mark.parametrize("name", sorted(PRESETS))
@pytest.mark.parametrize("texts", [["ab"], ["abcdef"], [""], ["", ""]])
def test_too_little_text_ends_every_rule(name: str, texts: list[str]) -> None:
    assert list(RULES[name](Letters(), texts, 2, 8, 0)) == []


@pytest.mark.parametrize("name", sorted(RULES))
def test_another_seed_is_another_draw(name: str) -> None:
    texts = words(2000)
    assert draws(name, texts, 20, 0) != draws(name, texts, 20, 1)
    assert draws(name, texts, 20, 0) == draws(name, texts, 20, 0)


def test_presets_say_what_the_papers_used() -> None:
    numbers = {name: (p.samples, p.length, p.seed) for name, p in PRESETS.items()}
    assert numbers == {
        "heapr_wiki": (128, 2048, 0), "heapr_c4": (128, 2048, 0), "camera_wiki": (128, 2048, 1234),
        "gptq_wiki": (128, 2048, 0), "gptq_c4": (128, 2048, 0), "super_c4": (256, 2048, 0),
        "d2_wiki103": (256, 2048, 42), "naee_c4": (128, 2048, 42),
    }  # fmt: skip


def test_packing_cuts_one_stream_however_long_documents_are() -> None:
    texts = words(20)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(9)).tolist()
    stream = [token for i in order for token in [*map(ord, texts[i]), 2]]
    expected = [stream[i : i + LENGTH] for i in range(0, len(stream) - LENGTH + 1, LENGTH)]
    assert list(pack(Letters(), texts, 3, LENGTH, 9)) == expected


# -- through the tokenizer, on local text


@pytest.fixture
def text_file(tmp_path: Path) -> str:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in words(60)))
    return str(path)


def test_a_preset_on_local_text_sees_its_empty_documents(tiny_model: Callable[..., Path], text_file: str) -> None:
    model = open_folder(tiny_model("qwen3_moe"))
    found = tokenise(text_file, model, samples=9, tokens_per_sample=16, packing="heapr_wiki")
    ids = make_tokenizer()("\n\n".join(words(60)))["input_ids"]
    blocks = [ids[i : i + 16] for i in range(0, len(ids) - 15, 16)]
    random.seed(0)
    assert found.ids.tolist() == [blocks[i] for i in random.sample(range(len(blocks)), 9)]
    assert bool(found.mask.all())


@pytest.mark.parametrize("packing", ["pack", "truncate", "heapr_wiki", "gptq_c4"])
def test_later_draws_go_on_where_the_first_stopped(
    packing: str, tiny_model: Callable[..., Path], text_file: str
) -> None:
    model = open_folder(tiny_model("qwen3_moe"))

    def draw(samples: int, number: int = 0) -> CalibrationText:
        return tokenise(
            text_file, model, samples=samples, tokens_per_sample=8, packing=packing, draw=number
        )  # fmt: skip

    parts = [draw(5, number).ids for number in range(3)]
    rule = RULES[packing](TokenizerEncoder(make_tokenizer()), _kept(packing), 5, 8, 0)
    expected = list(islice(rule, 15))
    shown = [[token for token in row if token] for row in torch.cat(parts).tolist()]
    assert shown == expected
    assert draw(5, 100 if packing != "gptq_c4" else 2).ids.shape == (0 if packing != "gptq_c4" else 5, 8)


def _kept(packing: str) -> list[str]:
    return [text for text in words(60) if text or packing in PRESETS]
