"""The job scripts: their own command lines, with a `srun` that runs them here instead of on a cluster."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from moecli.core.artifacts import CalibrationStats
from moecli.io.store import RunFolder

SCRIPTS = Path(__file__).parents[2] / "scripts" / "slurm"
SRUN = """#!/bin/bash
# starts the command on each of $NODES "machines", its own options left out
while [[ $1 == --* ]]; do shift; done
for node in $(seq "$NODES"); do "$@" & jobs+=($!); done
for job in "${jobs[@]}"; do wait "$job" || failed=$?; done
exit "${failed:-0}"
"""


@pytest.mark.parametrize("name", ["one-node", "several-nodes"])
def test_they_are_shell(name):
    subprocess.run(["bash", "-n", SCRIPTS / f"{name}.sbatch"], check=True)
    found = subprocess.run(["bash", SCRIPTS / f"{name}.sbatch"], capture_output=True, text=True)
    assert found.returncode != 0
    assert "which recipe? sbatch " in found.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("name", "nodes", "each"), [("one-node", 1, 2), ("several-nodes", 2, 1)])
def test_they_run_a_recipe(name, nodes, each, tiny_model, tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    slow = "#!/bin/bash\necho localhost\nsleep 0.2\necho other\n"  # its reader may be gone before it ends
    commands = {"srun": SRUN, "scontrol": slow}
    commands["torchrun"] = f'#!/bin/bash\nexec {sys.executable} -m torch.distributed.run "$@"\n'
    for command, text in commands.items():
        (tools / command).write_text(text)
        (tools / command).chmod(0o755)
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"some text {i}"}) + "\n" for i in range(20)))
    options = {"dataset": "text.jsonl", "samples": 4, "tokens_per_sample": 16}
    stages = [{"run": "calibrate/statistics", "with": options}]
    (tmp_path / "r.yaml").write_text(json.dumps({"recipe": 1, "model": str(tiny_model("qwen3_moe")), "stages": stages}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(SCRIPTS.parents[1]), "NODES": str(nodes),
        "SLURM_NNODES": str(nodes), "SLURM_GPUS_ON_NODE": str(each), "SLURM_CPUS_PER_TASK": "1", "SLURM_JOB_ID": "17",
        "SLURM_JOB_NODELIST": "localhost,other", "MOECLI_PORT": str(port),
    }  # fmt: skip
    shutil.copy(SCRIPTS / f"{name}.sbatch", tmp_path)
    found = subprocess.run(
        ["bash", f"{name}.sbatch", "r.yaml", "--device", "cpu"], cwd=tmp_path, env=environment, timeout=200,
        capture_output=True, text=True,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert "2 processes" in found.stderr
    (stage,) = [s for s in RunFolder(tmp_path / "runs" / "r", create=False).stages() if s.complete]
    assert stage.load(CalibrationStats)[0].tokens == 64
