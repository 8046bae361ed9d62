"""docs/measured.md shows the records beside it."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tables():
    spec = importlib.util.spec_from_file_location("measured_table", ROOT / "scripts" / "measured_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_made_from_the_records(tables):
    text = (ROOT / "docs" / "measured.md").read_text("utf-8")
    assert tables.page(text) == text, "run `python scripts/measured_table.py`"
    assert text.count("| the model itself | 1.2971 | 0.555 |") == 1


def test_rows_that_are_added_show(tables, tmp_path, monkeypatch):
    """And replace what was there under their name; rows that failed do not."""
    number = {"value": 1.5, "stderr": None, "paired": 0.01}
    good = {"mib": 10.0, "bits_per_byte": number, "acc": number}
    monkeypatch.setattr(tables, "DOCS", tmp_path)
    (tmp_path / "measured").mkdir()
    rows = tmp_path / "rows.jsonl"
    for value in (1.75, 1.25):
        number["value"] = value
        rows.write_text(
            tables.json.dumps({"row": "rtn-4", "seed": 0, "base": good, **good})
            + "\n"
            + tables.json.dumps({"row": "gptq-4", "seed": 0, "error": "no"})
        )
        tables.add(rows, "bits")
    assert tables.plain("bits").splitlines()[2:] == [
        "| the model itself | 10.0 | 1.2500 ± 0.0100 | 1.250 ± 0.010 |",
        "| rtn-4 | 10.0 | 1.2500 ± 0.0100 | 1.250 ± 0.010 |",
    ]
