"use strict";
// What all figures share: the data, elements, numbers as text, the tooltip, the chosen experiment, the theme.
// Text reaches the page through textContent alone: names come from users' files.

const DATA = JSON.parse(document.getElementById("data").textContent);
const NUM_ROWS = DATA.labels.length;

function make(namespace, tag, attributes, children) {
  const node = namespace ? document.createElementNS(namespace, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") Object.assign(node.style, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}
const el = (tag, attributes, ...children) => make(null, tag, attributes, children);
const svg = (tag, attributes, ...children) => make("http://www.w3.org/2000/svg", tag, attributes, children);
const body = (section) => document.querySelector(`#${section} .body`);
const note = (...children) => el("p", { class: "note" }, ...children);

// Columns of the table, by name

const COLUMNS = new Map(DATA.table.columns.map((name, i) => [name, DATA.table.values[i]]));
const EMPTY = new Array(NUM_ROWS).fill(null);
const column = (name) => COLUMNS.get(name) || EMPTY;
const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
const numbers = (name) => column(name).map((value) => (isNumber(value) ? value : null));
const CHANGE = numbers("accuracy_change").map((value, i) => (DATA.ok[i] ? value : null));
const LOW = numbers("accuracy_change_low");
const HIGH = numbers("accuracy_change_high");
const HOLM = DATA.ranking.holm;
const FDR = DATA.ranking.fdr;
const SHRUNK = DATA.ranking.accuracy_change_shrunk;
const ALPHA = DATA.ranking.alpha;
const VERDICT = DATA.ranking.verdicts;
const isReal = (i) => VERDICT[i] === "gain" || VERDICT[i] === "loss";
const tone = (i) => (isReal(i) ? VERDICT[i] : "none");

// Numbers as text

const MINUS = "\u2212";
const signed = (text) => text.replace("-", MINUS);
function points(share, digits = 1) {
  if (!isNumber(share)) return "–";
  const text = (100 * share).toFixed(digits);
  return Number(text) === 0 ? (0).toFixed(digits) : (share > 0 ? "+" : MINUS) + text.replace("-", "");
}
const percent = (share, digits = 1) => (isNumber(share) ? `${(100 * share).toFixed(digits)}%` : "–");
const pValue = (p) => (!isNumber(p) ? "–" : p < 0.001 ? "<0.001" : p > 0.9995 ? "1" : p.toFixed(3));
function short(value) {
  if (!isNumber(value)) return value === null || value === undefined ? "" : String(value);
  if (Number.isInteger(value)) return signed(Math.abs(value) < 1e15 ? value.toLocaleString("en") : value.toExponential(3));
  const size = Math.abs(value);
  return signed(size >= 1e5 || size < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(4))));
}
function duration(seconds) {
  if (!isNumber(seconds)) return "–";
  if (seconds < 60) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
  if (seconds < 3600) return `${(seconds / 60).toFixed(1)} min`;
  return `${(seconds / 3600).toFixed(seconds < 36000 ? 2 : 1)} h`;
}
/** A name whose end is kept where it is too long: names of one chunk often differ in their ends alone. */
function nameCell(name) {
  const tail = Math.min(9, Math.floor(name.length / 2));
  return el("span", { class: "name", title: name }, el("span", {}, name.slice(0, name.length - tail)), el("span", {}, name.slice(name.length - tail)));
}
const LONGEST_NAME = DATA.labels.reduce((most, name) => Math.max(most, name.length), 8);
const nameWidth = (share) => (width) => Math.min(290, 7.6 * LONGEST_NAME + 26, share * width);
const count = (num, what, many = `${what}s`) => `${num.toLocaleString("en")} ${num === 1 ? what : many}`;

/** About `num` round numbers that span low to high. */
function ticks(low, high, num) {
  const span = high - low || Math.abs(high) || 1;
  const raw = span / Math.max(num, 1);
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((k) => k * power).find((s) => s >= raw * 0.7);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) found.push(Number((k * step).toPrecision(12)));
  return found;
}
const extent = (values) => values.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);

// The tooltip

const tip = document.getElementById("tip");
function showTip(event, title, ...lines) {
  tip.replaceChildren(el("b", {}, title), ...lines.filter(Boolean).map((line) => el("div", {}, line)));
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const x = Math.min(event.clientX + 14, innerWidth - box.width - 8);
  const y = event.clientY + 18 + box.height > innerHeight ? event.clientY - box.height - 12 : event.clientY + 18;
  tip.style.left = `${Math.max(8, x)}px`;
  tip.style.top = `${Math.max(8, y)}px`;
}
const hideTip = () => { tip.hidden = true; };
addEventListener("scroll", hideTip, { passive: true });

// The chosen experiment: a click anywhere marks it everywhere

let chosen = null;
const followers = [];
const onChosen = (follow) => followers.push(follow);
function choose(i) {
  chosen = chosen === i ? null : i;
  const bar = document.getElementById("chosen");
  bar.hidden = chosen === null;
  if (chosen !== null) {
    const folder = DATA.folders[chosen];
    bar.replaceChildren(
      el("span", { class: "name" }, DATA.labels[chosen]),
      CHANGE[chosen] === null ? null : el("span", { class: tone(chosen) }, `${points(CHANGE[chosen])} points`),
      DATA.logs[chosen] ? el("a", { href: `experiments/${encodeURIComponent(folder)}/log.txt` }, "log") : "",
      el("button", { class: "link", type: "button", onclick: () => choose(chosen), "aria-label": "Choose none" }, "clear"),
    );
  }
  followers.forEach((follow) => follow());
}

// Redrawing: figures that are drawn in pixels follow the width of their place and the theme

const redraws = [];
function onResize(node, draw) {
  let width = 0;
  const update = () => { if (node.clientWidth) { width = node.clientWidth; draw(width); } };
  redraws.push(update);
  new ResizeObserver(() => { if (node.clientWidth !== width) update(); }).observe(node);
}
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

const root = document.documentElement;
const prefersDark = matchMedia("(prefers-color-scheme: dark)");
function setTheme(theme) {
  root.dataset.theme = theme;
  redraws.forEach((draw) => draw());
}
try {
  if (localStorage.getItem("raylora-theme")) root.dataset.theme = localStorage.getItem("raylora-theme");
} catch { /* a browser may keep nothing for files */ }
prefersDark.addEventListener("change", () => redraws.forEach((draw) => draw()));
document.getElementById("theme").addEventListener("click", () => {
  const theme = (root.dataset.theme || (prefersDark.matches ? "dark" : "light")) === "dark" ? "light" : "dark";
  setTheme(theme);
  try { localStorage.setItem("raylora-theme", theme); } catch { /* as above */ }
});
