// Numbers: out of base64 into rows of weights, for one head or for the mean of several.

const HALVES = new Float32Array(65536); // every half float, so that decoding is one look-up
for (let bits = 0; bits < 65536; bits++) {
  const exponent = (bits >> 10) & 31, fraction = bits & 1023;
  HALVES[bits] = exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : (2 ** -14 * fraction) / 1024;
}

function bytesOf(base64) {
  const text = atob(base64), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes.buffer;
}

/** Half floats that decode when they are read. */
class Halves {
  constructor(packed) {
    this.bits = new Uint16Array(bytesOf(packed.data));
    this.scale = packed.scale;
  }

  at(index) {
    return HALVES[this.bits[index]] * this.scale;
  }
}

/** The weights of n queries, each with the positions it reads in ascending order: compressed sparse rows. */
class Rows {
  constructor(n, m, starts, places, weights) {
    Object.assign(this, { n, m, starts, places, weights });
    this.largest = 0;
    for (const weight of weights) if (weight > this.largest) this.largest = weight;
  }

  /** What one query reads, as [[position, weight], ...]. */
  row(query) {
    const found = [];
    for (let i = this.starts[query]; i < this.starts[query + 1]; i++) found.push([this.places[i], this.weights[i]]);
    return found;
  }

  /** Which queries read one position, likewise. */
  column(position) {
    const found = [];
    for (let query = 0; query < this.n; query++) {
      const weight = this.weight(query, position);
      if (weight > 0) found.push([query, weight]);
    }
    return found;
  }

  weight(query, position) {
    let low = this.starts[query], high = this.starts[query + 1];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.places[middle] < position) low = middle + 1;
      else high = middle;
    }
    return low < this.starts[query + 1] && this.places[low] === position ? this.weights[low] : 0;
  }

  /** The mass of each position: its weights summed over queries. */
  columnSums() {
    const sums = new Float32Array(this.m);
    for (let i = 0; i < this.places.length; i++) sums[this.places[i]] += this.weights[i];
    return sums;
  }

  /** How much of a query's attention is among its weights here, on average. */
  keptShare() {
    let sum = 0;
    for (const weight of this.weights) sum += weight;
    return this.n ? sum / this.n : 0;
  }
}

/** The mean of several rows of weights, all n x m. */
function meanOf(all) {
  if (all.length === 1) return all[0];
  const { n, m } = all[0], sums = new Float64Array(m), starts = new Uint32Array(n + 1), places = [], weights = [];
  for (let query = 0; query < n; query++) {
    const touched = [];
    for (const rows of all) {
      for (let i = rows.starts[query]; i < rows.starts[query + 1]; i++) {
        if (sums[rows.places[i]] === 0) touched.push(rows.places[i]);
        sums[rows.places[i]] += rows.weights[i];
      }
    }
    touched.sort((a, b) => a - b);
    for (const place of touched) {
      places.push(place);
      weights.push(sums[place] / all.length);
      sums[place] = 0;
    }
    starts[query + 1] = places.length;
  }
  return new Rows(n, m, starts, Uint32Array.from(places), Float32Array.from(weights));
}

/** One layer's numbers. */
class Layer {
  constructor(packed, [name, kind], n, m) {
    Object.assign(this, { name, kind, n, m, heads: packed.heads });
    this.isWhole = packed.weights !== null;
    this.values = new Halves(this.isWhole ? packed.weights : packed.top.weights);
    this.k = this.isWhole ? m : packed.top.k;
    if (!this.isWhole) this.indices = new (m <= 65536 ? Uint16Array : Uint32Array)(bytesOf(packed.top.indices));
    this.highlight = packed.highlight && { values: new Halves(packed.highlight), isMean: packed.highlight.isMean };
  }

  rowsOf(head) {
    const { n, m, k } = this, starts = new Uint32Array(n + 1);
    const places = new Uint32Array(n * k), weights = new Float32Array(n * k);
    let count = 0;
    for (let query = 0; query < n; query++) {
      const first = (head * n + query) * k, found = [];
      for (let i = first; i < first + k; i++) {
        const weight = this.values.at(i);
        if (weight > 0) found.push([this.isWhole ? i - first : this.indices[i], weight]);
      }
      if (!this.isWhole) found.sort((a, b) => a[0] - b[0]);
      for (const [place, weight] of found) {
        places[count] = place;
        weights[count++] = weight;
      }
      starts[query + 1] = count;
    }
    return new Rows(n, m, starts, places.slice(0, count), weights.slice(0, count));
  }

  /** How concentrated a head is: the largest weight of a query, on average over queries. */
  concentration(head) {
    let sum = 0;
    for (let query = 0; query < this.n; query++) {
      const first = (head * this.n + query) * this.k;
      let largest = 0;
      for (let i = first; i < first + this.k; i++) largest = Math.max(largest, HALVES[this.values.bits[i]]);
      sum += largest;
    }
    return (sum / this.n) * this.values.scale;
  }

  /** The mass of each position in one head, or null where it is not known by itself. */
  massOf(head) {
    if (!this.highlight || this.highlight.isMean) return null;
    return Float32Array.from({ length: this.m }, (_, i) => this.highlight.values.at(head * this.m + i));
  }

  meanMass() {
    if (!this.highlight) return null;
    const maps = this.highlight.isMean ? 1 : this.heads, mass = new Float32Array(this.m);
    for (let head = 0; head < maps; head++) {
      for (let i = 0; i < this.m; i++) mass[i] += this.highlight.values.at(head * this.m + i) / maps;
    }
    return mass;
  }
}

/** Everything between the two sides. Layer or head -1 is the mean over all of them. */
class Attention {
  constructor(data) {
    this.layers = data.layers.map((packed, i) => new Layer(packed, data.names[i], data.queries.length, data.context.length));
    this.seen = new Map();
  }

  rows(layer, head) {
    const key = `${layer} ${head}`;
    if (!this.seen.has(key)) {
      if (this.seen.size > 24) this.seen.clear();
      this.seen.set(key, this.make(layer, head));
    }
    return this.seen.get(key);
  }

  make(layer, head) {
    if (layer < 0) return meanOf(this.layers.map((_, i) => this.make(i, head)));
    if (head >= 0) return this.layers[layer].rowsOf(head);
    return meanOf(Array.from({ length: this.layers[layer].heads }, (_, i) => this.layers[layer].rowsOf(i)));
  }

  /** Mass of each position and whether it is of all weights, not of the kept ones alone. */
  mass(layer, head) {
    const layers = layer < 0 ? this.layers : [this.layers[layer]];
    const parts = layers.map((one) => (head < 0 ? one.meanMass() : one.massOf(head)));
    const isWhole = layers.every((one) => one.isWhole);
    if (parts.some((part) => part === null)) return { values: this.rows(layer, head).columnSums(), isWhole };
    if (parts.length === 1) return { values: parts[0], isWhole: true };
    const mean = new Float32Array(parts[0].length);
    for (const part of parts) for (let i = 0; i < mean.length; i++) mean[i] += part[i] / parts.length;
    return { values: mean, isWhole: true };
  }
}

/** Three significant digits, without a zero before the point where that saves nothing of the number. */
function written(number) {
  if (number === 0) return "0";
  if (number >= 1000) return Math.round(number).toLocaleString("en-US");
  if (number < 0.001) return number.toExponential(1);
  return number >= 1 ? number.toPrecision(3) : number.toFixed(number < 0.1 ? 4 : 3);
}

const whole = (number) => number.toLocaleString("en-US");
const counted = (count, one, many = `${one}s`) => `${whole(count)} ${count === 1 ? one : many}`;
