// Matrix: every query against every position. Cells shrink to less than a pixel; then a pixel is the largest of its cells.

const HIGHEST = 1400; // pixels: a browser draws no canvas of some ten thousands, and nobody looks through one

class Matrix {
  constructor(page) {
    this.page = page;
    this.canvas = make("canvas", { role: "img" });
    this.legend = make("div");
    this.element = panel("Matrix", "", make("div", { className: "matrix across" }, this.canvas), this.legend);
    this.canvas.addEventListener("pointermove", (event) => page.hoverBoth(...this.cell(event)));
    this.canvas.addEventListener("pointerleave", () => page.hoverBoth(null, null));
    this.canvas.addEventListener("click", (event) => {
      const [query, position] = this.cell(event);
      if (query !== null) page.pinBoth(query, position);
    });
  }

  cell(event) {
    const x = event.offsetX - this.left, y = event.offsetY - this.top;
    const position = Math.floor(x / this.cellWidth), query = Math.floor(y / this.cellHeight);
    const { n, m } = this.rows;
    return x >= 0 && y >= 0 && position < m && query < n ? [query, position] : [null, null];
  }

  layout() {
    const { n, m } = this.rows, room = Math.max(220, this.element.clientWidth), context = this.canvas.getContext("2d");
    context.font = FONT(12);
    const widest = (labels, limit) => Math.min(limit, Math.ceil(Math.max(...labels.map((label) => context.measureText(label).width))) + 8);
    this.cellHeight = n <= 60 ? Math.max(16, Math.min(28, 560 / n)) : Math.min(12, Math.max(1, 700 / n), HIGHEST / n);
    this.rowLabels = labelsOf(this.page.queries, this.cellHeight, 13);
    this.left = widest(this.rowLabels.map(([, label]) => label), Math.min(130, room / 3));
    this.cellWidth = Math.min(44, (room - this.left - 2) / m);
    this.columnLabels = labelsOf(this.page.context, this.cellWidth, 14, 44);
    const labels = widest(this.columnLabels.map(([, label]) => label), 110);
    this.isTurned = labels - 8 > this.cellWidth && this.columnLabels.length === m;
    this.top = this.isTurned ? labels + 4 : 20;
    this.size = [this.left + this.cellWidth * m + 2, this.top + this.cellHeight * n + 2];
  }

  draw({ rows, query, position }) {
    const isNew = this.rows !== rows || this.drawn !== scheme();
    this.rows = rows;
    if (isNew || this.room !== this.element.clientWidth) {
      Object.assign(this, { drawn: scheme(), room: this.element.clientWidth });
      this.layout();
      this.picture = document.createElement("canvas");
      this.paint(sized(this.picture, ...this.size));
      this.legend.replaceChildren(scaleBar(rows.largest, "weight"));
      this.canvas.setAttribute("aria-label", `${whole(rows.n)} queries by ${whole(rows.m)} positions, weights from 0 to ${written(rows.largest)}; the table has the numbers`);
      const several = [[1 / this.cellHeight, "rows"], [1 / this.cellWidth, "columns"]].filter(([count]) => count > 1.5);
      const taken = several.map(([count, what]) => `${whole(Math.round(count))} ${what}`).join(" and ");
      const about = `A row for each of ${whole(rows.n)} queries, a column for each of ${whole(rows.m)} positions.`;
      this.element.note.textContent = taken ? `${about} Each pixel is the largest of about ${taken}.` : about;
    }
    const context = sized(this.canvas, ...this.size);
    context.drawImage(this.picture, 0, 0, ...this.size);
    this.frame(context, query, position);
  }

  paint(context) {
    const { rows, left, top, cellWidth, cellHeight } = this, { n, m, largest } = rows;
    const ratio = this.picture.width / this.size[0];
    const isFine = cellWidth < 2 || cellHeight < 2;
    context.fillStyle = heat(0);
    context.fillRect(left, top, cellWidth * m, cellHeight * n);
    if (isFine) this.paintPixels(context, ratio);
    else {
      for (let query = 0; query < n; query++) {
        for (const [position, weight] of rows.row(query)) {
          context.fillStyle = heat(largest ? weight / largest : 0);
          context.fillRect(left + position * cellWidth, top + query * cellHeight, cellWidth - (cellWidth > 6 ? 1 : 0), cellHeight - (cellHeight > 6 ? 1 : 0));
        }
      }
    }
    context.strokeStyle = styleOf("--line");
    context.strokeRect(left - 0.5, top - 0.5, cellWidth * m + 1, cellHeight * n + 1);
    if (cellWidth >= 27 && cellHeight >= 15) this.paintNumbers(context);
    this.paintLabels(context);
  }

  paintPixels(context, ratio) {
    const { rows, left, top, cellWidth, cellHeight } = this, { n, m, largest } = rows;
    const width = Math.max(1, Math.round(cellWidth * m * ratio)), height = Math.max(1, Math.round(cellHeight * n * ratio));
    const most = new Float32Array(width * height);
    const edge = (index, count, pixels) => Math.floor((index * pixels) / count);
    for (let query = 0; query < n; query++) {
      const from = edge(query, n, height), to = Math.max(from + 1, edge(query + 1, n, height));
      for (let i = rows.starts[query]; i < rows.starts[query + 1]; i++) {
        const low = edge(rows.places[i], m, width), high = Math.max(low + 1, edge(rows.places[i] + 1, m, width));
        for (let y = from; y < to; y++) for (let x = low; x < high; x++) most[y * width + x] = Math.max(most[y * width + x], rows.weights[i]);
      }
    }
    const image = new ImageData(width, height), bytes = image.data;
    for (let i = 0; i < most.length; i++) {
      const [red, green, blue] = rgb(largest ? most[i] / largest : 0);
      bytes.set([red, green, blue, 255], 4 * i);
    }
    context.putImageData(image, Math.round(left * ratio), Math.round(top * ratio));
  }

  paintNumbers(context) {
    const { rows, left, top, cellWidth, cellHeight } = this;
    context.font = FONT(10.5);
    context.textAlign = "center";
    context.textBaseline = "middle";
    for (let query = 0; query < rows.n; query++) {
      for (const [position, weight] of rows.row(query)) {
        if (weight < 0.005) continue;
        context.fillStyle = inkOn(weight / rows.largest);
        const digits = weight >= 0.995 ? "1" : weight.toFixed(2).slice(1);
        context.fillText(digits, left + (position + 0.5) * cellWidth - 0.5, top + (query + 0.5) * cellHeight);
      }
    }
  }

  paintLabels(context) {
    const { left, top, cellWidth, cellHeight } = this, isEach = this.columnLabels.length === this.rows.m;
    context.font = FONT(12);
    context.fillStyle = styleOf("--ink");
    context.textBaseline = "middle";
    context.textAlign = "right";
    for (const [query, label] of this.rowLabels) {
      context.fillText(fitted(context, label, left - 6), left - 5, top + (query + 0.5) * cellHeight);
    }
    for (const [position, label] of this.columnLabels) {
      context.save();
      context.translate(left + (position + 0.5) * cellWidth, top - 5);
      if (this.isTurned) context.rotate(-Math.PI / 2);
      context.textAlign = this.isTurned ? "left" : "center";
      context.textBaseline = this.isTurned ? "middle" : "alphabetic";
      const room = this.isTurned ? top - 8 : isEach ? cellWidth + 2 : 60;
      context.fillText(fitted(context, label, room), 0, 0);
      context.restore();
    }
  }

  frame(context, query, position) {
    const { left, top, cellWidth, cellHeight, rows } = this;
    context.strokeStyle = styleOf("--mark");
    context.lineWidth = 2;
    const height = Math.max(cellHeight, 2), width = Math.max(cellWidth, 2);
    if (query !== null) context.strokeRect(left - 1, top + query * cellHeight - 1, cellWidth * rows.m + 1, height + 1);
    if (position !== null) context.strokeRect(left + position * cellWidth - 1, top - 1, width + 1, cellHeight * rows.n + 1);
  }
}

/**
 * [position, label] of the positions that are labelled: each by its name where cells are wide enough, else some by number (of
 * a sound by time), in steps that are easy to count with.
 */
function labelsOf(side, cell, least, wide = least) {
  const count = side.length;
  if (cell >= least) return Array.from({ length: count }, (_, at) => [at, cut(side.brief(at), 30)]);
  const step = [1, 2, 5, 10, 20, 25, 50, 100, 200, 250, 500, 1e3, 2e3, 2500, 5e3, 1e4, 2e4, 5e4, 1e5, 1e6].find((one) => one * cell >= wide + 6 * (count > 9999)) || count;
  return Array.from({ length: Math.ceil(count / step) }, (_, i) => [i * step, side.kind === "sound" ? side.brief(i * step) : whole(i * step)]);
}
