// Line plots and sparklines as SVG: a few hundred points, drawn anew every second.

import { element } from "./elements.js";

const SVG = "http://www.w3.org/2000/svg";
const SPANS_MINUTES = [1, 2, 5, 10];
const MARGIN = { top: 10, right: 12, bottom: 22, left: 52 };

function shape(tag, attributes) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, String(value));
  return made;
}

/** A number as people read it: 1.2 k, 3.4 M. */
export function short(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  if (size >= 1e6) return `${trim(value / 1e6)} M`;
  if (size >= 1e4) return `${trim(value / 1e3)} k`;
  if (size >= 100) return String(Math.round(value));
  return trim(value);
}

/** Seconds as people read them. */
export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 0.001) return `${Math.round(seconds * 1e6)} µs`;
  if (seconds < 1) return `${trim(seconds * 1e3)} ms`;
  if (seconds < 120) return `${trim(seconds)} s`;
  return `${Math.round(seconds / 60)} min`;
}

/** Bytes as people read them. */
export function bytes(value) {
  if (value < 1000) return `${Math.round(value)} B`;
  if (value < 1e6) return `${trim(value / 1e3)} kB`;
  if (value < 1e9) return `${trim(value / 1e6)} MB`;
  return `${trim(value / 1e9)} GB`;
}

function trim(value) {
  return value >= 100 ? value.toFixed(0) : value.toFixed(1).replace(/\.0$/, "");
}

/** Several series over the last ten minutes in `figure`; `format` writes values, `isLogarithmic` spreads small ones. */
export class Plot {
  #svg = shape("svg", { role: "img" });
  #series;
  #format;
  #scaleOf;
  #points = [];
  #readout;
  #hover = null;

  constructor(figure, { title, series, format, isLogarithmic = false }) {
    this.#series = series;
    this.#format = format;
    this.#scaleOf = isLogarithmic ? decades : halves;
    this.#readout = element("span", { class: "readout" });
    const legend = element("ul", { class: "legend" }, ...series.map(({ label }, index) => element("li", { class: `s${index}` }, label)));
    figure.append(element("figcaption", {}, element("h2", {}, title), legend, element("span", { class: "spacer" }), this.#readout), this.#svg);
    this.#svg.setAttribute("aria-label", title);
    this.#svg.addEventListener("pointermove", (event) => {
      this.#hover = event.offsetX;
      this.draw(this.#points);
    });
    this.#svg.addEventListener("pointerleave", () => {
      this.#hover = null;
      this.draw(this.#points);
    });
    new ResizeObserver(() => this.draw(this.#points)).observe(this.#svg);
  }

  /** `points` are `{at, values}`, oldest first, with one value (or null) for each series. */
  draw(points) {
    this.#points = points;
    const width = this.#svg.clientWidth;
    const height = this.#svg.clientHeight;
    if (!width || !height) return;
    const inner = { width: width - MARGIN.left - MARGIN.right, height: height - MARGIN.top - MARGIN.bottom };
    const end = points.at(-1)?.at ?? 0;
    const scale = this.#scaleOf(points.flatMap(({ values }) => values).filter((value) => value > 0));
    const begin = points[0]?.at ?? end;
    const span = SPANS_MINUTES.find((minutes) => minutes * 60 >= end - begin) ?? SPANS_MINUTES.at(-1);
    const x = (at) => MARGIN.left + inner.width * (1 - (end - at) / (span * 60));
    const y = (value) => MARGIN.top + inner.height * (1 - scale.share(value));
    const parts = [];
    for (const tick of scale.ticks) {
      const at = y(tick);
      parts.push(shape("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: at, y2: at }));
      const label = shape("text", { class: "axis", x: MARGIN.left - 8, y: at + 4, "text-anchor": "end" });
      label.textContent = this.#format(tick);
      parts.push(label);
    }
    for (const [share, anchor] of [[1, "start"], [0.5, "middle"], [0, "end"]]) {
      const seconds = span * 60 * share;
      const label = shape("text", { class: "axis", x: x(end - seconds), y: height - 5, "text-anchor": anchor });
      label.textContent = seconds ? `${seconds < 60 ? `${seconds} s` : `${seconds / 60} min`} ago` : "now";
      parts.push(label);
    }
    this.#series.forEach((_, index) => parts.push(shape("path", { class: `line s${index}`, d: lines(points, index, x, y) })));
    this.#drawReadout(points, x, height, parts);
    this.#svg.replaceChildren(...parts);
  }

  #drawReadout(points, x, height, parts) {
    let shown = points.at(-1);
    if (this.#hover !== null && points.length) {
      shown = points.reduce((best, point) => (Math.abs(x(point.at) - this.#hover) < Math.abs(x(best.at) - this.#hover) ? point : best));
      parts.push(shape("line", { class: "cursor", x1: x(shown.at), x2: x(shown.at), y1: MARGIN.top, y2: height - MARGIN.bottom }));
    }
    this.#readout.textContent = shown ? shown.values.map((value) => (value === null ? "–" : this.#format(value))).join(" · ") : "";
  }
}

/** A small curve without axes in `svg`. */
export function sparkline(svg, values) {
  const top = Math.max(...values, 0) || 1;
  const step = 100 / Math.max(1, values.length - 1);
  const path = values.map((value, index) => `${index ? "L" : "M"}${(index * step).toFixed(2)} ${(23 - (value / top) * 21).toFixed(2)}`).join("");
  svg.setAttribute("viewBox", "0 0 100 24");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.replaceChildren(shape("path", { class: "under", d: path ? `${path}L100 24L0 24Z` : "" }), shape("path", { class: "curve", d: path }));
}

function lines(points, index, x, y) {
  let path = "";
  let isDown = false;
  for (const { at, values } of points) {
    const value = values[index];
    if (value === null) continue; // nothing was measured in that second: the line goes on to the next that was
    path += `${isDown ? "L" : "M"}${x(at).toFixed(1)} ${y(value).toFixed(1)}`;
    isDown = true;
  }
  return path;
}

/** A scale from 0: what lies where, from 0 to 1, and which values are written beside it. */
function halves(values) {
  const top = niceTop(Math.max(0, ...values));
  return { ticks: [0, top / 2, top], share: (value) => value / top };
}

/** A logarithmic scale of whole decades. What is 0 lies at the bottom. */
function decades(values) {
  const exponents = values.length ? values.map(Math.log10) : [-4, -2];
  const low = Math.floor(Math.min(...exponents));
  const high = Math.max(low + 1, Math.ceil(Math.max(...exponents)));
  const ticks = [];
  for (let exponent = low; exponent <= high; exponent += Math.ceil((high - low) / 5)) ticks.push(10 ** exponent);
  return { ticks, share: (value) => (Math.log10(Math.max(value, 10 ** low)) - low) / (high - low) };
}

function niceTop(value) {
  if (value <= 0) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 4, 6, 8, 10].map((step) => step * power).find((top) => top >= value);
}
