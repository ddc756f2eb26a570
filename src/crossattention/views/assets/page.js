// The page: what is chosen, the tools that choose it, and the panels that show it.

class Page {
  constructor(data) {
    this.queries = new Side(data.queries, "queries");
    this.context = new Side(data.context, "context");
    this.attention = new Attention(data);
    this.state = { layer: this.attention.layers.length > 1 ? -1 : 0, head: -1, least: 0.02 };
    this.pinned = { queries: null, context: null };
    this.hovered = { queries: null, context: null };
    this.found = { queries: new Set(), context: new Set() };
    this.readout = document.getElementById("readout");
    this.readAddress(data.start);
    this.panels = this.build();
    this.tools();
    this.notes(data.notes);
    document.addEventListener("keydown", (event) => this.key(event));
    for (const [name, printing] of [["beforeprint", true], ["afterprint", false]]) {
      addEventListener(name, () => {
        isPrinting = printing;
        this.draw();
      });
    }
    addEventListener("resize", () => this.refresh());
    darkScheme.addEventListener("change", () => this.refresh());
    this.draw();
  }

  build() {
    const { queries, context } = this, panels = [];
    const isText = (side) => side.kind === "text" && side.length <= MOST_TOKENS_IN_RIBBONS;
    if (isText(queries) && isText(context)) {
      this.ribbons = new Ribbons(this);
      panels.push(this.ribbons);
    } else {
      for (const side of [queries, context]) panels.push(this.panelOf(side));
    }
    const heads = new Heads(this), numbers = [new Matrix(this), new Table(this)];
    if (!this.ribbons) numbers.reverse();
    heads.element.classList.add("later"); // on a phone, where the columns are one
    for (const column of [[...panels, heads], numbers]) {
      document.getElementById("panels").append(make("div", { className: "column" }, ...column.map((one) => one.element)));
    }
    return [...panels, ...numbers, heads];
  }

  panelOf(side) {
    if (side.kind === "image") return new Picture(side, this);
    if (side.kind === "sound") return new Sound(side, this);
    if (side.isRead && side.length > MOST_TOKENS_IN_RIBBONS) return new Strips(side, this);
    return side.length > 4000 ? new Strips(side, this) : new TokenList(side, this);
  }

  // ------------------------------------------------------------------------------------------- what is chosen

  choose(layer, head) {
    const { layers } = this.attention;
    layer = Math.max(layers.length > 1 ? -1 : 0, Math.min(layers.length - 1, layer));
    Object.assign(this.state, { layer, head: Math.max(-1, Math.min(this.headsOf(layer) - 1, head)) });
    this.writeAddress();
    this.refresh();
  }

  /** How many heads can be chosen in a layer, or in all of them. */
  headsOf(layer) {
    const { layers } = this.attention;
    return layer < 0 ? Math.min(...layers.map((one) => one.heads)) : layers[layer].heads;
  }

  hover(role, at) {
    if (this.hovered[role] === at && this.hovered[role === "queries" ? "context" : "queries"] === null) return;
    this.hovered = { queries: null, context: null, [role]: at };
    this.refresh();
  }

  hoverBoth(query, position) {
    this.hovered = { queries: query, context: position };
    this.refresh();
  }

  pin(role, at, stays = false) {
    this.pinned = { queries: null, context: null, [role]: this.pinned[role] === at && !stays ? null : at };
    if (this.pinned[role] === null) this.hovered = { queries: null, context: null };
    this.writeAddress();
    this.refresh();
  }

  pinBoth(query, position) {
    const isSame = this.pinned.queries === query && this.pinned.context === position;
    this.pinned = isSame ? { queries: null, context: null } : { queries: query, context: position };
    this.writeAddress();
    this.refresh();
  }

  /** What is hovered, else what is pinned. */
  get focus() {
    const isHovering = this.hovered.queries !== null || this.hovered.context !== null;
    const { queries: query, context: position } = isHovering ? this.hovered : this.pinned;
    return { query, position };
  }

  /** A number for each position of one side: what the chosen query reads, or what all read; null where nothing is asked. */
  valuesOf(side) {
    const { rows } = this.shown, other = side.isRead ? this.queries : this.context;
    const at = this.hovered[other.role] ?? this.pinned[other.role];
    if (at === null && !side.isRead) return null;
    if (at === null) {
      const { values, isWhole } = this.shown.mass;
      return { values, largest: largestOf(values), unit: "mass over queries", what: `the mass of each position, ${isWhole ? "all weights" : "the kept weights"} of all queries in sum` };
    }
    const values = new Float32Array(side.length);
    for (const [place, weight] of side.isRead ? rows.row(at) : rows.column(at)) values[place] = weight;
    return { values, largest: largestOf(values), unit: "weight", what: side.isRead ? `what query ${other.numbered(at)} reads` : `which queries read position ${other.numbered(at)}` };
  }

  // ------------------------------------------------------------------------------------------------ the drawing

  refresh() {
    if (!this.waiting) this.waiting = requestAnimationFrame(() => this.draw());
  }

  draw() {
    this.waiting = 0;
    const { layer, head } = this.state, rows = this.attention.rows(layer, head);
    if (this.rows !== rows) this.mass = this.attention.mass(layer, head);
    this.rows = rows;
    this.shown = { rows, mass: this.mass, found: this.found, ...this.focus };
    for (const one of this.panels) one.draw(this.shown);
    if (this.layerChoice) this.showChoices();
    this.tell();
  }

  get place() {
    const { layer, head } = this.state, { layers } = this.attention;
    const names = layer < 0 ? `mean of ${layers.length} layers` : layers[layer].name;
    return `${names}, ${head < 0 ? (layer >= 0 && layers[layer].heads === 1 ? "its one head" : "mean of heads") : `head ${head}`}`;
  }

  tell() {
    const { query, position } = this.focus, { rows } = this, strong = make("strong", { textContent: this.place });
    if (query === null && position === null) {
      const kept = rows.keptShare(), share = kept > 0.9995 ? "" : ` The weights shown are ${(100 * kept).toFixed(1)} % of all attention.`;
      this.readout.replaceChildren(strong, `: the largest weight is ${written(rows.largest)}.${share}`);
      return;
    }
    const best = (pairs) => pairs.sort((a, b) => b[1] - a[1]).slice(0, 3);
    const listed = (side, pairs) => best(pairs).map(([at, weight]) => `${side.describe(at)}: ${written(weight)}`).join("; ") || "nothing that is kept";
    const read = position === null ? "" : `position ${this.context.numbered(position)}`;
    let words;
    if (query !== null && read) words = `: query ${this.queries.numbered(query)} reads ${read} with ${written(rows.weight(query, position))}`;
    else if (query !== null) words = `: query ${this.queries.numbered(query)} reads ${listed(this.context, rows.row(query))}`;
    else words = `: ${read} receives ${written(this.mass.values[position])} in sum, most from ${listed(this.queries, rows.column(position))}`;
    this.readout.replaceChildren(strong, make("bdi", { textContent: words }));
  }

  say(words) {
    this.readout.replaceChildren(make("strong", { textContent: this.place }), `: ${words}`);
  }

  // -------------------------------------------------------------------------------------------------- the tools

  tools() {
    const { layers } = this.attention, bar = document.getElementById("tools");
    this.layerChoice = make("select", { onchange: () => this.choose(Number(this.layerChoice.value), this.state.head) });
    if (layers.length > 1) this.layerChoice.append(make("option", { value: -1, textContent: `mean of ${layers.length} layers` }));
    layers.forEach((layer, i) => this.layerChoice.append(make("option", { value: i, textContent: `${i}: ${layer.name}` })));
    this.headChoice = make("select", { onchange: () => this.choose(this.state.layer, Number(this.headChoice.value)) });
    this.search = make("input", { type: "search", placeholder: "text or position", oninput: () => this.find(false) });
    this.search.addEventListener("keydown", (event) => event.key === "Enter" && this.find(true));
    this.hits = make("span");
    bar.append(make("label", {}, "Layer", this.layerChoice), make("label", {}, "Head", this.headChoice));
    bar.append(make("label", {}, make("span", {}, "Search both sides ", this.hits), this.search));
    if (this.ribbons) {
      const shown = make("span", { textContent: this.state.least.toFixed(2) });
      const range = make("input", { type: "range", min: 0, max: 0.5, step: 0.01, value: this.state.least });
      range.addEventListener("input", () => {
        this.state.least = Number(range.value);
        shown.textContent = this.state.least.toFixed(2);
        this.refresh();
      });
      bar.append(make("label", {}, make("span", {}, "Hide bands below ", shown), range));
    }
    const keys = [["↑ ↓", "the query before, the next"], ["← →", "the position before, the next"], ["l  L", "the next layer, the one before"], ["h  H", "the next head, the one before"], ["/", "search; Enter goes to the next hit"], ["Esc", "everything again"]];
    const list = make("dl", {}, ...keys.flatMap(([key, what]) => [make("dt", {}, make("kbd", { textContent: key })), make("dd", { textContent: what })]));
    bar.append(make("details", { className: "keys" }, make("summary", { textContent: "Keys" }), list));
    this.showChoices();
  }

  showChoices() {
    const { layer, head } = this.state, { layers } = this.attention;
    const heads = layer < 0 ? Math.min(...layers.map((one) => one.heads)) : layers[layer].heads;
    if (this.headChoice.options.length !== heads + 1) {
      const options = Array.from({ length: heads }, (_, i) => make("option", { value: i, textContent: `head ${i}` }));
      this.headChoice.replaceChildren(make("option", { value: -1, textContent: `mean of ${heads} head${heads > 1 ? "s" : ""}` }), ...options);
    }
    this.layerChoice.value = layer;
    this.headChoice.value = head;
  }

  find(goes) {
    this.found = { queries: this.queries.search(this.search.value), context: this.context.search(this.search.value) };
    const count = this.found.queries.size + this.found.context.size;
    this.hits.textContent = this.search.value.trim() ? `(${whole(count)} found)` : "";
    const all = [...this.found.context].map((at) => ["context", at]).concat([...this.found.queries].map((at) => ["queries", at]));
    if (goes && all.length) {
      this.hit = ((this.hit ?? -1) + 1) % all.length;
      this.pin(...all[this.hit], true);
    } else this.hit = -1;
    this.refresh();
  }

  key(event) {
    const isTyping = ["INPUT", "SELECT", "AUDIO"].includes(event.target.tagName);
    if (event.key === "Escape") {
      this.search.value = "";
      this.find(false);
      this.pinned = { queries: null, context: null };
      this.hovered = { queries: null, context: null };
      if (isTyping) event.target.blur();
      this.writeAddress();
    } else if (isTyping || event.ctrlKey || event.metaKey || event.altKey) return;
    else if (event.key === "/") this.search.focus();
    else if (event.key === "l" || event.key === "L") this.choose(this.state.layer + (event.key === "l" ? 1 : -1), this.state.head);
    else if (event.key === "h" || event.key === "H") this.choose(this.state.layer, this.state.head + (event.key === "h" ? 1 : -1));
    else if (event.key.startsWith("Arrow")) this.step(event.key);
    else return;
    event.preventDefault();
    this.refresh();
  }

  step(key) {
    const side = key === "ArrowUp" || key === "ArrowDown" ? this.queries : this.context;
    const by = key === "ArrowDown" || key === "ArrowRight" ? 1 : -1, now = this.pinned[side.role];
    const next = now === null ? (by > 0 ? 0 : side.length - 1) : Math.max(0, Math.min(side.length - 1, now + by));
    this.hovered = { queries: null, context: null };
    this.pin(side.role, next, true);
  }

  // ------------------------------------------------------------------------------------- the address and the rest

  /** What is chosen stands behind the # of the address, so that it can be sent and printed. Numbers and "mean" are read from it. */
  readAddress(start) {
    const given = new URLSearchParams(location.hash.slice(1)), { layers } = this.attention;
    const isMean = (name) => given.get(name) === "mean";
    const number = (name, most) => {
      const value = Number.parseInt(given.get(name), 10);
      return Number.isInteger(value) && value >= 0 && value < most ? value : null;
    };
    const layer = isMean("layer") && layers.length > 1 ? -1 : number("layer", layers.length) ?? start.layer;
    if (layer !== null) this.state.layer = layer;
    const atStart = layer === start.layer && !isMean("head") ? start.head : null;
    this.state.head = number("head", this.headsOf(this.state.layer)) ?? atStart ?? -1;
    this.pinned = { queries: number("query", this.queries.length), context: number("position", this.context.length) };
  }

  writeAddress() {
    const { layer, head } = this.state, parts = { layer, head, query: this.pinned.queries, position: this.pinned.context };
    const kept = Object.entries(parts).filter(([, value]) => value !== null).map(([name, value]) => `${name}=${value < 0 ? "mean" : value}`);
    try {
      history.replaceState(null, "", `#${kept.join("&")}`);
    } catch {
      // A browser that gives files no history shows the page all the same.
    }
  }

  notes(notes) {
    const { layers } = this.attention, heads = layers.reduce((sum, layer) => sum + layer.heads, 0);
    const kinds = [...new Set(layers.map((layer) => layer.kind))].join(", ");
    const counts = `${counted(this.queries.length, "query", "queries")} on ${counted(this.context.length, "position")} in ${counted(layers.length, "layer")} with ${counted(heads, "head")} (${kinds}).`;
    document.getElementById("about").textContent = counts;
    const always = "Positions, layers and heads are counted from 0. A weight is the share of a query's attention, from 0 to 1.";
    document.getElementById("notes").append(...[always, ...notes].map((note) => make("p", { textContent: note })));
  }
}

function largestOf(values) {
  let largest = 0;
  for (const value of values) if (value > largest) largest = value;
  return largest;
}

window.crossattentionPage = new Page(JSON.parse(document.getElementById("data").textContent));
