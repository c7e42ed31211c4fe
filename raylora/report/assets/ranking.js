// The datasets from the best change to the worst: a forest plot that is a table.

// Where datasets were trained with several seeds a line stands for all of them, under its first row's number.

const BALANCED = numbers("balanced_accuracy_change");
const P_VALUE = numbers("mcnemar_p_value");
const SEEDS = DATA.ranking.seeds;
const lineOf = (i) => (SEEDS ? SEEDS.lines[i] : { rows: [i], label: DATA.labels[i], change: CHANGE[i], low: LOW[i], high: HIGH[i], p_value: P_VALUE[i], balanced: BALANCED[i] });
const RANKED = DATA.ranking.rows.slice().sort((a, b) => lineOf(b).change - lineOf(a).change);
/** Every experiment with a change, from the best to the worst. */
const ASKED = RANKED.flatMap((i) => lineOf(i).rows).sort((a, b) => CHANGE[b] - CHANGE[a]);
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
    const clustered = numbers("base_overall_stderr_clustered")[best];
    const asked = numbers("total_questions")[best];
    add("Base model on MMLU", percent(base), `${stderr === null ? "" : `± ${(100 * stderr).toFixed(1)} (standard error${clustered === null ? "" : `; ${(100 * clustered).toFixed(1)} for other questions and subjects like these`}), `}${asked === null ? "" : count(asked, "question")}${favourite("base_", best)}`);
    add("Best change", `${points(lineOf(best).change)} points`, `${lineOf(best).label}${isReal(best) ? "" : `: ${verdict(best)}`}`, tone(best) === "none" ? "" : tone(best));
    add("Significant changes", `${gains} up, ${losses} down`, `of ${RANKED.length}; ${SEEDS ? "over seeds and questions" : "McNemar's test"}, Holm-adjusted, 5%, and balanced accuracy`);
  }
  const seconds = DATA.costs.totals.reduce((a, b) => a + (b || 0), 0);
  add(DATA.costs.gpus.length ? "GPU time" : "Worker time", duration(seconds), DATA.costs.gpus.length ? [...new Set(DATA.costs.gpus)].join(", ") : "one process a worker");
  const bad = NUM_ROWS - good;
  add("Failed", String(bad), bad ? "with cause and fix below" : `all ${count(good, "experiment")} succeeded`, bad ? "loss" : "");
}

/** How often two trainings on the same data would count as different. */
function aboutPairs() {
  const { num_pairs: pairs, num_pairs_real: differ, num_held_out: heldOut, num_held_out_real: real } = SEEDS;
  if (!pairs) return "No answers question by question (scores.parquet) are here: without them there is no interval over seeds.";
  const one = `A/A pairs, two trainings on the same data with other seeds: by McNemar's test alone, as for one seed, ${differ} of ${count(pairs, "pair")} (${percent(differ / pairs, 0)}) differ. `;
  if (!heldOut) return `${one}With three seeds or more, the page also says how often the interval over seeds would call one significant.`;
  return `${one}By the interval over seeds, each training in turn taken for the base of the others, ${real} of ${heldOut} (${percent(real / heldOut, 0)}) count as changed; 5% are to be expected.`;
}

const HAS_SHRUNK = RANKED.some((i) => SHRUNK[i] !== null);
/** What can be ranked by: accuracy, which decides what is significant on the rest of the page, and other outcomes. */
const BY_ACCURACY = { title: "accuracy", column: "accuracy_change", line: lineOf, holm: HOLM, verdicts: VERDICT, digits: 1 };
const RANKINGS = [BY_ACCURACY, ...DATA.outcomes.map((o) => ({ ...o, line: (i) => ({ ...lineOf(i), ...o.lines[i] }), digits: o.kind === "correct_probability" ? 2 : 1 }))];

function drawRanking() {
  const host = body("ranking");
  if (!RANKED.length) {
    host.append(note(NUM_ROWS ? "No experiment that succeeded has an MMLU accuracy: without the mmlu stage there is no change to rank." : "The table has no rows yet."));
    return;
  }
  const figure = el("div");
  const by = el("select", { "aria-label": "Rank by" }, ...RANKINGS.map((r, k) => el("option", { value: k }, `by ${r.title}`)));
  const draw = () => { figure.replaceChildren(); drawRankingBy(figure, RANKINGS[Number(by.value)]); };
  by.addEventListener("change", draw);
  host.append(...DATA.constant.map((text) => note(el("b", {}, text))));
  if (RANKINGS.length > 1) host.append(el("div", { class: "tools" }, by));
  host.append(figure);
  draw();
}

function aboutAccuracy() {
  const { num_gains: gains, num_losses: losses, num_letters: letters, num_raw: raw, num_fdr: discovered } = DATA.ranking;
  return [
    note(
      "Change in MMLU accuracy in percentage points, adapter minus base on the same questions, with 95% intervals ",
      SEEDS ? "that hold what a training with a fresh seed would change, on all questions like these: they count the noise of the seeds and that of the questions. Small dots are the seeds, large ones their mean. " : "(Tango's score interval, corrected for continuity). ",
      el("b", {}, `${gains + losses} of ${count(RANKED.length, "change")} ${gains + losses === 1 ? "is" : "are"} significant`),
      ` (filled): the p-values of ${SEEDS ? "the change of accuracy over seeds" : "McNemar's exact test of accuracy"} and of the change of balanced accuracy (the mean over the right letters) are both below ${ALPHA}, Holm-adjusted over all ${RANKED.length}, and both changed to the same side. `,
      letters ? `In ${letters}, ${SEEDS ? "only that of accuracy" : "only McNemar's"} passes, and balanced accuracy did not change: its favourite letter moved. A model that comes to prefer another letter gains where that letter happens to be right. ` : "",
      `The chance of even one false mark is at most 5%. Unadjusted, ${raw} would pass, where about ${short(Number((ALPHA * RANKED.length).toPrecision(2)))} would by chance alone if nothing had changed.`,
      RANKED.length > 1 ? ` Where a few false ones among them do no harm: by the false-discovery rate (Benjamini and Hochberg, 5%) ${discovered} ${discovered === 1 ? "is" : "are"} significant, of which 5% may be false on average.` : "",
    ),
    ...(DATA.power ? [note(`${DATA.power}.`)] : []),
    ...(HAS_SHRUNK ? [note(`Shrunk: the greatest of ${RANKED.length} noisy changes is partly luck, so each is moved towards the mean of all, by as much as its own noise asks for (empirical Bayes). A single true change among hundreds that are none is moved too far: there, look at its p-value.`)] : []),
    note(SEEDS ? aboutPairs() : "Each was trained with one seed. The intervals and p-values know the noise of the questions, and not what another seed would have given: that another training on the same data would be as good, or better at all, they cannot say (--repeats 5 measures it)."),
  ];
}

const ABOUT = {
  accuracy: { test: "McNemar's exact test, and that of balanced accuracy,", meaning: "" },
  balanced_accuracy: { test: "the change's interval", meaning: "It is the mean over the right letters: a preference for a letter does not move it. " },
  correct_probability: {
    test: "the paired t-test over questions",
    meaning: "It is the mean over questions of the probability among a question's choices; of letters, the model's mean preference for each is taken off before. It moves where the highest choice stays the same. ",
  },
};

function aboutOutcome({ kind, set, title, verdicts, power }) {
  const real = RANKED.filter((i) => ["gain", "loss"].includes(verdicts[i])).length;
  return [
    note(
      `Change in ${title} in percentage points, adapter minus base on the same questions, with 95% intervals. `,
      ABOUT[kind].meaning,
      el("b", {}, `${real} of ${count(RANKED.length, "change")} ${real === 1 ? "is" : "are"} significant`),
      ` (filled): the p-value of ${ABOUT[kind].test} is below ${ALPHA}, Holm-adjusted over all ${RANKED.length}.`,
      SEEDS && (set || kind === "correct_probability") ? " Of datasets with several seeds only the mean is shown, without an interval." : "",
    ),
    ...(power ? [note(`${power}.`)] : []),
    note("The rest of the page goes by accuracy on the first set of questions. Whoever looks at several outcomes and takes the best one finds more by chance than 5%."),
  ];
}

function drawRankingBy(host, ranking) {
  const { title, column, line, holm, verdicts, digits } = ranking;
  const isAccuracy = column === "accuracy_change";
  const letters = isAccuracy ? DATA.ranking.num_letters : 0;
  const own = numbers(column);
  const isReal = (i) => verdicts[i] === "gain" || verdicts[i] === "loss";
  const tone = (i) => (isReal(i) ? verdicts[i] : "none");
  const verdict = (i) => (verdicts[i] === "letter" ? "its favourite letter moved" : verdicts[i]);
  const order = RANKED.slice().sort((a, b) => (line(b).change ?? -Infinity) - (line(a).change ?? -Infinity));
  host.append(...(isAccuracy ? aboutAccuracy() : aboutOutcome(ranking)));
  const keys = [["gain", "significant gain", true], ["loss", "significant loss", true], ["none", "undecided", false]];
  host.append(el("div", { class: "keys" }, ...keys.map(([name, text, filled]) => el("span", { class: "key" }, el("i", { style: { borderColor: `var(--${name})`, background: filled ? `var(--${name})` : "none" } }), text))));

  const known = (name) => RANKED.map((i) => line(i)[name]).filter((v) => v !== null);
  let [low, high] = extent([0, ...ASKED.map((i) => own[i]).filter((v) => v !== null), ...known("low"), ...known("high")]);
  const margin = 0.06 * (high - low || 0.02);
  [low, high] = [low - margin, high + margin];
  const scale = cellScale(low, high);
  const marks = ticks(100 * low, 100 * high, 5);
  const plot = (i) => {
    const paint = `var(--${tone(i)})`;
    const { rows, change, low: least, high: most } = line(i);
    if (change === null) return el("div", { class: "plot" });
    const left = least === null ? null : scale.at(least);
    const width = least === null || most === null ? null : Math.max(0, scale.at(most) - left);
    return el("div", { class: "plot", role: "img", "aria-label": `${points(change, digits)} points, ${verdict(i)}` },
      ...marks.map((m) => el("i", { class: m === 0 ? "zero" : "grid", style: { left: scale.left(m / 100) } })),
      width === null ? null : el("i", { class: "whisker", style: { left: `${left}%`, width: `${width}%`, background: paint } }),
      ...(rows.length > 1 ? rows : []).map((row) => el("i", { class: "seed", style: { left: scale.left(own[row]), background: paint } })),
      el("i", { class: "dot", style: { left: scale.left(change), borderColor: paint, background: isReal(i) ? paint : "var(--panel)" } }));
  };
  const axis = () => {
    const edge = (m) => (scale.at(m / 100) < 4 ? "start" : scale.at(m / 100) > 96 ? "end" : null);
    return el("div", { class: "axis", "aria-hidden": "true" }, ...marks.map((m) => el("span", { class: edge(m), style: { left: scale.left(m / 100) } }, m > 0 ? `+${m}` : signed(String(m)))));
  };
  const rank = new Map(order.map((i, k) => [i, k + 1]));
  const accuracies = numbers("overall_accuracy");
  const accuracy = (i) => line(i).rows.reduce((sum, row) => sum + accuracies[row], 0) / line(i).rows.length;
  new Table(host, [
    { key: "rank", title: "#", hint: "Rank by change", value: (i) => rank.get(i), text: (i) => String(rank.get(i)), num: true, width: 44, from: 560, first: "ascending" },
    { key: "name", title: "Dataset", value: (i) => line(i).label, draw: (i) => nameCell(line(i).label), width: nameWidth(0.36) },
    ...(SEEDS ? [{ key: "seeds", title: "Seeds", hint: "Trainings with a seed of their own", value: (i) => line(i).rows.length, text: (i) => String(line(i).rows.length), num: true, width: 62, from: 700 }] : []),
    { key: "plot", title: "Points, with 95% interval", brief: "Points", hint: "Sort by change", value: (i) => line(i).change, draw: plot, head: axis, first: "descending" },
    { key: "change", title: "Change", hint: "Percentage points", value: (i) => line(i).change, text: (i) => points(line(i).change, digits), num: true, width: 76, tone: (i) => (isReal(i) ? tone(i) : "") },
    { key: "interval", title: "95% interval", hint: "Sort by its lower end", value: (i) => line(i).low, text: (i) => (line(i).low === null ? "–" : `${points(line(i).low, digits)} to ${points(line(i).high, digits)}`), num: true, width: 120, from: 760 },
    ...(HAS_SHRUNK && isAccuracy ? [{ key: "shrunk", title: "Shrunk", hint: "Change shrunk towards the mean of all, percentage points", value: (i) => SHRUNK[i], text: (i) => points(SHRUNK[i]), num: true, width: 70, from: 820 }] : []),
    { key: "balanced", title: "Balanced", hint: "Change of balanced accuracy, percentage points", value: (i) => line(i).balanced, text: (i) => points(line(i).balanced), num: true, width: 86, from: 900 },
    { key: "p", title: "p", hint: SEEDS ? "Over seeds and questions, unadjusted" : isAccuracy ? "McNemar's exact test of accuracy, unadjusted" : `Of ${title}, unadjusted`, value: (i) => line(i).p_value, text: (i) => pValue(line(i).p_value), num: true, width: 70, from: 960, first: "ascending" },
    { key: "holm", title: "Holm p", hint: `${SEEDS || !isAccuracy ? "That p" : "McNemar's p of accuracy"}, adjusted over ${RANKED.length} changes`, value: (i) => holm[i], text: (i) => pValue(holm[i]), num: true, width: 74, from: 640, first: "ascending" },
    ...(RANKED.length > 1 && isAccuracy ? [{ key: "fdr", title: "FDR p", hint: "That p, adjusted by Benjamini and Hochberg: of those below 5%, 5% are false on average", value: (i) => FDR[i], text: (i) => pValue(FDR[i]), num: true, width: 64, from: 1080, first: "ascending" }] : []),
    { key: "verdict", title: "Verdict", value: verdict, text: verdict, width: letters ? 206 : 112, from: 860, tone: (i) => (isReal(i) ? tone(i) : "faded") },
    ...(HAS_SHRUNK && isAccuracy ? [] : [{ key: "accuracy", title: "Accuracy", value: accuracy, text: (i) => percent(accuracy(i)), num: true, width: 86, from: 1000 }]), // no room beside the others; the table of all columns has it
  ], { name: "ranking", rows: order, sort: "plot", search: (i) => `${line(i).label} ${verdict(i)}`, height: 760 });
}
