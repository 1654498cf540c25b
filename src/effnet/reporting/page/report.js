"use strict";

const find = (selector, within = document) => within.querySelector(selector);
const every = (selector, within = document) => [...within.querySelectorAll(selector)];
const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)}%`;

// Wilson's interval at 95 % of a share of n images, as metrics/intervals.py has it.
function wilson(count, n) {
  const z = 1.959963984540054;
  const share = count / n;
  const weight = (z * z) / n;
  const middle = (share + weight / 2) / (1 + weight);
  const reach = (z / (1 + weight)) * Math.sqrt((share * (1 - share)) / n + weight / (4 * n));
  return [count ? Math.max(0, middle - reach) : 0, count === n ? 1 : Math.min(1, middle + reach)];
}

// when to answer

const { points, n } = JSON.parse(find("#points").textContent);
const slider = find("#share");
const handle = find("#handle");
const curve = find("svg:has(#handle) .first").getAttribute("points").split(" ").map((place) => place.split(","));

function choose() {
  const [least, answered, right] = points[slider.value];
  const [low, high] = wilson(right, answered).map((share) => percent(share));
  const words = `Answers from ${percent(least)} confidence on: ${percent(answered / n)} of the images are answered, `
    + `${percent(right / answered)} of the answers are right (${low} to ${high}). Wrong answers: ${answered - right}; `
    + `images left to people: ${n - answered}.`;
  find("#chosen").textContent = words;
  slider.setAttribute("aria-valuetext", `${percent(least)} confidence, ${percent(answered / n)} answered`);
  [handle.cx.baseVal.value, handle.cy.baseVal.value] = curve[slider.value].map(Number);
}

slider.addEventListener("input", choose);
find("#slider").hidden = false;
choose();

// cells of the confusion matrix open their pictures

function open() {
  const shown = location.hash.startsWith("#cell-") && document.getElementById(location.hash.slice(1));
  if (!shown) return;
  for (let part = shown; part; part = part.parentElement) {
    if (part.tagName === "DETAILS") part.open = true;
  }
  const details = shown.closest("details");
  find("summary", details).focus({ preventScroll: true });
  details.scrollIntoView({ block: "nearest" });
}

window.addEventListener("hashchange", open);
for (const link of every(".matrix a")) {
  link.addEventListener("click", () => {
    if (location.hash === link.getAttribute("href")) open(); // the same cell again
  });
}
open();

// sorting the classes: each heading is a button

const table = find("#scores");
const body = find("tbody", table);
const headings = every("thead th", table);
let column = 0; // of the cells; a heading may span several

const value = (cell) => (cell.dataset.v === undefined ? cell.textContent : Number(cell.dataset.v));
const compare = (a, b) => (typeof a === "number" ? a - b : a.localeCompare(b));

for (const heading of headings) {
  const place = column + heading.colSpan - 1;
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = heading.textContent;
  heading.replaceChildren(button);
  column += heading.colSpan;
  button.addEventListener("click", () => {
    const falling = heading.getAttribute("aria-sort") === "ascending";
    const rows = [...body.rows].sort((a, b) => compare(value(a.cells[place]), value(b.cells[place])));
    for (const other of headings) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", falling ? "descending" : "ascending");
    body.replaceChildren(...(falling ? rows.reverse() : rows));
  });
}

// on paper every part is open but the pictures of the cells

window.addEventListener("beforeprint", () => {
  for (const details of every("section > details")) details.open = true;
});
