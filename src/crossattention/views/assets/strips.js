// Strips: a long side from all of its positions down to one. Each strip shows one part in cells; the chosen cell is the next strip.

const CELLS = 64, STRIP_HEIGHT = 64;

class Strips {
  constructor(side, page) {
    Object.assign(this, { side, page, path: [], last: null });
    this.box = make("div");
    this.element = panel(side.title, "", this.box);
  }

  /** [first, length, cell size] of each strip, down to cells of one position. */
  levels() {
    const levels = [];
    let first = 0, length = this.side.length, size;
    do {
      size = Math.ceil(length / CELLS);
      levels.push({ first, length, size });
      const chosen = this.path[levels.length - 1] ?? this.best(first, length, size);
      first += chosen * size;
      length = Math.min(size, this.side.length - first);
    } while (size > 1);
    return levels;
  }

  best(first, length, size) {
    const sums = this.cells(first, length, size);
    return sums.indexOf(Math.max(...sums));
  }

  cells(first, length, size) {
    const sums = new Array(Math.ceil(length / size)).fill(0), { values } = this.found;
    for (let i = 0; i < length; i++) sums[Math.floor(i / size)] += values[first + i];
    return sums;
  }

  /** Open the cells that lead to a position. */
  open(at) {
    this.path = [];
    let first = 0, length = this.side.length, size;
    do {
      size = Math.ceil(length / CELLS);
      const cell = Math.floor((at - first) / size);
      this.path.push(cell);
      first += cell * size;
      length = Math.min(size, this.side.length - first);
    } while (size > 1);
  }

  draw(shown) {
    const { side, page } = this, found = page.valuesOf(side);
    const chosen = side.isRead ? shown.position : shown.query, pinned = page.pinned[side.role];
    this.found = found || { values: new Float32Array(side.length), largest: 0, what: "nothing; choose a position of the other side", unit: "" };
    if (pinned !== this.pinned && pinned !== null) this.open(pinned);
    else if (this.what !== this.found.what && pinned === null) this.path = [];
    Object.assign(this, { pinned, what: this.found.what });
    const levels = this.levels(), part = side.kind === "text" ? "tokens" : "positions";
    this.element.note.textContent = `Shown: ${this.found.what}. A strip is cut into cells; the framed cell is opened in the strip below, down to single ${part}. Click, or use ← and → in a strip.`;
    while (this.box.children.length > levels.length) this.box.lastChild.remove();
    while (this.box.children.length < levels.length) this.box.append(this.strip(this.box.children.length));
    levels.forEach((level, depth) => this.paint(this.box.children[depth], level, depth, chosen, shown.found[side.role]));
  }

  strip(depth) {
    const canvas = make("canvas", { role: "slider", tabIndex: 0 });
    const strip = make("div", { className: "strip" }, make("div", { className: "axis" }), canvas, make("div", { className: "axis" }));
    const cell = (event) => Math.max(0, Math.min(strip.sums.length - 1, Math.floor((event.offsetX / canvas.clientWidth) * strip.sums.length)));
    canvas.addEventListener("click", (event) => this.choose(depth, cell(event)));
    canvas.addEventListener("pointermove", (event) => this.peek(strip, cell(event)));
    canvas.addEventListener("pointerleave", () => this.peek(strip, null));
    canvas.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step) return;
      event.preventDefault();
      event.stopPropagation();
      this.choose(depth, Math.max(0, Math.min(strip.sums.length - 1, strip.open + step)));
    });
    return Object.assign(strip, { canvas });
  }

  choose(depth, cell) {
    const levels = this.levels(), { first, size } = levels[depth];
    this.path = [...levels.slice(0, depth).map((level, i) => this.path[i] ?? this.best(level.first, level.length, level.size)), cell];
    if (size === 1) this.page.pin(this.side.role, first + cell, true);
    else {
      this.pinned = null;
      this.page.pin(this.side.role, null);
      this.page.refresh();
    }
  }

  peek(strip, cell) {
    if (cell === null) return this.page.hover(this.side.role, null);
    const { first, size, length } = strip.level, from = first + cell * size, to = Math.min(from + size, first + length) - 1;
    if (size === 1) this.page.hover(this.side.role, from);
    else this.page.say(`${whole(from)} to ${whole(to)}: ${written(strip.sums[cell])} in sum, ${this.found.unit}`);
  }

  paint(strip, level, depth, chosen, found) {
    const { first, length, size } = level, sums = this.cells(first, length, size), most = Math.max(...sums, 1e-30);
    const width = Math.max(280, this.element.clientWidth), context = sized(strip.canvas, width, STRIP_HEIGHT), step = width / sums.length;
    const open = size === 1 ? (chosen !== null && chosen >= first && chosen < first + length ? chosen - first : -1) : this.path[depth] ?? sums.indexOf(Math.max(...sums));
    Object.assign(strip, { level, sums, open });
    const hits = new Set([...found].filter((at) => at >= first && at < first + length).map((at) => Math.floor((at - first) / size)));
    sums.forEach((sum, cell) => {
      const height = (sum / most) * (STRIP_HEIGHT - 8);
      context.fillStyle = styleOf("--line");
      context.fillRect(cell * step, STRIP_HEIGHT - 1, step - 1, 1);
      context.fillStyle = hits.has(cell) ? styleOf("--mark") : styleOf("--accent");
      context.fillRect(cell * step, STRIP_HEIGHT - 1 - height, Math.max(1, step - 1), height);
      if (hits.has(cell)) context.fillRect(cell * step, 0, Math.max(2, step - 1), 3);
    });
    if (open >= 0) {
      context.strokeStyle = styleOf("--mark");
      context.lineWidth = 2;
      context.strokeRect(open * step, 1, Math.max(3, step - 1), STRIP_HEIGHT - 2);
    }
    strip.style.maxWidth = `${width}px`; // so that the ends of the axis stay under those of the strip in print
    const [above, , below] = strip.children, per = size === 1 ? "one position a cell" : `${whole(size)} positions a cell`;
    const at = (cell) => this.side.brief(Math.min(first + cell * size, first + length - 1));
    const tallest = size === 1 && most > 1e-30 ? `, position ${this.side.numbered(first + sums.indexOf(most))},` : "";
    above.replaceChildren(make("span", { className: "what", textContent: `${per}; the tallest${tallest} is ${written(most > 1e-30 ? most : 0)}` }));
    const middle = open >= 0 ? `▲ ${size === 1 ? at(open) : `${whole(first + open * size)} to ${whole(Math.min(first + (open + 1) * size, first + length) - 1)}`}: ${written(sums[open])}` : "";
    below.replaceChildren(make("span", { textContent: whole(first) }), make("span", { className: "what", dir: "auto", textContent: middle }), make("span", { textContent: whole(first + length - 1) }));
    const values = { "aria-label": `Positions ${first} to ${first + length - 1}, ${per}`, "aria-valuemin": 0, "aria-valuemax": sums.length - 1, "aria-valuenow": Math.max(0, open), "aria-valuetext": middle.slice(2) };
    for (const [name, value] of Object.entries(values)) strip.canvas.setAttribute(name, value);
  }
}
