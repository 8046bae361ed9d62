"""One table over a small model: pruning, merging, routers and INT4 at two sizes.

python scripts/small_table.py MODEL_FOLDER [--out runs/small-table] [--keep 24 16] [--only m-smoe ream]

MODEL_FOLDER holds a model and `tasks/` with `calibration.jsonl` and the lm-eval tasks small_continuation and
small_perplexity. Each row is a recipe run by `moecli run`, all in one run folder, so that the baseline is evaluated
once; seconds are those of the row's own stages, whenever they ran. Recipes and reports stay in --out.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

KD = {"learning_rate": 1e-3, "epochs": 4, "dtype": "float32"}
"""The calibration text is 33 k tokens, 2 % of the paper's: more passes at a higher rate."""


def recipe(model: Path, stages: list[dict[str, Any]]) -> dict[str, Any]:
    tasks = model / "tasks"
    calibrate = {"dataset": str(tasks / "calibration.jsonl"), "samples": 64, "tokens_per_sample": 512}
    evaluate = {"include": str(tasks), "tasks": ["small_continuation", "small_perplexity"], "dtype": "float32"}
    return {
        "recipe": 1,
        "model": str(model),
        "seed": 0,
        "stages": [
            {"run": "calibrate/statistics", "with": calibrate},
            *stages,
            {"run": "eval/lm-eval", "with": evaluate},
        ],
    }


def variants(keeps: list[int]) -> dict[str, list[dict[str, Any]]]:
    """Name -> the stages between calibration and evaluation."""
    int4 = {"run": "quantize/rtn", "with": {"bits": 4, "group_size": 128}}
    rows: dict[str, list[dict[str, Any]]] = {"int4": [int4]}
    for keep in keeps:
        reap = [{"run": "prune/reap", "with": {"keep": keep}}]
        hc_smoe = [{"run": "cluster/hc-smoe", "with": {"keep": keep}}, {"run": "merge/weighted"}]
        m_smoe = {"run": "cluster/m-smoe", "with": {"keep": keep}}
        sub_moe = {"run": "cluster/sub-moe", "with": {"keep": keep, "alloc": "uniform"}}
        fitted = [m_smoe, {"run": "merge/merge-moe"}]
        rows |= {
            f"reap-{keep}": reap,
            f"hc-smoe-{keep}-alias": hc_smoe,
            f"hc-smoe-{keep}-row-drop": [*hc_smoe, {"run": "router/row-drop"}],
            f"reap-{keep}-int4": [*reap, int4],
            f"m-smoe-{keep}-alias": [m_smoe, {"run": "merge/weighted"}],
            f"m-smoe-{keep}-aligned-alias": [m_smoe, {"run": "merge/weighted", "with": {"align": "weights"}}],
            f"sub-moe-{keep}-alias": [sub_moe, {"run": "merge/weighted"}],
            f"sub-moe-{keep}-merge-moe-alias": [sub_moe, {"run": "merge/merge-moe"}],
            f"ream-{keep}-row-drop": [
                {"run": "cluster/ream", "with": {"keep": keep}}, {"run": "merge/ream"}, {"run": "router/row-drop"},
            ],
            f"hc-smoe-{keep}-merge-moe-alias": [hc_smoe[0], {"run": "merge/merge-moe"}],
            f"m-smoe-{keep}-merge-moe-paper-alias": [
                m_smoe,
                {"run": "merge/merge-moe", "with": {"tokens": "all", "align": "none", "ridge": 1e-4}},
            ],
            f"m-smoe-{keep}-merge-moe-alias": fitted,
            f"m-smoe-{keep}-merge-moe-row-drop": [*fitted, {"run": "router/row-drop"}],
            f"m-smoe-{keep}-merge-moe-row-mean": [*fitted, {"run": "router/row-mean"}],
            f"m-smoe-{keep}-merge-moe-lse-ridge": [*fitted, {"run": "router/lse-ridge"}],
            f"m-smoe-{keep}-merge-moe-refit": [*fitted, {"run": "router/refit"}],
            f"m-smoe-{keep}-merge-moe-refit-kd": [*fitted, {"run": "router/refit"}, {"run": "router/kd", "with": KD}],
            f"reap-{keep}-kd": [*reap, {"run": "router/kd", "with": KD}],
        }  # fmt: skip
    return rows


def run(name: str, stages: list[dict[str, Any]], model: Path, out: Path) -> dict[str, Any]:
    path = out / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe(model, stages), sort_keys=False), encoding="utf-8")
    command = [sys.executable, "-m", "moecli", "run", str(path), "--run-dir", str(out / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name} failed with exit code {done.returncode}:\n{done.stderr[-3000:]}")
    shutil.copytree(out / "run" / "report", out / f"{name}-report", dirs_exist_ok=True)
    return json.loads((out / "run" / "report" / "report.json").read_text(encoding="utf-8"))


def seconds(report: dict[str, Any], baseline: bool) -> float:
    return sum(stage["seconds"] for stage in report["stages"] if stage["id"].endswith("(source)") == baseline)


def cell(report: dict[str, Any], metric: str, side: str) -> str:
    row = next(m for m in report["metrics"] if m["metric"] == metric)
    error = row[f"{side}_stderr"]
    return f"{row[side]:.4f}" + (f" ± {error:.4f}" if error is not None else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/small-table"))
    parser.add_argument("--keep", type=int, nargs="+", default=[24, 16])
    parser.add_argument("--only", nargs="+", help="rows whose name contains one of these")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    print("| recipe | MiB | bits per byte | accuracy | seconds |\n|---|---|---|---|---|")
    first = True
    chosen = variants(args.keep).items()
    for name, stages in ((n, s) for n, s in chosen if not args.only or any(part in n for part in args.only)):
        report = run(name, stages, args.model.resolve(), args.out)
        sides = ["before", "after"] if first else ["after"]
        first = False
        for side in sides:
            label = "base" if side == "before" else name
            size = report["size"][side]["bytes"] / 2**20
            took = f"{seconds(report, side == 'before'):.0f}"
            numbers = " | ".join(cell(report, metric, side) for metric in ("bits_per_byte", "acc"))
            print(f"| {label} | {size:.1f} | {numbers} | {took} |", flush=True)


if __name__ == "__main__":
    main()
