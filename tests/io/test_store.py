"""Run folders: locks, stages, parts, events, and what a crash leaves of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moecli.core.artifacts import CalibrationStats, Evaluation, LayerStats, Metric
from moecli.core.errors import SurroundingsError
from moecli.io.durable import file_safe, gib, natural_key
from moecli.io.store import RunFolder, StageFolder, redo_hint

KEY = "0123456789abcdef" * 4


def stats(tokens: int = 5) -> CalibrationStats:
    extra = {"output_mean": torch.tensor([[0.1, float("inf")]], dtype=torch.float64)}
    layer = LayerStats(tokens, torch.tensor([2**40, 3]), torch.tensor([1 / 3, 0.5], dtype=torch.float64), extra)
    return CalibrationStats({3: layer}, source={"samples": 8})


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "runs" / "x")


@pytest.fixture
def stage(run: RunFolder) -> StageFolder:
    return run.stage("calibrate/statistics", KEY)


class TestLock:
    def test_second_run_is_told_who_holds_it(self, run: RunFolder) -> None:
        program = (
            "import sys; from moecli.io.store import RunFolder\n"
            f"with RunFolder({str(run.path)!r}).lock(): print('held', flush=True); sys.stdin.readline()"
        )
        holder = subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        with holder:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            message = rf"another run \(pid {holder.pid} on \S+\) holds `{run.path}`"
            with pytest.raises(SurroundingsError, match=message) as caught, run.lock():
                pass
            assert caught.value.hint == f"`moecli status {run.path}` shows how far it is"
            holder.send_signal(signal.SIGKILL)
            holder.wait()
        assert f"pid {holder.pid} " in (run.path / "lock").read_text()
        with run.lock():
            assert (run.path / "lock").read_text().startswith(f"pid {os.getpid()} on ")

    def test_is_freed_by_an_exception(self, run: RunFolder) -> None:
        with pytest.raises(RuntimeError, match="boom"), run.lock():
            raise RuntimeError("boom")
        with run.lock(), pytest.raises(SurroundingsError, match="another run"), run.lock():
            pass


class TestRunFolder:
    def test_a_file_in_the_way(self, tmp_path: Path) -> None:
        (tmp_path / "runs").write_text("x")
        with pytest.raises(SurroundingsError, match=r"runs/x` cannot be a folder: a file is in the way"):
            RunFolder(tmp_path / "runs" / "x")

    def test_unwritable(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "access", lambda path, mode: False)
        with pytest.raises(SurroundingsError, match=r"cannot write to `.*/x`: permission denied"):
            RunFolder(tmp_path / "x")

    def test_readers_do_not_make_it(self, tmp_path: Path) -> None:
        with pytest.raises(SurroundingsError, match=r"there is no run in `.*/nothing`"):
            RunFolder(tmp_path / "nothing", create=False)
        assert not (tmp_path / "nothing").exists()

    def test_text(self, run: RunFolder) -> None:
        run.write_text("report/report.md", "old")
        run.write_text("report/report.md", "ü\r\n")
        assert (run.path / "report" / "report.md").read_bytes() == "ü\r\n".encode()
        assert [path.name for path in (run.path / "report").iterdir()] == ["report.md"]

    def test_events_survive_a_torn_line(self, run: RunFolder) -> None:
        assert list(run.events()) == []
        run.append_event({"event": "started", "stage": "merge/weighted"})
        with (run.path / "events.jsonl").open("a") as file:
            file.write('{"event": "prog')
        assert [event["event"] for event in run.events()] == ["started"]
        run.append_event({"event": "finished"})
        assert [event["event"] for event in run.events()] == ["started", "finished"]


class TestStage:
    def test_from_begin_to_finish(self, run: RunFolder, stage: StageFolder) -> None:
        assert not stage.complete and not stage.partial
        stage.begin()
        stage.save(stats())
        assert stage.partial and not stage.complete
        stage.finish({"seconds": 1.5})
        assert stage.complete and not stage.partial
        assert stage.path == run.path / "stages" / "calibrate-statistics" / KEY[:16]
        assert stage.manifest() == {"seconds": 1.5}
        assert sorted(path.name for path in stage.path.iterdir()) == [
            "artifact.json", "artifact.safetensors", "manifest.json",
        ]  # fmt: skip
        with pytest.raises(ValueError, match="is complete; remove it before making it again"):
            stage.begin()

    def test_tensors_come_back_without_loss(self, stage: StageFolder) -> None:
        stage.begin()
        stage.save(stats())
        stage.finish({})
        back, before = stage.load(CalibrationStats)[3], stats()[3]
        for name in ("count", "gate_sum", "output_mean"):
            assert back[name].dtype == before[name].dtype
            assert torch.equal(back[name], before[name])
        assert back.tokens == 5
        assert stage.load(CalibrationStats).source == {"samples": 8}

    def test_artifact_without_tensors(self, stage: StageFolder) -> None:
        stage.begin()
        measured = Evaluation((Metric("arc", "acc", 0.25, None, 4),), {"limit": 4}, {"results.json": "{}"})
        stage.save(measured)
        assert stage.load(Evaluation) == measured
        assert [path.name for path in stage.work.iterdir()] == ["artifact.json"]

    def test_stages_of_a_run(self, run: RunFolder, stage: StageFolder) -> None:
        stage.begin()
        other = run.stage("merge/weighted", "ffff")
        other.begin()
        other.finish({})
        (other.path.parent / "eeee.trash").mkdir()
        found = list(run.stages())
        assert [(s.name, s.key, s.complete) for s in found] == [
            ("calibrate/statistics", KEY[:16], False), ("merge/weighted", "ffff", True),
        ]  # fmt: skip
        assert list(RunFolder(run.path / "empty").stages()) == []

    def test_parts_survive_a_crash(self, stage: StageFolder) -> None:
        made: list[int] = []

        def make() -> CalibrationStats:
            made.append(1)
            return stats(7)

        for _ in range(2):  # the second time is the run after the crash
            stage.begin()
            assert stage.part("layer-012", CalibrationStats, make)[3].tokens == 7
            assert stage.has_part("layer-012") and not stage.has_part("layer-013")
        assert made == [1]
        stage.finish({})
        assert not (stage.path / "parts").exists()

    def test_parts_can_be_kept(self, stage: StageFolder) -> None:
        stage.begin()
        stage.part("a", CalibrationStats, stats)
        stage.finish({}, keep_parts=True)
        assert stage.has_part("a")
        assert stage.part("a", CalibrationStats, lambda: pytest.fail("made again"))[3].tokens == 5

    def test_fresh_and_resumed_parts_are_equal(self, stage: StageFolder) -> None:
        stage.begin()
        fresh = stage.part("e", Evaluation, lambda: Evaluation((), {"tasks": ("a", "b")}))
        resumed = stage.part("e", Evaluation, lambda: pytest.fail("made again"))
        assert fresh.settings == resumed.settings == {"tasks": ["a", "b"]}

    def test_remove_and_bytes(self, stage: StageFolder) -> None:
        stage.begin()
        (stage.work / "x").write_bytes(b"12345")
        assert stage.bytes() == 5
        stage.finish({})
        assert stage.bytes() == 5 + len("{}\n")
        stage.remove()
        assert (stage.bytes(), list(stage.path.parent.iterdir())) == (0, [])

    def test_leftovers_of_a_killed_write_are_not_published(self, stage: StageFolder) -> None:
        stage.begin()
        (stage.work / ".layer-003.safetensors.tmp").write_bytes(b"half")
        stage.finish({})
        assert [path.name for path in stage.path.iterdir()] == ["manifest.json"]

    def test_damage_says_what_to_redo(self, run: RunFolder, stage: StageFolder) -> None:
        stage.begin()
        stage.save(stats())
        stage.finish({})
        hint = f"`moecli run {run.path}/recipe.yaml --run-dir {run.path} --redo calibrate/statistics` makes it again"
        tensors = stage.path / "artifact.safetensors"
        content = stage.path / "artifact.json"
        tensors.write_bytes(tensors.read_bytes()[:-1])
        cases = [
            (lambda: None, r"artifact\.safetensors` is cut short"),
            (tensors.unlink, r"safetensors` is missing"),
        ]
        cases += [(lambda: content.write_text("{"), r"artifact\.json` is not JSON")]
        cases += [
            (
                lambda: content.write_text('{"kind": "ExpertPlan"}'),
                r"holds ExpertPlan, expected CalibrationStats",
            )
        ]
        cases += [
            (
                lambda: content.write_text('{"kind": "CalibrationStats", "meta": {}, "tensor_bytes": null}'),
                r"artifact\.json` is damaged: 'tokens'",
            )
        ]
        cases += [(content.unlink, r"artifact\.json` is missing")]
        for damage, message in cases:
            damage()
            with pytest.raises(SurroundingsError, match=message) as caught:
                stage.load(CalibrationStats)
            assert caught.value.hint == hint


def test_names_and_sizes() -> None:
    assert sorted(["l.10.w", "l.2.w", "l.2.b", "embed"], key=natural_key) == [
        "embed",
        "l.2.b",
        "l.2.w",
        "l.10.w",
    ]
    assert [gib(n) for n in (0, 5 * 2**20, 61 * 2**30 + 2**28)] == ["0.0 GiB", "0.0049 GiB", "61.2 GiB"]
    assert redo_hint(Path("/somewhere/else")) is None
    with pytest.raises(ValueError, match=r"`\.\./x` cannot be used as a file name"):
        file_safe("../x")
