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

// Every figure can be taken along: its drawing as SVG with the colours it has now, its numbers as CSV.
const PAINT = ["fill", "stroke", "stroke-width", "stroke-dasharray", "stroke-linecap", "stroke-linejoin", "font-family",
  "font-size", "font-weight", "text-anchor", "opacity", "paint-order"];
const SHAPE = ["x", "y", "width", "height"];

function asSvg(drawing) {
  const copy = drawing.cloneNode(true);
  const box = drawing.getBoundingClientRect();
  const view = drawing.viewBox.baseVal;
  const wide = view && view.width ? view.width : box.width, tall = view && view.height ? view.height : box.height;
  const from = [drawing, ...drawing.querySelectorAll("*")], to = [copy, ...copy.querySelectorAll("*")];
  from.forEach((element, i) => {
    if (element.tagName === "title") return;
    const style = getComputedStyle(element);
    const names = element.tagName === "rect" ? [...PAINT, ...SHAPE.slice(2)] : PAINT;
    to[i].setAttribute("style", names.map((name) => `${name}:${style.getPropertyValue(name)}`).join(";"));
    to[i].removeAttribute("class");
  });
  copy.removeAttribute("style");
  copy.setAttribute("xmlns", drawing.namespaceURI);
  copy.setAttribute("width", wide);
  copy.setAttribute("height", tall);
  const paper = document.createElementNS(drawing.namespaceURI, "rect");
  for (const [name, value] of [["width", "100%"], ["height", "100%"], ["fill", getComputedStyle(document.body).backgroundColor]])
    paper.setAttribute(name, value);
  copy.prepend(paper);
  return new XMLSerializer().serializeToString(copy);
}

function asCsv(tables) {
  const quoted = (text) => (/[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  return tables.map((table) => [...table.rows].map((row) =>
    [...row.cells].map((cell) => quoted(cell.textContent.trim())).join(",") + "\n").join("")).join("\n");
}

function save(text, type, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

for (const figure of document.querySelectorAll("figure")) {
  const drawing = figure.querySelector("svg:not(.dots)");
  const tables = [...figure.querySelectorAll(".data table")];
  const label = figure.querySelector("figcaption b")?.textContent.replace(".", "") ?? "Figure";
  const stem = `${document.querySelector("h1").textContent} ${label}`.toLowerCase().replace(/[^a-z0-9]+/g, "-");
  const bar = document.createElement("div");
  bar.className = "export";
  const offer = (kind, act) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = kind;
    button.setAttribute("aria-label", `Download ${label} as ${kind}`);
    button.addEventListener("click", act);
    bar.append(button);
  };
  if (drawing) offer("SVG", () => save(asSvg(drawing), "image/svg+xml", `${stem}.svg`));
  if (tables.length) offer("CSV", () => save(asCsv(tables), "text/csv", `${stem}.csv`));
  if (bar.childElementCount) figure.append(bar);
}
