// Time and cost, failures and warnings, the whole table; then everything is drawn.

function drawTime() {
  const host = body("time");
  const { stages, seconds, totals, gpus } = DATA.costs;
  const sum = totals.reduce((a, b) => a + b, 0);
  if (!sum) {
    host.append(note("No stage has a time: nothing was finished."));
    return;
  }
  const hours = gpus.length ? "GPU-hours" : "worker-hours";
  host.append(note(`Seconds that a worker (${gpus.length ? "one GPU" : "one process; a GPU where the cluster has any"}) spent on each stage; ${hours} are their sum. What failed, and what was waited for, is not in it. The base's own MMLU is in the row of whichever experiment made it.`));
  const price = el("input", { type: "number", min: "0", step: "any", placeholder: "2.50", "aria-label": "Price of a GPU-hour", value: DATA.price === null ? null : String(DATA.price) });
  host.append(el("div", { class: "tools" }, el("label", {}, `Price of ${gpus.length ? "a GPU-hour" : "a worker-hour"}`, price)));
  const cost = (s) => (Number(price.value) > 0 ? (s / 3600) * Number(price.value) : null);
  const money = (value) => (value === null ? "–" : value.toLocaleString("en", { minimumFractionDigits: 2, maximumFractionDigits: value < 1 ? 4 : 2 }));
  const kinds = stages.map((_, k) => k);
  const paint = (k) => `var(--s${k})`;
  const totalsHost = el("div");
  const stack = (values, of) => el("div", { class: "stack" }, ...kinds.filter((k) => values[k] > 0).map((k) => el("i", { title: `${stages[k]}: ${duration(values[k])}`, style: { width: `${(100 * values[k]) / of}%`, background: paint(k) } })));
  const drawTotals = () => totalsHost.replaceChildren(
    stack(totals, sum),
    el("div", { class: "vt", style: { borderTop: "0", marginTop: "6px", maxWidth: "620px" } }, el("table", { "aria-label": "stages" },
      el("thead", {}, el("tr", {}, ...["Stage", hours, "Share", "Cost"].map((t, k) => el("th", { scope: "col", class: k ? "num" : null, style: k ? {} : { width: "44%" } }, t)))),
      el("tbody", {}, ...[...kinds.filter((k) => totals[k] > 0), -1].map((k) => {
        const value = k < 0 ? sum : totals[k];
        return el("tr", {}, el("td", {}, k < 0 ? el("b", {}, "all") : el("span", { class: "key" }, el("i", { class: "box", style: { background: paint(k) } }), stages[k])), el("td", { class: "num" }, (value / 3600).toPrecision(3)), el("td", { class: "num" }, percent(value / sum, 0)), el("td", { class: "num" }, money(cost(value))));
      })))));
  host.append(totalsHost);
  drawTotals();

  const total = Array.from({ length: NUM_ROWS }, (_, i) => kinds.reduce((t, k) => t + (seconds[k][i] || 0), 0));
  const rows = total.map((_, i) => i).filter((i) => total[i] > 0);
  const longest = Math.max(...rows.map((i) => total[i]));
  const [speed, memory] = [numbers("train_tokens_per_second"), numbers("peak_memory_bytes")];
  const perStage = kinds.filter((k) => totals[k] > 0 && stages[k] !== "other").map((k) => ({ key: `stage${k}`, title: { "static features": "Features", probe: "Probe", training: "Training", MMLU: "MMLU", transfer: "Transfer" }[stages[k]], hint: stages[k], value: (i) => seconds[k][i], text: (i) => duration(seconds[k][i]), num: true, width: 82, from: 1000 }));
  const table = new Table(host, [
    { key: "name", title: "Dataset", value: (i) => DATA.labels[i], draw: (i) => nameCell(DATA.labels[i]), width: nameWidth(0.38) },
    { key: "bar", title: "Time by stage", value: (i) => total[i], first: "descending", draw: (i) => el("div", { style: { width: `${Math.max(1, (100 * total[i]) / longest)}%` } }, stack(seconds.map((s) => s[i]), total[i])) },
    { key: "total", title: "All", hint: "Seconds of a worker", value: (i) => total[i], text: (i) => duration(total[i]), num: true, width: 82 },
    { key: "cost", title: "Cost", value: (i) => cost(total[i]), text: (i) => money(cost(total[i])), num: true, width: 74, from: 620 },
    ...perStage,
    { key: "speed", title: "Tokens/s", hint: "Training", value: (i) => speed[i], text: (i) => (speed[i] === null ? "–" : short(Math.round(speed[i]))), num: true, width: 86, from: 760 },
    { key: "memory", title: "Memory", hint: "Peak of the training", value: (i) => memory[i], text: (i) => (memory[i] === null ? "–" : `${(memory[i] / 2 ** 30).toFixed(1)} GiB`), num: true, width: 82, from: 860 },
  ], { name: "times", rows, sort: "bar", search: (i) => DATA.labels[i], height: 420, whole: 12 });
  price.addEventListener("input", () => { drawTotals(); table.arrange(); });
}

function drawFailures() {
  const host = body("failures");
  const link = (i) => (DATA.logs[i] ? el("a", { href: `experiments/${encodeURIComponent(DATA.folders[i])}/log.txt` }, "log") : el("span", { class: "faded" }, "–"));
  const name = (rows) => ({ key: "name", title: "Dataset", value: (k) => DATA.labels[rows[k].row], draw: (k) => (rows.length > 12 && rows !== failures ? nameCell(DATA.labels[rows[k].row]) : DATA.labels[rows[k].row]), width: nameWidth(0.3) });
  const log = (rows) => ({ key: "log", title: "Log", draw: (k) => link(rows[k].row), width: 50 });
  const { failures, oddities } = DATA;
  host.append(note(failures.length ? `${count(failures.length, "experiment")} failed. They have rows in the table too.` : NUM_ROWS ? "No experiment failed." : "The table has no rows yet."));
  if (failures.length) {
    const attempts = column("num_attempts");
    new Table(host, [name(failures),
      { key: "cause", title: "Cause", value: (k) => failures[k].cause, draw: (k) => el("div", { title: `${failures[k].cause}\nFix: ${failures[k].fix}` }, failures[k].cause, el("div", { class: "fix" }, el("b", {}, "Fix: "), failures[k].fix)) },
      { key: "fix", title: "Fix", value: (k) => failures[k].fix, text: (k) => failures[k].fix, from: 620 },
      { key: "attempts", title: "Tries", value: (k) => attempts[failures[k].row], text: (k) => short(attempts[failures[k].row]), num: true, width: 60, from: 700 },
      log(failures)], { name: "failures", rows: failures.map((_, k) => k), sort: "name", descending: false, search: (k) => `${DATA.labels[failures[k].row]} ${failures[k].cause} ${failures[k].fix}`, wrap: failures.length <= 60, height: 420, onRow: null });
  }
  if (oddities.length) {
    host.append(el("h3", {}, "Warnings: no failure, and worth a look"));
    new Table(host, [name(oddities), { key: "what", title: "What", value: (k) => oddities[k].what, text: (k) => oddities[k].what }, log(oddities)],
      { name: "oddities", rows: oddities.map((_, k) => k), sort: "name", descending: false, search: (k) => `${DATA.labels[oddities[k].row]} ${oddities[k].what}`, wrap: oddities.length <= 12, height: 300, whole: 8, onRow: null });
  }
}

function drawTable() {
  const host = body("table");
  document.getElementById("csv").addEventListener("click", saveCsv);
  if (!NUM_ROWS) return;
  const filled = DATA.table.columns.filter((key) => key !== "dataset" && column(key).some((v) => v !== null && v !== ""));
  const longest = (key) => Math.max(key.length + 2, ...column(key).slice(0, 200).map((v) => Math.min(30, short(v).length)));
  const isNum = (key) => column(key).every((v) => v === null || typeof v === "number");
  const plain = filled.map((key) => ({ key, title: key, value: (i) => column(key)[i], text: (i) => short(column(key)[i]), num: isNum(key), width: Math.round(20 + 7.6 * longest(key)) }));
  const name = { key: "dataset", title: "dataset", value: (i) => DATA.labels[i], draw: (i) => nameCell(DATA.labels[i]), width: (w) => Math.min(260, 0.4 * w) };
  host.append(note(`${count(NUM_ROWS, "row")}, ${count(DATA.table.columns.length, "column")}${filled.length + 1 < DATA.table.columns.length ? `, of which ${DATA.table.columns.length - filled.length - 1} are empty and left out here` : ""}.`));
  new Table(host, [name, ...plain], { name: "all columns", rows: DATA.labels.map((_, i) => i), sort: "dataset", descending: false, search: (i) => `${DATA.labels[i]} ${filled.map((key) => column(key)[i] ?? "").join(" ")}`, height: 460, whole: 14, minWidth: plain.reduce((w, c) => w + c.width, 200) });
}

/** The table the page carries, as a file: values as results.csv has them. */
function saveCsv() {
  const quote = (value) => {
    if (value === null) return "";
    const text = typeof value === "boolean" ? (value ? "True" : "False") : String(value);
    return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  const lines = [DATA.table.columns.map(quote).join(",")];
  for (let i = 0; i < NUM_ROWS; i++) lines.push(DATA.table.values.map((values) => quote(values[i])).join(","));
  const url = URL.createObjectURL(new Blob([`${lines.join("\n")}\n`], { type: "text/csv" }));
  el("a", { href: url, download: "results.csv" }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

// A figure that cannot be drawn says so in its place, and the others are drawn.
for (const [section, draw] of [["tiles", drawTiles], ["ranking", drawRanking], ["subjects", drawSubjects], ["transfer", drawTransfer], ["losses", drawLosses], ["features", drawFeatures], ["time", drawTime], ["failures", drawFailures], ["table", drawTable]]) {
  try {
    draw();
  } catch (error) {
    console.error(section, error);
    (body(section) || document.getElementById("tiles")).append(note(`This part could not be drawn: ${error}`));
  }
}
document.documentElement.dataset.drawn = "yes";
