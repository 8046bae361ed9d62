"""Loading in fresh processes: either import order, without any import, and with nothing of ours installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moecli.runtime.modeling_file import AUTO_MAP, FILE_NAME, modeling_source
from tests.runtime.compact import EXPERTS, logits, make_model, write_compact

SLOW = pytest.mark.slow
LOAD = """
import sys, torch
from safetensors.torch import save_file
{before}
from transformers import AutoModelForCausalLM
{after}
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True{options})
assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
tokens = torch.arange(24).reshape(2, 12) * 5 % 64
save_file({{"logits": model.eval()(tokens).logits.detach()}}, sys.argv[2])
"""
NOT_INSTALLED = """
import sys
class Hide:
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "moecli":
            raise ModuleNotFoundError("hidden")
sys.meta_path.insert(0, Hide())
try:
    import moecli
except ModuleNotFoundError:
    pass
else:
    sys.exit("moecli is importable")
"""


def run(script: str, *arguments: Path, cwd: Path, isolated: bool = False) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter: with this checkout on its path, or in isolated mode with no `moecli` to be had."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd / "hf"), "OMP_NUM_THREADS": "1"}
    for name in ("PYTHONPATH", "TRANSFORMERS_VERBOSITY"):  # the command line quietens transformers in its process
        environment.pop(name, None)
    if not isolated:
        environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    python = [sys.executable, *(["-I"] if isolated else [])]
    script = NOT_INSTALLED + script if isolated else script
    return subprocess.run(
        [*python, "-c", script, *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
    )


def with_file(folder: Path) -> Path:
    (folder / FILE_NAME).write_text(modeling_source())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": AUTO_MAP}))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("compact")
    source = make_model(root / "source")
    experts, every = {0: 3, 1: 5}, {0: EXPERTS, 1: EXPERTS}
    return {
        "alias": with_file(write_compact(source, root / "alias", experts)),
        "packed": with_file(write_compact(source, root / "packed", experts, bits=4)),
        "stacked": with_file(write_compact(make_model(root / "stacks", "gpt_oss"), root / "stacked", every, bits=4)),
    }


@pytest.mark.parametrize("kind", ["alias", "packed"])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param("import moecli", "", id="moecli-first"),
        pytest.param("", "import moecli", id="transformers-first"),
        pytest.param("import transformers.quantizers.auto", "import moecli", marks=SLOW, id="quantizers-first"),
    ],
)
def test_import_moecli_is_enough_in_either_order(kind, before, after, folders, tmp_path):
    done = run(LOAD.format(before=before, after=after, options=""), folders[kind], tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert torch.equal(load_file(tmp_path / "out")["logits"], logits(folders[kind]))


@pytest.mark.parametrize("kind", ["alias", "packed", "stacked"])
def test_the_file_beside_the_weights_is_enough_with_nothing_installed(kind, folders, tmp_path):
    script = LOAD.format(before="", after="", options=", trust_remote_code=True")
    done = run(script, folders[kind], tmp_path / "out", cwd=tmp_path, isolated=True)
    assert done.returncode == 0, done.stderr
    assert torch.equal(load_file(tmp_path / "out")["logits"], logits(folders[kind]))


def test_experts_that_shall_stay_packed_take_moecli(folders, tmp_path):
    before = 'import json, os, shutil; shutil.copytree(sys.argv[1], "own"); sys.argv[1] = "own"\n'
    before += 'c = json.load(open("own/config.json")); c["quantization_config"]["memory"] = "packed"\n'
    before += 'json.dump(c, open("own/config.json", "w"))'
    script = LOAD.format(before=before, after="", options=", trust_remote_code=True")
    done = run(script, folders["packed"], tmp_path / "out", cwd=tmp_path, isolated=True)
    assert done.returncode == 1
    assert "experts stay packed in memory where moecli is installed only; leave out `memory`" in done.stderr


@pytest.mark.parametrize("kind", ["alias", "packed", "stacked"])
def test_with_neither_import_nor_trust_loading_stops(kind, folders, tmp_path):
    script = LOAD.format(before="", after="", options="")
    done = run(script, folders[kind], tmp_path / "out", cwd=tmp_path, isolated=True)
    assert done.returncode == 1
    assert "Unknown quantization type, got moecli" in done.stderr
    assert "RuntimeError: You set `ignore_mismatched_sizes` to `False`" in done.stderr
    assert ".mlp.experts.down_proj" in done.stderr
    assert not (tmp_path / "out").exists()


def test_import_moecli_imports_neither_torch_nor_transformers(tmp_path):
    script = "import moecli, sys; print({'torch', 'transformers'} & set(sys.modules))"
    done = run(script, cwd=tmp_path)
    assert done.stdout == "set()\n", done.stderr


def test_the_loader_can_be_the_first_import(tmp_path):
    script = """
import moecli.runtime.compact_model
import transformers.quantizers.auto as auto
print("moecli" in auto.AUTO_QUANTIZER_MAPPING)
"""
    done = run(script, cwd=tmp_path)
    assert done.stdout == "True\n", done.stderr


def test_the_waiting_finder_leaves_after_its_module_came(tmp_path):
    script = """
import sys, moecli, moecli.runtime.quantizer as q
assert sum(isinstance(f, q._AfterQuantizers) for f in sys.meta_path) == 1
q.register_when_transformers_loads()
assert sum(isinstance(f, q._AfterQuantizers) for f in sys.meta_path) == 1
import transformers.quantizers.auto as auto
assert not any(isinstance(f, q._AfterQuantizers) for f in sys.meta_path)
print("moecli" in auto.AUTO_QUANTIZER_MAPPING)
"""
    done = run(script, cwd=tmp_path)
    assert done.stdout == "True\n", done.stderr
