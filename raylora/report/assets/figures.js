// Figures of lines and points: training losses; a feature against the change.

/** Axes of a plot: scales, rules and labels, drawn into `figure`. x and y: { low, high, log, title, tick } */
function axes(figure, width, height, x, y, right = 14) {
  const margin = { left: 52, right, top: 24, bottom: 44 };
  const [w, h] = [width - margin.left - margin.right, height - margin.top - margin.bottom];
  const place = (a, length) => {
    const f = a.log ? Math.log10 : (v) => v;
    const [low, high] = [f(a.low), f(a.high)];
    return (v) => (length * (f(v) - low)) / (high - low || 1);
  };
  const [px, py] = [place(x, w), place(y, h)];
  const at = { x: (v) => margin.left + px(v), y: (v) => margin.top + h - py(v) };
  const marks = (a, num) => {
    if (!a.log) return ticks(a.low, a.high, num);
    const [first, last] = [Math.floor(Math.log10(a.low)), Math.ceil(Math.log10(a.high))];
    const within = (digits) => Array.from({ length: last - first + 1 }, (_, e) => digits.map((d) => Number(`${d}e${first + e}`))).flat().filter((v) => v >= a.low && v <= a.high);
    const choices = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 5], [1, 3], [1]].map(within);
    return choices.find((found) => found.length <= num + 1) || choices[3].filter((_, k) => k % Math.ceil(choices[3].length / num) === 0);
  };
  const text = (attributes, words) => svg("text", attributes, words);
  for (const v of marks(y, 5)) {
    figure.append(svg("line", { class: v === 0 && y.zero ? "zero" : "rule", x1: margin.left, x2: margin.left + w, y1: at.y(v), y2: at.y(v) }));
    figure.append(text({ x: margin.left - 7, y: at.y(v) + 4, "text-anchor": "end" }, y.tick ? y.tick(v) : short(v)));
  }
  for (const v of marks(x, Math.max(4, Math.floor(w / 80)))) figure.append(text({ x: at.x(v), y: margin.top + h + 17, "text-anchor": "middle" }, x.tick ? x.tick(v) : short(v)));
  figure.append(text({ class: "strong", x: margin.left + w / 2, y: height - 6, "text-anchor": "middle" }, x.title));
  figure.append(text({ class: "strong", x: 2, y: 12 }, y.title));
  return { ...at, w, h, margin };
}

/** The nearest of points [{ px, py, ... }] to a pointer, within `reach` pixels. */
function nearest(points, event, node, reach) {
  const box = node.getBoundingClientRect();
  const [x, y] = [event.clientX - box.left, event.clientY - box.top];
  let [best, least] = [null, reach * reach];
  for (const point of points) {
    const distance = (point.px - x) ** 2 + (point.py - y) ** 2;
    if (distance < least) [best, least] = [point, distance];
  }
  return best;
}

function drawLosses() {
  const host = body("losses");
  const rows = Object.keys(DATA.curves).map(Number);
  if (!rows.length) {
    host.append(note("No loss curve was found: without the train stage there is none."));
    return;
  }
  const ranked = ASKED.filter((i) => DATA.curves[i]);
  const marked = ranked.length >= 5 ? 2 : ranked.length >= 2 ? 1 : 0;
  const [up, down] = [new Set(ranked.slice(0, marked)), new Set(ranked.slice(ranked.length - marked))];
  host.append(note("Training loss at each optimizer step: mean cross-entropy of the supervised tokens, in nats per token; a long curve is drawn by the means of 80 stretches. ",
    marked ? `Coloured: the ${marked === 1 ? "best and the worst change" : `${marked} best and the ${marked} worst changes`} in accuracy. ` : "",
    "A low loss says that the answers are easy to learn, not that they help."));
  const unit = el("select", { "aria-label": "Horizontal axis" }, el("option", { value: "step" }, "optimizer steps"), el("option", { value: "share" }, "share of the training"));
  const log = el("input", { type: "checkbox" });
  host.append(el("div", { class: "tools" }, el("label", {}, "Over", unit), el("label", {}, log, "logarithmic loss")));
  const figure = svg("svg", { role: "img", "aria-label": "Training loss of every experiment" });
  host.append(el("div", { class: "figure" }, figure));
  const labelOf = (i) => `${DATA.labels[i].length > 30 ? `${DATA.labels[i].slice(0, 18)}…${DATA.labels[i].slice(-11)}` : DATA.labels[i]} ${points(CHANGE[i])}`;
  const coloured = [...up, ...down];
  const longestLabel = Math.max(0, ...coloured.map((i) => labelOf(i).length));
  const names = el("div", { class: "keys" }, ...coloured.map((i) => el("span", { class: `key ${up.has(i) ? "gain" : "loss"}` }, labelOf(i))));
  host.append(names);
  let drawn = [];
  const paths = new Map();

  function draw(width) {
    const height = width < 500 ? 300 : 400;
    figure.setAttribute("viewBox", `0 0 ${width} ${height}`);
    figure.setAttribute("height", height);
    figure.replaceChildren();
    const share = unit.value === "share";
    const lengths = rows.map((i) => DATA.curves[i].steps.at(-1));
    const everything = rows.flatMap((i) => DATA.curves[i].losses);
    const positive = everything.filter((v) => v > 0);
    const useLog = log.checked && positive.length > 0;
    const [low, high] = useLog ? extent(positive) : extent([0, ...everything]);
    const x = { low: share ? 0 : 1, high: share ? 1 : Math.max(2, ...lengths), title: share ? "share of the training" : "optimizer step", tick: share ? (v) => percent(v, 0) : null };
    const at = axes(figure, width, height, x, { low, high: high * 1.03, log: useLog, zero: true, title: "loss (nats per token)" }, width < 700 ? 14 : Math.min(260, 6.6 * longestLabel + 40));
    drawn = [];
    paths.clear();
    const order = [...rows.filter((i) => !up.has(i) && !down.has(i)), ...down, ...up];
    for (const i of order) {
      const { steps, losses } = DATA.curves[i];
      const last = steps.at(-1) || 1;
      const coordinates = steps.map((s, k) => [at.x(share ? s / last : s), losses[k]]).filter(([, v]) => !useLog || v > 0).map(([px, v], k) => ({ i, k, px, py: at.y(v) }));
      drawn.push(...coordinates);
      const path = svg("path", { class: `curve${up.has(i) ? " up" : down.has(i) ? " down" : ""}`, d: coordinates.map((c, k) => `${k ? "L" : "M"}${c.px.toFixed(1)} ${c.py.toFixed(1)}`).join("") });
      if (coordinates.length === 1) path.setAttribute("d", `${path.getAttribute("d")}h0.1`);
      paths.set(i, path);
      figure.append(path);
    }
    names.hidden = width >= 700;
    if (width >= 700) labels(at);
    mark();
  }

  /** Names to the right of the plot, each tied to the end of its curve, moved apart where they would touch. */
  function labels(at) {
    const ends = coloured.map((i) => drawn.findLast((p) => p.i === i)).filter(Boolean).sort((a, b) => a.py - b.py);
    const right = at.margin.left + at.w;
    let previous = -Infinity;
    for (const { i, px, py } of ends) {
      const y = Math.max(py, previous + 16);
      previous = y;
      const classes = up.has(i) ? "up" : "down";
      figure.append(svg("path", { class: `leader ${classes}`, d: `M${px + 3} ${py}L${right + 6} ${y}` }), svg("text", { class: classes, x: right + 12, y: y + 4 }, labelOf(i)));
    }
  }

  let hovered = null;
  function mark() {
    for (const [i, path] of paths) path.classList.toggle("on", i === chosen || i === hovered);
    for (const i of [chosen, hovered]) if (paths.has(i)) figure.append(paths.get(i));
  }
  figure.addEventListener("pointermove", (event) => {
    const point = nearest(drawn, event, figure, 30);
    const i = point ? point.i : null;
    if (i !== hovered) { hovered = i; mark(); }
    if (point === null) { hideTip(); return; }
    const { steps, losses } = DATA.curves[i];
    showTip(event, DATA.labels[i], `step ${short(Math.round(steps[point.k]))} of ${short(Math.round(steps.at(-1)))}: ${losses[point.k].toFixed(3)} nats per token`, CHANGE[i] === null ? null : `change ${pointsOf(i)}`);
  });
  figure.addEventListener("pointerleave", () => { hovered = null; mark(); hideTip(); });
  figure.addEventListener("click", (event) => { const point = nearest(drawn, event, figure, 30); if (point) choose(point.i); });
  onChosen(mark);
  onResize(figure.parentNode, draw);
  for (const input of [unit, log]) input.addEventListener("change", () => draw(figure.parentNode.clientWidth));
}
const pointsOf = (i) => `${points(CHANGE[i])} points`;

function drawFeatures() {
  const host = body("features");
  const found = DATA.features;
  const measured = found.columns.filter((f) => f.num_measured > 0);
  if (!measured.length) {
    host.append(note("No feature was measured: the features stage was not run, or none of it succeeded."));
    return;
  }
  const tested = found.num_tested > 0;
  host.append(tested
    ? note("Spearman's rank correlation with the change in accuracy (not in balanced accuracy), over ", `${count(found.num_datasets, "dataset")}${found.grouped ? " (experiments of one dataset count once, by their means)" : ""}. `,
      el("b", {}, `${found.num_raw} of ${found.num_tested} features have p < ${ALPHA}; about ${found.num_expected.toFixed(1)} would by chance. `),
      `After Benjamini and Hochberg's adjustment at 5%, ${found.num_adjusted} remain${found.num_adjusted === 1 ? "s" : ""} (filled bars). A correlation is no cause.`)
    : note(RANKED.length ? "There are fewer than four datasets with both a feature and a change: a rank correlation would say nothing. " : "Without the mmlu stage there is no change to hold the features against. ", "Shown are the values themselves."));
  const [left, right] = [el("div"), el("div")];
  host.append(el("div", { class: "split" }, left, right));
  const scale = cellScale(-1, 1);
  const bar = (k) => {
    const { rho, q_value: q } = measured[k];
    if (rho === null) return el("span", { class: "faded" }, "–");
    const sure = q !== null && q < ALPHA;
    const paint = `var(--${rho > 0 ? "gain" : "loss"})`;
    return el("div", { class: "plot" }, el("i", { class: "zero", style: { left: "50%" } }),
      el("i", { class: "bar", style: { left: scale.left(Math.min(0, rho)), width: `${50 * Math.abs(rho)}%`, background: sure ? paint : "none", boxShadow: `inset 0 0 0 1.5px ${paint}` } }));
  };
  const value = (name) => (k) => measured[k][name];
  const spread = measured.map((f) => numbers(f.name).filter((v, i) => v !== null && DATA.ok[i]).sort((a, b) => a - b));
  const middle = (k) => spread[k][Math.floor((spread[k].length - 1) / 2)];
  const columns = [
    { key: "name", title: "Feature", value: value("name"), draw: (k) => el("span", { title: measured[k].definition }, measured[k].name), width: tested ? (w) => Math.min(205, 0.52 * w) : null },
    ...(tested ? [
      { key: "rho", title: "Correlation", brief: "ρ", hint: "Sort by its size", value: (k) => (measured[k].rho === null ? null : Math.abs(measured[k].rho)), draw: bar, num: false, first: "descending", head: () => el("div", { class: "axis" }, ...[["start", -1], [null, 0], ["end", 1]].map(([edge, v]) => el("span", { class: edge, style: { left: scale.left(v) } }, v > 0 ? `+${v}` : signed(String(v))))) },
      { key: "sign", title: "ρ", value: value("rho"), text: (k) => (measured[k].rho === null ? "–" : signed(measured[k].rho.toFixed(2))), num: true, width: 66 },
      { key: "p", title: "p", value: value("p_value"), text: (k) => pValue(measured[k].p_value), num: true, width: 72, from: 480, first: "ascending" },
      { key: "q", title: "q", hint: "Benjamini-Hochberg adjusted p", value: value("q_value"), text: (k) => pValue(measured[k].q_value), num: true, width: 72, from: 420, first: "ascending" },
      { key: "n", title: "n", hint: "Datasets with both values", value: value("num"), text: (k) => String(measured[k].num), num: true, width: 44, from: 540 },
    ] : [
      { key: "low", title: "Least", value: (k) => spread[k][0], text: (k) => short(spread[k][0]), num: true, width: 78 },
      { key: "median", title: "Median", value: middle, text: (k) => short(middle(k)), num: true, width: 78 },
      { key: "high", title: "Most", value: (k) => spread[k].at(-1), text: (k) => short(spread[k].at(-1)), num: true, width: 78 },
    ]),
  ];
  const shownFirst = measured.reduce((best, f, k) => (Math.abs(f.rho || 0) > Math.abs(measured[best].rho || 0) ? k : best), 0);
  const scatter = makeScatter(right, tested || RANKED.length > 0);
  const table = new Table(left, columns, { name: "features", rows: measured.map((_, k) => k), sort: tested ? "rho" : null, search: (k) => `${measured[k].name} ${measured[k].group} ${measured[k].definition}`, height: 470, whole: 0, onRow: (k) => scatter(measured[k]) });
  table.scroller.style.maxHeight = "470px";
  scatter(measured[shownFirst]);
}

/** A place that draws a feature against the change, or where there is no change its values in order. */
function makeScatter(host, withChange) {
  const title = el("h3");
  const about = note();
  const figure = svg("svg", { role: "img" });
  host.append(title, about, el("div", { class: "figure" }, figure));
  let feature = null;
  let drawn = [];

  function draw(width) {
    if (!feature) return;
    const values = numbers(feature.name);
    let rows = values.map((_, i) => i).filter((i) => DATA.ok[i] && values[i] !== null && (!withChange || CHANGE[i] !== null));
    const height = Math.min(420, Math.max(280, width * 0.7));
    figure.setAttribute("viewBox", `0 0 ${width} ${height}`);
    figure.setAttribute("height", height);
    figure.replaceChildren();
    drawn = [];
    if (!rows.length) return;
    const order = new Map(rows.slice().sort((a, b) => values[a] - values[b]).map((i, k) => [i, k + 1]));
    const y = withChange ? CHANGE : values.map((_, i) => order.get(i));
    let [low, high] = extent(rows.map((i) => values[i]));
    const log = low > 0 && high / low > 30;
    if (log) [low, high] = [low / 1.15, high * 1.15];
    else { const pad = 0.05 * (high - low || Math.abs(high) || 1); [low, high] = [low - pad, high + pad]; }
    let [bottom, top] = withChange ? extent([0, ...rows.map((i) => y[i])]) : [0, rows.length];
    const pad = 0.08 * (top - bottom || 0.02);
    if (withChange) [bottom, top] = [bottom - pad, top + pad];
    const at = axes(figure, width, height, { low, high, log, title: `${feature.name} (${feature.unit}${log ? ", logarithmic" : ""})` },
      withChange ? { low: 100 * bottom, high: 100 * top, zero: true, title: "change in accuracy (percentage points)", tick: (v) => (v > 0 ? `+${v}` : signed(String(v))) } : { low: bottom, high: top, title: "datasets in order of the value" });
    const clip = (v) => Math.min(top, Math.max(bottom, v));
    const atY = (v) => at.y(withChange ? 100 * v : v);
    if (withChange && rows.length <= 150) for (const i of rows) if (LOW[i] !== null && HIGH[i] !== null) figure.append(svg("line", { x1: at.x(values[i]), x2: at.x(values[i]), y1: atY(clip(LOW[i])), y2: atY(clip(HIGH[i])), style: { stroke: `var(--${tone(i)})`, opacity: 0.28 } }));
    for (const i of rows) {
      const paint = `var(--${withChange ? tone(i) : "accent"})`;
      drawn.push({ i, px: at.x(values[i]), py: atY(y[i]) });
      figure.append(svg("circle", { cx: at.x(values[i]), cy: atY(y[i]), r: rows.length > 200 ? 3 : 4.2, class: i === chosen ? "on" : null, style: { fill: isReal(i) || !withChange ? paint : "var(--panel)", stroke: i === chosen ? "" : paint, strokeWidth: i === chosen ? "" : "1.6" } }));
    }
    if (rows.includes(chosen)) {
      const right = at.x(values[chosen]) > width / 2;
      figure.append(svg("text", { class: "strong halo", x: at.x(values[chosen]) + (right ? -8 : 8), y: atY(y[chosen]) - 8, "text-anchor": right ? "end" : "start" }, DATA.labels[chosen]));
    }
  }
  figure.addEventListener("pointermove", (event) => {
    const point = nearest(drawn, event, figure, 24);
    if (!point) { hideTip(); return; }
    const value = numbers(feature.name)[point.i];
    showTip(event, DATA.labels[point.i], `${feature.name}: ${short(value)} ${feature.unit}`, CHANGE[point.i] === null ? null : `change ${pointsOf(point.i)}${LOW[point.i] === null ? "" : `, 95% interval ${points(LOW[point.i])} to ${points(HIGH[point.i])}`}`);
  });
  figure.addEventListener("pointerleave", hideTip);
  figure.addEventListener("click", (event) => { const point = nearest(drawn, event, figure, 24); if (point) choose(point.i); });
  const again = () => draw(figure.parentNode.clientWidth);
  onChosen(again);
  onResize(figure.parentNode, draw);
  return (chosenFeature) => {
    feature = chosenFeature;
    title.textContent = feature.name;
    about.replaceChildren(`${feature.definition}${feature.rho === null ? "" : `. ρ = ${signed(feature.rho.toFixed(2))}, p ${feature.p_value < 0.001 ? "" : "= "}${pValue(feature.p_value)}, n = ${feature.num}`}`);
    figure.setAttribute("aria-label", `${feature.name} of every dataset${withChange ? " against its change in accuracy" : ""}`);
    again();
  };
}
