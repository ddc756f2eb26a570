// Sides: what a position is called. Labels are text of the data; they reach the page as text nodes and canvas text only.

const MOST_TOKENS_IN_RIBBONS = 300;

class Side {
  constructor(data, role) {
    Object.assign(this, data, { role });
    this.lower = new Map();
  }

  get isRead() {
    return this.role === "context";
  }

  /** The label of a position, or "" where it has none. */
  label(at) {
    if (this.kind === "text") return this.labels[at];
    if (this.kind === "long") return this.labels[at] || "";
    if (this.kind === "image") return at < this.leading.length ? this.leading[at] : "";
    return "";
  }

  /** A position in words, for readers and for screen readers. */
  describe(at) {
    const label = this.label(at);
    if (this.kind === "sound") return this.time(at);
    if (this.kind === "image" && at >= this.leading.length) {
      const patch = this.patch(at);
      return `row ${patch.row}, column ${patch.column}`;
    }
    return label ? `“${cut(label, 60)}”` : `position ${whole(at)}`;
  }

  /** A position by its number, and by its name where it has one. */
  numbered(at) {
    if (this.kind === "text" || this.label(at)) return `${whole(at)} “${cut(this.label(at), 60)}”`;
    return this.kind === "long" ? whole(at) : `${whole(at)} (${this.describe(at)})`;
  }

  /** What fits into a narrow place. */
  brief(at) {
    if (this.kind === "sound") return seconds(at * this.secondsPerPosition);
    if (this.kind === "image" && at >= this.leading.length) {
      const patch = this.patch(at);
      return `${patch.row},${patch.column}`;
    }
    return this.label(at) || whole(at);
  }

  /** Where a patch lies; rows and columns are counted from 0. */
  patch(at) {
    const inside = at - this.leading.length;
    return { row: Math.floor(inside / this.columns), column: inside % this.columns };
  }

  time(at, end = at + 1) {
    return `${seconds(at * this.secondsPerPosition)}–${seconds(end * this.secondsPerPosition)} s`;
  }

  /** Positions whose label holds a text, or the position that is a number written there. */
  search(text) {
    const found = new Set(), wanted = text.trim().toLowerCase(), number = Number(wanted.replaceAll(",", ""));
    if (!wanted) return found;
    const named = this.kind === "long" ? Object.keys(this.labels).map(Number) : this.kind === "text" ? null : [];
    const count = this.kind === "text" ? this.length : this.kind === "image" ? this.leading.length : 0;
    for (const at of named && named.length ? named : Array(count).keys()) {
      if (this.label(at).toLowerCase().includes(wanted)) found.add(at);
    }
    if (Number.isInteger(number) && number >= 0 && number < this.length) found.add(number);
    return found;
  }

  get title() {
    const what = { text: "tokens", long: "positions", image: "patches", sound: "spans of time" }[this.kind];
    return `${this.isRead ? "Context (B)" : "Queries (A)"}: ${whole(this.length)} ${this.length === 1 ? what.replace(/s$/, "").replace("patche", "patch") : what}`;
  }
}

/** At most so many UTF-16 units of a text; a character that takes two is cut off whole. */
const cut = (text, limit) => (text.length <= limit ? text : `${text.slice(0, limit - 1).replace(/[\ud800-\udbff]$/, "")}…`);
const seconds = (number) => number.toFixed(number < 100 ? 2 : 1);
