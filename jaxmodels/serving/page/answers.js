// What models answer, as elements. All texts of models become text nodes, never markup.

import { charts } from "./chart.js";

export function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

const percent = (value) => (value < 0.0005 ? "< 0.1 %" : `${(100 * value).toFixed(value < 0.0995 || value > 0.9949 ? 1 : 0)} %`);

function bars(labels) {
  const rows = [...labels].sort((a, b) => b.probability - a.probability).slice(0, 10);
  const list = element("ol", { className: "bars" });
  for (const { label, probability } of rows) {
    const bar = element("i");
    bar.style.width = `${100 * probability}%`;
    list.append(element("li", {}, element("span", { textContent: label }), element("b", { textContent: percent(probability) }), element("div", {}, bar)));
  }
  return [list];
}

// Offsets count Unicode characters, of which a string of JavaScript stores some as two.
function spans(text, found) {
  const characters = Array.from(text);
  const labels = [...new Set(found.map((span) => span.label))].sort();
  const hue = (node, label) => (node.style.setProperty("--hue", (25 + labels.indexOf(label) * 137.5) % 360), node);
  const passage = element("p", { className: "tagged" });
  let end = 0;
  for (const span of [...found].sort((a, b) => a.start - b.start)) {
    passage.append(characters.slice(end, span.start).join(""));
    passage.append(hue(element("mark", { title: span.label }, characters.slice(span.start, span.end).join(""), element("small", { textContent: span.label })), span.label));
    end = span.end;
  }
  passage.append(characters.slice(end).join(""));
  const count = (label) => found.filter((span) => span.label === label).length;
  const legend = labels.map((label) => element("li", {}, hue(element("i"), label), `${label} (${count(label)})`));
  return [passage, legend.length ? element("ul", { className: "legend", ariaLabel: "Legend" }, ...legend) : element("small", { textContent: "Nothing is tagged." })];
}

function forecast(names, rows, past) {
  const csv = [names, ...rows].map((row) => row.join(",")).join("\n");
  const key = element("ul", { className: "legend" }, element("li", {}, element("i", { className: "past" }), "past"), element("li", {}, element("i", { className: "future" }), "forecast"));
  return [key, ...charts(names, past, rows), element("details", {}, element("summary", { textContent: "Numbers" }), element("pre", { textContent: csv, tabIndex: 0 }))];
}

function similarities(texts, vectors) {
  const dot = (a, b) => a.reduce((sum, value, i) => sum + value * b[i], 0);
  const table = element("table", {}, element("caption", { textContent: "Cosine of the angles between the texts" }));
  vectors.forEach((vector, i) => {
    const row = element("tr", {}, element("th", { scope: "row", textContent: texts[i] }));
    for (const other of vectors) {
      const value = dot(vector, other) / Math.sqrt(dot(vector, vector) * dot(other, other));
      const cell = element("td", { textContent: value.toFixed(2) });
      cell.style.setProperty("--share", `${Math.round(100 * Math.max(value, 0))}%`);
      row.append(cell);
    }
    table.append(row);
  });
  return [element("div", { className: "wide", tabIndex: 0 }, table)];
}

// Return the elements that show an answer of a model to an input, by what the answer holds.
export function show(answer, input) {
  if (answer.embeddings) return similarities(input.texts, answer.embeddings);
  if (answer.forecast) return forecast(answer.columns, answer.forecast, input.past);
  if (answer.spans) return spans(input.text, answer.spans);
  if (answer.labels) return bars(answer.labels);
  if (typeof answer.value === "number") return [element("p", { className: "number", textContent: Number(answer.value.toPrecision(5)) })];
  return [element("pre", { textContent: JSON.stringify(answer, null, 2), tabIndex: 0 })];
}
