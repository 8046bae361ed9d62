"""One table over a small model: channels dropped inside experts, by method, scope and repair, beside whole experts.

python scripts/slim_table.py MODEL_FOLDER [--out runs/slim-table] [--ratio 0.25 0.5] [--only heapr camera-p]

The folder is that of `small_table.py`. All rows of one ratio store as many bytes, but for those of scope `layer` and
`global`: they are zeros in tensors of the old shapes, and would store as many bytes with widths of their own.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import small_table

PLAIN = small_table.recipe
METHODS = ("heapr", "camera-p", "flap", "magnitude", "random")


def variants(ratios: list[float], experts: int) -> dict[str, list[dict[str, Any]]]:
    """Name -> the stages between calibration and evaluation, the most telling first."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for ratio in ratios:
        for method in METHODS:
            for repair in ("none", "least_squares"):
                rows[_name(method, ratio, "expert", repair)] = [_slim(method, ratio, "expert", repair, "uniform")]
        for scope in ("layer", "global"):
            for method in ("heapr", "camera-p"):
                for repair in ("none", "least_squares"):
                    rows[_name(method, ratio, scope, repair)] = [_slim(method, ratio, scope, repair, "pad")]
        keep = round(experts * (1 - ratio))
        rows[f"reap-{ratio}"] = [{"run": "prune/reap", "with": {"keep": keep}}]
    return rows


def _name(method: str, ratio: float, scope: str, repair: str) -> str:
    return f"{method}-{ratio}-{scope}" + ("-repair" if repair != "none" else "")


def _slim(method: str, ratio: float, scope: str, repair: str, widths: str) -> dict[str, Any]:
    options = {"ratio": ratio, "scope": scope, "repair": repair, "widths": widths, "align": 8}
    return {"run": f"slim/{method}", "with": options}


def recipe(model: Path, stages: list[dict[str, Any]]) -> dict[str, Any]:
    """That of the other table, calibrated in float32: on a CPU gradients in bfloat16 are slow."""
    made = PLAIN(model, stages)
    made["stages"][0]["with"]["dtype"] = "float32"
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/slim-table"))
    parser.add_argument("--ratio", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--experts", type=int, default=32, help="experts a layer, for the rows that drop whole ones")
    parser.add_argument("--only", nargs="+", help="rows whose name begins with one of these")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rows = variants(args.ratio, args.experts)
    small_table.recipe = recipe
    print("| recipe | bits per byte | accuracy |\n|---|---|---|")
    first = True
    for name, stages in rows.items():
        if args.only and not name.startswith(tuple(args.only)):
            continue
        report = small_table.run(name, stages, args.model.resolve(), args.out)
        sides = (["before"] if first else []) + ["after"]
        for side in sides:
            cells = [small_table.cell(report, metric, side) for metric in ("bits_per_byte", "acc")]
            print(f"| {'base' if side == 'before' else name} | {' | '.join(cells)} |", flush=True)
        first = False


if __name__ == "__main__":
    main()
