"""Layers that `config.json` does not know are somebody else's, except where a family has MTP layers."""

import json
import shutil

import pytest

from moecli.families import accounting, facts_of
from moecli.io.reader import FolderCheckpoint


def with_fewer_layers(folder, target, layers):
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    return FolderCheckpoint(target, facts_of)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_surplus_layers_are_refused(model_type, tiny_model, tmp_path):
    (problem,) = accounting(with_fewer_layers(tiny_model(model_type), tmp_path / "model", 1))
    assert problem.message == "config.json says 1 layers, the checkpoint has 2"


def test_surplus_layers_of_a_family_with_mtp_are_mtp(tiny_model, tmp_path):
    assert accounting(with_fewer_layers(tiny_model("deepseek_v3"), tmp_path / "model", 2)) == []
