// The page: a model is chosen, its form is shown, and what is sent is answered below, or in a conversation above.

import { apiKey, call, stream } from "./api.js";
import { element, show } from "./answers.js";

const at = (id) => document.getElementById(id);
const WORDS = {
  chat: ["Message", "Send"],
  completion: ["Text to continue", "Continue"],
  seq2seq: ["Source text", "Send"],
  embedding: ["Texts, one a line", "Compare"],
  image: ["", "Classify"],
  text: ["Text", "Send"],
  pair: ["", "Compare"],
  table: ["Rows of the past as CSV, the last row is the newest", "Forecast"],
  json: ["Input as JSON", "Send"],
};
let model; // the one chosen, as the service describes it
let history = []; // of a chat: messages
let image; // the chosen file
let running; // AbortController of the request that runs

// --- models and forms ---------------------------------------------------------------------------------------------------------

// What a model does here: the first of these that it offers.
function kindOf({ endpoints, task }) {
  if (endpoints.includes("/v1/chat/completions")) return "chat";
  if (endpoints.includes("/v1/completions")) return task === "seq2seq" ? "seq2seq" : "completion";
  return endpoints.includes("/v1/predict") ? "predict" : "embedding";
}

const generates = () => ["chat", "completion", "seq2seq"].includes(model.kind);

const forms = () => model.input?.anyOf ?? [model.input ?? {}];

// How an input is given, by the first schema that the page knows: as text, two texts, an image or a table. Anything else is typed as JSON.
function inputKind() {
  if (model.kind !== "predict") return "text";
  for (const form of forms()) {
    if (form.contentEncoding === "base64") return "image";
    if (form.properties?.pair) return "pair";
    if (form.type === "string") return "text";
    if (form.items?.items?.type === "number") return "table";
  }
  return "json";
}

async function loadModels() {
  let names;
  try {
    names = (await call("v1/models")).data.map(({ id }) => id);
  } catch (error) {
    return fail(error);
  }
  at("error").hidden = true;
  at("model").replaceChildren(...names.map((name) => element("option", { value: name, textContent: name })));
  at("model").disabled = !names.length;
  if (!names.length) {
    at("about").textContent = "The models are being loaded…";
    setTimeout(loadModels, 1000);
    return;
  }
  const named = decodeURIComponent(location.hash.slice(1));
  if (names.includes(named)) at("model").value = named;
  await choose();
}

async function choose() {
  running?.abort();
  const name = at("model").value;
  let found;
  try {
    found = await call(`v1/models/${encodeURIComponent(name)}`);
  } catch (error) {
    return fail(error);
  }
  if (at("model").value !== name) return; // another was chosen meanwhile
  model = { ...found, kind: kindOf(found) };
  window.history.replaceState(null, "", `#${encodeURIComponent(name)}`);
  document.title = `${name} · jaxmodels`;
  const kind = inputKind();
  const [label, verb] = WORDS[model.kind === "predict" ? kind : model.kind];
  for (const part of document.querySelectorAll("[data-input]")) part.hidden = !part.dataset.input.split(" ").includes(kind);
  for (const part of document.querySelectorAll("[data-for]")) part.hidden = part.dataset.for === "chat" ? model.kind !== "chat" : !generates();
  at("label").textContent = label;
  at("send").textContent = verb;
  at("text").rows = kind === "table" || kind === "json" ? 8 : 3;
  at("about").textContent = [model.title ?? model.task.replaceAll("_", " "), model.context && `${model.context} tokens of context`].filter(Boolean).join(" · ");
  at("hint").textContent = hint(kind);
  at("max_tokens").placeholder = Math.min(256, (model.context ?? 512) >> 1); // OpenAI's API would end completions after 16
  at("form").hidden = false;
  at("form").classList.toggle("below", generates());
  clear();
}

function hint(kind) {
  if (kind === "image") return "";
  if (kind !== "table") return "Enter sends, Shift+Enter breaks the line";
  const [rows, columns, names] = tableSize();
  return `${rows} rows or more of ${names && columns < 12 ? names.join(", ") : `${columns} columns`}`;
}

function clear() {
  history = [];
  at("log").replaceChildren();
  at("log").hidden = at("answer").hidden = at("error").hidden = true;
}

// --- inputs -------------------------------------------------------------------------------------------------------------------

// Rows that the model reads, its columns, and their names, if they are known.
function tableSize() {
  const [rows, named] = forms();
  return [rows.minItems, rows.items.minItems, named?.required];
}

// Read a table: commas, semicolons or tabs; a first line of names, if it has fewer numbers; columns that are no numbers, such as dates, are left out.
function readTable(text) {
  const separator = ["\t", ";", ","].find((each) => text.includes(each)) ?? ",";
  const lines = text.trim().split(/\r?\n/).map((line) => line.split(separator).map((cell) => cell.trim()));
  const number = (cell) => (cell ? Number(separator === ";" ? cell.replace(",", ".") : cell) : NaN);
  const count = (line) => line.filter((cell) => !isNaN(number(cell))).length;
  const body = count(lines[0]) < count(lines.at(-1)) ? lines.slice(1) : lines;
  const [length, , known] = tableSize();
  const head = body === lines ? [] : lines[0];
  const byName = known?.every((name) => head.includes(name));
  const columns = byName ? known.map((name) => head.indexOf(name)) : [...body[0].keys()].filter((i) => !isNaN(number(body[0][i])));
  const rows = body.map((line) => columns.map((i) => number(line[i])));
  const wrong = rows.findIndex((row) => row.some(isNaN));
  if (!columns.length) throw new Error("The table has no numbers.");
  if (wrong >= 0) throw new Error(`Row ${wrong + 1} of the table has a cell that is no number: ${body[wrong].join(separator)}`);
  return { rows, past: rows.slice(-length) };
}

function exampleTable() {
  const [length, columns] = tableSize();
  const row = (t) => Array.from({ length: columns }, (_, i) => (10 + 3 * Math.sin((2 * Math.PI * t) / (24 + 6 * i)) + 0.02 * t + 0.4 * Math.sin(t * 1.7 + i)).toFixed(2));
  at("text").value = Array.from({ length }, (_, t) => row(t).join(",")).join("\n");
}

async function base64(file) {
  const url = await new Promise((resolve, reject) => {
    const reader = Object.assign(new FileReader(), { onload: () => resolve(reader.result), onerror: () => reject(new Error("The file cannot be read.")) });
    reader.readAsDataURL(file);
  });
  return url.slice(url.indexOf(",") + 1);
}

async function chooseImage(file) {
  if (!file || running) return;
  image = file;
  const canvas = at("preview");
  try {
    const picture = await createImageBitmap(file);
    const scale = Math.min(1, 320 / Math.max(picture.width, picture.height));
    [canvas.width, canvas.height] = [picture.width, picture.height].map((side) => Math.max(1, Math.round(side * scale)));
    canvas.getContext("2d").drawImage(picture, 0, 0, canvas.width, canvas.height);
    canvas.hidden = false;
  } catch {
    canvas.hidden = true; // the service says what is wrong, or knows the format
  }
  at("form").requestSubmit();
}

// Return what the service is sent, and what is needed to show the answer.
async function readInput() {
  const text = at("text").value;
  const kind = inputKind();
  if (kind === "image") {
    if (!image) throw new Error("Choose an image first.");
    return [await base64(image), {}];
  }
  if (kind === "pair") return [{ text: at("first").value, pair: at("second").value }, {}];
  if (!text.trim()) throw new Error("There is nothing to send yet.");
  if (kind === "table") {
    const table = readTable(text);
    return [table.rows, table];
  }
  if (kind === "json") {
    try {
      return [JSON.parse(text), {}];
    } catch (error) {
      throw new Error(`This is no JSON: ${error.message}`);
    }
  }
  return [text, { text }];
}

// --- requests -----------------------------------------------------------------------------------------------------------------

function settings() {
  const set = ["temperature", "top_p", "max_tokens", "seed"].filter((name) => at(name).value !== "");
  return { max_tokens: Number(at("max_tokens").placeholder), ...Object.fromEntries(set.map((name) => [name, at(name).valueAsNumber])) };
}

function atBottom() {
  return window.innerHeight + window.scrollY > document.documentElement.scrollHeight - 60;
}

function append(parent, piece) {
  const follow = atBottom();
  parent.append(piece);
  if (follow) window.scrollTo(0, document.documentElement.scrollHeight);
}

async function generate(text, signal) {
  const chat = model.kind === "chat";
  const system = at("system").value.trim();
  const turn = { role: "user", content: text };
  const conversation = history; // it may be cleared before the answer ends
  const messages = [...(system ? [{ role: "system", content: system }] : []), ...conversation, turn];
  const output = element("p");
  const note = element("small");
  const answer = element("article", { className: chat ? "model" : "model joined", ariaLabel: "Model" }, output, note);
  const question = element("article", { className: "you", ariaLabel: "You" }, element("p", { textContent: text }));
  at("log").hidden = false;
  at("log").ariaBusy = "true";
  if (model.kind === "completion") output.append(element("span", { className: "prompt", textContent: text }));
  else append(at("log"), question);
  append(at("log"), answer);
  answer.scrollIntoView({ block: "nearest" });
  at("text").value = "";
  const start = performance.now();
  let [written, reason, usage] = ["", null, null];
  try {
    const body = { model: model.id, ...settings(), ...(chat ? { messages } : { prompt: text }) };
    for await (const event of stream(chat ? "v1/chat/completions" : "v1/completions", body, signal)) {
      const choice = event.choices?.[0];
      const piece = choice?.delta?.content ?? choice?.text ?? "";
      written += piece;
      reason = choice?.finish_reason ?? reason;
      usage = event.usage ?? usage;
      if (piece) append(output, piece);
    }
  } catch (error) {
    reason = error.name === "AbortError" ? "stopped" : "failed";
    if (!written) {
      answer.remove();
      question.remove();
      if (!at("text").value) at("text").value = text; // to send it again
    }
    if (reason === "failed") throw error;
  } finally {
    output.normalize();
    at("log").ariaBusy = "false";
    at("log").hidden = !at("log").childElementCount;
    const seconds = ((performance.now() - start) / 1000).toFixed(1);
    const ends = { length: "cut at the limit of tokens", stopped: "stopped", failed: "ended by an error" };
    append(note, [ends[reason], usage && `${usage.completion_tokens} tokens`, `${seconds} s`].filter(Boolean).join(" · "));
  }
  if (chat && written) conversation.push(turn, { role: "assistant", content: written });
  return reason === "stopped" ? "Stopped." : "The answer is complete.";
}

async function predict(signal) {
  let [sent, input] = await readInput();
  let answer;
  if (model.kind === "embedding") {
    const texts = sent.split("\n").filter((line) => line.trim());
    const { data } = await call("v1/embeddings", { model: model.id, input: texts }, signal);
    [answer, input] = [{ embeddings: data.map(({ embedding }) => embedding) }, { texts }];
  } else {
    [answer] = (await call("v1/predict", { model: model.id, inputs: [sent] }, signal)).results;
  }
  at("answer").replaceChildren(...show(answer, input));
  at("answer").hidden = false;
  return "The answer is shown below the form.";
}

function fail(error) {
  at("error").textContent = error.message;
  at("error").hidden = false;
  if (error.status === 401) {
    at("settings").open = true;
    at("key").focus();
  }
}

async function submit() {
  if (running || !model) return;
  const text = at("text").value;
  if (generates() && !text.trim()) return;
  running = new AbortController();
  const { signal } = running;
  const [send, stop] = [at("send"), at("stop")];
  const focused = document.activeElement === send;
  at("error").hidden = true;
  [send.hidden, stop.hidden] = [true, false];
  if (focused) stop.focus();
  at("status").textContent = "Working…";
  try {
    at("status").textContent = generates() ? await generate(text, signal) : await predict(signal);
  } catch (error) {
    at("status").textContent = "";
    if (error.name === "AbortError") at("status").textContent = "Stopped.";
    else fail(error);
  }
  running = undefined;
  const back = document.activeElement === stop;
  [send.hidden, stop.hidden] = [false, true];
  if (back) (generates() ? at("text") : send).focus();
}

// --- events -------------------------------------------------------------------------------------------------------------------

at("model").addEventListener("change", choose);
at("form").addEventListener("submit", (event) => (event.preventDefault(), submit()));
at("settings").addEventListener("submit", (event) => event.preventDefault());
at("stop").addEventListener("click", () => running?.abort());
at("clear").addEventListener("click", () => (running?.abort(), clear(), at("text").focus()));
at("example").addEventListener("click", () => (exampleTable(), at("form").requestSubmit()));
at("key").value = apiKey();
at("key").addEventListener("change", () => (apiKey(at("key").value), loadModels()));
at("file").addEventListener("change", (event) => chooseImage(event.target.files[0]));
at("form").addEventListener("keydown", (event) => {
  const long = ["table", "json"].includes(inputKind()) || model.kind === "embedding";
  if (event.target.tagName !== "TEXTAREA" || event.key !== "Enter" || event.shiftKey || event.isComposing || (long && !event.ctrlKey)) return;
  event.preventDefault();
  submit();
});
document.addEventListener("keydown", (event) => event.key === "Escape" && running?.abort());
for (const name of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(name, (event) => {
    if (!event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault(); // a file that is dropped elsewhere would replace the page
    at("drop").classList.toggle("over", name === "dragenter" || name === "dragover");
    if (name === "drop" && model && inputKind() === "image") chooseImage(event.dataTransfer.files[0]);
  });
}
document.addEventListener("paste", (event) => {
  if (model && inputKind() === "image") chooseImage(event.clipboardData.files[0]);
});
window.addEventListener("hashchange", loadModels);
loadModels();
