"""A fork does what a fresh interpreter does."""

import os

import pytest

from moecli.runner import verify
from tests.fresh import run_python

SCRIPT = """
import os, sys
print(os.getcwd(), sys.argv[1:], os.environ["COLOUR"], "moecli" in sys.modules, "torch" in sys.modules and "loaded")
print("said", file=sys.stderr)
if sys.argv[1] == "raise":
    raise ValueError("two\\nlines")
if sys.argv[1] == "exit":
    sys.exit("stopped")
if sys.argv[1] == "kill":
    os.kill(os.getpid(), 9)
sys.modules["moecli"] = None
"""


@pytest.mark.parametrize("how", ["end", "raise", "exit", "kill"])
def test_a_fork_and_an_interpreter_say_the_same(how, tmp_path):
    environment = os.environ | {"COLOUR": "blue"}
    for _ in range(2):  # what one fork imports, the next one does not have
        fork = verify.run_python(SCRIPT, [how, "x y"], tmp_path, environment)
        assert f"{tmp_path} ['{how}', 'x y'] blue False loaded\n" == fork.stdout or how == "kill"
    real = run_python("import torch\n" + SCRIPT, [how, "x y"], tmp_path, environment)
    assert (fork.returncode, fork.stdout) == (real.returncode, real.stdout)
    assert fork.stderr.splitlines()[-1:] == real.stderr.splitlines()[-1:]


@pytest.mark.own_interpreter
def test_a_marked_test_gets_an_interpreter():
    assert verify.run_python is run_python
