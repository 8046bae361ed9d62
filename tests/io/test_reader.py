"""A folder as a checkpoint, and everything that can be wrong with a folder."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moecli.core.artifacts import Packed
from moecli.core.errors import SurroundingsError
from moecli.core.model import TensorSpec
from moecli.io.reader import FolderCheckpoint, digest, download_hint, stored
from tests.io.toys import CONFIG, make_folder, numbered, toy_facts

NAMES = ["layers.10.w", "layers.2.w", "embed", "norm"]
INDEX = "model.safetensors.index.json"


def test_single_file(tmp_path: Path) -> None:
    tensors = numbered(NAMES) | {"half": torch.ones(3).bfloat16()}
    ckpt = FolderCheckpoint(make_folder(tmp_path / "m", tensors), toy_facts)
    assert ckpt.names() == ("embed", "half", "layers.2.w", "layers.10.w", "norm")
    assert ckpt.spec("half") == TensorSpec("bfloat16", (3,))
    assert ckpt.get("half").dtype == torch.bfloat16
    assert ckpt.get("layers.2.w").tolist() == [[1, 1]] * 4
    assert ckpt.rows("norm", 1, 3).tolist() == [[3, 3]] * 2
    assert "embed" in ckpt and "lm_head" not in ckpt
    assert ckpt.facts.experts == 4
    assert ckpt.config == CONFIG
    assert ckpt.origin("norm") == ("source", "norm")
    assert [path.name for path in ckpt.files] == ["model.safetensors"]
    with pytest.raises(KeyError, match=r"has no tensor `lm_head`"):
        ckpt.get("lm_head")


def test_shards(tmp_path: Path) -> None:
    shards = [numbered(["b", "a"]), numbered(["layers.10.w", "c"])]
    ckpt = FolderCheckpoint(make_folder(tmp_path / "m", shards), toy_facts)
    assert ckpt.names() == ("a", "b", "c", "layers.10.w")
    assert ckpt.get("c").tolist() == [[1, 1]] * 4
    assert ckpt.file_of("c") == ckpt.files[1]
    assert set(ckpt.names_in(ckpt.files[0])) == {"a", "b"}


def test_single_file_counts_before_an_index_as_in_transformers(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", [numbered(["a"]), numbered(["b"])])
    save_file(numbered(["only"]), folder / "model.safetensors")
    assert FolderCheckpoint(folder, toy_facts).names() == ("only",)


def test_index_decides_between_copies_and_unlisted_tensors_count(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", [{"a": torch.zeros(1)}, {"a": torch.ones(1), "b": torch.ones(1)}])
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / INDEX).write_text(json.dumps(index))
    assert FolderCheckpoint(folder, toy_facts).get("a").item() == 0
    save_file({"b": torch.ones(1), "c": torch.ones(1)}, folder / "model-00002-of-00002.safetensors")
    assert FolderCheckpoint(folder, toy_facts).names() == ("a", "b", "c")


def test_reads_from_several_threads(tmp_path: Path) -> None:
    ckpt = FolderCheckpoint(make_folder(tmp_path / "m", numbered([f"t{i}" for i in range(40)])), toy_facts)
    wrong: list[str] = []

    def read() -> None:
        wrong.extend(name for name in ckpt.names() if ckpt.get(name)[0, 0].item() != float(name[1:]))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_side_files(tmp_path: Path) -> None:
    kept = [
        "LICENSE", "added_tokens.json", "chat_template.jinja", "generation_config.json", "merges.txt",
        "modeling_x.py", "special_tokens_map.json", "tokenizer.json", "tokenizer.model",
        "tokenizer_config.json", "vocab.json",
    ]  # fmt: skip
    left = ["README.md", "training_args.bin", "notes.txt", "optimizer.pt"]
    folder = make_folder(tmp_path / "m", numbered(["a"]), side_files=dict.fromkeys(kept + left, "x"))
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("x")
    found = FolderCheckpoint(folder, toy_facts).side_files()
    assert list(found) == sorted([*kept, "additional_chat_templates/rag.jinja"])
    assert all(Path(path).read_text() == "x" for path in found.values())


def test_names_and_digest_need_no_torch(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", numbered(NAMES))
    program = (
        "import sys; from moecli.io.reader import FolderCheckpoint, digest;"
        f"c = FolderCheckpoint({str(folder)!r}, lambda config: None);"
        f"print(len(c.names()), digest({str(folder)!r}));"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "4"


def test_a_checkpoint_is_not_packed(tmp_path: Path) -> None:
    ckpt = FolderCheckpoint(make_folder(tmp_path / "m", numbered(["a"])), toy_facts)
    with pytest.raises(TypeError, match="passed on as its folder"):
        ckpt.pack()
    with pytest.raises(TypeError, match="opened from its folder"):
        FolderCheckpoint.unpack(Packed({}, {}))
    assert stored(ckpt) is ckpt
    with pytest.raises(TypeError, match="expected a checkpoint that lives in folders, got str"):
        stored("model")  # type: ignore[arg-type]


class TestDigest:
    def test_same_content_elsewhere_is_the_same_model(self, tmp_path: Path) -> None:
        one = make_folder(tmp_path / "one", [numbered(["a"]), numbered(["b"])])
        two = make_folder(tmp_path / "two", [numbered(["a"]), numbered(["b"])])
        (two / "README.md").write_text("other")
        assert digest(one) == digest(two)
        assert len(digest(one)) == 64

    def test_config_and_shapes_count(self, tmp_path: Path) -> None:
        one = make_folder(tmp_path / "one", numbered(["a"]))
        wider = make_folder(tmp_path / "two", numbered(["a"], (4, 3)))
        other = make_folder(tmp_path / "three", numbered(["a"]), config=CONFIG | {"num_experts": 5})
        assert len({digest(one), digest(wider), digest(other)}) == 3

    def test_another_tokenizer_is_another_model(self, tmp_path: Path) -> None:
        folder = make_folder(tmp_path / "one", numbered(["a"]))
        found = {digest(folder)}
        for name in ("tokenizer.json", "vocab.json", "chat_template.jinja"):
            (folder / name).write_text("{}")
            found.add(digest(folder))
        (folder / "tokenizer.json").write_text("{ }")
        assert len(found | {digest(folder)}) == 5
        (folder / "LICENSE").write_text("none")
        assert len(found | {digest(folder)}) == 5

    def test_weights_that_were_trained_further_are_another_model(self, tmp_path: Path) -> None:
        one = make_folder(tmp_path / "one", {"a": torch.zeros(4), "b": torch.zeros(0)})
        two = make_folder(tmp_path / "two", {"a": torch.ones(4), "b": torch.zeros(0)})
        assert digest(one) != digest(two)

    def test_places_lie_in_the_middle_of_tensors_all_over_a_file(self, tmp_path: Path) -> None:
        """Of 1,000 tensors each third, of a large one the middle."""
        plain = {f"t{i:04}": torch.zeros(4096) for i in range(1000)}
        found = {digest(make_folder(tmp_path / "plain", plain))}
        for name in ("t0000", "t0501", "t0999"):
            changed = plain | {name: torch.zeros(4096).index_fill(0, torch.tensor(2048), 1)}
            found.add(digest(make_folder(tmp_path / name, changed)))
        assert len(found) == 4
        edge = plain | {"t0000": torch.zeros(4096).index_fill(0, torch.tensor(0), 1)}
        assert digest(make_folder(tmp_path / "edge", edge)) in found  # between the places


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def with_text(name: str, text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_text(text)

    return write


def with_index(**weight_map: str) -> Callable[[Path], None]:
    return with_text(INDEX, json.dumps({"weight_map": weight_map}))


def cut(name: str) -> Callable[[Path], None]:
    def shorten(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:-1])

    return shorten


def only(*names: str) -> Callable[[Path], None]:
    def replace(folder: Path) -> None:
        for path in folder.glob("model*"):
            path.unlink()
        for name in names:
            (folder / name).write_text("x")

    return replace


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("config.json"), r"`{0}/config\.json` is missing"),
        (with_text("config.json", "{"), r"`{0}/config\.json` is not JSON: Expecting property name"),
        (with_text("config.json", "[]"), r"`{0}/config\.json` holds no JSON object"),
        (without(TWO), rf"`{{0}}/{TWO}` is missing"),
        (cut(ONE), rf"`{{0}}/{ONE}` is cut short: it needs \d+ bytes, the file has \d+"),
        (with_text(INDEX, "{}"), r"`{0}/model\.safetensors\.index\.json` has no `weight_map`"),
        (with_text(INDEX, "x"), r"`{0}/model\.safetensors\.index\.json` is not JSON"),
        (with_index(a="../a"), r"names `\.\./a`, which is no file beside it"),
        (with_index(a=ONE, x=TWO), r"index\.json` names `x`, which is in no shard"),
        (with_index(a=ONE, b=ONE, c=TWO), rf"index\.json` puts `b` in `{ONE}`, it is in `{TWO}`"),
        (with_index(a=ONE, c=TWO), rf"`shared` is in `{ONE}` and `{TWO}`, and `{{0}}/{INDEX}` does not"),
        (without(INDEX), rf"has neither `model\.safetensors` nor `{INDEX}`, only `{ONE}` and 1 more"),
        (only(), r"`{0}` holds no safetensors weights"),
        (only("pytorch_model.bin"), r"holds only pickled weights \(`pytorch_model\.bin`\); moecli reads"),
        (only("model.pt"), r"holds only pickled weights \(`model\.pt`\)"),
    ],
)  # fmt: skip
def test_damaged_folder(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    shards = [numbered(["a", "shared"]), numbered(["b", "c", "shared"])]
    folder = make_folder(tmp_path / "m", shards)
    damage(folder)
    with pytest.raises(SurroundingsError, match=message.replace("{0}", str(folder))):
        FolderCheckpoint(folder, toy_facts)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(SurroundingsError, match=rf"the model folder `{tmp_path}/m` does not exist"):
        FolderCheckpoint(tmp_path / "m", toy_facts)


def test_pickle_hint_can_be_typed(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", numbered(["a"]))
    only("pytorch_model.bin")(folder)
    with pytest.raises(SurroundingsError, match="pickled") as caught:
        FolderCheckpoint(folder, toy_facts)
    assert caught.value.hint is not None
    program = caught.value.hint.split('"')[1]
    compile(program, "hint", "exec")
    assert f"save_pretrained('{folder}-safetensors')" in program


def test_hub_cache_hint(tmp_path: Path) -> None:
    folder = tmp_path / "models--Qwen--Qwen3-30B-A3B" / "snapshots" / "0123abcd"
    make_folder(folder, [numbered(["a"]), numbered(["b"])])
    (folder / TWO).unlink()
    with pytest.raises(SurroundingsError, match="is missing") as caught:
        FolderCheckpoint(folder, toy_facts)
    assert caught.value.hint == f"`hf download Qwen/Qwen3-30B-A3B {TWO} --revision 0123abcd`"
    assert download_hint(tmp_path) is None
