"""Write the table of `io.servable` into docs/formats.md, between its two marks. Prints nothing.

python scripts/servable_table.py
"""

from pathlib import Path

from moecli.io.servable import markdown

PAGE = Path(__file__).parents[1] / "docs" / "formats.md"
START, END = "<!-- table: python scripts/servable_table.py -->", "<!-- end of table -->"


def main() -> None:
    before, rest = PAGE.read_text("utf-8").split(START)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{START}\n{markdown()}\n{END}{after}", "utf-8")


if __name__ == "__main__":
    main()
