"""One table over a small model: pruning, merging, routers and INT4 at two sizes.

python scripts/small_table.py MODEL_FOLDER [--out runs/small-table] [--keep 24 16] [--only m-smoe ream]

MODEL_FOLDER holds a model and `tasks/` with `calibration.jsonl` and the lm-eval tasks small_continuation and
small_perplexity. Each row is a recipe, all in one run folder, so that the source is evaluated once; nothing is
exported. ± is the standard error over questions, for rows of several seeds that over seeds. Recipes stay in --out.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from moecli.core.artifacts import Evaluation, Metric
from moecli.io.store import RunFolder
from moecli.runner.execute import Execution
from moecli.runner.open import open_recipe

KD = {"learning_rate": 1e-3, "epochs": 4, "dtype": "float32"}
"""The calibration text is 33 k tokens, 2 % of the paper's: more passes at a higher rate."""


CALIBRATE: dict[str, Any] = {"run": "calibrate/statistics"}
"""Stands for the same calibration again, of the model as it is there."""
PRUNING = {
    "random": ("random", {"protect": "none"}), "frequency": ("frequency", {}), "gating-score": ("gating-score", {}),
    "soft-count": ("soft-count", {}), "ean": ("ean", {"form": "sum"}), "man": ("ean", {"form": "mean"}),
    "msan": ("ean", {"form": "mean_square"}), "easy-ep": ("easy-ep", {}), "naee": ("naee", {}), "reap": ("reap", {}),
}  # fmt: skip
SEEDS = {"random": range(5)}
"""Rows that are run with more seeds than 0; means and standard errors over them."""


def recipe(model: Path, stages: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    tasks = model / "tasks"
    calibrate = {
        "dataset": str(tasks / "calibration.jsonl"),
        "samples": 64,
        "tokens_per_sample": 512,
        "dtype": "float32",
    }
    wanted = ["small_continuation", "small_perplexity"]
    evaluate = {"include": str(tasks), "tasks": wanted, "dtype": "float32", "backend": "streamed"}
    return {
        "recipe": 1,
        "model": str(model),
        "seed": seed,
        "stages": [
            {"run": "calibrate/statistics", "with": calibrate},
            *({"run": "calibrate/statistics", "with": calibrate} if stage is CALIBRATE else stage for stage in stages),
            {"run": "eval/lm-eval", "with": evaluate},
        ],
    }


def variants(keeps: list[int]) -> dict[str, list[dict[str, Any]]]:
    """Name -> the stages between calibration and evaluation."""
    int4 = {"run": "quantize/rtn", "with": {"bits": 4, "group_size": 128}}
    gptq4 = {"run": "quantize/gptq", "with": {"bits": 4, "group_size": 128}}
    rows: dict[str, list[dict[str, Any]]] = {"int4": [int4]}
    for bits in (4, 3, 2):
        for method in ("rtn", "gptq"):
            rows[f"{method}-{bits}"] = [{"run": f"quantize/{method}", "with": {"bits": bits, "group_size": 128}}]
    for keep in keeps:
        reap = [{"run": "prune/reap", "with": {"keep": keep}}]
        hc_smoe = [{"run": "cluster/hc-smoe", "with": {"keep": keep}}, {"run": "merge/weighted"}]
        m_smoe = {"run": "cluster/m-smoe", "with": {"keep": keep}}
        sub_moe = {"run": "cluster/sub-moe", "with": {"keep": keep, "alloc": "uniform"}}
        fitted = [m_smoe, {"run": "merge/merge-moe"}]
        more = min(keep + 4, 32)
        rows |= {
            f"{name}-{keep}": [{"run": f"prune/{method}", "with": {"keep": keep, **options}}]
            for name, (method, options) in PRUNING.items()
        }
        rows |= {
            f"reap-{keep}-gptq-4": [*reap, gptq4],
            f"m-smoe-{keep}-merge-moe-refit-gptq-4": [*fitted, {"run": "router/refit"}, gptq4],
            f"reap-{more}-then-merge-{keep}": [
                {"run": "prune/reap", "with": {"keep": more}}, CALIBRATE, *fitted, {"run": "router/refit"},
            ],
            f"merge-{more}-then-reap-{keep}": [
                {"run": "cluster/m-smoe", "with": {"keep": more}}, {"run": "merge/merge-moe"}, {"run": "router/refit"},
                CALIBRATE, *reap,
            ],
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


def run(name: str, stages: list[dict[str, Any]], model: Path, out: Path, seed: int) -> Row:
    """One recipe, stage by stage, without exporting a model."""
    path = out / f"{name}-seed-{seed}.yaml"
    path.write_text(yaml.safe_dump(recipe(model, stages, seed), sort_keys=False), encoding="utf-8")
    opened = open_recipe(path)
    folder = RunFolder(out / "run")
    wanted = [index for index, step in enumerate(opened.plan.steps) if not (step.baseline and seed)]
    execution = Execution(opened, folder, torch.device("cpu"))
    start = time.monotonic()
    with folder.lock():
        for index in wanted:
            execution.step(index)
    found: dict[bool, Side | None] = {True: None}
    for index in wanted:
        step = opened.plan.steps[index]
        if step.stage.kind == "eval":
            sketch = opened.plan.source if step.baseline else opened.plan.sketch_of(opened.plan.final)
            size = sum(spec.bytes for spec in sketch.specs.values()) / 2**20
            found[step.baseline] = Side(size, execution.artifact(index, Evaluation))
    return Row(found[True], found[False], time.monotonic() - start)


class Side(NamedTuple):
    size: float
    evaluation: Evaluation

    def metric(self, name: str) -> Metric:
        return next(m for m in self.evaluation.metrics if m.metric == name)


class Row(NamedTuple):
    base: Side | None
    """None for seeds other than 0: the source is evaluated once."""
    result: Side
    seconds: float


def line(label: str, sides: list[Side], seconds: float) -> str:
    cells = []
    for name in ("bits_per_byte", "acc"):
        values = [side.metric(name).value for side in sides]
        error = sides[0].metric(name).stderr
        if len(values) > 1:
            error = statistics.stdev(values) / len(values) ** 0.5
        cells.append(f"{statistics.fmean(values):.4f}" + ("" if error is None else f" ± {error:.4f}"))
    return f"| {label} | {sides[0].size:.1f} | {' | '.join(cells)} | {seconds:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/small-table"))
    parser.add_argument("--keep", type=int, nargs="+", default=[24, 16])
    parser.add_argument("--only", nargs="+", help="rows whose name contains one of these")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    print("| recipe | MiB | bits per byte | accuracy | seconds |\n|---|---|---|---|---|")
    shown = False
    for name, stages in variants(args.keep).items():
        if args.only and not any(part in name for part in args.only):
            continue
        seeds = SEEDS.get(name.rpartition("-")[0], range(1))
        rows = [run(name, stages, args.model.resolve(), args.out, seed) for seed in seeds]
        if not shown:
            print(line("base", [rows[0].base], 0))
            shown = True
        print(line(name, [row.result for row in rows], sum(row.seconds for row in rows)), flush=True)


if __name__ == "__main__":
    main()
