// A table that can be sorted and searched and holds, of any number of rows, only those in sight in the page.

const ROW_HEIGHT = 29;
const MAX_WHOLE = 40; // a table of so few rows is shown whole where it may be

class Table {
  /**
   * columns: { key, title, hint, value(i) for sorting, text(i), draw(i) -> Node, head(), num, width (px; the rest is
   *   shared), brief (its title where there is little room), from: the table's width from which it is shown, first: direction of its first sort }
   * options: rows, sort, height (px at most), search (what it looks through; none without), wrap, minWidth, onRow, name
   */
  constructor(host, columns, options) {
    this.all = columns;
    this.options = { height: 620, descending: true, onRow: choose, ...options };
    this.rows = options.rows;
    this.whole = this.options.whole ?? MAX_WHOLE;
    this.sortKey = options.sort;
    this.descending = this.options.descending;
    this.query = "";
    this.body = el("tbody");
    this.head = el("thead");
    this.widths = el("colgroup");
    this.table = el("table", { "aria-label": options.name }, this.widths, this.head, this.body);
    this.scroller = el("div", { class: "vt", tabindex: "0" }, this.table);
    this.status = el("span", { role: "status" });
    host.append(this.tools(), this.scroller);
    this.scroller.addEventListener("scroll", () => this.draw(), { passive: true });
    this.body.addEventListener("click", (event) => {
      const row = event.target.closest("tr.row");
      if (row && !event.target.closest("a") && this.options.onRow) this.options.onRow(Number(row.dataset.row));
    });
    onChosen(() => { this.drawn = null; this.draw(); });
    onResize(this.scroller, (width) => this.layOut(width));
    addEventListener("beforeprint", () => { this.printing = true; this.draw(); });
    addEventListener("afterprint", () => { this.printing = false; this.draw(); });
    this.arrange();
  }

  tools() {
    const { search, rows, extra } = this.options;
    if (!search || rows.length < 5) return el("div", { class: "tools" }, ...(extra || []));
    const input = el("input", { type: "search", placeholder: "Search", "aria-label": `Search ${this.options.name}` });
    input.addEventListener("input", () => { this.query = input.value.trim().toLowerCase(); this.arrange(); });
    return el("div", { class: "tools" }, input, this.status, ...(extra || []));
  }

  layOut(width) {
    const shown = this.all.filter((c) => !c.from || width >= c.from);
    this.columns = shown;
    this.table.style.minWidth = this.options.minWidth ? `${this.options.minWidth}px` : "";
    this.widths.replaceChildren(...shown.map((c) => el("col", { style: { width: c.width ? `${typeof c.width === "function" ? c.width(width) : c.width}px` : "auto" } })));
    this.head.replaceChildren(el("tr", {}, ...shown.map((c) => this.heading(c))));
    this.drawn = null;
    this.draw();
  }

  heading(c) {
    const sorted = c.key === this.sortKey ? (this.descending ? "descending" : "ascending") : "none";
    const button = el("button", { type: "button", title: c.hint || c.title, onclick: () => this.sortBy(c) }, c.brief && this.scroller.clientWidth < 480 ? c.brief : c.title);
    return el("th", { class: c.num ? "num" : null, scope: "col", "aria-sort": c.value ? sorted : null }, c.value ? button : el("span", {}, c.title), c.head ? c.head() : null);
  }

  sortBy(c) {
    this.descending = this.sortKey === c.key ? !this.descending : (c.first || (c.num ? "descending" : "ascending")) === "descending";
    this.sortKey = c.key;
    this.arrange();
    this.layOut(this.scroller.clientWidth);
    this.scroller.scrollTop = 0;
  }

  /** Which rows, in which order. What has no value comes last, whichever the direction. */
  arrange() {
    const { search, rows } = this.options;
    const words = this.query.split(/\s+/).filter(Boolean);
    const fits = (i) => { const text = search(i).toLowerCase(); return words.every((word) => text.includes(word)); };
    const kept = words.length ? rows.filter(fits) : rows.slice();
    const by = this.all.find((c) => c.key === this.sortKey);
    if (by) {
      const keys = new Map(kept.map((i) => [i, by.value(i)]));
      const sign = this.descending ? -1 : 1;
      const missing = (v) => v === null || v === undefined || v === "";
      kept.sort((a, b) => {
        const [x, y] = [keys.get(a), keys.get(b)];
        if (missing(x) || missing(y)) return missing(x) - missing(y) || a - b;
        const order = isNumber(x) && isNumber(y) ? x - y : String(x).localeCompare(String(y), "en", { numeric: true });
        return sign * order || a - b;
      });
    }
    this.rows = kept;
    this.status.textContent = words.length ? `${kept.length} of ${rows.length}` : "";
    const whole = this.options.wrap || kept.length <= this.whole;
    this.scroller.style.maxHeight = whole ? "none" : `${this.options.height}px`;
    this.drawn = null;
    if (this.columns) this.draw();
  }

  draw() {
    if (!this.columns) return;
    const num = this.rows.length;
    let [first, last] = [0, num];
    const whole = this.options.wrap || this.printing;
    if (!whole && num > this.whole) {
      first = Math.max(0, Math.floor(this.scroller.scrollTop / ROW_HEIGHT) - 8);
      last = Math.min(num, first + Math.ceil(this.options.height / ROW_HEIGHT) + 16);
    }
    const mark = `${first} ${last}`;
    if (this.drawn === mark) return;
    this.drawn = mark;
    const gap = (rows) => (rows > 0 ? el("tr", { class: "gap", "aria-hidden": "true" }, el("td", { colspan: this.columns.length, style: { height: `${rows * ROW_HEIGHT}px` } })) : null);
    const shown = this.rows.slice(first, last).map((i, k) => this.row(i, first + k));
    const nothing = num === 0 ? el("tr", {}, el("td", { class: "empty", colspan: this.columns.length }, "Nothing fits.")) : null;
    this.body.replaceChildren(...[gap(first), ...shown, gap(num - last), nothing].filter(Boolean));
    this.table.setAttribute("aria-rowcount", num + 1);
  }

  row(i, place) {
    const cells = this.columns.map((c) => {
      const classes = [c.num ? "num" : "", this.options.wrap && c.wrap !== false ? "wrap" : "", c.tone ? c.tone(i) : ""].join(" ").trim();
      const text = c.text ? c.text(i, place) : null;
      return el("td", { class: classes || null, title: !c.draw && !this.options.wrap && text && text.length > 12 ? text : null }, c.draw ? c.draw(i) : text);
    });
    return el("tr", { class: `row${i === chosen && this.options.onRow === choose ? " chosen" : ""}`, "data-row": i, "aria-rowindex": place + 2 }, ...cells);
  }
}
