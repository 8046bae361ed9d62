"""A model that does not verify is never left under the name of one that does."""

import json

import pytest

from moecli.core.errors import StageFailed
from moecli.runner import export
from moecli.runner.execute import run
from moecli.runner.open import open_recipe


def test_a_model_that_does_not_verify_is_set_aside_and_made_again(tiny_model, tmp_path, monkeypatch):
    recipe = tmp_path / "recipe.yaml"
    stages = [{"run": "quantize/rtn", "with": {"bits": 8, "group_size": 16}}]
    recipe.write_text(json.dumps({"recipe": 1, "model": str(tiny_model("qwen3_moe")), "stages": stages}))
    write = export.export

    def damaged(checkpoint, folder, kind="auto", extra_files=None):
        done = write(checkpoint, folder, kind, extra_files)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(
            json.dumps(config | {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}})
        )
        return done

    with monkeypatch.context() as patch:
        patch.setattr(export, "export", damaged)
        for _ in range(2):
            with pytest.raises(StageFailed, match=r"the export does not verify: .*logits") as caught:
                run(open_recipe(recipe), tmp_path / "run")
            assert caught.value.hint == f"`moecli verify {tmp_path / 'run' / 'model.failed'}` lists all problems"
            assert not (tmp_path / "run" / "model").exists()
            assert (tmp_path / "run" / "model.failed" / "config.json").exists()

    assert run(open_recipe(recipe), tmp_path / "run").report.verification.status == "passed"
    assert (tmp_path / "run" / "model" / "config.json").exists()
