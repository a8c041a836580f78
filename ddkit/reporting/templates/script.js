"use strict";
// Sorting and arrow keys; everything else works without a script.
function valueOf(row, column) {
  const cell = row.cells[column];
  const text = cell.dataset.sort ?? cell.textContent.trim();
  const number = Number(text);
  return text !== "" && Number.isFinite(number) ? number : text;
}

function compare(a, b) {
  if (typeof a === "number" && typeof b === "number") return a - b;
  return String(a).localeCompare(String(b), undefined, { numeric: true });
}

function sortBy(table, header, column) {
  // Numbers are wanted largest first, names from A; a second click turns it round.
  const first = header.classList.contains("num") && header.textContent.trim() !== "#" ? "descending" : "ascending";
  const other = first === "ascending" ? "descending" : "ascending";
  const order = header.getAttribute("aria-sort") === first ? other : first;
  for (const th of table.tHead.rows[0].cells) th.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", order);
  const sign = order === "ascending" ? 1 : -1;
  const body = table.tBodies[0];
  const rows = [...body.rows].map((row) => [valueOf(row, column), row]);
  rows.sort((a, b) => sign * compare(a[0], b[0]));
  body.append(...rows.map(([, row]) => row));
}

for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((header, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = header.textContent;
    button.addEventListener("click", () => sortBy(table, header, column));
    header.replaceChildren(button);
  });
}

// One stop of the Tab key for each sheet of pictures; arrow keys go from class to class within it.
for (const sheet of document.querySelectorAll(".sheet")) {
  const strips = [...sheet.querySelectorAll(".strip")];
  strips.forEach((strip, place) => { strip.tabIndex = place === 0 ? 0 : -1; });
  sheet.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1 }[event.key];
    const place = strips.indexOf(document.activeElement);
    if (step === undefined || place < 0) return;
    const next = strips[Math.min(strips.length - 1, Math.max(0, place + step))];
    strips[place].tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
    event.preventDefault();
  });
}

// A link to an entry opens it.
function openTarget() {
  const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (target instanceof HTMLDetailsElement) target.open = true;
}
addEventListener("hashchange", openTarget);
openTarget();

// What is folded is printed as well, and folded again after that.
const folded = [];
addEventListener("beforeprint", () => {
  for (const box of document.querySelectorAll("details:not([open], .repeats)")) { box.open = true; folded.push(box); }
});
addEventListener("afterprint", () => { for (const box of folded.splice(0)) box.open = false; });
