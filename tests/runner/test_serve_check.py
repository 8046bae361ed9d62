"""The parts of `scripts/serve_check.py` that need no vLLM."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def serve_check():
    path = Path(__file__).parents[2] / "scripts" / "serve_check.py"
    spec = importlib.util.spec_from_file_location("serve_check", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_local_versions_and_what_text_models_do_not_need_are_left_out(serve_check):
    lines = ["torch==2.13.0+cpu", "torchaudio==2.11.0", "triton_cpu>=3", "transformers<5.21,>=5.5", "TorchVision"]
    assert serve_check.wanted(lines) == ["torch==2.13.0", "transformers<5.21,>=5.5"]


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        (("linux", "x86_64", (3, 12)), None),
        (("darwin", "arm64", (3, 12)), "vLLM's CPU build is for Linux on x86_64 and aarch64, this is darwin on arm64"),
        (("linux", "x86_64", (3, 15)), "vLLM's CPU build is for Python 3.10 to 3.13, this is 3.15"),
    ],
)
def test_places_without_a_wheel_are_named(serve_check, place, reason):
    assert serve_check.unsupported(*place) == reason


def test_the_mean_decides_and_nan_never_passes(serve_check):
    assert serve_check.judge([0.01, 0.03], 0.02)["status"] == "passed"
    assert serve_check.judge([0.01, 0.04], 0.02)["status"] == "failed"
    assert serve_check.judge([0.0, math.nan], 0.02)["status"] == "failed"
    assert serve_check.judge([], 0.02)["status"] == "failed"


def test_a_package_that_cannot_be_had_is_skipped_with_its_reason(serve_check, tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text("{}")

    def refuse(command, failure):
        raise serve_check.Skipped(f"{failure}: no such package")

    monkeypatch.setattr(serve_check, "_step", refuse)
    monkeypatch.setattr(serve_check, "unsupported", lambda *place: None)
    monkeypatch.setenv("MOECLI_SERVE_CHECK", str(tmp_path / "environment"))
    assert serve_check.main([str(tmp_path)]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == {"status": "skipped", "reason": "no environment could be made: no such package"}


def test_a_folder_without_a_model_is_refused(serve_check, tmp_path, capsys):
    assert serve_check.main([str(tmp_path)]) == 2
    assert "holds no model" in capsys.readouterr().err


def test_the_first_exception_is_the_reason(serve_check):
    output = """INFO starting
(Worker pid=17) ERROR 11-22 23:35:13 [multiproc_executor.py:953] Traceback (most recent call last):
(Worker pid=17) ERROR 11-22 23:35:13 [multiproc_executor.py:953]   File "a.py", line 3, in f
(Worker pid=17) ERROR 11-22 23:35:13 [multiproc_executor.py:953] ValueError: Failed to find a kernel. Reasons:
(Worker pid=17) ERROR 11-22 23:35:13 [multiproc_executor.py:953]  OneKernel cannot: 3 bits
(EngineCore pid=9) ERROR 11-22 23:35:19 [core.py:1510] EngineCore failed to start.
(EngineCore pid=9) ERROR 11-22 23:35:19 [core.py:1510] Exception: WorkerProc initialization failed
RuntimeError: Engine core initialization failed."""
    assert serve_check.cause(output) == "ValueError: Failed to find a kernel. Reasons: OneKernel cannot: 3 bits"
    assert serve_check.cause("INFO starting\nINFO done") is None
