// The datasets from the best change to the worst: a forest plot that is a table.

const BALANCED = numbers("balanced_accuracy_change");
const RANKED = DATA.ranking.rows.slice().sort((a, b) => CHANGE[b] - CHANGE[a]);
const verdict = (i) => (VERDICT[i] === "letter" ? "its favourite letter moved" : VERDICT[i]);

/** Such as "; answers A to 98%": a model that prefers one letter may know less, or more, than its accuracy says. */
function favourite(prefix, i) {
  const shares = ["a", "b", "c", "d"].map((letter) => [numbers(`${prefix}prediction_share_${letter}`)[i] ?? 0, letter.toUpperCase()]);
  const [share, letter] = shares.sort((a, b) => b[0] - a[0])[0];
  return share > 0.5 ? `; answers ${letter} to ${percent(share, 0)}` : "";
}

/** From a domain to percent of a cell's width. */
function cellScale(low, high) {
  const at = (value) => (100 * (value - low)) / (high - low);
  return { at, left: (value) => `${Math.min(100, Math.max(0, at(value)))}%` };
}

function drawTiles() {
  const tiles = document.getElementById("tiles");
  const add = (what, value, more, classes) => tiles.append(el("div", { class: "tile" }, el("div", { class: "what" }, what), el("div", { class: `value ${classes || ""}` }, value), el("div", { class: "more" }, more)));
  const good = DATA.ok.filter(Boolean).length;
  if (RANKED.length) {
    const { num_gains: gains, num_losses: losses } = DATA.ranking;
    const [best] = RANKED;
    const base = numbers("base_overall_accuracy")[best];
    const stderr = numbers("base_overall_stderr")[best];
    const asked = numbers("total_questions")[best];
    add("Base model on MMLU", percent(base), `${stderr === null ? "" : `± ${(100 * stderr).toFixed(1)} (standard error), `}${asked === null ? "" : count(asked, "question")}${favourite("base_", best)}`);
    add("Best change", `${points(CHANGE[best])} points`, `${DATA.labels[best]}${isReal(best) ? "" : `: ${verdict(best)}`}`, tone(best) === "none" ? "" : tone(best));
    add("Real changes", `${gains} up, ${losses} down`, `of ${RANKED.length}; McNemar's test, Holm-adjusted, 5%, and balanced accuracy`);
  }
  const seconds = DATA.costs.totals.reduce((a, b) => a + (b || 0), 0);
  add(DATA.costs.gpus.length ? "GPU time" : "Worker time", duration(seconds), DATA.costs.gpus.length ? [...new Set(DATA.costs.gpus)].join(", ") : "one process a worker");
  const bad = NUM_ROWS - good;
  add("Failed", String(bad), bad ? "with cause and fix below" : `all ${count(good, "experiment")} are good`, bad ? "loss" : "");
}

function drawRanking() {
  const host = body("ranking");
  if (!RANKED.length) {
    host.append(note(NUM_ROWS ? "No good row has an MMLU accuracy: without the mmlu stage there is no change to rank." : "The table has no rows yet."));
    return;
  }
  const { num_gains: gains, num_losses: losses, num_letters: letters, num_raw: raw } = DATA.ranking;
  host.append(
    note(
      "Change in MMLU accuracy in percentage points, adapter minus base on the same questions, with 95% intervals (Tango's score interval, corrected for continuity). ",
      el("b", {}, `${gains + losses} of ${count(RANKED.length, "change")} ${gains + losses === 1 ? "is" : "are"} real`),
      ` (filled): McNemar's exact test of accuracy, Holm-adjusted over all ${RANKED.length}, is below ${ALPHA}, and balanced accuracy (the mean over the four right letters) moved to the same side: its own 95% interval leaves out 0. `,
      letters ? `In ${letters} the test passes and balanced accuracy does not: a model that comes to prefer another letter gains where that letter happens to be right. ` : "",
      `Where nothing changed, the chance of even one false mark is at most 5%. Unadjusted, ${raw} would pass, where about ${short(Number((ALPHA * RANKED.length).toPrecision(2)))} would by chance alone if nothing had changed.`,
    ),
  );
  const keys = [["gain", "real gain", true], ["loss", "real loss", true], ["none", "undecided", false]];
  host.append(el("div", { class: "keys" }, ...keys.map(([name, text, filled]) => el("span", { class: "key" }, el("i", { style: { borderColor: `var(--${name})`, background: filled ? `var(--${name})` : "none" } }), text))));

  const known = (values) => RANKED.map((i) => values[i]).filter((v) => v !== null);
  let [low, high] = extent([0, ...known(CHANGE), ...known(LOW), ...known(HIGH)]);
  const margin = 0.06 * (high - low || 0.02);
  [low, high] = [low - margin, high + margin];
  const scale = cellScale(low, high);
  const marks = ticks(100 * low, 100 * high, 5);
  const plot = (i) => {
    const paint = `var(--${tone(i)})`;
    const left = LOW[i] === null ? null : scale.at(LOW[i]);
    const width = LOW[i] === null || HIGH[i] === null ? null : Math.max(0, scale.at(HIGH[i]) - left);
    return el("div", { class: "plot", role: "img", "aria-label": `${points(CHANGE[i])} points, ${verdict(i)}` },
      ...marks.map((m) => el("i", { class: m === 0 ? "zero" : "grid", style: { left: scale.left(m / 100) } })),
      width === null ? null : el("i", { class: "whisker", style: { left: `${left}%`, width: `${width}%`, background: paint } }),
      el("i", { class: "dot", style: { left: scale.left(CHANGE[i]), borderColor: paint, background: isReal(i) ? paint : "var(--panel)" } }));
  };
  const axis = () => {
    const edge = (m) => (scale.at(m / 100) < 4 ? "start" : scale.at(m / 100) > 96 ? "end" : null);
    return el("div", { class: "axis", "aria-hidden": "true" }, ...marks.map((m) => el("span", { class: edge(m), style: { left: scale.left(m / 100) } }, m > 0 ? `+${m}` : signed(String(m)))));
  };
  const rank = new Map(RANKED.map((i, k) => [i, k + 1]));
  const [p, accuracy] = [numbers("mcnemar_p_value"), numbers("overall_accuracy")];
  new Table(host, [
    { key: "rank", title: "#", hint: "Rank by change", value: (i) => rank.get(i), text: (i) => String(rank.get(i)), num: true, width: 44, from: 560, first: "ascending" },
    { key: "name", title: "Dataset", value: (i) => DATA.labels[i], draw: (i) => nameCell(DATA.labels[i]), width: nameWidth(0.36) },
    { key: "plot", title: "Points, with 95% interval", brief: "Points", hint: "Sort by change", value: (i) => CHANGE[i], draw: plot, head: axis, first: "descending" },
    { key: "change", title: "Change", hint: "Percentage points", value: (i) => CHANGE[i], text: (i) => points(CHANGE[i]), num: true, width: 76, tone: (i) => (isReal(i) ? tone(i) : "") },
    { key: "interval", title: "95% interval", hint: "Sort by its lower end", value: (i) => LOW[i], text: (i) => (LOW[i] === null ? "–" : `${points(LOW[i])} to ${points(HIGH[i])}`), num: true, width: 120, from: 760 },
    { key: "balanced", title: "Balanced", hint: "Change of balanced accuracy, percentage points", value: (i) => BALANCED[i], text: (i) => points(BALANCED[i]), num: true, width: 86, from: 900 },
    { key: "p", title: "p", hint: "McNemar's exact test of accuracy, unadjusted", value: (i) => p[i], text: (i) => pValue(p[i]), num: true, width: 70, from: 960, first: "ascending" },
    { key: "holm", title: "Holm p", hint: `Adjusted over ${RANKED.length} changes`, value: (i) => HOLM[i], text: (i) => pValue(HOLM[i]), num: true, width: 74, from: 640, first: "ascending" },
    { key: "verdict", title: "Real?", value: verdict, text: verdict, width: letters ? 186 : 112, from: 860, tone: (i) => (isReal(i) ? tone(i) : "faded") },
    { key: "accuracy", title: "Accuracy", value: (i) => accuracy[i], text: (i) => percent(accuracy[i]), num: true, width: 86, from: 1000 },
  ], { name: "ranking", rows: RANKED, sort: "plot", search: (i) => `${DATA.labels[i]} ${verdict(i)}`, height: 760 });
}
