"""Rows for `small_table.py --rows matrices`: experts as factors, and zeros in them.

Factors are those of the compact form, and MiB those of the checkpoint; evaluations see them multiplied out. Zeros take
as many bytes as other weights.
"""

from __future__ import annotations

from typing import Any

Stages = list[dict[str, Any]]

AGAIN: dict[str, Any] = {"run": "calibrate/statistics"}
"""Stands for the same calibration again, of the model as it is there."""


def matrix_rows() -> dict[str, Stages]:
    """Name -> the stages between calibration and evaluation."""
    rows: dict[str, Stages] = {}
    for kept in (0.8, 0.6, 0.4):
        for method in ("svd-llm", "d2-moe"):
            rows[f"{method}-{kept}"] = [{"run": f"slim/{method}", "with": {"kept": kept}}]
        rows[f"d2-moe-{kept}-mean"] = [{"run": "slim/d2-moe", "with": {"kept": kept, "base": "mean"}}]
    for rank, kept_rows in ((60, 0.1), (42, 0.1), (68, 0.0)):
        options = {"rank": rank, "rows": kept_rows}
        rows[f"mc-smoe-second-{rank}-{kept_rows}"] = [{"run": "slim/mc-smoe-second", "with": options}]
    for sparsity in (0.5, "2:4"):
        for method in ("wanda", "moe-pruner", "sparsegpt"):
            rows[f"{method}-{sparsity}"] = [{"run": f"slim/{method}", "with": {"sparsity": sparsity}}]
    rows["wanda-0.5-matrix"] = [{"run": "slim/wanda", "with": {"compare": "matrix"}}]
    rows["m-smoe-24-mc-smoe-second-60-0.1"] = [
        {"run": "cluster/m-smoe", "with": {"keep": 24}}, {"run": "merge/weighted"}, AGAIN,
        {"run": "slim/mc-smoe-second", "with": {"rank": 60, "rows": 0.1}},
    ]  # fmt: skip
    return rows
