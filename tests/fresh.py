"""A process that knows nothing of `moecli`, without the seconds that importing torch and transformers takes.

Verification loads a model in a fresh interpreter. Here that is forked from one which has imported those two and what
they load models with, computed nothing and never seen `moecli`; each test's process is a new fork of it. Tests marked
`own_interpreter` get a real one.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from moecli.runner.verify import run_python as run_python  # the real one, whatever a test has put in its place

SERVER = """
import json, os, sys, traceback
import torch, safetensors.torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
import compressed_tensors
for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if child:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    code = 1
    try:
        os.chdir(asked["cwd"])
        os.environ.clear()
        os.environ.update(asked["environment"])
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT, dir_fd=os.open(asked["said"], os.O_RDONLY)), number)
        sys.argv = ["-c", *asked["argv"]]
        exec(compile(asked["script"], "<string>", "exec"), {"__name__": "__main__"})
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
"""


class Interpreter:
    """`run` is `moecli.runner.verify.run_python`, in a fork."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None
        self._cache = tempfile.TemporaryDirectory()

    def run(
        self, script: str, argv: Sequence[str], cwd: Path, environment: Mapping[str, str]
    ) -> subprocess.CompletedProcess[str]:
        if self._server is None:  # libraries read the environment when they are imported
            self._server = subprocess.Popen(
                [sys.executable, "-P", "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                env={**environment, "HF_MODULES_CACHE": self._cache.name}, cwd=self._cache.name,
            )  # fmt: skip
        assert self._server.stdin is not None and self._server.stdout is not None
        with tempfile.TemporaryDirectory() as said:
            asked = {"script": script, "argv": list(argv), "cwd": str(cwd), "environment": dict(environment)}
            self._server.stdin.write(json.dumps(asked | {"said": said}) + "\n")
            self._server.stdin.flush()
            code = int(self._server.stdout.readline())
            out, err = ((Path(said) / name).read_text() for name in ("out", "err"))
        return subprocess.CompletedProcess([], code, out, err)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._server is not None:
            self._server.communicate()
        self._cache.cleanup()
