"""`make golden`: write the answers anew. Read the diff before committing it."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from tests.golden import cases


def main() -> None:
    os.environ["NO_COLOR"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        cases.make_model(Path(folder) / "tiny")
        changed = [name for name in cases.names() if _rewrite(name, Path(folder))]
    sys.stdout.write("".join(f"{name}.txt\n" for name in changed) or "nothing changed\n")


def _rewrite(name: str, folder: Path) -> bool:
    path = cases.HERE / f"{name}.txt"
    before = path.read_text(encoding="utf-8") if path.exists() else None
    after = cases.answer(name, folder)
    path.write_text(after, encoding="utf-8")
    return before != after


if __name__ == "__main__":
    main()
