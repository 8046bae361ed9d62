"""Write what was measured on the small model into docs/measured.md, from the records in docs/measured/.

python scripts/measured_table.py                                        # the page from the records
python scripts/measured_table.py --add runs/small-table/rows.jsonl bits  # first take new rows of small_table.py in

A record is a line of docs/measured/NAME.jsonl: row, seed, MiB, and value, standard error and paired standard error of
the difference to the base for bits per byte and accuracy. Rows that are there already are replaced.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
START, END = "<!-- {name}: python scripts/measured_table.py -->", "<!-- end of {name} -->"
METRICS = ("bits_per_byte", "acc")
Record = dict[str, Any]


def add(rows: Path, name: str) -> None:
    known = {(r["row"], r["seed"]): r for r in read(name)}
    for text in rows.read_text("utf-8").splitlines():
        found = json.loads(text)
        if "error" in found:
            continue
        known["base", 0] = _short("base", 0, found["base"])
        known[found["row"], found["seed"]] = _short(found["row"], found["seed"], found)
    lines = [json.dumps(record) for _, record in sorted(known.items())]
    (DOCS / "measured" / f"{name}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")


def _short(row: str, seed: int, found: Record) -> Record:
    numbers = {
        metric: [
            None if found[metric][k] is None else round(found[metric][k], 5) for k in ("value", "stderr", "paired")
        ]
        for metric in METRICS
    }
    return {"row": row, "seed": seed, "mib": round(found["mib"], 2), **numbers}


def read(name: str) -> list[Record]:
    path = DOCS / "measured" / f"{name}.jsonl"
    return [json.loads(text) for text in path.read_text("utf-8").splitlines()] if path.exists() else []


class Table:
    """Rows of one file of records by name."""

    def __init__(self, name: str) -> None:
        self.rows: dict[str, list[Record]] = {}
        for record in read(name):
            self.rows.setdefault(record["row"], []).append(record)

    def cell(self, row: str, metric: str) -> str:
        found = self.rows.get(row)
        if found is None:
            return ""
        values = [record[metric][0] for record in found]
        spread = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else found[0][metric][2]
        digits = 4 if metric == "bits_per_byte" else 3
        return f"{statistics.fmean(values):.{digits}f}" + (f" ± {spread:.{digits}f}" if spread else "")

    def mib(self, row: str) -> str:
        return f"{self.rows[row][0]['mib']:.1f}" if row in self.rows else ""


def experts() -> str:
    """One line a recipe, both sizes side by side."""
    table = Table("experts")
    names = {row: row.replace("-24", "-N").replace("-28-", "-N+4-") for row in table.rows if "-24" in row}
    names = {row: name for row, name in names.items() if "int4" not in name}
    order = sorted(names, key=lambda row: table.rows[row][0]["bits_per_byte"][0])
    lines = [
        "| recipe | 24 of 32: bits per byte | accuracy | 16 of 32: bits per byte | accuracy |",
        "|---|---|---|---|---|",
    ]
    lines.append(f"| the model itself | {' | '.join(table.cell('base', metric) for metric in METRICS)} | | |")
    for row in order:
        half = row.replace("-28-", "-20-").replace("-24", "-16")
        cells = [table.cell(which, metric) for which in (row, half) for metric in METRICS]
        lines.append(f"| {names[row]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def channels() -> str:
    """One line a method, scope and repair; sizes side by side."""
    table, ratios = Table("channels"), ("0.2", "0.4", "0.6")
    names = dict.fromkeys(row.replace("-0.2", "-R") for row in table.rows if "-0.2" in row and "-0.25" not in row)
    head = "".join(f" {ratio} dropped: bits per byte | accuracy |" for ratio in ratios)
    lines = [f"| recipe |{head}", "|---|" + "---|---|" * len(ratios)]

    def middle(name: str) -> float:
        rows = table.rows.get(name.replace("-R", "-0.4")) or table.rows[name.replace("-R", "-0.2")]
        return statistics.fmean(row["bits_per_byte"][0] for row in rows)

    for name in sorted(names, key=middle):
        cells = [table.cell(name.replace("-R", f"-{ratio}"), metric) for ratio in ratios for metric in METRICS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plain(name: str, only: str = "") -> str:
    table = Table(name)
    rows = [row for row in table.rows if only in row and row != "base"]
    lines = ["| recipe | MiB | bits per byte | accuracy |", "|---|---|---|---|"]
    lines.append(f"| the model itself | {table.mib('base')} | {' | '.join(table.cell('base', m) for m in METRICS)} |")
    for row in sorted(rows, key=lambda row: table.rows[row][0]["bits_per_byte"][0]):
        lines.append(f"| {row} | {table.mib(row)} | {' | '.join(table.cell(row, m) for m in METRICS)} |")
    return "\n".join(lines)


def page(text: str) -> str:
    """The page with its tables made anew."""
    tables = {
        "experts": experts(), "channels": channels(), "aligned": plain("channels", "aligned"), "bits": plain("bits"),
    }  # fmt: skip
    for name, made in tables.items():
        start, end = START.format(name=name), END.format(name=name)
        before, rest = text.split(start)
        text = f"{before}{start}\n{made}\n{end}{rest.split(end)[1]}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--add", nargs=2, metavar=("ROWS", "NAME"), help="rows.jsonl and experts, channels or bits")
    args = parser.parse_args()
    if args.add:
        add(Path(args.add[0]), args.add[1])
    path = DOCS / "measured.md"
    path.write_text(page(path.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
