"""One table over a small model: pruning, merging, routers, quantization and channels at several sizes.

python scripts/small_table.py MODEL_FOLDER [--out runs/small-table] [--rows experts|channels|bits] [--keep 24 16]
    [--only m-smoe ream] [--device cuda] [--jobs 4]

MODEL_FOLDER holds a model and `tasks/` with `calibration.jsonl` and the lm-eval tasks small_continuation and
small_perplexity. Each row is a recipe; nothing is exported. Rows go to `rows.jsonl` in --out as they are done, so a
table that was stopped goes on where it was. ± is the standard error of the difference to the source model on the same
documents (of a row of several seeds, of its mean over them); of the accuracy itself it is in `rows.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
import yaml

from moecli.core.artifacts import Evaluation
from moecli.io.store import RunFolder
from moecli.runner.compare import pair
from moecli.runner.execute import Execution
from moecli.runner.open import open_recipe

Record = dict[str, Any]

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
            *({"run": "calibrate/statistics", "with": calibrate} if stage == CALIBRATE else stage for stage in stages),
            {"run": "eval/lm-eval", "with": evaluate},
        ],
    }


def variants(keeps: list[int]) -> dict[str, list[dict[str, Any]]]:
    """Name -> the stages between calibration and evaluation."""
    int4 = {"run": "quantize/rtn", "with": {"bits": 4, "group_size": 128}}
    kd = {"run": "router/kd", "with": KD}
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
            f"m-smoe-{keep}-merge-moe-refit-kd-gptq-4": [*fitted, {"run": "router/refit"}, kd, gptq4],
            f"naee-{keep}-kd": [{"run": "prune/naee", "with": {"keep": keep}}, kd],
            f"ean-{keep}-kd": [{"run": "prune/ean", "with": {"keep": keep, "form": "sum"}}, kd],
            f"m-smoe-{keep}-merge-moe-row-drop-kd": [*fitted, {"run": "router/row-drop"}, kd],
            f"naee-{more}-then-merge-{keep}-kd": [
                {"run": "prune/naee", "with": {"keep": more}}, CALIBRATE, *fitted, {"run": "router/refit"}, kd,
            ],
            f"merge-{more}-then-naee-{keep}-kd": [
                {"run": "cluster/m-smoe", "with": {"keep": more}}, {"run": "merge/merge-moe"}, {"run": "router/refit"},
                CALIBRATE, {"run": "prune/naee", "with": {"keep": keep}}, kd,
            ],
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
            f"ream-{keep}-sequential": [{"run": "merge/ream-sequential", "with": {"keep": keep, "dtype": "float32"}}],
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
            f"m-smoe-{keep}-merge-moe-refit-kd": [*fitted, {"run": "router/refit"}, kd],
            f"reap-{keep}-kd": [*reap, kd],
        }  # fmt: skip
    return rows


def bits_rows() -> dict[str, list[dict[str, Any]]]:
    """Quantization below 4 bits and around it: grids, mixes of bits over experts, corrections."""

    def stage(name: str, **options: Any) -> dict[str, Any]:
        return {"run": name, "with": {"group_size": 128, **options}}

    rows: dict[str, list[dict[str, Any]]] = {}
    kd = {"run": "router/kd", "with": KD}
    for bits in (4, 3, 2):
        rows[f"hqq-{bits}"] = [stage("quantize/hqq", bits=bits)]
        rows[f"awq-{bits}"] = [stage("quantize/awq", bits=bits)]
        rows[f"awq-{bits}-gptq"] = [
            stage("quantize/awq", bits=bits, form="scaled"), stage("quantize/gptq", bits=bits),
        ]  # fmt: skip
        for merge in ("max", "sum1"):
            rows[f"eaquant-smooth-{merge}-gptq-{bits}"] = [
                {"run": "quantize/eaquant-smooth", "with": {"merge": merge}}, stage("quantize/gptq", bits=bits),
            ]  # fmt: skip
        rows[f"gptaq-{bits}"] = [stage("quantize/gptq", bits=bits, asymmetric=0.25)]
        rows[f"gptaq-{bits}-shrink"] = [stage("quantize/gptq", bits=bits, asymmetric=0.25, shrink=True)]
        rows[f"gptq-{bits}-shrink"] = [stage("quantize/gptq", bits=bits, shrink=True)]
        rows[f"gptq-{bits}-shrink-kd"] = [stage("quantize/gptq", bits=bits, shrink=True), kd]
        for method in ("eora", "lqer", "slim"):
            rows[f"gptq-{bits}-{method}-4"] = [
                stage("quantize/gptq", bits=bits), {"run": f"compensate/{method}", "with": {"rank": 4}},
            ]  # fmt: skip
        rows[f"rtn-{bits}-eora-4"] = [
            stage("quantize/rtn", bits=bits), {"run": "compensate/eora", "with": {"rank": 4}},
        ]  # fmt: skip
    for search in ("joint", "each", "weights"):
        for bits in (8, 4):
            align = {"run": "router/eaquant-align", "with": {"bits": bits, "search": search}}
            rows[f"eaquant-align-{search}-router-{bits}"] = [align]
            rows[f"eaquant-align-{search}-router-{bits}-gptq-3"] = [align, stage("quantize/gptq", bits=3)]
    for mean, shares in (
        ("3.0", [0.25, 0.5, 0.25]), ("2.5", [0.1, 0.3, 0.6]), ("even-3", [0.0, 1.0, 0.0]),
    ):  # fmt: skip
        rows[f"camera-q-{mean}-rtn"] = [stage("quantize/camera-q", tiers=[4, 3, 2], shares=shares)]
        rows[f"camera-q-{mean}-rtn-shrink"] = [
            stage("quantize/camera-q", tiers=[4, 3, 2], shares=shares, shrink=True)
        ]  # fmt: skip
    rows["rtn-4-group-32"] = [{"run": "quantize/rtn", "with": {"bits": 4, "group_size": 32}}]
    for method in ("rtn", "gptq", "hqq"):
        rows[f"{method}-1"] = [stage(f"quantize/{method}", bits=1, attention_bits=4)]
    rows["gptq-1-shrink"] = [stage("quantize/gptq", bits=1, attention_bits=4, shrink=True)]
    for average, levels in MEANS.items():
        wanted = {"average": average, "bits": levels}
        plans = {
            "pmq": [stage("allocate/pmq", **wanted)],
            "gemq": [stage("allocate/gemq", **wanted)],
            "quantmoe-bench": [{"run": "allocate/quantmoe-bench", "with": wanted}],
            "evopress": [stage("allocate/evopress", **wanted, **EVOPRESS)],
            "gemq-evopress": [stage("allocate/gemq", **wanted), stage("allocate/evopress", **wanted, **EVOPRESS)],
        }
        for name, plan in plans.items():
            rows[f"{name}-{average}-gptq"] = [*plan, stage("quantize/gptq", bits=4)]
        rows[f"pmq-{average}-rtn"] = [*plans["pmq"], stage("quantize/rtn", bits=4)]
        shrunk = stage("quantize/gptq", bits=4, shrink=True)
        rows[f"gemq-{average}-gptq-shrink"] = [*plans["gemq"], shrunk]
        for method in ("gemq", "pmq"):
            searched = stage(f"allocate/{method}", **wanted, shrink=True)
            rows[f"{method}-shrink-{average}-gptq-shrink"] = [searched, shrunk]
            rows[f"{method}-shrink-{average}-gptq-shrink-kd"] = [searched, shrunk, kd]
            compensated = stage(f"allocate/{method}", **wanted, shrink=True, rounding="gptq")
            rows[f"{method}-by-gptq-{average}-gptq-shrink"] = [compensated, shrunk]
        widest = {**wanted, "bits": [1, 2, 3, 4], "shrink": True}
        rows[f"gemq-1234-{average}-gptq-shrink"] = [stage("allocate/gemq", **widest), shrunk]
        widest["rounding"] = "gptq"
        rows[f"gemq-1234-by-gptq-{average}-gptq-shrink"] = [stage("allocate/gemq", **widest), shrunk]
        rows[f"gemq-{average}-gptq-eora-4"] = [
            *plans["gemq"], stage("quantize/gptq", bits=4), {"run": "compensate/eora", "with": {"rank": 4}},
        ]  # fmt: skip
    return rows


MEANS = {
    4.0: [2, 3, 4, 8], 3.0: [2, 3, 4], 2.5: [2, 3, 4], 2.25: [2, 3, 4], 2.0: [1, 2, 3], 1.5: [1, 2, 3],
}  # fmt: skip
"""Mean bits of experts, and the numbers of bits that a plan may give them."""
EVOPRESS = {"generations": 10, "offspring": 8, "steps": [[2, 1024], [1, 4096]]}
"""Far fewer than published (150 generations of 128): minutes on a CPU."""


LONG = ("evopress", "kd")
"""Rows that take longest go first."""


class Runner:
    """Runs rows one after another in a run folder of its own: the source is evaluated once, calibrations are shared."""

    def __init__(self, model: Path, out: Path, device: str) -> None:
        self.model, self.out, self.device = model, out, torch.device(device)
        self.base: Evaluation | None = None

    def row(self, name: str, stages: list[dict[str, Any]], seed: int) -> Record:
        """One recipe, stage by stage, without exporting a model."""
        path = self.out / f"{name}-seed-{seed}.yaml"
        path.write_text(yaml.safe_dump(recipe(self.model, stages, seed), sort_keys=False), encoding="utf-8")
        opened = open_recipe(path)
        plan = opened.plan
        folder = RunFolder(self.out / f"run-{os.getpid()}")
        execution = Execution(opened, folder, self.device)
        found: dict[bool, Evaluation] = {}
        mib = mebibytes(plan.sketch_of(plan.final))
        start = time.monotonic()
        with folder.lock():
            for index, step in enumerate(plan.steps):
                if step.baseline and self.base is not None:
                    continue
                done = execution.step(index)
                if packed := done.manifest["records"].get("packed"):  # dense values of grids that nothing packs
                    mib = packed["bytes"] / 2**20
                if step.stage.kind == "eval":
                    found[step.baseline] = execution.artifact(index, Evaluation)
        self.base = found.get(True, self.base)
        assert self.base is not None
        return {
            "row": name,
            "seed": seed,
            "seconds": time.monotonic() - start,
            "base": {"mib": mebibytes(plan.source), **metrics(self.base, self.base)},
            "mib": mib,
            **metrics(self.base, found[False]),
        }


def mebibytes(sketch: Any) -> float:
    return float(sum(spec.bytes for spec in sketch.specs.values()) / 2**20)


def metrics(base: Evaluation, found: Evaluation) -> Record:
    """bits_per_byte and acc: value, its standard error, and that of the difference to the base, paired."""
    paired, _ = pair(base, found)
    return {
        metric.metric: {
            "value": metric.value,
            "stderr": metric.stderr,
            "paired": paired[metric.task, metric.metric].stderr if (metric.task, metric.metric) in paired else None,
        }
        for metric in found.metrics
        if metric.metric in ("bits_per_byte", "acc")
    }


def line(label: str, found: list[Record]) -> str:
    cells = []
    for name in ("bits_per_byte", "acc"):
        values = [record[name]["value"] for record in found]
        error = found[0][name]["paired"]
        if len(values) > 1:
            error = statistics.stdev(values) / len(values) ** 0.5
        cells.append(f"{statistics.fmean(values):.4f}" + (f" ± {error:.4f}" if error else ""))
    return f"| {label} | {found[0]['mib']:.1f} | {' | '.join(cells)} |"


_runner: Runner | None = None


def start(model: Path, out: Path, device: str) -> None:
    global _runner
    torch.set_num_threads(1)
    _runner = Runner(model, out, device)


def one(job: tuple[str, list[dict[str, Any]], int]) -> Record:
    """A row that fails is a row that says so: the others go on."""
    assert _runner is not None
    try:
        return _runner.row(*job)
    except Exception as error:
        return {"row": job[0], "seed": job[2], "error": f"{type(error).__name__}: {error}"}


def jobs(rows: Mapping[str, list[dict[str, Any]]], done: set[tuple[str, int]]) -> Iterator[tuple[str, Any, int]]:
    for name, stages in rows.items():
        for seed in SEEDS.get(name.partition("-")[0], range(1)):
            if (name, seed) not in done:
                yield name, stages, seed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/small-table"))
    parser.add_argument("--rows", choices=("experts", "channels", "bits", "matrices"), default="experts")
    parser.add_argument("--keep", type=int, nargs="+", default=[24, 16])
    parser.add_argument("--only", nargs="+", help="rows whose name contains one of these")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="rows at a time")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.rows == "channels":
        from slim_table import slim_rows

        rows = slim_rows()
    elif args.rows == "bits":
        rows = bits_rows()
    elif args.rows == "matrices":
        from matrices_table import matrix_rows

        rows = matrix_rows()
    else:
        rows = variants(args.keep)
    rows = {name: stages for name, stages in rows.items() if not args.only or any(part in name for part in args.only)}
    log = args.out / "rows.jsonl"
    found = [json.loads(text) for text in log.read_text().splitlines()] if log.exists() else []
    found = [record for record in found if "error" not in record]
    wanted = list(jobs(rows, {(record["row"], record["seed"]) for record in found}))
    wanted.sort(key=lambda job: not any(part in job[0] for part in LONG))
    settings = (args.model.resolve(), args.out, args.device)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, context, start, settings) as pool, log.open("a") as out:
        for future in as_completed([pool.submit(one, job) for job in wanted]):
            record = future.result()
            found.append(record)
            print(json.dumps(record), file=out, flush=True)
            print(record.get("error") or line(record["row"], [record]), file=sys.stderr, flush=True)
    print("| recipe | MiB | bits per byte | accuracy |\n|---|---|---|---|")
    failed = [record for record in found if "error" in record]
    whole = [record for record in found if "error" not in record]
    if whole:
        print(line("base", [whole[0]["base"]]))
    for name in rows:
        same = [record for record in whole if record["row"] == name]
        if same:
            print(line(name, same))
    for record in failed:
        print(f"{record['row']} (seed {record['seed']}) failed: {record['error']}")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
