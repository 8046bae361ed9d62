"""One table over a small model: REAP and HC-SMoE at two sizes, alias and row-drop routers, INT4.

python scripts/small_table.py MODEL_FOLDER [--out runs/small-table] [--keep 24 16]

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
        merged = [{"run": "cluster/hc-smoe", "with": {"keep": keep}}, {"run": "merge/weighted"}]
        rows |= {
            f"reap-{keep}": reap,
            f"hc-smoe-{keep}-alias": merged,
            f"hc-smoe-{keep}-row-drop": [*merged, {"run": "router/row-drop"}],
            f"reap-{keep}-int4": [*reap, int4],
        }
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
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    print("| recipe | MiB | bits per byte | accuracy | seconds |\n|---|---|---|---|---|")
    first = True
    for name, stages in variants(args.keep).items():
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
