// Feed-forward memory: which keys fire at a token, what their values promote, and on which texts they fire most.

class MemoryPage {
  constructor(data) {
    Object.assign(this, { data, layer: data.start.layer ?? data.layers.length - 1, token: 0 });
    this.readout = document.getElementById("readout");
    this.tools();
    this.cards = make("div", { className: "cards" });
    this.buttons = data.tokens.map((label, at) => make("button", { className: "token", type: "button", at, onclick: () => this.choose(this.layer, at) }, make("span", { className: "place", textContent: at }), text(label)));
    const list = make("ul", { className: "tokens row context", "aria-label": "Tokens" }, ...this.buttons.map((button) => make("li", {}, button)));
    const about = "A key is a row of the layer's first matrix; it fires with the coefficient that stands beside it. Its value, a row of the second matrix, is added to the output times this coefficient, and promotes symbols of the vocabulary.";
    const panels = document.getElementById("panels");
    panels.className = "one";
    panels.append(panel("Tokens", "Choose the step of which the keys are shown; each is named by the token that it writes.", list), panel("Keys that fire most", about, this.cards));
    const always = "Tokens, layers and keys are counted from 0. A score is the value times the symbol's row of the output embedding, less the mean over the vocabulary: how much a coefficient of 1 adds to the symbol's logit, before the last norm.";
    document.getElementById("notes").append(...[always, ...data.notes].map((note) => make("p", { textContent: note })));
    document.getElementById("about").textContent = `${whole(data.tokens.length)} tokens, ${whole(data.layers.length)} feed-forward layer${data.layers.length > 1 ? "s" : ""} of ${[...new Set(data.layers.map((layer) => whole(layer.size)))].join(", ")} keys.`;
    document.addEventListener("keydown", (event) => this.key(event));
    this.draw();
  }

  tools() {
    this.choice = make("select", { onchange: () => this.choose(Number(this.choice.value), this.token) });
    this.data.layers.forEach((layer, i) => this.choice.append(make("option", { value: i, textContent: `${i}: ${layer.name}` })));
    this.search = make("input", { type: "search", placeholder: "symbol, text or key", oninput: () => this.draw() });
    const keys = [["← →", "the token before, the next"], ["l  L", "the next layer, the one before"], ["/", "search"], ["Esc", "end of search"]];
    const list = make("dl", {}, ...keys.flatMap(([key, what]) => [make("dt", {}, make("kbd", { textContent: key })), make("dd", { textContent: what })]));
    const help = make("details", { className: "keys" }, make("summary", { textContent: "Keys" }), list);
    document.getElementById("tools").append(make("label", {}, "Layer", this.choice), make("label", {}, "Search", this.search), help);
  }

  choose(layer, token) {
    this.layer = Math.max(0, Math.min(this.data.layers.length - 1, layer));
    this.token = Math.max(0, Math.min(this.data.tokens.length - 1, token));
    this.draw();
  }

  key(event) {
    const isTyping = ["INPUT", "SELECT"].includes(event.target.tagName);
    if (event.key === "Escape") {
      this.search.value = "";
      if (isTyping) event.target.blur();
      this.draw();
    } else if (isTyping || event.ctrlKey || event.metaKey || event.altKey) return;
    else if (event.key === "/") this.search.focus();
    else if (event.key === "l" || event.key === "L") this.choose(this.layer + (event.key === "l" ? 1 : -1), this.token);
    else if (["ArrowLeft", "ArrowUp"].includes(event.key)) this.choose(this.layer, this.token - 1);
    else if (["ArrowRight", "ArrowDown"].includes(event.key)) this.choose(this.layer, this.token + 1);
    else return;
    event.preventDefault();
  }

  draw() {
    const layer = this.data.layers[this.layer], firing = layer.firing[this.token], { tokens } = this.data;
    this.choice.value = this.layer;
    for (const button of this.buttons) {
      button.classList.toggle("on", button.at === this.token);
      button.setAttribute("aria-pressed", button.at === this.token);
    }
    const share = ((100 * firing) / layer.size).toFixed(1);
    const words = `: at token ${this.token} “${cut(tokens[this.token], 60)}” ${whole(firing)} of ${whole(layer.size)} keys fire (${share} %).`;
    const { agreement, triggered } = layer;
    const agrees = agreement === null || triggered === null ? "" : ` Of ${whole(triggered)} keys that fire on some text, ${(100 * agreement).toFixed(1)} % have a value whose first symbol follows their strongest one.`;
    this.readout.replaceChildren(make("strong", { textContent: layer.name }), make("bdi", { textContent: words }), agrees);
    const most = Math.max(...layer.coefficients.flat(), 1e-30);
    const cards = layer.top[this.token].map((key, i) => this.card(layer, key, layer.coefficients[this.token][i], most));
    this.cards.replaceChildren(...cards.filter((card) => card !== null));
  }

  card(layer, key, coefficient, most) {
    if (coefficient === 0) return null;
    const { promotes, inputs } = layer.keys[key];
    const head = make("h3", {}, make("span", { textContent: `Key ${whole(key)}` }), make("span", { className: "count", textContent: `fires ${written(coefficient)}` }));
    const bar = make("div", { className: "level", role: "img", "aria-label": `${written(coefficient)} of at most ${written(most)}` }, make("div"));
    bar.firstChild.style.width = `${(100 * coefficient) / most}%`;
    const largest = Math.max(...promotes.map(([, score]) => Math.abs(score)), 1e-30);
    const lines = promotes.map(([symbol, score]) => {
      const length = make("div");
      length.style.width = `${(100 * Math.abs(score)) / largest}%`;
      return make("tr", {}, make("td", { className: "text" }, make("span", { dir: "auto", title: cut(symbol, 200), textContent: cut(symbol, 200) })), make("td", { className: "n", textContent: score < 0 ? `−${written(-score)}` : written(score) }), make("td", { className: "bar" }, length));
    });
    const card = make("article", { className: "card" }, head, bar, make("h4", { textContent: "its value promotes" }), make("table", {}, make("tbody", {}, ...lines)));
    if (inputs.length) card.append(make("h4", { textContent: "it fires most on" }), make("ul", { className: "inputs" }, ...inputs.map((input) => this.input(input))));
    const wanted = this.search.value.trim().toLowerCase();
    const all = [String(key), ...promotes.map(([symbol]) => symbol), ...inputs.flatMap((input) => [input.source, ...input.tokens])];
    card.classList.toggle("hit", wanted !== "" && all.some((label) => label.toLowerCase().includes(wanted)));
    return card;
  }

  input({ tokens, at, coefficient, source }) {
    const near = tokens.map((token, i) => [token, i]).filter(([, i]) => i >= at - 6 && i <= at + 3);
    const words = make("span", { className: "words", dir: "auto" }, source ? `${cut(source, 60)}: ` : "");
    if (at > 6) words.append("… ");
    for (const [token, i] of near) words.append(i === at ? make("mark", { textContent: cut(token, 40) }) : make("bdi", { textContent: cut(token, 40) }), " ");
    if (at + 3 < tokens.length - 1) words.append("…");
    return make("li", {}, words, make("span", { className: "count", textContent: written(coefficient) }));
  }
}

window.crossattentionPage = new MemoryPage(JSON.parse(document.getElementById("data").textContent));
