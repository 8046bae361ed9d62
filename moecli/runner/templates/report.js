"use strict";
// Sortable tables: each heading becomes a button. Without this script the tables read as they are.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const value = (row, column) => {
    const cell = row.cells[column];
    return cell.dataset.sort ?? cell.textContent.trim();
  };
  const compare = (a, b) => {
    const x = Number(a === "inf" ? Infinity : a), y = Number(b === "inf" ? Infinity : b);
    return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b, "en", { numeric: true }) : x - y;
  };
  heads.forEach((head, column) => {
    if (head.dataset.nosort !== undefined) return;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const known = [], unknown = [];
      for (const row of [...body.rows]) (value(row, column) === "" ? unknown : known).push(row);
      known.sort((a, b) => compare(value(a, column), value(b, column)) * (down ? -1 : 1));
      body.append(...known, ...unknown);
    });
  });
}
