"""Names of data sets, shares, commits, and rows that are conversations."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moecli.core.errors import SurroundingsError, UsageError
from moecli.engine.data import TextSource, identity, parse, pinned, read_rows, shares, spec_text, tokenise
from moecli.engine.data.sources import is_pinned
from tests.engine.memory import open_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", {"dataset": "org/name"}),
        ("org/name:5", {"dataset": "org/name", "rows": 5}),
        ("org/name[cfg](test):5", {"dataset": "org/name", "config": "cfg", "split": "test", "rows": 5}),
        ("org/name@v1.0*0.5", {"dataset": "org/name", "revision": "v1.0", "weight": 0.5}),
        ("org/name(a)@refs/pr/1:7*3", {"dataset": "org/name", "split": "a", "revision": "refs/pr/1", "rows": 7,
                                       "weight": 3.0}),
        ("org/c4[en/x.json.gz]", {"dataset": "org/c4", "config": "en/x.json.gz"}),
        ("demo:3", {"dataset": "demo", "rows": 3}),
        ("a.jsonl:3*2", {"dataset": "a.jsonl", "rows": 3, "weight": 2.0}),
    ],
)  # fmt: skip
def test_one_name(text: str, expected: dict[str, Any]) -> None:
    assert parse(text) == (TextSource(**expected),)
    assert spec_text(parse(text)) == text


def test_several_names() -> None:
    found = parse("a.jsonl*3, org/b[x,y](train[:10%]):4 ,demo")
    assert [s.dataset for s in found] == ["a.jsonl", "org/b", "demo"]
    assert [s.weight for s in found] == [3, 1, 1]
    assert (found[1].config, found[1].split, found[1].rows) == ("x,y", "train[:10%]", 4)


def test_a_file_that_exists_is_that_file(tmp_path: Path) -> None:
    odd = tmp_path / "a, b@c(d)*2.jsonl"
    odd.write_text('{"text": "x"}\n{"text": "y"}')
    assert parse(str(odd)) == (TextSource(dataset=str(odd)),)
    assert read_rows(str(odd)) == ["x", "y"]
    plain = tmp_path / "at@home.jsonl"
    plain.write_text('{"text": "z"}\n{"text": "w"}')
    assert read_rows(f"{plain}:1, {plain}") == ["z", "z", "w"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("org/name[cfg", "does not read as"),
        ("a b/c", "does not read as"),
        ("org/a,,org/b", "a data set between two commas has no name"),
        ("org/a:0", "asks for nothing"),
        ("org/a*0", "asks for nothing"),
        ("a.jsonl(train)", "`a.jsonl` is a local name, it takes no config, split or revision"),
    ],
)
def test_what_does_not_read(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(text)


NAMES = st.sampled_from(["org/a", "b.jsonl", "demo"])


@given(
    st.lists(st.tuples(NAMES, st.none() | st.integers(1, 9), st.integers(1, 40).map(lambda n: n / 4)), min_size=1),
    st.integers(1, 100),
)
def test_names_and_shares_agree(parts: list[tuple[str, int | None, float]], samples: int) -> None:
    sources = tuple(TextSource(dataset=name, rows=rows, weight=weight) for name, rows, weight in parts)
    assert parse(spec_text(sources)) == sources
    counts = shares(sources, samples)
    total = sum(source.weight for source in sources)
    assert sum(counts) == samples
    assert all(abs(count - samples * source.weight / total) < 1 for count, source in zip(counts, sources, strict=True))


def test_samples_of_a_source_come_first() -> None:
    sources = [
        TextSource(dataset="a.txt", samples=7),
        TextSource(dataset="b.txt", weight=3),
        TextSource(dataset="c.txt"),
    ]
    assert shares(sources, 11) == [7, 3, 1]
    assert shares(sources[:1], 7) == [7]


# -- keys and commits


def test_a_key_holds_content_and_commit(tmp_path: Path) -> None:
    here, there = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    here.write_text("{}")
    there.write_text("{}")

    def key(text: str) -> str:
        return identity(parse(text), lambda path: path.read_text())

    assert key(str(here)) == key(str(there)) == "sha256:{}"
    assert key(f"{here}:3*2, org/b(test)@{COMMIT}") == f"sha256:{{}}:3*2, org/b(test)@{COMMIT}"
    assert key("demo") != "sha256:demo", "the text of the demo, not its name"
    told = [TextSource(dataset=str(here), field=field, samples=n) for field, n in [(None, 1), ("q", 1), ("q", 2)]]
    assert len({identity([source], lambda path: "x") for source in told}) == 3


def test_revisions_become_commits(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import constants

    class Hub:
        def dataset_info(self, name: str, revision: str | None, timeout: float) -> Any:
            assert (name, revision) == ("org/b", "main")
            return type("Info", (), {"sha": COMMIT})

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    sources = parse("a.jsonl, org/b@main:5")
    assert [is_pinned(source) for source in sources] == [True, False]
    assert spec_text(pinned(sources)) == f"a.jsonl, org/b@{COMMIT}:5"
    assert pinned(pinned(sources)) == pinned(sources)


def test_offline_the_cache_knows_the_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert pinned(parse("org/b")) == parse("org/b")
    ref = tmp_path / "datasets--org--b" / "refs" / "main"
    ref.parent.mkdir(parents=True)
    ref.write_text(COMMIT)
    assert spec_text(pinned(parse("org/b"))) == f"org/b@{COMMIT}"


def test_the_commit_is_what_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[tuple] = []

    def load(name: str, config: str | None, split: str, revision: str | None) -> Any:
        asked.append((name, config, split, revision))
        return datasets.Dataset.from_dict({"text": ["x"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_rows(f"org/b(test)@{COMMIT}") == ["x"]
    assert asked == [("org/b", None, "test", COMMIT)]


def test_one_file_of_a_repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    rows = "".join(json.dumps({"text": text}) + "\n" for text in ("x", "y", "z"))
    (tmp_path / "c4.json.gz").write_bytes(gzip.compress(rows.encode()))

    def fetch(name: str, file: str, repo_type: str, revision: str | None) -> str:
        assert (name, file, repo_type, revision) == ("allenai/c4", "en/c4.json.gz", "dataset", COMMIT)
        return str(tmp_path / "c4.json.gz")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    assert read_rows(f"allenai/c4[en/c4.json.gz]@{COMMIT}:2") == ["x", "y"]


# -- conversations, and several data sets at once

CHAT = [{"role": "user", "content": "two fish?"}, {"role": "assistant", "content": "red fish"}]
TEMPLATE = "{% for m in messages %}<bos>{{ m.role }}:{{ m.content }}{% endfor %}"


@pytest.fixture
def model(tiny_model: Callable[..., Path]) -> Any:
    return open_folder(tiny_model("qwen3_moe"))


@pytest.fixture
def chats(tmp_path: Path) -> str:
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"id": 1, "messages": CHAT}) + "\n")
    return str(path)


def test_conversations_are_rendered(model: Any, chats: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from moecli.engine.data import tokens
    from moecli.families.adapter import load_tokenizer

    tokenizer = load_tokenizer(model)
    tokenizer.chat_template = TEMPLATE
    monkeypatch.setattr(tokens, "load_tokenizer", lambda _: tokenizer)
    expected = "<bos>user:two fish?<bos>assistant:red fish"
    for packing, field in [("pack", "text"), ("truncate", "text"), ("truncate", "messages")]:
        found = tokenise(chats, model, samples=1, tokens_per_sample=30, packing=packing, field=field)
        text = tokenizer.decode(found.ids[0])
        assert (expected + "<eos>").startswith(text.replace("<pad>", "")) and text.startswith("<bos>user:two fish?")


def test_conversations_need_a_template(model: Any, chats: str) -> None:
    with pytest.raises(SurroundingsError, match="the model's tokenizer has no chat template"):
        tokenise(chats, model, samples=1, tokens_per_sample=4)


def test_a_list_that_is_no_conversation(model: Any, tmp_path: Path) -> None:
    (tmp_path / "odd.jsonl").write_text(json.dumps({"messages": ["hello"]}))
    with pytest.raises(SurroundingsError, match=r"row 1 of `.*` holds a list that is no conversation"):
        tokenise(str(tmp_path / "odd.jsonl"), model, samples=1, tokens_per_sample=4)


def test_several_data_sets_give_their_shares(model: Any, tmp_path: Path) -> None:
    for letter in "ab":
        (tmp_path / f"{letter}.jsonl").write_text(json.dumps({letter * 2: letter * 100, "text": letter * 100}))
    text = f"{tmp_path}/a.jsonl*3, {tmp_path}/b.jsonl"
    found = tokenise(text, model, samples=8, tokens_per_sample=10)
    letters = [chr(row[0] + 29) for row in found.ids.tolist()]
    assert letters == ["a"] * 6 + ["b"] * 2
    fields = [
        TextSource(dataset=f"{tmp_path}/a.jsonl", field="aa", samples=6),
        TextSource(dataset=f"{tmp_path}/b.jsonl", field="bb"),
    ]
    assert tokenise(fields, model, samples=8, tokens_per_sample=10).digest == found.digest
    with pytest.raises(SurroundingsError, match=r"asked for 15 samples of 10 tokens, `.*b.jsonl` gives 10"):
        tokenise(f"{tmp_path}/a.jsonl*.01, {tmp_path}/b.jsonl", model, samples=15, tokens_per_sample=10)
