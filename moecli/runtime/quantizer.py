"""Makes transformers know compact checkpoints as soon as both it and `moecli` are imported, in either order.

`import moecli` must cost nothing, so it imports neither torch nor transformers. It waits for the module in
which transformers keeps its quantizers; `from_pretrained` always imports that before it reads a checkpoint.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

QUANTIZERS = "transformers.quantizers.auto"
LOADER = "moecli.runtime.compact_model"
METHOD = "moecli"
"""`quant_method` in `config.json` of a compact checkpoint."""


def compact_config(
    experts: Mapping[int, int],
    rows: int | Mapping[int, int],
    packed: Mapping[str, Any] | None = None,
    guard: str | None = None,
    widths: Mapping[str, Sequence[int]] | None = None,
    factors: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """The `quantization_config` of a compact checkpoint; `compact_model` says what the keys mean."""
    return {
        "quant_method": METHOD,
        "experts": {str(layer): count for layer, count in experts.items()},
        "rows": rows if isinstance(rows, int) else {str(layer): count for layer, count in rows.items()},
        "packed": dict(packed) if packed else None,
        "guard": guard,
        "widths": {layer: list(found) for layer, found in (widths or {}).items()},
        "factors": {layer: list(found["projections"]) for layer, found in (factors or {}).items()},
    }


def register() -> None:
    """Register the loader with transformers now; importing its file does it."""
    from moecli.runtime import compact_model

    compact_model.register()


def register_when_transformers_loads() -> None:
    """Register the loader now if transformers' quantizers are loaded, else right after they are."""
    if QUANTIZERS in sys.modules:
        register()
    elif not any(isinstance(finder, _AfterQuantizers) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterQuantizers())


class _AfterQuantizers:
    """A finder of one module: asks the other finders and adds `register` to the end of its execution."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != QUANTIZERS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            if LOADER not in sys.modules:  # else its import led here, and ends with registering
                register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
