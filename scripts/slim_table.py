"""Rows for `small_table.py --rows channels`: channels dropped inside experts, by method, ratio, scope and repair.

`expert` leaves one width in all experts and loads everywhere; `layer` and `global` leave any width in any expert.
Widths are not aligned, so that all rows of a ratio hold the same number of channels, but for rounding (`expert` rounds
what is left of each expert up). Beside them whole experts at about the same bytes: REAP, and merging with a refit
router. MiB are those of the checkpoint.
"""

from __future__ import annotations

from typing import Any

Stages = list[dict[str, Any]]

METHODS = ("heapr", "camera-p", "flap", "moe-slimming", "magnitude", "random")
RATIOS = (0.2, 0.4, 0.6)
SCOPES = {"expert": "uniform", "layer": "ragged", "global": "ragged"}
"""scope: widths"""
EXPERTS = 32
"""Experts a layer of the small model, for the rows that drop or merge whole ones."""


def slim_rows() -> dict[str, Stages]:
    """Name -> the stages between calibration and evaluation."""
    rows: dict[str, Stages] = {}
    for ratio in RATIOS:
        for method in METHODS:
            for scope, widths in SCOPES.items():
                if method == "random" and scope != "expert":
                    continue  # the floor, of several seeds, once
                for repair in ("none", "least_squares"):
                    options = {"ratio": ratio, "scope": scope, "widths": widths, "align": 1, "repair": repair}
                    name = f"{method}-{ratio}-{scope}" + ("-repair" if repair != "none" else "")
                    rows[name] = [{"run": f"slim/{method}", "with": options}]
        keep = round(EXPERTS * (1 - ratio))
        rows[f"reap-{ratio}"] = [{"run": "prune/reap", "with": {"keep": keep}}]
        rows[f"m-smoe-{ratio}-merge-moe-refit"] = [
            {"run": "cluster/m-smoe", "with": {"keep": keep}}, {"run": "merge/merge-moe"}, {"run": "router/refit"},
        ]  # fmt: skip
        rows[f"naee-{ratio}"] = [{"run": "prune/naee", "with": {"keep": keep}}]
    for ratio in (0.25, 0.5):  # widths that scales of 32 inputs divide
        options = {"ratio": ratio, "scope": "expert", "widths": "uniform", "align": 32, "repair": "least_squares"}
        slim = {"run": "slim/camera-p", "with": options}
        rows[f"camera-p-{ratio}-aligned-repair"] = [slim]
        gptq = {"run": "quantize/gptq", "with": {"bits": 4, "group_size": 32}}
        rows[f"camera-p-{ratio}-aligned-repair-gptq-4"] = [slim, gptq]
    return rows
