"""What `moecli compare` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moecli.runner.compare import Comparison


def comparison_text(found: Comparison) -> str:
    """A row a metric, totals below a rule of their own, then what was left out."""
    from moecli.cli.render import table_text
    from moecli.runner.report_words import PAIRED_HEAD, delta_texts, metric_name, number_text, paired_texts, value_text

    head = ["task", "metric", "A", "B", "difference", *PAIRED_HEAD, "documents", "detects"]
    rows = [
        [
            row.task, metric_name(row), value_text(row.before, None), value_text(row.after, None),
            " ".join(delta_texts(row)).strip(), *paired_texts(row), f"{row.samples:,}",
            number_text(row.paired.detectable) if row.paired else "–",
        ]
        for row in (*found.rows, *found.totals)
    ]  # fmt: skip
    notes = [f"note: {note}" for note in found.notes]
    return "\n".join(
        [f"A  {found.a}", f"B  {found.b}", "", table_text(head, rows, right=range(2, len(head))), "", LEGEND, *notes]
    )


LEGEND = """\
The interval (95 %) is of the paired difference, × of the ratio B / A. `lost` went from right to wrong, `gained` back;
p is McNemar's exact test; `detects` is the smallest true difference that so many documents and flips would show four
times in five."""
