"""Bad input through the real command: one clear error, exit code 2 or 3, nothing half-written.

Each case is a damage to a folder that would run, what stderr then says as a whole, and which paths are new. The suite
may run as root, who may write anywhere: a file in the place of the folder stands for a folder that is not writable.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from moecli.cli import app, main
from moecli.io.durable import sync_tree
from moecli.runner import verify
from tests.runner.small_runs import EVALUATED, RECIPE, TASK, digests, furnish, listing

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch
INDEX = Path("toy/model.safetensors.index.json")
DIFFERENT = "hint: config.json and the weights are of different models"
STARTED = {"runs/", "runs/r/", "runs/r/lock", "runs/r/recipe.yaml", "runs/r/events.jsonl", "runs/r/stages/"}
"""What a run leaves that stopped in its first stage, besides that stage's `.partial` folder."""


@pytest.fixture
def here(tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: Patch) -> Path:
    """A folder in which `moecli run r.yaml` works; the current one."""
    folder = tmp_path / "here"
    folder.mkdir()
    furnish(folder, tiny_model("qwen3_moe", shards=3))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return folder


@pytest.fixture(scope="module")
def finished(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same after a whole run."""
    folder = tmp_path_factory.mktemp("finished")
    furnish(folder, tiny_model("qwen3_moe", shards=3))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main.run(["run", "r.yaml", "--quiet"]) == 0
    return folder


@pytest.fixture
def again(finished: Path, tmp_path: Path, monkeypatch: Patch) -> Path:
    """A copy of the finished folder; the current one."""
    shutil.copytree(finished, tmp_path / "again")
    monkeypatch.chdir(tmp_path / "again")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / "again"


@pytest.fixture
def unverified(monkeypatch: Patch) -> None:
    """Exports count as verified: loading each in a fresh process takes seconds, and other tests are about that."""
    monkeypatch.setattr(verify, "verify", lambda *args, **options: verify.Verification(()))


def said(capsys: Capture) -> str:
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    return err.rstrip("\n")


# -- damages


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def config(**values: Any) -> Callable[[], None]:
    return lambda: edit(Path("toy/config.json"), **values)


def shard(number: int = 0) -> Path:
    return sorted(Path("toy").glob("*.safetensors"))[number]


def cut_short() -> None:
    path = shard()
    path.write_bytes(path.read_bytes()[:-100])


def an_absent_tensor() -> None:
    places = json.loads(INDEX.read_text())["weight_map"]
    edit(INDEX, weight_map=places | {"model.layers.7.mlp.gate.weight": shard().name})


def only_pickles() -> None:
    for path in [*Path("toy").glob("*.safetensors"), INDEX]:
        path.unlink()
    torch.save({}, "toy/pytorch_model.bin")


def without_tokenizer() -> None:
    for path in Path("toy").glob("*token*"):
        path.unlink()


def write(path: str, text: str | bytes) -> Callable[[], None]:
    def damage() -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(text.encode() if isinstance(text, str) else text)

    return damage


def folder_at(path: str) -> Callable[[], None]:
    return lambda: Path(path).mkdir(parents=True)


def recipe(stages: str) -> Callable[[], None]:
    return write("r.yaml", RECIPE + stages)


def both(*damages: Callable[[], None]) -> Callable[[], None]:
    return lambda: [damage() for damage in damages] and None


class Case(NamedTuple):
    name: str
    damage: Callable[[], None]
    code: int
    error: str
    """All of stderr."""
    new: set[str] = set()  # noqa: RUF012
    """Paths that are new; KEY stands for a key."""


CASES = [
    Case("missing shard", lambda: shard(1).unlink(), 3, "error: `toy/model-00002-of-00004.safetensors` is missing"),
    Case(
        "truncated safetensors", cut_short, 3,
        "error: `toy/model-00001-of-00004.safetensors` is cut short: it needs 132512 bytes, the file has 132412",
    ),
    Case(
        "empty shard", lambda: shard().write_bytes(b"") and None, 3,
        "error: `toy/model-00001-of-00004.safetensors` is not a safetensors file",
    ),
    Case(
        "absent tensor", an_absent_tensor, 3,
        "error: `toy/model.safetensors.index.json` names `model.layers.7.mlp.gate.weight`, which is in no shard",
    ),
    Case(
        "unknown model type", config(model_type="qwen3_moee"), 3,
        "error: model type `qwen3_moee` is not among the supported MoE families\n"
        "hint: the nearest are `qwen3_moe`, `qwen2_moe`, `qwen3_next`",
    ),
    Case(
        "pickled weights only", only_pickles, 3,
        "error: `toy` holds only pickled weights (`pytorch_model.bin`); moecli reads safetensors\n"
        'hint: `python -c "from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained('
        "'toy', use_safetensors=False).save_pretrained('toy-safetensors')\"` converts them",
    ),
    Case(
        "too many experts in the config", config(num_local_experts=16), 3,
        f"error: config.json says 16 experts, the checkpoint has 8 (and 51 more) (layer 0)\n{DIFFERENT}",
    ),
    Case(
        "too few experts in the config", config(num_local_experts=4), 3,
        "error: `model.layers.0.mlp.experts.4.gate_proj.weight` exists: config.json says 4 experts, "
        f"the checkpoint has 8 (and 3 more) (layer 0)\n{DIFFERENT}",
    ),
    Case(
        "another width", config(moe_intermediate_size=48), 3,
        "error: `model.layers.0.mlp.experts.0.gate_proj.weight` has shape [32, 64], config.json asks for [48, 64] "
        f"(and 47 more) (layer 0)\n{DIFFERENT}",
    ),
    Case(
        "a number in words", config(num_local_experts="eight"), 3,
        "error: `num_local_experts` in config.json must be a whole number, got `eight` (qwen3_moe)",
    ),
    Case("config is a folder", both(lambda: Path("toy/config.json").unlink(), folder_at("toy/config.json")), 3,
         "error: `toy/config.json` cannot be read: is a directory"),
    *(
        Case(f"config with a wrong {key}", config(**{key: value}), 3,
             f"error: `{key}` in config.json must be {wanted}, got `{value}` (qwen3_moe)")
        for key, value, wanted in [
            ("dtype", "float64x", "the name of a dtype"),
            ("quantization_config", 3, "a mapping"),
            ("moecli_experts", 3, "a mapping"),
            ("num_experts_per_tok", 0, "at least 1"),
            ("decoder_sparse_step", 0, "at least 1"),
        ]
    ),
    Case("no layer with experts", config(num_hidden_layers=0), 3,
         "error: config.json gives no layer any experts (qwen3_moe)"),
    Case("config is a list", write("toy/config.json", "[1]"), 3, "error: `toy/config.json` holds no JSON object"),
    Case("no model folder", lambda: shutil.rmtree("toy"), 3,
         "error: there is no model folder `toy`, and it is no hub id (`organisation/name`)"),
    Case(
        "recipe in Latin-1", write("r.yaml", b"recipe: 1\nmodel: caf\xe9\n"), 2,
        "error: the file is not UTF-8: byte 0xE9 at offset 20\n  --> r.yaml:2:11\n   |\n 2 | model: caf\ufffd\n"
        "   |           ^\nhint: it looks like Latin-1; `iconv -f LATIN1 -t UTF-8 r.yaml` prints it as UTF-8\n\n"
        "1 problem in r.yaml; nothing was run",
    ),
    Case("recipe is a folder", both(lambda: Path("r.yaml").unlink(), folder_at("r.yaml")), 2,
         "error: `r.yaml` is a folder, not a recipe"),
    Case("runs is a file", write("runs", ""), 3, "error: `runs/r` cannot be a folder: a file is in the way"),
    Case("the run folder is a file", write("runs/r", ""), 3,
         "error: `runs/r` cannot be a folder: a file is in the way"),
    Case("the lock is a folder", folder_at("runs/r/lock"), 3,
         "error: cannot write to `runs/r`: a folder is in the way (`runs/r/lock`)"),
    Case("the run's recipe is a folder", folder_at("runs/r/recipe.yaml"), 3,
         "error: cannot write to `runs/r`: a folder is in the way (`runs/r/recipe.yaml`)", {"runs/r/lock"}),
    Case("no tokenizer", without_tokenizer, 3,
         "error: the model has no tokenizer: none of `tokenizer.json`, `tokenizer.model`, `vocab.json`, "
         "`tokenizer_config.json` is beside its weights",
         STARTED | {"runs/r/stages/calibrate-statistics/", "runs/r/stages/calibrate-statistics/KEY.partial/"}),
    Case("damaged tokenizer", write("toy/tokenizer.json", "{"), 3,
         "error: the tokenizer in `toy` cannot be loaded: Expecting property name enclosed in double quotes: "
         "line 1 column 2 (char 1)",
         STARTED | {"runs/r/stages/calibrate-statistics/", "runs/r/stages/calibrate-statistics/KEY.partial/"}),
    Case("no such lm-eval task", recipe(TASK.replace("pets", "petts")), 3,
         "error: lm-eval knows no task `petts` in `data`\nhint: did you mean `pets`?"),
    Case("no folder with tasks", recipe(TASK.replace("data", "dota")), 3,
         "error: there is no folder `dota` with lm-eval tasks"),
    Case("a task without its data", both(recipe(TASK), lambda: Path("data/pets.jsonl").unlink()), 3,
         "error: lm-eval cannot load the task `pets`: Unable to find 'HERE/data/pets.jsonl'"),
    Case("a task that names no data", both(recipe(TASK), write("data/pets.yaml", "task: pets\n")), 3,
         "error: lm-eval cannot load the task `pets`: "
         "expected str, bytes or os.PathLike object, not NoneType"),
    Case("no text to evaluate", both(write("r.yaml", EVALUATED), lambda: Path("data/test.jsonl").unlink()), 3,
         "error: the data set `data/test.jsonl` does not exist"),
]  # fmt: skip


def keyless(paths: set[str]) -> set[str]:
    return {re.sub(r"/[0-9a-f]{16}\b", "/KEY", path) for path in paths}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_bad_input(case: Case, here: Path, tmp_path: Path, capsys: Capture) -> None:
    case.damage()
    before, beside = listing(here), listing(tmp_path) - {f"here/{path}" for path in listing(here)}
    assert main.run(["run", "r.yaml", "--quiet"]) == case.code
    assert said(capsys) == case.error.replace("HERE", str(here))
    assert keyless(listing(here) - before) == case.new
    assert before <= listing(here)
    assert listing(tmp_path) - {f"here/{path}" for path in listing(here)} == beside, "no log, no temporary file"


TEXTS = [
    ("missing", None, "the data set `data/text.jsonl` does not exist"),
    ("without text", '{"txt": "abc"}\n', "`data/text.jsonl` has no field `text`; it has `txt`"),
    ("no JSON", '{"text": "abc"\n', "`data/text.jsonl` cannot be read: Expecting ',' delimiter"),
    ("no UTF-8", b"\xff\xfe\x00\n", "`data/text.jsonl` cannot be read: 'utf-8' codec can't decode byte 0xff"),
    ("empty", "", "`data/text.jsonl` holds no text"),
    ("too short", '{"text": "abc"}\n', "asked for 6 samples of 32 tokens, the text gives 0"),
]


@pytest.mark.parametrize(("text", "error"), [t[1:] for t in TEXTS], ids=[t[0].replace(" ", "-") for t in TEXTS])
def test_calibration_text(text: str | bytes | None, error: str, here: Path, capsys: Capture) -> None:
    """Its words belong to the engine's tests; here: the first of them, and what is left behind."""
    Path("data/text.jsonl").unlink() if text is None else write("data/text.jsonl", text)()
    before = listing(here)
    assert main.run(["run", "r.yaml", "--quiet"]) == 3
    assert said(capsys).startswith(f"error: {error}")
    new = keyless(listing(here) - before)
    assert all(path in STARTED or "calibrate-statistics" in path for path in new)
    assert not any(re.search(r"KEY/", path) for path in new), "a stage that failed has no folder without a suffix"


def test_a_second_run_at_the_same_time(here: Path, capsys: Capture) -> None:
    Path("runs/r").mkdir(parents=True)
    with Path("runs/r/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("pid 17 on elsewhere\n")
        lock.flush()
        before = listing(here)
        assert main.run(["run", "r.yaml", "--quiet"]) == 3
        assert said(capsys) == (
            "error: another run (pid 17 on elsewhere) holds `runs/r`\nhint: `moecli status runs/r` shows how far it is"
        )
        assert listing(here) == before
        assert Path("runs/r/lock").read_text() == "pid 17 on elsewhere\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu(here: Path, capsys: Capture) -> None:
    before = listing(here)
    assert main.run(["run", "r.yaml", "--quiet", "--device", "cuda"]) == 3
    assert said(capsys) == (
        "error: there is no CUDA device\nhint: `--device cpu`, or `moecli doctor` for what is there"
    )
    assert listing(here) == before


def test_lm_eval_is_not_installed(here: Path, capsys: Capture, monkeypatch: Patch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "lm_eval" else find(name, *more)
    )
    recipe(TASK)()
    before = listing(here)
    assert main.run(["run", "r.yaml", "--quiet"]) == 3
    assert said(capsys) == "error: lm-eval is not installed\nhint: `pip install 'moecli[eval]'`"
    assert listing(here) == before


@pytest.mark.parametrize(
    ("what", "error"),
    [
        ("toy", "the model folder `toy` does not exist"),
        ("toy/model-00001-of-00004.safetensors",
         "`toy/model-00001-of-00004.safetensors` cannot be read: No such file or directory"),
    ],
)  # fmt: skip
def test_the_model_goes_away_after_the_plan(
    what: str, error: str, here: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    def device(asked: str | None) -> tuple[str, str]:
        shutil.rmtree(what) if Path(what).is_dir() else Path(what).unlink()
        return "cpu", "as asked"

    monkeypatch.setattr(app, "_device", device)
    assert main.run(["run", "r.yaml", "--quiet"]) == 3
    assert said(capsys) == f"error: {error}"
    assert not Path("runs/r/model").exists()
    assert {path.suffix for path in Path("runs/r/stages").glob("*/*")} == {".partial"}


# -- a full disk


class FullDisk:
    """fsync of any file whose path matches fails as on a full disk, as delayed allocation makes it do."""

    def __init__(self, patch: Patch) -> None:
        self._patch = patch
        self.wanted: str | None = None
        self._fsync = os.fsync
        patch.setattr(os, "fsync", self._sync)

    def _sync(self, number: int) -> None:
        if self.wanted is not None and re.search(self.wanted, str(Path(f"/proc/self/fd/{number}").readlink())):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._fsync(number)


@pytest.fixture
def full_disk(monkeypatch: Patch) -> Iterator[FullDisk]:
    yield FullDisk(monkeypatch)


@pytest.mark.parametrize(
    ("moment", "done"),
    [
        (r"/parts/.*\.safetensors", set()),
        (r"calibrate-statistics/.*/\.manifest\.json", set()),
        (r"prune-reap/.*/\.layer-001\.safetensors", {"calibrate-statistics"}),
        (r"prune-reap/.*/\.layer-001\.json", {"calibrate-statistics"}),
        (r"quantize-rtn/.*/\.overlay\.json", {"calibrate-statistics", "prune-reap"}),
        (r"r/model\.partial/\.model.*\.safetensors", {"calibrate-statistics", "prune-reap", "quantize-rtn"}),
        (r"r/model\.partial/\.config\.json", {"calibrate-statistics", "prune-reap", "quantize-rtn"}),
    ],
)
@pytest.mark.usefixtures("unverified")
def test_a_full_disk(
    moment: str, done: set[str], again: Path, finished: Path, full_disk: FullDisk, capsys: Capture
) -> None:
    """At any moment: one error, no `model/`, finished stages and no others; then, with space, the same bytes."""
    shutil.rmtree("runs")
    full_disk.wanted = moment
    assert main.run(["run", "r.yaml", "--quiet"]) == 3
    assert re.fullmatch(r"error: `runs/r/\S+` (needs \S+ GiB|has no space left), \S+ GiB free", said(capsys))
    assert not Path("runs/r/model").exists() and not Path("runs/r/model.partial").exists()
    assert {p.parent.name for p in Path("runs/r/stages").glob("*/*") if p.suffix == ""} == done
    assert not list(Path("runs").rglob(".*.tmp")), "what was being written gives its space back"
    full_disk.wanted = None
    if "model" in moment:  # one moment stands for all: a verification takes seconds
        assert main.run(["run", "r.yaml", "--quiet"]) == 0
        assert digests(again / "runs/r/model") == digests(finished / "runs/r/model")


@pytest.mark.parametrize("moment", [r"report/\.report\.(json|md|html)", r"r/\.manifest\.json", r"model/\.README\.md"])
def test_a_full_disk_at_the_end(moment: str, again: Path, full_disk: FullDisk, capsys: Capture) -> None:
    """The weights are complete; what is missing is written by the next run."""
    expected = digests(Path("runs/r/model"))
    for path in ("runs/r/report", "runs/r/manifest.json", "runs/r/model/README.md"):
        shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()
    full_disk.wanted = moment
    assert main.run(["run", "r.yaml", "--quiet"]) == 3
    assert re.fullmatch(r"error: `runs/r\S*` has no space left, \S+ GiB free", said(capsys))
    full_disk.wanted = None
    assert main.run(["run", "r.yaml", "--quiet"]) == 0
    assert digests(Path("runs/r/model")) == expected
    assert Path("runs/r/report/report.html").exists() and Path("runs/r/manifest.json").exists()


def test_a_disk_too_small_for_the_export(again: Path, capsys: Capture, monkeypatch: Patch) -> None:
    """Asked before a byte of `model/` is written; an older one stays."""
    expected = digests(Path("runs/r/model"))
    shutil.rmtree("runs/r/stages/export")
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert main.run(["run", "r.yaml", "--quiet"]) == 3
    assert re.fullmatch(r"error: `runs/r/model` needs \S+ GiB, 9.3e-07 GiB free", said(capsys))
    assert digests(Path("runs/r/model")) == expected
    assert not Path("runs/r/model.partial").exists()


# -- what a finished run left is damaged


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize(
    ("path", "damage", "stage"),
    [
        ("calibrate-statistics/*/artifact.safetensors", cut, "calibrate/statistics"),
        ("calibrate-statistics/*/artifact.json", Path.unlink, "calibrate/statistics"),
        ("calibrate-statistics/*/manifest.json", cut, "calibrate/statistics"),
        ("prune-reap/*/layer-001.safetensors", Path.unlink, "prune/reap"),
        ("prune-reap/*/overlay.json", cut, "prune/reap"),
        ("quantize-rtn/*/layer-000.json", cut, "quantize/rtn"),
        ("export/*/manifest.json", cut, "export"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("unverified")
def test_a_damaged_result(
    path: str, damage: Callable[[Path], Any], stage: str, again: Path, finished: Path, capsys: Capture
) -> None:
    """The message names the file and the line that makes it again; that line, typed, does."""
    (file,) = Path("runs/r/stages").glob(path)
    damage(file)
    assert main.run(["run", "r.yaml", "--quiet"]) == 3
    error, hint = said(capsys).split("\n")
    assert error.startswith(f"error: `{file}` ")
    typed = f"moecli run runs/r/recipe.yaml --run-dir runs/r --redo {stage}"
    assert hint == f"hint: `{typed}` makes it again"
    if stage == "export":
        assert main.run(typed.split()[1:]) == 0
    else:
        assert main.run([*typed.split()[1:], "--until", stage]) == 0
    assert digests(again / "runs/r/model") == digests(finished / "runs/r/model")


@pytest.mark.usefixtures("unverified")
def test_a_damaged_baseline(here: Path, capsys: Capture) -> None:
    """`--redo eval/perplexity` covers the evaluation of the source too."""
    Path("r.yaml").write_text(EVALUATED.replace("  - run: quantize/rtn\n    with: {group_size: 16}\n", ""))
    assert main.run(["run", "r.yaml", "--quiet"]) == 0
    for file in Path("runs/r/stages/eval-perplexity").glob("*/artifact.json"):
        cut(file)
    capsys.readouterr()
    assert main.run(["run", "r.yaml", "--quiet"]) == 3
    typed = said(capsys).partition("hint: `")[2].partition("`")[0]
    assert main.run(typed.split()[1:]) == 0


def test_sync_tree_reaches_every_file(tmp_path: Path, full_disk: FullDisk) -> None:
    """The full disk of these tests is one that the program really asks."""
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "file").touch()
    full_disk.wanted = "below/file"
    with pytest.raises(OSError, match="No space left"):
        sync_tree(tmp_path)


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("/proc/out", "`/proc/out` cannot be made"),
        ("x" * 300, f"file name too long (`{'x' * 300}`)"),
        ("/dev/null/out", "`/dev/null/out` cannot be a folder: a file is in the way"),
    ],
    ids=["proc", "long", "below-a-file"],
)
def test_a_run_folder_that_cannot_be(name: str, error: str, here: Path, capsys: Capture) -> None:
    before = listing(here)
    assert main.run(["run", "r.yaml", "--quiet", "--run-dir", name]) == 3
    assert said(capsys) == f"error: {error}"
    assert listing(here) == before
