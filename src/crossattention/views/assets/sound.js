// Sound: its spectrogram over time, below it what each span receives, and the sound itself to be played, whole or by span.

const SPECTRUM_HEIGHT = 150, LANE = 70, AXIS = 20, MARGIN = 46;
const MOST_LETTERS = 300, LETTER_HEIGHT = 20;

class Sound {
  constructor(side, page) {
    Object.assign(this, { side, page });
    this.levels = new Uint8Array(bytesOf(side.spectrum.data));
    this.canvas = make("canvas", { role: "img" });
    this.audio = make("audio", { controls: true, src: side.source, preload: "metadata", "aria-label": "The sound" });
    this.spans = make("div", { className: "pages" });
    this.element = panel(side.title, "", make("div", { className: "sound across" }, this.canvas), this.audio, this.spans);
    this.canvas.addEventListener("pointermove", (event) => page.hover(side.role, this.at(event)));
    this.canvas.addEventListener("pointerleave", () => page.hover(side.role, null));
    this.canvas.addEventListener("click", (event) => page.pin(side.role, this.at(event)));
    this.audio.addEventListener("timeupdate", () => {
      if (this.until !== undefined && this.audio.currentTime >= this.until) this.audio.pause();
      page.refresh();
    });
    this.audio.addEventListener("pause", () => delete this.until);
  }

  /** Play from the first of some positions up to the one after the last. */
  play(from, to) {
    const length = this.side.secondsPerPosition;
    this.audio.currentTime = from * length;
    this.until = Math.min(this.side.seconds, to * length);
    this.audio.play();
  }

  get total() {
    return Math.max(this.side.seconds, this.side.length * this.side.secondsPerPosition);
  }

  at(event) {
    const time = ((event.offsetX - MARGIN) / (this.width - MARGIN - 1)) * this.total;
    const at = Math.floor(time / this.side.secondsPerPosition);
    return at >= 0 && at < this.side.length ? at : null;
  }

  draw(shown) {
    const { side, page } = this;
    this.width = Math.max(300, this.element.clientWidth);
    const context = sized(this.canvas, this.width, SPECTRUM_HEIGHT + LANE + AXIS + 8), room = this.width - MARGIN - 1;
    const found = page.valuesOf(side), x = (time) => MARGIN + (time / this.total) * room;
    this.element.note.textContent = found ? `Shown: ${found.what}. Above the spectrogram, below the weight of each span.` : "Choose a position of the other side to see which spans read it.";
    this.spectrum(context, x);
    this.axes(context, x, found);
    if (found) this.lane(context, x, found);
    const chosen = side.isRead ? shown.position : shown.query;
    if (chosen !== null) this.outline(context, x, chosen, chosen + 1, styleOf("--mark"));
    this.letters(context, x, shown);
    if (this.audio.currentTime > 0) {
      context.fillStyle = styleOf("--mark");
      context.fillRect(x(this.audio.currentTime) - 1, 0, 2, SPECTRUM_HEIGHT + LANE + 4);
    }
    this.offer(found);
  }

  spectrum(context, x) {
    const { frames, bands } = this.side.spectrum, name = scheme();
    if (this.drawn !== name) {
      this.drawn = name;
      this.picture = make("canvas", { width: frames, height: bands });
      const image = new ImageData(frames, bands);
      for (let frame = 0; frame < frames; frame++) {
        for (let band = 0; band < bands; band++) {
          const [red, green, blue] = rgb(this.levels[frame * bands + band] / 255);
          image.data.set([red, green, blue, 255], 4 * ((bands - 1 - band) * frames + frame));
        }
      }
      this.picture.getContext("2d").putImageData(image, 0, 0);
    }
    context.drawImage(this.picture, x(0), 0, x(this.side.seconds) - x(0), SPECTRUM_HEIGHT);
  }

  axes(context, x, found) {
    const { spectrum } = this.side, bottom = SPECTRUM_HEIGHT + LANE + 4;
    context.font = FONT(11);
    context.fillStyle = styleOf("--quiet");
    context.textAlign = "right";
    context.textBaseline = "middle";
    for (const part of [0, 0.5, 1]) {
      const kilohertz = (part * spectrum.hertz) / 1000;
      context.fillText(`${kilohertz.toFixed(kilohertz < 10 ? 1 : 0)} kHz`, MARGIN - 4, Math.max(7, Math.min(SPECTRUM_HEIGHT - 7, SPECTRUM_HEIGHT * (1 - part))));
    }
    if (found) {
      context.fillText(written(found.largest), MARGIN - 4, SPECTRUM_HEIGHT + 12);
      context.fillText("0", MARGIN - 4, bottom - 4);
    }
    context.textAlign = "center";
    const step = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300].find((one) => (one / this.total) * (this.width - MARGIN) > 52) || 600;
    for (let i = 0; i * step <= this.total + 1e-9; i++) {
      context.fillRect(x(i * step), bottom, 1, 4);
      const label = `${Number((i * step).toFixed(2))} s`;
      context.fillText(label, Math.min(this.width - 14, Math.max(MARGIN + 8, x(i * step))), bottom + 12);
    }
    context.fillStyle = styleOf("--line");
    context.fillRect(MARGIN, bottom, this.width - MARGIN, 1);
  }

  lane(context, x, { values, largest }) {
    const bottom = SPECTRUM_HEIGHT + LANE + 4, length = this.side.secondsPerPosition;
    context.fillStyle = styleOf("--accent");
    for (let at = 0; at < this.side.length; at++) {
      const height = largest ? (values[at] / largest) * (LANE - 6) : 0, from = x(at * length), to = x((at + 1) * length);
      context.fillRect(from, bottom - height, Math.max(0.75, to - from - (to - from > 3 ? 1 : 0)), height);
    }
    for (const [first, end] of this.strongest(values, largest)) this.outline(context, x, first, end, styleOf("--accent"));
  }

  /** Each token of the reading side over the span that it reads most; tokens that would meet stand below each other. */
  letters(context, x, { rows, query: chosen }) {
    const { side } = this, tokens = this.page.queries, ends = [];
    this.placed = [];
    if (!side.isRead || tokens.kind !== "text" || tokens.length > MOST_LETTERS) return;
    context.font = FONT(15);
    context.textAlign = "center";
    context.textBaseline = "middle";
    context.lineWidth = 4;
    context.lineJoin = "round";
    for (let query = 0; query < tokens.length; query++) {
      const best = rows.row(query).reduce((most, one) => (one[1] > most[1] ? one : most), [-1, 0]);
      if (best[0] < 0) continue;
      const time = (best[0] + 0.5) * side.secondsPerPosition, label = cut(tokens.label(query), 12);
      const half = context.measureText(label).width / 2 + 2, place = Math.min(this.width - half, Math.max(MARGIN + half, x(time)));
      let lane = ends.findIndex((end) => end <= place - half);
      if (lane < 0) lane = ends.length;
      ends[lane] = place + half;
      this.placed.push([tokens.label(query), time]);
      const height = 12 + (lane % Math.floor(SPECTRUM_HEIGHT / LETTER_HEIGHT)) * LETTER_HEIGHT;
      context.strokeStyle = styleOf("--paper");
      context.strokeText(label, place, height);
      context.fillStyle = styleOf(query === chosen ? "--mark" : "--ink");
      context.fillText(label, place, height);
    }
  }

  /** Runs of neighbours that each receive at least half of the most, as [first, end]; the first eight. */
  strongest(values, largest) {
    const runs = [];
    for (let at = 0; at < values.length && largest > 0; at++) {
      if (values[at] < largest / 2) continue;
      if (runs.length && runs.at(-1)[1] === at) runs.at(-1)[1]++;
      else runs.push([at, at + 1]);
    }
    return runs.slice(0, 8);
  }

  outline(context, x, first, end, colour) {
    const length = this.side.secondsPerPosition, from = x(first * length), to = x(end * length);
    context.strokeStyle = colour;
    context.lineWidth = 2;
    context.strokeRect(from, 1, Math.max(2, to - from), SPECTRUM_HEIGHT - 2);
  }

  offer(found) {
    const spans = found ? this.strongest(found.values, found.largest) : [], key = spans.join(";");
    if (key === this.offered) return;
    this.offered = key;
    const button = ([first, end]) => {
      const sum = found.values.slice(first, end).reduce((a, b) => a + b, 0);
      const words = `▶ ${this.side.time(first, end)}: ${written(sum)}`;
      return make("button", { className: "plain", type: "button", textContent: words, onclick: () => this.play(first, end) });
    };
    this.spans.replaceChildren(...(spans.length ? ["Half of the most or more: "] : []), ...spans.map(button));
    this.spans.style.flexWrap = "wrap";
    this.spans.style.marginTop = "8px";
  }
}
