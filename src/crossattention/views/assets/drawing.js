// Drawing: elements, colours with a scale, canvases as sharp as the screen.

/** An element with properties, attributes (aria-..., role, ...) and children; texts become text nodes. */
function make(tag, options = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) {
    if (name.includes("-") || ["role", "scope", "dir", "for", "colspan"].includes(name)) element.setAttribute(name, value);
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

function text(label, limit = 200) {
  return make("span", { className: "text", dir: "auto", title: cut(label, 2000), textContent: cut(label, limit) });
}

function panel(title, about, ...children) {
  const note = make("p", { className: "about", textContent: about });
  const section = make("section", { "aria-label": title }, make("h2", { textContent: title }), note, ...children);
  section.note = note;
  return section;
}

// Both scales grow steadily in lightness, which every kind of colour vision sees: from the paper to dark blue by day, from the
// paper over blue and grey to yellow (as cividis) by night.
const SCALES = {
  light: ["#ffffff", "#e3ebf5", "#c3d4ea", "#9dbadd", "#759dcb", "#4d7eb4", "#2c5f98", "#164277", "#0a2750"],
  dark: ["#101317", "#15284b", "#26416f", "#44567a", "#62697d", "#82807b", "#a69a6f", "#cfb95b", "#fce94f"],
};
// Over a picture the paper does not show: from nearly black to yellow, whatever the scheme.
SCALES.over = ["#00204c", "#00336f", "#39486b", "#575d6d", "#707173", "#8a8779", "#a69d75", "#c4b56c", "#ffea46"];

const TABLES = {};
for (const [name, colours] of Object.entries(SCALES)) {
  const points = colours.map((colour) => [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16)));
  TABLES[name] = Array.from({ length: 256 }, (_, i) => {
    const place = (i / 255) * (points.length - 1), low = Math.min(Math.floor(place), points.length - 2), part = place - low;
    return points[low].map((from, channel) => Math.round(from + (points[low + 1][channel] - from) * part));
  });
}

const darkScheme = matchMedia("(prefers-color-scheme: dark)");
let isPrinting = false;
const scheme = () => (darkScheme.matches && !isPrinting ? "dark" : "light");

/** The colour of a share of the scale, as [red, green, blue]. */
const rgb = (share, name = scheme()) => TABLES[name][Math.max(0, Math.min(255, Math.round(share * 255)))];
const heat = (share, name) => `rgb(${rgb(share, name).join(" ")})`;

/** Ink that can be read on a heat colour: contrast of at least 4.5 at every step, by relative luminance. */
function inkOn(share, name) {
  const [red, green, blue] = rgb(share, name).map((channel) => {
    const part = channel / 255;
    return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.18 ? "#000" : "#fff";
}

const PRINTED = { "--ink": "#000", "--quiet": "#444", "--line": "#bbb", "--accent": "#0b57a4", "--mark": "#a83f00", "--paper": "#fff" };
const styleOf = (name) => (isPrinting ? PRINTED[name] : getComputedStyle(document.documentElement).getPropertyValue(name).trim());

/** Size a canvas in CSS pixels and return its context, cleared, in the same units. */
function sized(canvas, width, height) {
  const ratio = Math.min(window.devicePixelRatio || 1, 3);
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}

const FONT = (pixels, weight = "") => `${weight} ${pixels}px system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif`;

/** Text cut to a width, with an ellipsis. */
function fitted(context, label, width) {
  let shown = cut(label, 80);
  while (shown.length > 1 && context.measureText(shown).width > width) shown = `${[...shown].slice(0, -2).join("")}…`;
  return shown;
}

/** The legend of a heat map: colours with their numbers. */
function scaleBar(largest, what, name) {
  const canvas = make("canvas", { role: "img", "aria-label": `Scale from 0 to ${written(largest)}` });
  const context = sized(canvas, 140, 10);
  for (let x = 0; x < 140; x++) {
    context.fillStyle = heat(x / 139, name);
    context.fillRect(x, 0, 1, 10);
  }
  const half = make("span", { textContent: `half: ${written(largest / 2)}` });
  return make("div", { className: "scale" }, "0", canvas, written(largest), half, make("span", { textContent: what }));
}
