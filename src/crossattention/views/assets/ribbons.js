// Ribbons: two columns of tokens, and between them bands as thick as the weights. A query's bands fill its height in sum.

const ROW = 26;

/** One column of tokens as buttons; only one of them is in the tab order. */
class Tokens {
  constructor(side, page) {
    Object.assign(this, { side, page, first: 0 });
    this.list = make("ul", { className: "tokens", "aria-label": side.title });
    this.list.addEventListener("pointerover", (event) => this.on(event, (at) => page.hover(side.role, at)));
    this.list.addEventListener("pointerleave", () => page.hover(side.role, null));
    this.list.addEventListener("click", (event) => this.on(event, (at) => page.pin(side.role, at)));
    this.list.addEventListener("focusin", (event) => this.on(event, (at) => page.hover(side.role, at)));
    this.list.addEventListener("focusout", () => page.hover(side.role, null));
  }

  on(event, act) {
    const button = event.target.closest("button");
    if (button) act(button.at);
  }

  fill(first, count) {
    this.first = first;
    this.buttons = [];
    const items = [];
    for (let at = first; at < Math.min(first + count, this.side.length); at++) {
      const number = make("span", { className: "number" });
      const label = this.side.label(at), name = this.side.kind === "text" || label ? label : `position ${whole(at)}`;
      const place = make("span", { className: "place", textContent: name === label ? whole(at) : "" });
      const button = make("button", { className: "token", type: "button", tabIndex: -1, at, number }, place, text(name), number);
      button.setAttribute("aria-label", `${this.side.isRead ? "Context" : "Query"} ${at}: ${cut(this.side.describe(at), 200)}`);
      this.buttons.push(button);
      items.push(make("li", {}, button));
    }
    this.list.replaceChildren(...items);
  }

  /** Mark what is chosen, what it reads or is read by, and what was searched for. */
  mark(chosen, numbers, found) {
    for (const button of this.buttons) {
      const weight = numbers && numbers.get(button.at), isChosen = button.at === chosen;
      button.classList.toggle("on", isChosen);
      button.classList.toggle("read", weight >= this.page.state.least);
      button.classList.toggle("found", found.has(button.at));
      button.setAttribute("aria-pressed", isChosen);
      button.tabIndex = button.at === (chosen ?? this.first) ? 0 : -1;
      button.number.textContent = weight ? written(weight) : "";
    }
  }
}

class Ribbons {
  constructor(page) {
    this.page = page;
    this.queries = new Tokens(page.queries, page);
    this.context = new Tokens(page.context, page);
    this.drawing = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    this.drawing.setAttribute("aria-hidden", "true");
    this.drawing.setAttribute("preserveAspectRatio", "none");
    this.box = make("div", { className: "ribbons" }, this.queries.list, this.drawing, this.context.list);
    this.queries.list.classList.add("queries");
    this.context.list.classList.add("context");
    const heads = make("div", { className: "heads-of-sides" });
    heads.append(make("span", { textContent: page.queries.title }), make("span", { textContent: page.context.title }));
    this.element = panel("Alignment", "Each band is as thick as its weight; the bands of one query sum to its row's height.", heads, this.box);
    this.height = Math.max(page.queries.length, page.context.length) * (matchMedia("(max-width: 760px)").matches ? 30 : ROW);
    for (const column of [this.queries, this.context]) {
      column.fill(0, column.side.length);
      this.place(column);
    }
  }

  place(column) {
    column.list.style.height = `${this.height}px`;
    const step = this.height / column.side.length;
    column.buttons.forEach((button, i) => (button.parentElement.style.top = `${(i + 0.5) * step}px`));
    let longest = "";
    for (let at = 0; at < column.side.length; at++) if (column.side.label(at).length > longest.length) longest = column.side.label(at);
    const sizer = make("li", { className: "sizer", "aria-hidden": "true" }, make("span", { className: "token" }, text(longest, 40), make("span", { textContent: "0000 0.0000" })));
    column.list.append(sizer);
  }

  draw({ rows, query, position, found }) {
    if (this.rows !== rows || this.least !== this.page.state.least) this.bands(rows);
    const readBy = position === null ? null : new Map(rows.column(position));
    const reads = query === null ? null : new Map(rows.row(query));
    this.queries.mark(query, query === null ? readBy : null, found.queries);
    this.context.mark(position, position === null || query !== null ? reads : null, found.context);
    this.box.classList.toggle("focused", query !== null || position !== null);
    for (const path of this.paths) {
      const isOn = (query === null || path.query === query) && (position === null || path.position === position);
      path.classList.toggle("on", isOn && (query !== null || position !== null));
    }
  }

  /** Bands stack at each end in the order of the other end, so that they cross as little as they can. */
  bands(rows) {
    Object.assign(this, { rows, least: this.page.state.least });
    const width = 100, { n, m } = rows, stepA = this.height / n, stepB = this.height / m;
    const masses = rows.columnSums(), most = Math.max(1, ...masses);
    const fullA = Math.min(stepA, ROW) - 4, fullB = Math.min(stepB, ROW) - 4;
    const usedA = new Float64Array(n), usedB = new Float64Array(m), order = [];
    for (let query = 0; query < n; query++) for (const [position, weight] of rows.row(query)) order.push([query, position, weight]);
    this.paths = [];
    for (const [query, position, weight] of order) {
      const thickA = weight * fullA, thickB = (weight / most) * fullB;
      const a = (query + 0.5) * stepA - fullA / 2 + usedA[query], b = (position + 0.5) * stepB - ((masses[position] / most) * fullB) / 2 + usedB[position];
      usedA[query] += thickA;
      usedB[position] += thickB;
      if (weight < this.least) continue;
      const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
      path.setAttribute("d", `M0 ${a}C45 ${a} 55 ${b} ${width} ${b}V${b + thickB}C55 ${b + thickB} 45 ${a + thickA} 0 ${a + thickA}Z`);
      path.style.opacity = 0.25 + 0.6 * weight;
      this.paths.push(Object.assign(path, { query, position }));
    }
    this.drawing.setAttribute("viewBox", `0 0 ${width} ${this.height}`);
    this.drawing.style.height = `${this.height}px`;
    this.drawing.replaceChildren(...this.paths);
  }
}

/** Tokens without ribbons: for many queries, or beside a picture or a sound. */
class TokenList {
  constructor(side, page) {
    this.page = page;
    this.tokens = new Tokens(side, page);
    this.tokens.list.classList.add("list", "context");
    this.count = 400;
    const buttons = make("div", { className: "pages" });
    if (side.length > this.count) {
      this.where = make("span");
      buttons.append(
        make("button", { className: "plain", type: "button", textContent: "Before", onclick: () => this.turn(-this.count) }),
        make("button", { className: "plain", type: "button", textContent: "After", onclick: () => this.turn(this.count) }),
        this.where,
      );
    }
    this.element = panel(side.title, "Hover or choose one to see what belongs to it; Esc goes back to all.", buttons, make("div", { className: "scroll low" }, this.tokens.list));
    this.turn(0);
  }

  turn(by) {
    const { side } = this.tokens, last = Math.floor((side.length - 1) / this.count) * this.count;
    this.tokens.fill(Math.max(0, Math.min(last, this.tokens.first + by)), this.count);
    if (this.where) this.where.textContent = `${whole(this.tokens.first)} to ${whole(Math.min(side.length, this.tokens.first + this.count) - 1)}`;
    if (this.last) this.draw(this.last);
  }

  draw(shown) {
    this.last = shown;
    const { rows, query, position, found } = shown, { side } = this.tokens;
    const chosen = side.isRead ? position : query;
    const page = chosen === null ? this.tokens.first : Math.floor(chosen / this.count) * this.count;
    if (page !== this.tokens.first && chosen === this.page.pinned[side.role]) return this.turn(page - this.tokens.first);
    const other = side.isRead ? query : position;
    const numbers = other === null ? null : new Map(side.isRead ? rows.row(other) : rows.column(other));
    this.tokens.mark(chosen, numbers, found[side.role]);
  }
}
