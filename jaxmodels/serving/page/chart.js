// Line charts of the past and a forecast: one for each variable, drawn anew for each width, so that their letters keep their size.

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 190;
const MARGIN = { top: 12, right: 14, bottom: 24, left: 52 };

function shape(name, attributes, text) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

const short = (value) => Number(value.toPrecision(4)).toLocaleString("en", { maximumSignificantDigits: 4 }).replace("-", "−");

// About `count` round numbers between two.
function ticks(low, high, count) {
  const rough = (high - low) / count;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = unit * [1, 2, 2.5, 5, 10].find((each) => each * unit >= rough);
  const first = Math.ceil(low / step);
  return Array.from({ length: Math.floor(high / step + 1e-9) - first + 1 }, (_, i) => (first + i) * step);
}

function draw(svg, name, past, future) {
  const width = Math.max(svg.parentElement.clientWidth, 240);
  const values = [...past, ...future];
  let [low, high] = [Math.min(...values), Math.max(...values)];
  if (low === high) [low, high] = [low - 1, high + 1];
  const pad = (high - low) * 0.06;
  const x = (row) => MARGIN.left + ((row + past.length) / Math.max(values.length - 1, 1)) * (width - MARGIN.left - MARGIN.right);
  const y = (value) => HEIGHT - MARGIN.bottom - ((value - low + pad) / (high - low + 2 * pad)) * (HEIGHT - MARGIN.top - MARGIN.bottom);
  const line = (rows, first, part) => shape("polyline", { class: part, points: rows.map((value, i) => `${x(first + i).toFixed(1)},${y(value).toFixed(1)}`).join(" ") });
  svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
  svg.setAttribute("height", HEIGHT);
  svg.replaceChildren();
  const right = width - MARGIN.right;
  svg.append(shape("rect", { class: "ahead", x: x(-1), y: MARGIN.top, width: right - x(-1), height: HEIGHT - MARGIN.top - MARGIN.bottom }));
  for (const value of ticks(low, high, 4)) {
    svg.append(shape("line", { class: "grid", x1: MARGIN.left, x2: right, y1: y(value), y2: y(value) }));
    svg.append(shape("text", { x: MARGIN.left - 8, y: y(value) + 4, "text-anchor": "end" }, short(value)));
  }
  for (const row of ticks(-past.length, future.length - 1, width < 480 ? 6 : 10).filter(Number.isInteger)) {
    svg.append(shape("text", { x: x(row), y: HEIGHT - 6, "text-anchor": "middle" }, row > 0 ? `+${row}` : short(row)));
  }
  svg.append(line(past, -past.length, "past"), line([past[past.length - 1], ...future], -1, "future"));
}

// Return a figure for each variable. `past` and `future` are lists of rows, each a list with one number for each name.
export function charts(names, past, future) {
  return names.map((name, column) => {
    const [before, after] = [past, future].map((rows) => rows.map((row) => row[column]));
    const figure = document.createElement("figure");
    const told = `${name}: ${before.length} rows of the past, then a forecast of ${after.length}, from ${short(after[0])} to ${short(after[after.length - 1])}`;
    const svg = shape("svg", { role: "img", "aria-label": told });
    const caption = document.createElement("figcaption");
    caption.textContent = name;
    figure.append(caption, svg);
    new ResizeObserver(() => draw(svg, name, before, after)).observe(figure);
    return figure;
  });
}
