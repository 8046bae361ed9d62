"""Rows for `small_table.py --rows channels`: channels dropped inside experts, by method, ratio, scope and repair.

`expert` leaves one width in all experts, a multiple of 8 (a CUDA kernel wants rows of 16 bytes), and loads everywhere;
`layer` and `global` leave any width in any expert, here as zeros in place (`pad`): the same numbers as `ragged` widths,
whose rows `-ragged` are aligned to 8 as well. Beside them whole experts at about the same bytes. MiB are those of the
checkpoint.
"""

from __future__ import annotations

from typing import Any

Stages = list[dict[str, Any]]

KD = {"learning_rate": 1e-3, "epochs": 4, "dtype": "float32"}
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
                    align = 8 if widths == "uniform" else 1
                    options = {"ratio": ratio, "scope": scope, "widths": widths, "align": align, "repair": repair}
                    name = f"{method}-{ratio}-{scope}" + ("-repair" if repair != "none" else "")
                    rows[name] = [{"run": f"slim/{method}", "with": options}]
        keep = round(EXPERTS * (1 - ratio))
        rows[f"reap-{ratio}"] = [{"run": "prune/reap", "with": {"keep": keep}}]
        rows[f"m-smoe-{ratio}-merge-moe-refit"] = [
            {"run": "cluster/m-smoe", "with": {"keep": keep}}, {"run": "merge/merge-moe"}, {"run": "router/refit"},
        ]  # fmt: skip
        rows[f"naee-{ratio}"] = [{"run": "prune/naee", "with": {"keep": keep}}]
    for ratio in RATIOS:
        for method in ("heapr", "camera-p"):
            options = {"ratio": ratio, "scope": "global", "widths": "ragged", "align": 8, "repair": "least_squares"}
            rows[f"{method}-{ratio}-global-repair-ragged"] = [{"run": f"slim/{method}", "with": options}]
    for ratio in (0.25, 0.5):  # widths that scales of 32 inputs divide
        options = {"ratio": ratio, "scope": "expert", "widths": "uniform", "align": 32, "repair": "least_squares"}
        slim = {"run": "slim/camera-p", "with": options}
        rows[f"camera-p-{ratio}-aligned-repair"] = [slim]
        gptq = {"run": "quantize/gptq", "with": {"bits": 4, "group_size": 32}}
        rows[f"camera-p-{ratio}-aligned-repair-gptq-4"] = [slim, gptq]
        rows[f"camera-p-{ratio}-aligned-repair-kd"] = [slim, {"run": "router/kd", "with": KD}]
        rows[f"camera-p-{ratio}-aligned-repair-kd-gptq-4"] = [slim, {"run": "router/kd", "with": KD}, gptq]
    return rows
