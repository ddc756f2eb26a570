// Picture: heat over its patches, each in its place; the strongest are framed and numbered, for eyes that tell no colours.

const FRAMED = 5;

class Picture {
  constructor(side, page) {
    Object.assign(this, { side, page });
    const [width, height] = side.size;
    this.image = make("img", { src: side.source, alt: `The picture, in ${side.rows} by ${side.columns} patches` });
    this.canvas = make("canvas", { role: "img" });
    const figure = make("div", { className: "figure" }, this.image, this.canvas);
    figure.style.width = `${Math.round(width * Math.min(560 / width, 560 / height))}px`;
    figure.style.aspectRatio = `${width} / ${height}`;
    this.legend = make("div");
    this.veil = make("input", { type: "range", min: 0, max: 100, value: 65, oninput: () => page.refresh() });
    const veil = make("label", { className: "scale" }, "heat over the picture", this.veil);
    this.leading = new TokenButtons(side, page);
    this.element = panel(side.title, "", ...(side.leading.length ? [this.leading.element] : []), figure, this.legend, veil);
    this.canvas.addEventListener("pointermove", (event) => page.hover(side.role, this.at(event)));
    this.canvas.addEventListener("pointerleave", () => page.hover(side.role, null));
    this.canvas.addEventListener("click", (event) => page.pin(side.role, this.at(event)));
    this.image.addEventListener("load", () => page.refresh());
  }

  at(event) {
    const { rows, columns, leading } = this.side;
    const row = Math.floor((event.offsetY / this.canvas.clientHeight) * rows), column = Math.floor((event.offsetX / this.canvas.clientWidth) * columns);
    return leading.length + Math.max(0, Math.min(rows - 1, row)) * columns + Math.max(0, Math.min(columns - 1, column));
  }

  draw(shown) {
    const { side, page } = this, width = this.image.clientWidth, height = this.image.clientHeight;
    if (!width || !height) return;
    const found = page.valuesOf(side), context = sized(this.canvas, width, height);
    this.canvas.style.width = this.canvas.style.height = "";
    const cellWidth = width / side.columns, cellHeight = height / side.rows, first = side.leading.length;
    this.element.note.textContent = found ? `Shown: ${found.what}. Patches are counted from 0; the ${FRAMED} strongest are framed, with their weights or, where patches are small, their ranks.` : "Choose a position of the other side to see which patches read it.";
    const largest = found ? largestOf(found.values.subarray(first)) : 0;
    this.legend.replaceChildren(found ? scaleBar(largest, found.unit, "over") : "");
    if (found) this.leading.mark(found.values);
    if (found) {
      context.globalAlpha = this.veil.value / 100;
      context.imageSmoothingEnabled = false;
      context.drawImage(this.patches(found.values, largest), 0, 0, width, height);
      context.globalAlpha = 1;
    }
    const order = found ? Array.from({ length: side.length - first }, (_, i) => i + first).filter((at) => found.values[at] > 0) : [];
    order.sort((a, b) => found.values[b] - found.values[a]);
    const isRoomy = cellWidth >= 44; // else the number is in the table, and the patch has its rank
    order.slice(0, FRAMED).forEach((at, rank) => {
      this.frame(context, at, cellWidth, cellHeight, "#fff", 1.5, isRoomy ? written(found.values[at]) : cellWidth > 16 ? String(rank + 1) : "");
    });
    const chosen = side.isRead ? shown.position : shown.query;
    if (chosen !== null && chosen >= first) this.frame(context, chosen, cellWidth, cellHeight, "#ff7a1a", 3, "");
    const best = order.length ? `${side.describe(order[0])}, ${written(found.values[order[0]])}` : "none";
    this.canvas.setAttribute("aria-label", `Heat over ${side.rows} by ${side.columns} patches; the strongest is ${best}`);
  }

  /** The heat as a picture of one pixel a patch. */
  patches(values, largest) {
    const { rows, columns, leading } = this.side, canvas = make("canvas", { width: columns, height: rows });
    const image = new ImageData(columns, rows);
    for (let i = 0; i < rows * columns; i++) {
      image.data.set([...rgb(largest ? values[leading.length + i] / largest : 0, "over"), 255], 4 * i);
    }
    canvas.getContext("2d").putImageData(image, 0, 0);
    return canvas;
  }

  frame(context, at, cellWidth, cellHeight, colour, thick, label) {
    const { row, column } = this.side.patch(at), x = column * cellWidth, y = row * cellHeight;
    context.lineWidth = thick + 2;
    context.strokeStyle = "rgb(0 0 0 / .75)";
    context.strokeRect(x + 2, y + 2, cellWidth - 4, cellHeight - 4);
    context.lineWidth = thick;
    context.strokeStyle = colour;
    context.strokeRect(x + 2, y + 2, cellWidth - 4, cellHeight - 4);
    if (!label) return;
    context.font = FONT(12, 700);
    context.textAlign = "center";
    context.textBaseline = "middle";
    context.lineWidth = 3;
    context.strokeStyle = "#000";
    context.strokeText(label, x + cellWidth / 2, y + cellHeight / 2);
    context.fillStyle = "#fff";
    context.fillText(label, x + cellWidth / 2, y + cellHeight / 2);
  }
}

/** Positions that are no part of the picture, such as a class token. */
class TokenButtons {
  constructor(side, page) {
    this.buttons = side.leading.map((label, at) => {
      const number = make("span", { className: "number" });
      return make("button", { className: "token", type: "button", number, onclick: () => page.pin(side.role, at) }, text(label), number);
    });
    this.element = make("div", { className: "context" }, ...this.buttons);
  }

  mark(values) {
    this.buttons.forEach((button, at) => (button.number.textContent = written(values[at])));
  }
}
