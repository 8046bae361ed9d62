"""Where text comes from, and how it becomes samples."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moecli.core.errors import SurroundingsError
from moecli.engine.data import batches_of, read_rows, tokenise
from tests.engine.memory import MemoryCheckpoint, open_folder

Maker = Callable[..., Path]
TEXTS = ["one fish", "two fishes", "red\u2028fish", "blue fish"]


@pytest.fixture
def model(tiny_model: Maker) -> Any:
    return open_folder(tiny_model("qwen3_moe"))


@pytest.fixture
def texts(tmp_path: Path) -> str:
    return str(write_jsonl(tmp_path / "texts.jsonl", TEXTS))


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    path.write_text("\n".join(json.dumps({field: t, "id": i}, ensure_ascii=False) for i, t in enumerate(texts)))
    return path


def rows_of(source: Any, ids: torch.Tensor) -> list[str]:
    from moecli.families.adapter import load_tokenizer

    tokenizer = load_tokenizer(source)
    return [tokenizer.decode(row) for row in ids]


# -- reading


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_files_of_rows(kind: str, zipped: bool, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / f"texts.{kind}"
    if kind == "jsonl":
        write_jsonl(path, TEXTS)
    elif kind == "json":
        path.write_text(json.dumps([{"text": t} for t in TEXTS]))
    else:
        pq.write_table(pa.table({"text": TEXTS, "id": range(4)}), path)
    if zipped:
        plain, path = path, path.with_name(path.name + ".gz")
        path.write_bytes(gzip.compress(plain.read_bytes()))
    assert read_rows(str(path)) == TEXTS
    assert read_rows(f"{path}:2") == TEXTS[:2]


def test_a_txt_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("chapter one\n\nchapter two\n")
    assert read_rows(str(tmp_path / "book.txt")) == ["chapter one\n\nchapter two\n"]


def test_a_folder_is_all_files_in_it(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "b.jsonl", ["b"])
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "README.md").write_text("not text")
    assert read_rows(str(tmp_path)) == ["a", "b"]


def test_rows_may_be_plain_strings_and_another_field(tmp_path: Path) -> None:
    (tmp_path / "plain.json").write_text(json.dumps(TEXTS))
    assert read_rows(str(tmp_path / "plain.json")) == TEXTS
    assert read_rows(str(write_jsonl(tmp_path / "q.jsonl", TEXTS, "question")), "question") == TEXTS


def test_hub_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[tuple] = []

    def load(name: str, config: str | None, split: str, revision: str | None) -> Any:
        asked.append((name, config, split, revision))
        return datasets.Dataset.from_dict({"text": TEXTS})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_rows("Salesforce/wikitext[wikitext-2-raw-v1](test):3") == TEXTS[:3]
    assert read_rows("org/name") == TEXTS
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", "test", None), ("org/name", None, "train", None)]
    with pytest.raises(SurroundingsError, match="`org/name` has no field `body`; it has `text`"):
        read_rows("org/name", "body")


def test_a_hub_data_set_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(*args: Any, **options: Any) -> Any:
        raise ConnectionError("Couldn't reach 'org/name' on the Hub\nand a second line")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(SurroundingsError, match=r"`org/name` cannot be loaded: Couldn't reach .* Hub$"):
        read_rows("org/name")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "the data set `.*missing.jsonl` does not exist"),
        ("texts", None, "the data set `.*texts` does not exist"),
        ("texts.csv", "a,b", r"is none of \.json, \.jsonl, \.parquet, \.txt"),
        ("a.jsonl", '{"body": "x", "id": 1}', "has no field `text`; it has `body`, `id`"),
        ("b.jsonl", '{"text": "x"}\n{"text": 3}', "row 2 of `.*` has no text in `text` but int"),
        ("c.jsonl", '{"text": ', "cannot be read"),
        ("d.json", '{"text": "x"}', "must hold a list of rows"),
        ("e.jsonl", "", "holds no text"),
        ("f.parquet", "no parquet", "cannot be read"),
        ("g.txt.gz", "no gzip", "cannot be read"),
    ],
)
def test_what_cannot_be_read_is_said(name: str, content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(SurroundingsError, match=message):
        read_rows(str(tmp_path / name))


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(SurroundingsError, match=r"holds no \.json, \.jsonl, \.parquet, \.txt file"):
        read_rows(str(tmp_path))


# -- samples


def test_packing_joins_documents_and_cuts_blocks(model: Any, texts: str) -> None:
    found = tokenise(texts, model, samples=3, tokens_per_sample=10, seed=3)
    assert found.ids.shape == found.mask.shape == (3, 10)
    assert bool(found.mask.all())
    joined = "".join(rows_of(model, found.ids))
    order = torch.randperm(4, generator=torch.Generator().manual_seed(3)).tolist()
    expected = "".join(TEXTS[i].replace("\u2028", "<unk><unk><unk>") + "<eos>" for i in order)
    assert expected.startswith(joined.removesuffix("<unk>"))


def test_truncating_takes_one_document_a_sample(model: Any, texts: str) -> None:
    found = tokenise(texts, model, samples=4, tokens_per_sample=9, packing="truncate")
    assert sorted(found.mask.sum(1).tolist()) == [8, 9, 9, 9]
    assert set(found.ids[found.mask == 0].tolist()) == {0}
    assert "one fish<pad>" in rows_of(model, found.ids)


def test_the_seed_decides_and_the_digest_tells(model: Any, texts: str) -> None:
    runs = [tokenise(texts, model, samples=2, tokens_per_sample=8, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(runs[0].ids, runs[1].ids)
    assert runs[0].digest == runs[1].digest != runs[2].digest
    assert len(runs[0].digest) == 64


def test_batches_are_consecutive_samples(model: Any, texts: str) -> None:
    found = tokenise(texts, model, samples=3, tokens_per_sample=8)
    batches = batches_of(found, 2)
    assert [len(b.input_ids) for b in batches] == [2, 1]
    assert torch.equal(torch.cat([b.input_ids for b in batches]), found.ids)
    assert torch.equal(torch.cat([b.attention_mask for b in batches]), found.mask)


def test_too_little_text(model: Any, texts: str) -> None:
    with pytest.raises(SurroundingsError, match="asked for 64 samples of 10 tokens, the text gives 4") as caught:
        tokenise(texts, model, samples=64, tokens_per_sample=10)
    assert caught.value.hint == "write `samples: 4`, or name more text"
    with pytest.raises(SurroundingsError, match="asked for 5 samples of 10 tokens, the text gives 4"):
        tokenise(texts, model, samples=5, tokens_per_sample=10, packing="truncate")


def test_samples_longer_than_the_model(model: Any, texts: str) -> None:
    with pytest.raises(SurroundingsError, match="at most the model's 256 positions, got 512") as caught:
        tokenise(texts, model, samples=1, tokens_per_sample=512)
    assert caught.value.hint == "write `tokens_per_sample: 256`"


def test_no_tokenizer(model: Any, texts: str) -> None:
    bare = MemoryCheckpoint({}, model.config)
    with pytest.raises(SurroundingsError, match="the model has no tokenizer"):
        tokenise(texts, bare, samples=1, tokens_per_sample=4)
