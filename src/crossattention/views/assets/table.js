// Table: the numbers behind what is chosen, largest first; and the grid of heads.

const LINES = 12;

class Table {
  constructor(page) {
    this.page = page;
    this.table = make("table");
    this.rest = make("p", { className: "about" });
    this.element = panel("Numbers", "", this.table, this.rest);
    this.element.note.remove();
  }

  draw({ rows, query, position, mass }) {
    const { queries, context } = this.page;
    if (query !== null) this.fill(`Query ${queries.numbered(query)} reads`, context, rows.row(query), "weight", "of its attention is on other positions");
    else if (position !== null) this.fill(`Position ${context.numbered(position)} is read by`, queries, rows.column(position), "weight", "comes from other queries");
    else {
      const pairs = Array.from(mass.values, (value, at) => [at, value]).filter(([, value]) => value > 0);
      this.fill("What is read most: the weights of all queries in sum", context, pairs, "mass", "is on other positions");
    }
  }

  fill(title, side, pairs, unit, rest) {
    const order = pairs.sort((a, b) => b[1] - a[1] || a[0] - b[0]), most = order.length ? order[0][1] : 1;
    const head = ["position", side.kind === "image" ? "patch" : side.kind === "sound" ? "time" : "text", unit, ""];
    const header = make("tr", {}, ...head.map((name, i) => make("th", { scope: "col", className: i === 0 || i === 2 ? "n" : "", textContent: name })));
    const lines = order.slice(0, LINES).map(([at, value]) => this.line(side, at, value, most));
    const caption = make("caption", {}, make("bdi", { textContent: title }));
    this.table.replaceChildren(caption, make("thead", {}, header), make("tbody", {}, ...lines));
    const shown = order.slice(0, LINES).reduce((sum, [, value]) => sum + value, 0);
    const others = unit === "weight" && side.isRead ? Math.max(0, 1 - shown) : order.slice(LINES).reduce((sum, [, value]) => sum + value, 0);
    this.rest.textContent = order.length === 0 ? "Nothing." : others > 0.0005 ? `${written(others)} ${rest}.` : "";
  }

  line(side, at, value, most) {
    const bar = make("div");
    bar.style.width = `${(100 * value) / most}%`;
    const label = make("span", { dir: "auto", textContent: cut(side.kind === "sound" || side.kind === "image" ? side.describe(at) : side.label(at) || "–", 10_000) });
    label.title = "Click to see all of a long text";
    label.addEventListener("click", () => label.classList.toggle("whole"));
    return make("tr", {}, make("td", { className: "n", textContent: whole(at) }), make("td", { className: "text" }, label), make("td", { className: "n", textContent: written(value) }), make("td", { className: "bar" }, bar));
  }
}

/** A button for each head of each layer, with how concentrated it is. */
class Heads {
  constructor(page) {
    this.page = page;
    const { layers } = page.attention, most = Math.max(...layers.map((layer) => layer.heads));
    const numbers = Array.from({ length: most }, (_, head) => make("th", { scope: "col", textContent: head }));
    this.buttons = [];
    const rows = layers.map((layer, i) => {
      const cells = Array.from({ length: layer.heads }, (_, head) => make("td", {}, this.button(i, head, layer.concentration(head))));
      const name = make("th", { scope: "row", title: layer.name }, make("bdi", { textContent: layer.name }));
      return make("tr", {}, name, ...cells);
    });
    const table = make("table", { className: "heads" }, make("thead", {}, make("tr", {}, make("th", { scope: "col", textContent: "layer \\ head" }), ...numbers)), make("tbody", {}, ...rows));
    const about = "How concentrated each head is: the largest weight of a query, mean over queries. 1 reads one position, a small number reads many. Choose one.";
    this.legend = make("div");
    this.element = panel("Heads", about, make("div", { className: "scroll" }, table), this.legend);
  }

  button(layer, head, share) {
    const button = make("button", { type: "button", share, layer, head, textContent: share >= 0.995 ? "1" : share.toFixed(2).slice(1) });
    button.setAttribute("aria-label", `Layer ${layer}, head ${head}: ${written(share)}`);
    button.addEventListener("click", () => this.page.choose(layer, head));
    this.buttons.push(button);
    return button;
  }

  draw() {
    const { layer, head } = this.page.state, name = scheme();
    for (const button of this.buttons) {
      const isAll = head < 0 && (layer < 0 || this.page.attention.layers.length === 1); // then none need be marked
      button.setAttribute("aria-pressed", !isAll && (layer < 0 || button.layer === layer) && (head < 0 || button.head === head));
      if (this.drawn !== name) {
        button.style.background = heat(button.share);
        button.style.color = inkOn(button.share);
      }
    }
    if (this.drawn !== name) this.legend.replaceChildren(scaleBar(1, "mean of largest weights"));
    this.drawn = name;
  }
}
