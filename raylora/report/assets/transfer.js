// Transfer: a heat map of adapters by the held-out examples of every dataset; and its table.

function drawTransfer() {
  const found = DATA.transfer;
  if (!found) return;
  const host = body("transfer");
  const place = new Map(found.rows.map((i, k) => [i, k]));
  const columns = found.columns.map((_, c) => c);
  const at = (matrix, i, c) => matrix[place.get(i)][c];
  const change = (i, c) => at(found.change, i, c);
  const real = (i, c) => isNumber(at(found.fdr, i, c)) && at(found.fdr, i, c) < found.alpha;
  const isOwn = (i, c) => found.own[place.get(i)] === c;
  const nats = (value) => (isNumber(value) ? signed(`${value > 0 ? "+" : ""}${value.toFixed(3)}`) : "–");
  // An adapter's own dataset changes most: the colours are for the others.
  const others = found.rows.flatMap((i) => columns.filter((c) => !isOwn(i, c)).map((c) => change(i, c)));
  const sizes = (others.length ? others : found.change.flat()).filter(isNumber).map(Math.abs).sort((a, b) => a - b);
  const limit = Math.max(0.01, sizes[Math.floor(0.98 * (sizes.length - 1))] || 0);
  const cells = found.num_cells.toLocaleString("en");
  const left = found.num_rows > found.rows.length || found.num_columns > columns.length;
  host.append(note(
    el("b", {}, found.sentence),
    ` Of ${cells} pairs of an adapter and another dataset ${found.num_helped.toLocaleString("en")} ${found.num_helped === 1 ? "is" : "are"} significantly better and ${found.num_forgotten.toLocaleString("en")} significantly worse than with the base (dotted): the p-value of the paired t-test over a dataset's held-out conversations is below ${found.alpha} by the false-discovery rate over all cells, so that 5% of them may be false. `,
    "A cell is the change of the mean loss, in nats per token, on examples that trainings left out; those of the adapter's own dataset are outlined.",
    left ? ` Shown are the ${found.rows.length} adapters and ${columns.length} datasets with the greatest changes, of ${found.num_rows.toLocaleString("en")} and ${found.num_columns.toLocaleString("en")}: ` : " ",
    el("a", { href: "transfer.csv" }, "transfer.csv"), " has all."));
  const sort = el("select", { "aria-label": "Order of the adapters" }, el("option", { value: "ranking" }, "the ranking"), el("option", { value: "name" }, "name"), ...columns.map((c) => el("option", { value: c }, found.columns[c])));
  const scaleBar = el("i", { class: "scale" });
  host.append(el("div", { class: "tools" }, el("label", {}, "Rows by", sort), el("span", { class: "key" }, `+${limit.toFixed(2)}`, scaleBar, `${MINUS}${limit.toFixed(2)} nats and beyond: lower is better`)));
  const map = heatMap(host, {
    label: "Heat map of the change of held-out loss by adapter and dataset; the table below has its figures",
    rows: found.rows, columns, limit, scaleBar, real, widest: 64,
    value: (i, c) => (isNumber(change(i, c)) ? -change(i, c) : null),
    own: (i) => found.own[place.get(i)],
    columnLabel: (c) => found.columns[c],
    tip(i, c) {
      if (c === undefined) return [`adapter of ${DATA.labels[i]}`];
      const dataset = `on ${found.columns[c]} (${count(found.num_examples[c], "example")}, base ${short(found.base[c])} nats per token)`;
      if (i === undefined) return [dataset];
      if (!isNumber(change(i, c))) return [`adapter of ${DATA.labels[i]}`, dataset, "not measured"];
      const interval = isNumber(at(found.low, i, c)) ? `, ${nats(at(found.low, i, c))} to ${nats(at(found.high, i, c))}` : "";
      return [`adapter of ${DATA.labels[i]}`, dataset, `${nats(change(i, c))} nats per token${interval}`, `FDR p ${pValue(at(found.fdr, i, c))}${real(i, c) ? (change(i, c) < 0 ? ": significantly better" : ": significantly worse") : ""}${isOwn(i, c) ? "; its own dataset" : ""}`];
    },
  });
  sort.addEventListener("change", () => {
    const by = sort.value;
    const worst = (i) => (isNumber(change(i, Number(by))) ? change(i, Number(by)) : Infinity);
    map.show(by === "ranking" ? found.rows : found.rows.slice().sort((a, b) => (by === "name" ? DATA.labels[a].localeCompare(DATA.labels[b], "en", { numeric: true }) : worst(a) - worst(b))));
  });
  transferTable(host, found, columns, change, real, isOwn, nats);
}

function transferTable(host, found, columns, change, real, isOwn, nats) {
  const others = (i) => columns.filter((c) => !isOwn(i, c) && isNumber(change(i, c)));
  const lines = found.rows.map((i) => {
    const sorted = others(i).sort((a, b) => change(i, a) - change(i, b));
    const own = columns.find((c) => isOwn(i, c));
    return { i, own: own === undefined ? null : change(i, own), helped: sorted[0], worst: sorted.at(-1), forgotten: sorted.filter((c) => real(i, c) && change(i, c) > 0).length };
  });
  const details = el("details", {}, el("summary", {}, "The same as a table of adapters"));
  host.append(details);
  details.addEventListener("toggle", () => {
    if (!details.open || details.querySelector(".vt")) return;
    const titled = (name) => (k) => (lines[k][name] === undefined ? "–" : `${nats(change(lines[k].i, lines[k][name]))} ${found.columns[lines[k][name]]}`);
    const valued = (name) => (k) => (lines[k][name] === undefined ? null : change(lines[k].i, lines[k][name]));
    new Table(details, [
      { key: "name", title: "Adapter of", value: (k) => DATA.labels[lines[k].i], draw: (k) => nameCell(DATA.labels[lines[k].i]), width: nameWidth(0.34) },
      { key: "own", title: "Own", hint: "Change of the loss on its own dataset's held-out examples", value: (k) => lines[k].own, text: (k) => nats(lines[k].own), num: true, width: 84, first: "ascending" },
      { key: "helped", title: "Best of the others", value: valued("helped"), text: titled("helped"), first: "ascending", from: 620 },
      { key: "worst", title: "Worst of the others", value: valued("worst"), text: titled("worst"), first: "descending", from: 820 },
      { key: "forgotten", title: "Forgotten", hint: "Other datasets shown here that became significantly worse", value: (k) => lines[k].forgotten, text: (k) => String(lines[k].forgotten), num: true, width: 96 },
    ], { name: "transfer", rows: lines.map((_, k) => k), sort: "own", descending: false, search: (k) => DATA.labels[lines[k].i], height: 420, onRow: null });
  });
}
