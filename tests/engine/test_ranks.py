"""Several processes give what one gives, and when one of them stops there is one message and finished work is kept."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moecli.core.artifacts import CalibrationStats
from moecli.engine.collectors import CATALOGUE
from moecli.engine.ranks import ALONE, Ranks, _parcels
from moecli.engine.stats import collector_of, names_in
from moecli.io.store import RunFolder
from tests.runner.small_runs import PRELOADED, events

STATISTICS = list(CATALOGUE)
PADDED = {"dataset": "text.jsonl", "samples": 7, "tokens_per_sample": 24, "packing": "truncate", "batch_size": 2,
          "statistics": STATISTICS}  # fmt: skip


# -- without processes


@given(st.integers(0, 40), st.integers(1, 9))
def test_blocks_are_all_items_in_order(count, size):
    items = list(range(count))
    blocks = [list(Ranks(rank, size).split(items)) for rank in range(size)]
    assert [item for block in blocks for item in block] == items
    lengths = [len(block) for block in blocks]
    assert lengths == sorted(lengths, reverse=True)
    assert max(lengths) - min(lengths) <= 1


def test_alone_nothing_is_sent():
    total = torch.tensor([1.0])
    ALONE.combine([(total, "sum")])
    assert (ALONE.leads, ALONE.split([1, 2]), ALONE.told(lambda: 3), ALONE.gathered(4)) == (True, [1, 2], 3, [4])
    assert total.item() == 1


def test_small_tensors_of_a_kind_travel_together(monkeypatch):
    monkeypatch.setattr("moecli.engine.ranks.JOIN_BYTES", 100)
    a, b, c, large = torch.ones(2), torch.ones(3), torch.ones(2, dtype=torch.int64), torch.ones(50)
    parcels = list(_parcels([(a, "sum"), (large, "sum"), (b, "sum"), (c, "sum"), (b, "max")]))
    assert [(reduce, [len(t) for t in some]) for reduce, some in parcels] == [
        ("sum", [50]), ("sum", [2, 3]), ("sum", [2]), ("max", [3]),
    ]  # fmt: skip


# -- processes: forked from one that has imported everything, with the store that torchrun's agent would keep


class Processes:
    """`moecli` or a function in several processes that know of each other."""

    def __init__(self, folder: Path, size: int, work, *argv: str, code: str = "") -> None:
        self.store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=60))
        self._terminated = False
        self.said = [folder / f"said-{rank}.txt" for rank in range(size)]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.all = [
            context.Process(target=_child, args=(rank, size, self.store.port, str(folder), work, argv, code, str(said)))
            for rank, said in enumerate(self.said)
        ]
        for process in self.all:
            process.start()

    def ended(self) -> list[tuple[int, str]]:
        """Exit code and words of each; when one fails the others get SIGTERM, as torchrun does it."""
        until = time.monotonic() + 100
        while any(process.exitcode is None for process in self.all):
            assert time.monotonic() < until, [path.read_text() for path in self.said]
            if any(process.exitcode for process in self.all):
                self.terminate()
            time.sleep(0.02)
        return [(process.exitcode, said.read_text()) for process, said in zip(self.all, self.said, strict=True)]

    def terminate(self) -> None:
        """SIGTERM to all that still run, once."""
        if not self._terminated:
            self._terminated = True
            for process in self.all:
                if process.exitcode is None:
                    process.terminate()


def _child(rank, size, port, folder, work, argv, code, said):
    os.setsid()
    os.chdir(folder)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    with Path(said).open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    exec("from moecli.engine import ranks; ranks.SILENCE_S = 2.0\n" + code, {})
    from moecli.__main__ import main

    work(rank) if work else main(argv)
    sys.stdout.flush()
    os._exit(0)


def _exchange(rank):
    """What `Ranks` offers, checked in the process; a failure is the process's exit code."""
    from moecli.engine.ranks import current, joining

    with joining("cpu") as ranks:
        assert (ranks.rank, ranks.leads) == (rank, rank == 0)
        assert current() is ALONE, "outside of a stage that every rank runs"
        told = ranks.told(lambda: {"text": torch.arange(5), "by": ranks.rank})
        assert told["by"] == 0
        assert told["text"].tolist() == [0, 1, 2, 3, 4]
        mine = [item * item for item in ranks.split(range(7))]
        assert [square for some in ranks.gathered(mine) for square in some] == [item * item for item in range(7)]
        values = [_values(r) for r in range(ranks.size)]
        own = [(tensor.clone(), reduce) for tensor, reduce in values[rank]]
        ranks.combine(own)
        for index, (found, reduce) in enumerate(own):
            parts = torch.stack([value[index][0] for value in values])
            assert torch.equal(found, parts.amax(0) if reduce == "max" else parts.sum(0)), (index, reduce)


def _values(rank):
    """Whole numbers: their sums are exact in any order."""
    source = torch.Generator().manual_seed(rank)

    def some(*shape, dtype):
        return torch.randint(-50, 50, shape, generator=source).to(dtype)

    return [
        (some(3, dtype=torch.int64), "sum"), (some(2, 2, dtype=torch.float64), "sum"),
        (some(4, dtype=torch.float32), "max"), (some(0, dtype=torch.float64), "sum"),
        (some(4, 3, dtype=torch.float64).T, "sum"), (some(1 << 19, dtype=torch.float64)[:: 2], "sum"),
        (some(1 << 22, dtype=torch.float64), "sum"),
    ]  # fmt: skip


@pytest.mark.parametrize("size", [2, 3])
def test_what_ranks_exchange(size, tmp_path):
    assert Processes(tmp_path, size, _exchange).ended() == [(0, "")] * size


def _shared_reading(rank):
    """Each rank reads a block of every layer; the layers are those of one reader, bit for bit."""
    from moecli.engine import loader
    from moecli.engine.ranks import joining
    from moecli.families import adapter
    from tests.engine.memory import open_folder

    loader.SPAN_BYTES = 2048  # many spans
    source = open_folder(Path("model").read_text())
    model = adapter.empty_model(source.config)
    names = adapter.tensor_map(model, source)
    with joining("cpu") as ranks:
        alone, sharing = (loader.Loader(model, source, names, torch.device("cpu"), ahead=False) for _ in range(2))
        sharing._staging, sharing._ranks = loader.Staging(torch.device("cpu")), ranks
        asked, span = [], sharing._staging._span
        sharing._staging._span = lambda pieces: (asked.append(len(pieces)), span(pieces))
        for layer in names.layers:
            wanted = {name: tensor.clone() for name, tensor in alone.load(layer).named_parameters()}
            alone.free(layer)
            for name, tensor in sharing.load(layer).named_parameters():
                assert torch.equal(tensor.view(torch.int16), wanted[name].view(torch.int16)), name
            sharing.free(layer)
        sharing.close()
        assert 0 < len(asked) < sum(ranks.gathered(len(asked))), "nobody reads all"


def test_a_layer_is_read_once_between_ranks(tiny_model, tmp_path):
    (tmp_path / "model").write_text(str(tiny_model("qwen3_moe", dtype="bfloat16")))
    assert Processes(tmp_path, 3, _shared_reading).ended() == [(0, "")] * 3


# -- a run in several processes


@pytest.fixture(scope="module")
def ready(tiny_model, tmp_path_factory):
    """A folder with a text of uneven documents and a recipe."""
    folder = tmp_path_factory.mktemp("ranks")
    source = random.Random(0)
    rows = ["".join(source.choice("abcdefgh ") for _ in range(source.randint(4, 40))) for _ in range(12)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    recipe(folder, tiny_model("qwen3_moe"), PADDED)
    return folder


def recipe(folder, model, options):
    stages = [{"run": "calibrate/statistics", "with": options}]
    (folder / "r.yaml").write_text(json.dumps({"recipe": 1, "model": str(model), "stages": stages}))


def of_run(folder) -> CalibrationStats:
    (stage,) = [s for s in RunFolder(folder, create=False).stages() if s.complete]
    return stage.load(CalibrationStats)


def run(folder, size, name, code=""):
    """Exit code and words of every process of a run in `folder/name`."""
    return Processes(folder, size, None, "run", "r.yaml", "--run-dir", name, "--device", "cpu", code=code).ended()


@pytest.fixture(scope="module")
def single(ready):
    ((code, said),) = run(ready, 1, "single")
    assert code == 0, said
    return of_run(ready / "single")


@pytest.mark.parametrize("size", [2, 3])
def test_statistics_are_those_of_one_process(size, ready, single):
    name = f"of-{size}"
    results = run(ready, size, name)
    assert [code for code, _ in results] == [0] * size, results
    assert f"{size} processes" in results[0][1]
    assert [said for _, said in results[1:]] == [""] * (size - 1), "only the first one speaks"
    found = of_run(ready / name)
    assert found.source == single.source
    assert torch.equal(found.text.ids, single.text.ids)
    for layer, expected in single.items():
        assert found[layer].tokens == expected.tokens
        assert names_in(found[layer]) == names_in(expected)
        for statistic in names_in(expected):
            a, b = found[layer][statistic], expected[statistic]
            if not a.is_floating_point() or collector_of(statistic).reduce != "sum":
                assert torch.equal(a, b), statistic
            else:
                rounding = 1e-12 if a.dtype == torch.float64 else 1e-6
                assert float((a - b).norm()) <= rounding * float(b.norm()), statistic
    kinds = [event["event"] for event in events(ready / name)]
    assert kinds.count("stage_started") == kinds.count("stage_finished") == kinds.count("run_finished") == 1


def test_more_processes_than_samples(tiny_model, tmp_path):
    """One of them sees no text; samples keep their dtype, bfloat16."""
    rows = "".join(json.dumps({"text": f"text {i} of a few"}) + "\n" for i in range(9))
    (tmp_path / "text.jsonl").write_text(rows)
    recipe(tmp_path, tiny_model("qwen3_moe", dtype="bfloat16"), PADDED | {"samples": 2})
    for size in (1, 3):
        results = run(tmp_path, size, f"of-{size}")
        assert [code for code, _ in results] == [0] * size, results
    one, three = of_run(tmp_path / "of-1"), of_run(tmp_path / "of-3")
    for layer, expected in one.items():
        assert three[layer].tokens == expected.tokens
        assert int(three[layer].count_E.sum()) == int(expected.count_E.sum())
        for statistic in names_in(expected):
            a, b = three[layer][statistic], expected[statistic]
            assert (a.shape, a.dtype) == (b.shape, b.dtype), statistic
        assert torch.equal(three[layer]["tok_reservoir_key"], expected["tok_reservoir_key"])


# -- when one of them stops

AT_LAYER_1 = """
import os
from moecli.engine.sweep import SweptLayer
observe = SweptLayer.observe
def stop(layer, *rest):
    if layer.index == 1 and os.environ["RANK"] == "{rank}":
        {what}
    return observe(layer, *rest)
SweptLayer.observe = stop
"""
KILLED = "os.kill(os.getpid(), 9)"
NO_MEMORY = 'raise RuntimeError("[enforce fail] DefaultCPUAllocator: can\'t allocate memory: you tried")'
BUG = 'raise ValueError("of a kind")'
DISK_FULL = "from moecli.io.durable import disk_full; raise disk_full(__import__('pathlib').Path('.'), None)"


def stopped(folder, name, rank, what, size=2):
    return run(folder, size, name, AT_LAYER_1.format(rank=rank, what=what))


@pytest.mark.parametrize(("rank", "speaker", "rest"), [(1, 0, 3), (0, 1, 1)])
def test_a_killed_rank_is_named_and_any_number_goes_on(rank, speaker, rest, ready, single):
    name = f"killed-{rank}"
    results = stopped(ready, name, rank, KILLED, size=3)
    codes, said = [code for code, _ in results], [words for _, words in results]
    assert codes[rank] == -signal.SIGKILL
    assert codes[speaker] == 3
    assert f"error: rank {rank} (pid " in said[speaker]
    assert " of 3 does not answer: killed, or the machine is out of memory\n" in said[speaker]
    assert "hint: finished parts are saved, the same command goes on from there" in said[speaker]
    assert [words for other, words in enumerate(said) if other not in (0, speaker)] == [""] * (2 if speaker == 0 else 1)
    parts = {path.name[:-37] for path in (ready / name / "parts").glob("statistic-*.json")}
    assert {part[-4:] for part in parts} == {"000-"}, "layer 0 is there, layer 1 is not"
    again = run(ready, rest, name)
    assert [code for code, _ in again] == [0] * rest, again
    found = of_run(ready / name)
    for layer, expected in single.items():
        assert torch.equal(found[layer].count_E, expected.count_E)
        assert torch.allclose(found[layer]["gean_sum"], expected["gean_sum"], rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("rank", "what", "code", "message"),
    [
        (1, NO_MEMORY, 3, "error: rank 1 of 2: calibrate/statistics ran out of memory\n"),
        (0, NO_MEMORY, 3, "error: calibrate/statistics ran out of memory\n"),
        (0, DISK_FULL, 3, "error: `.` has no space left, "),
    ],
)
def test_a_rank_that_fails_is_heard_once(rank, what, code, message, ready):
    (first, said), (other, silent) = stopped(ready, f"failed-{rank}-{len(what)}", rank, what)
    assert (first, other) == (code, 1)
    assert said.count("error:") == 1
    assert message in said
    assert silent == ""


def test_a_bug_keeps_its_trace(ready):
    (first, said), (other, silent) = stopped(ready, "bug", 1, BUG)
    assert (first, other) == (70, 1)
    assert "rank 1 of 2: ValueError: of a kind; this is a bug in moecli, the whole trace is in " in said
    log = Path(said.split(" is in ")[1].strip())
    assert "in stop\nValueError: of a kind\n" in log.read_text()
    log.unlink()
    assert silent == ""


def test_stopped_from_outside(ready):
    code = AT_LAYER_1.format(rank=1, what="open('reached', 'w'); __import__('time').sleep(60)")
    processes = Processes(ready, 2, None, "run", "r.yaml", "--run-dir", "outside", "--device", "cpu", code=code)
    until = time.monotonic() + 60
    while not (ready / "reached").exists():
        assert time.monotonic() < until
        time.sleep(0.01)
    processes.terminate()
    (first, said), (other, silent) = processes.ended()
    assert (first, other) == (143, 1)
    assert said.endswith("terminated; finished parts are kept, the same command goes on from there\n")
    assert silent == ""


def test_a_broken_recipe_is_said_once(ready, tmp_path):
    (tmp_path / "r.yaml").write_text("recipe: 1\nmodel: nowhere\nstages: [{run: calibrate/statistic}]\n")
    (first, said), (other, silent) = run(tmp_path, 2, "broken")
    assert (first, other) == (2, 1)
    assert "unknown stage `calibrate/statistic`" in said
    assert "1 problem in r.yaml; nothing was run" in said
    assert silent == ""
