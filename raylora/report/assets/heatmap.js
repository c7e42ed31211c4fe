// Heat maps, on a canvas that holds only what is in sight; that of experiments by subjects, and its table.

const GROUP_NAMES = { stem: "STEM", humanities: "humanities", social_sciences: "social sciences", other: "other" };
const shortSubject = (name) => name.replaceAll("_", " ").replace("high school", "HS").replace("professional", "prof.").replace("college", "coll.").replace("government and politics", "government").replace("conceptual", "conc.").replace("elementary", "elem.");

/** A colour of the diverging scale: -1 the worst loss, 0 no change, 1 the best gain. */
function diverging() {
  const parse = (name) => colour(name).match(/[0-9a-f]{2}/gi).map((pair) => parseInt(pair, 16));
  const stops = ["low", "low-mid", "mid", "high-mid", "high"].map(parse);
  return (t) => {
    const place = 2 + 2 * Math.max(-1, Math.min(1, t));
    const k = Math.min(3, Math.floor(place));
    return `rgb(${stops[k].map((c, j) => Math.round(c + (place - k) * (stops[k + 1][j] - c))).join(" ")})`;
  };
}

function drawSubjects() {
  const host = body("subjects");
  const found = DATA.subjects;
  if (!found || !Object.keys(found.rows).length) {
    host.append(note(RANKED.length ? "The answers question by question (scores.parquet) are missing, or are those of another run." : "Without the mmlu stage there are no subjects to compare."));
    return;
  }
  const groups = Object.keys(GROUP_NAMES);
  const order = found.names.map((_, s) => s).sort((a, b) => groups.indexOf(found.groups[a]) - groups.indexOf(found.groups[b]) || found.names[a].localeCompare(found.names[b]));
  const rows = ASKED.filter((i) => found.rows[i]);
  const change = (i, s) => (found.rows[i].gained[s] - found.rows[i].lost[s]) / found.sizes[s];
  const real = (i, s) => ["gain", "loss"].includes(found.rows[i].verdicts[s]);
  const mean = found.names.map((_, s) => rows.reduce((sum, i) => sum + change(i, s), 0) / rows.length);
  const sizes = rows.flatMap((i) => order.map((s) => Math.abs(change(i, s)))).sort((a, b) => a - b);
  const limit = Math.max(0.01, sizes[Math.floor(0.98 * (sizes.length - 1))]);
  const numReal = rows.reduce((sum, i) => sum + order.filter((s) => real(i, s)).length, 0);
  const [fewest, most] = extent(found.sizes);
  host.append(note(
    "Change from the base by subject, in percentage points. ",
    el("b", {}, `${count(numReal, "cell")} of ${(rows.length * order.length).toLocaleString("en")} ${numReal === 1 ? "is" : "are"} significant`),
    " (dotted): the p-values of McNemar's exact test and of balanced accuracy's change are both below 0.05, Holm-adjusted over each experiment's subjects. ",
    `A subject has ${fewest === most ? fewest : `${fewest} to ${most.toLocaleString("en")}`} questions: a single one moves a cell by ${fewest === most ? "" : "up to "}${(100 / fewest).toFixed(1)} points, so most of what is pale is chance.`,
    found.num_left_out ? ` ${count(found.num_left_out, "experiment")} left out: the answers are missing.` : ""));
  const sort = el("select", { "aria-label": "Order of the rows" }, el("option", { value: "change" }, "overall change"), el("option", { value: "name" }, "name"), ...order.map((s) => el("option", { value: s }, found.names[s].replaceAll("_", " "))));
  const scaleBar = el("i", { class: "scale" });
  host.append(el("div", { class: "tools" }, el("label", {}, "Rows by", sort), el("span", { class: "key" }, `${MINUS}${(100 * limit).toFixed(0)}`, scaleBar, `+${(100 * limit).toFixed(0)} points and beyond`)));

  const map = heatMap(host, {
    label: "Heat map of the change by experiment and subject; the table below has its figures",
    rows, columns: order, limit, scaleBar, mean, real, value: change,
    columnLabel: (s) => shortSubject(found.names[s]),
    groups: groups.map((group) => ({ name: GROUP_NAMES[group], members: order.filter((s) => found.groups[s] === group) })).filter((group) => group.members.length),
    tip(i, s) {
      if (s === undefined) return [DATA.labels[i], `overall ${pointsOf(i)}`];
      const subject = `${found.names[s].replaceAll("_", " ")} (${count(found.sizes[s], "question")}, base ${percent(found.base[s])})`;
      if (i === undefined) return [subject];
      if (i === null) return [`mean of ${count(rows.length, "experiment")}`, subject, `${points(mean[s])} points`];
      return [DATA.labels[i], subject, `${points(change(i, s))} points: ${found.rows[i].gained[s]} gained, ${found.rows[i].lost[s]} lost`, `Holm p ${pValue(found.rows[i].holm[s])}${real(i, s) ? ": significant" : found.rows[i].verdicts[s] === "letter" ? ": its favourite letter moved" : ""}`];
    },
  });
  sort.addEventListener("change", () => {
    const by = sort.value;
    map.show(by === "change" ? rows : rows.slice().sort((a, b) => (by === "name" ? DATA.labels[a].localeCompare(DATA.labels[b], "en", { numeric: true }) : change(b, Number(by)) - change(a, Number(by)))));
  });
  subjectTable(host, found, order, rows, change, real, mean);
}

/**
 * A heat map of experiments by columns; `show` gives it other rows.
 *
 * spec: `rows` (experiments), `columns` (keys), `value(i, c)` (null: nothing was measured), `limit` (the value of the
 * deepest colour), `real(i, c)` (significant: dotted), `tip(i, c)` (lines of the tooltip; i null: the mean, undefined: the heading),
 * `columnLabel(c)`, `label` (of the picture), `scaleBar`; perhaps `mean` (by column), `groups` of columns, `own(i)` (the
 * column that is outlined), `widest` (pixels of a cell).
 */
function heatMap(host, spec) {
  const { label: title, columns, limit, scaleBar, mean = null, groups = [], own = () => undefined, widest = Infinity, value, real, tip: told, columnLabel } = spec;
  const canvas = el("canvas", { role: "img", "aria-label": title });
  const spacer = el("div", {}, canvas);
  const scroller = el("div", { class: "heat", tabindex: "0" }, spacer);
  host.append(scroller);
  let sorted = spec.rows;
  let view = null;

  function layOut(width) {
    const wide = width >= 800;
    const label = Math.round(Math.min(230, 6.9 * LONGEST_NAME + 14, Math.max(104, width * 0.2)));
    const gap = wide ? 8 : 4; // between groups
    const cell = Math.min(widest, (width - label - gap * Math.max(0, groups.length - 1) - 2) / columns.length);
    const row = sorted.length > 150 ? 13 : 18;
    const top = (cell >= 11 ? 138 : 4) + (groups.length ? 20 : 0);
    const xs = new Map();
    let x = label;
    columns.forEach((s) => {
      if (groups.slice(1).some((group) => group.members[0] === s)) x += gap;
      xs.set(s, x);
      x += cell;
    });
    const first = top + (mean ? row + 6 : 2);
    const total = first + sorted.length * row;
    view = { width, label, cell, row, top, xs, total, first, height: total <= 1000 ? total : 640 };
    scroller.style.height = `${view.height}px`;
    spacer.style.height = `${total}px`;
    canvas.style.width = `${width}px`;
    canvas.style.height = `${view.height}px`;
    paint();
  }

  function paint() {
    if (!view) return;
    const { width, label, cell, row, top, xs, first, height } = view;
    const ratio = Math.min(3, devicePixelRatio || 1);
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    const pen = canvas.getContext("2d");
    const tint = diverging();
    const [ink, soft, panel, mark] = ["ink", "soft", "panel", "chosen"].map(colour);
    const font = (size, weight = 400) => `${weight} ${size}px ${getComputedStyle(document.body).fontFamily}`;
    scaleBar.style.background = `linear-gradient(to right, ${[-1, -0.5, 0, 0.5, 1].map(tint).join(", ")})`;
    pen.scale(ratio, ratio);
    const inset = cell >= 8 ? 1 : 0.3;
    const cells = (y, value, sure, outlined) => columns.forEach((s) => {
      if (value(s) === null) return;
      pen.fillStyle = tint(value(s) / limit);
      pen.fillRect(xs.get(s), y, cell - inset, row - 1);
      if (outlined(s)) {
        pen.strokeStyle = ink;
        pen.strokeRect(xs.get(s) + 0.5, y + 0.5, cell - inset - 1, row - 2);
      }
      if (!sure(s)) return;
      const strong = Math.abs(value(s)) > 0.6 * limit;
      pen.fillStyle = strong ? panel : ink;
      pen.beginPath();
      pen.arc(xs.get(s) + (cell - inset) / 2, y + (row - 1) / 2, Math.min(2.2, cell / 3), 0, 7);
      pen.fill();
    });
    const name = (text, y, weight) => {
      pen.font = font(row >= 16 ? 12 : 10.5, weight);
      pen.textAlign = "left";
      pen.textBaseline = "middle";
      pen.fillText(fitText(pen, text, label - 8, true), 0, y + row / 2);
    };
    const start = Math.max(0, Math.floor(scroller.scrollTop / row));
    const end = Math.min(sorted.length, start + Math.ceil((height - first) / row) + 1);
    for (let k = start; k < end; k++) {
      const i = sorted[k];
      const y = first + k * row - scroller.scrollTop;
      if (i === chosen) { pen.fillStyle = mark; pen.fillRect(0, y, label - 3, row - 1); }
      pen.fillStyle = i === chosen ? ink : soft;
      name(DATA.labels[i], y, i === chosen ? 600 : 400);
      cells(y, (s) => value(i, s), (s) => real(i, s), (s) => own(i) === s);
    }
    pen.fillStyle = panel;
    pen.fillRect(0, 0, width, first - 1);
    if (mean) {
      pen.fillStyle = ink;
      name("mean", top, 600);
      cells(top, (s) => mean[s], () => false, () => false);
    }
    if (cell >= 11) {
      pen.font = font(11);
      pen.textAlign = "left";
      for (const s of columns) {
        pen.save();
        pen.translate(xs.get(s) + cell / 2, top - 5);
        pen.rotate(-Math.PI / 2);
        pen.fillStyle = soft;
        pen.fillText(fitText(pen, columnLabel(s), 132, true), 0, 0);
        pen.restore();
      }
    }
    pen.textBaseline = "alphabetic";
    pen.font = font(12, 600);
    pen.fillStyle = ink;
    for (const { name: heading, members } of groups) {
      const from = xs.get(members[0]);
      const to = xs.get(members.at(-1)) + cell;
      pen.textAlign = "center";
      pen.fillText(fitText(pen, heading, to - from), (from + to) / 2, 13);
      pen.fillRect(from, 18, to - from - inset, 1);
    }
  }

  function hit(event) {
    const box = canvas.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top];
    const s = columns.find((candidate) => x >= view.xs.get(candidate) && x < view.xs.get(candidate) + view.cell);
    if (mean && y >= view.top && y < view.top + view.row) return { i: null, s };
    if (y < view.first) return { i: undefined, s };
    return { i: sorted[Math.floor((y - view.first + scroller.scrollTop) / view.row)], s };
  }
  canvas.addEventListener("pointermove", (event) => {
    const { i, s } = hit(event);
    if (s === undefined && (i === undefined || i === null)) hideTip();
    else showTip(event, ...told(i, s));
  });
  canvas.addEventListener("pointerleave", hideTip);
  canvas.addEventListener("click", (event) => { const { i } = hit(event); if (i !== undefined && i !== null) choose(i); });
  scroller.addEventListener("scroll", paint, { passive: true });
  onChosen(paint);
  onResize(scroller, layOut);
  return { show(rows) { sorted = rows; scroller.scrollTop = 0; paint(); } };
}

function fitText(pen, text, width, ends = false) {
  if (pen.measureText(text).width <= width) return text;
  const tail = ends ? Math.min(9, Math.floor(text.length / 2)) : 0; // the ends of names tell them apart
  const cut = (num) => `${text.slice(0, num)}…${text.slice(text.length - tail)}`;
  let [low, high] = [0, text.length - tail];
  while (low < high) {
    const middle = Math.ceil((low + high) / 2);
    if (pen.measureText(cut(middle)).width <= width) low = middle;
    else high = middle - 1;
  }
  return low ? cut(low) : "";
}

function subjectTable(host, found, order, rows, change, real, mean) {
  const extreme = (better) => found.names.map((_, s) => rows.reduce((best, i) => (better(change(i, s), change(best, s)) ? i : best), rows[0]));
  const [best, worst] = [extreme((a, b) => a > b), extreme((a, b) => a < b)];
  const num = found.names.map((_, s) => rows.filter((i) => real(i, s)).length);
  const details = el("details", {}, el("summary", {}, "The same as a table of subjects"));
  host.append(details);
  details.addEventListener("toggle", () => {
    if (!details.open || details.querySelector(".vt")) return;
    const titled = (who) => (s) => `${points(change(who[s], s))} ${DATA.labels[who[s]]}`;
    new Table(details, [
      { key: "subject", title: "Subject", value: (s) => found.names[s], text: (s) => found.names[s].replaceAll("_", " "), width: (w) => Math.min(250, 0.42 * w) },
      { key: "group", title: "Group", value: (s) => found.groups[s], text: (s) => GROUP_NAMES[found.groups[s]], width: 120, from: 700 },
      { key: "size", title: "Questions", value: (s) => found.sizes[s], text: (s) => String(found.sizes[s]), num: true, width: 90, from: 560 },
      { key: "base", title: "Base", hint: "Accuracy of the base", value: (s) => found.base[s], text: (s) => percent(found.base[s]), num: true, width: 74 },
      { key: "mean", title: "Mean", hint: "Mean change over experiments, points", value: (s) => mean[s], text: (s) => points(mean[s]), num: true, width: 70 },
      { key: "real", title: "Significant", hint: "Experiments with a significant change", value: (s) => num[s], text: (s) => String(num[s]), num: true, width: 96 },
      { key: "best", title: "Best", value: (s) => change(best[s], s), text: titled(best), first: "descending", from: 760 },
      { key: "worst", title: "Worst", value: (s) => change(worst[s], s), text: titled(worst), from: 900 },
    ], { name: "subjects", rows: order, sort: "mean", search: (s) => `${found.names[s].replaceAll("_", " ")} ${found.groups[s]}`, height: 460, onRow: null });
  });
}
