"""Fixtures every test module may use."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers share the cores; sums keep one order in every process
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not os.path.exists("/dev/nvidiactl"):  # no GPU: Triton kernels run on the CPU, read when triton is first imported
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_model("qwen3_moe", experts=8)`: the folder of a toy model, made once a session; only read it."""
    from tests import tiny

    made: dict[tuple[str, str], Path] = {}

    def get(model_type: str, **options: Any) -> Path:
        key = (model_type, repr(sorted(options.items())))
        if key not in made:
            made[key] = tiny.make(model_type, tmp_path_factory.mktemp(model_type), **options)
        return made[key]

    return get


@pytest.fixture(scope="session", autouse=True)
def _forks() -> Iterator[None]:
    """Verification's fresh process is a fork (`tests.fresh`), but in tests marked `own_interpreter`."""
    from moecli.runner import verify
    from tests.fresh import Interpreter

    with pytest.MonkeyPatch.context() as patch, Interpreter() as interpreter:
        patch.setattr(verify, "run_python", interpreter.run)
        yield


@pytest.fixture(autouse=True)
def _own_interpreter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("own_interpreter"):
        from moecli.runner import verify
        from tests.fresh import run_python

        monkeypatch.setattr(verify, "run_python", run_python)
