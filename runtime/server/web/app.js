// The web page: input files, a question or a task, the streamed answer, and downloads.

import { ApiError, chat, key, model, parse } from "./api.js";
import { element, show } from "./view.js";

const QUESTION = "prompt";
const PARSE_MS = 600; // between two requests to parse an incomplete answer
const PREVIEWED = ["image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp"];
const SCHEMA = {
  type: "object",
  properties: { invoice_number: { type: ["string", "null"] }, date: { type: ["string", "null"] }, total: { type: ["number", "null"] } },
  required: ["invoice_number", "date", "total"],
};

const $ = (id) => document.getElementById(id);
const attached = []; // {name, url, isImage, pages}
let tasks = [{ name: QUESTION, tag: null, kind: "prose", takes_schema: false }];
let running = null; // the AbortController of the answer in flight
let answer = { text: "", parsed: null, confidences: {} };

// --- the model ---

async function connect() {
  try {
    const found = await model((why) => {
      $("model").textContent = why;
    });
    $("model").textContent = found.id;
    tasks = [tasks[0], ...(found.meta.tasks ?? [])];
    fillTasks();
  } catch (error) {
    if (error instanceof ApiError && error.status === 401) return askKey();
    $("model").textContent = `no connection: ${error.message}`;
  }
}

function fillTasks() {
  const chosen = $("task").value;
  const titles = { tables: "Tables", chart: "Charts", code: "Charts", prose: "Text", fields: "Fields" };
  const groups = new Map();
  for (const task of tasks) {
    const title = titles[task.kind] ?? task.kind;
    if (!groups.has(title)) groups.set(title, element("optgroup", { label: title }));
    const name = task.name === QUESTION ? "A question of your own" : task.name;
    groups.get(title).append(element("option", { value: task.name }, name));
  }
  $("task").replaceChildren(...groups.values());
  if (tasks.some((task) => task.name === chosen)) $("task").value = chosen;
  taskChanged();
}

const task = () => tasks.find((one) => one.name === $("task").value) ?? tasks[0];

function taskChanged() {
  $("question-field").hidden = task().name !== QUESTION;
  $("schema-field").hidden = !task().takes_schema;
}

function askKey() {
  $("open-key").hidden = false;
  $("model").textContent = "an API key is needed";
  $("key-dialog").showModal();
}

// --- files ---

async function attach(files) {
  for (const file of files) {
    const url = await new Promise((resolve, reject) => {
      const reader = new FileReader();
      reader.addEventListener("load", () => resolve(reader.result));
      reader.addEventListener("error", () => reject(reader.error));
      reader.readAsDataURL(file);
    });
    const isImage = PREVIEWED.includes(file.type);
    attached.push({ name: file.name || "pasted image", url, isImage, pages: isImage ? null : "1" });
  }
  showPages();
}

function showPages() {
  $("pages").replaceChildren(...attached.map(pageItem));
}

function pageItem(file, i) {
  const remove = element("button", { type: "button" }, "Remove");
  remove.setAttribute("aria-label", `Remove ${file.name}`);
  remove.addEventListener("click", () => {
    attached.splice(i, 1);
    showPages();
    $("files").focus();
  });
  const item = element("li", {}, element("div", { className: "line" }, element("span", {}, file.name), remove));
  if (file.isImage) {
    item.append(element("img", { src: file.url, alt: `The page ${file.name}` }));
  } else {
    const input = element("input", { type: "text", id: `pages-${i}`, value: file.pages, placeholder: "all" });
    input.addEventListener("input", () => {
      file.pages = input.value.trim();
    });
    const label = element("label", { htmlFor: input.id }, "Pages, such as 1-3,7");
    item.append(element("div", { className: "field" }, label, input));
  }
  return item;
}

// --- asking ---

function part(file) {
  if (file.isImage) return { type: "image_url", image_url: { url: file.url } };
  const content = { filename: file.name, file_data: file.url };
  return { type: "file", file: file.pages ? { ...content, pages: file.pages } : content };
}

/** The request for the form's contents; null if something is missing, which the form then shows. */
function question() {
  const chosen = task();
  const content = attached.map(part);
  const body = {
    messages: [{ role: "user", content }],
    max_completion_tokens: $("max-tokens").valueAsNumber || 2048,
    temperature: $("temperature").valueAsNumber || 0,
    stream_options: { include_usage: true },
    confidence: $("shade").checked,
  };
  $("schema-problem").textContent = "";
  if (chosen.name === QUESTION) {
    const text = $("question").value.trim();
    if (!text) return missing("question", "Write a question first.");
    content.push({ type: "text", text });
  } else if (!attached.length) {
    return missing("files", "Choose an image or a PDF first.");
  } else if (chosen.takes_schema) {
    try {
      const schema = JSON.parse($("schema").value);
      body.response_format = { type: "json_schema", json_schema: { name: "fields", schema } };
    } catch (error) {
      $("schema-problem").textContent = `This is not JSON: ${error.message}`;
      return missing("schema", "");
    }
  } else {
    content.push({ type: "text", text: chosen.tag });
    body.unconstrained = !$("held").checked;
  }
  return body;
}

function missing(id, message) {
  $("failure").textContent = message;
  $(id).focus();
  return null;
}

async function ask() {
  if (running) return;
  $("failure").textContent = "";
  const body = question();
  if (!body) return;
  const asked = task().name;
  answer = { text: "", parsed: null, confidences: {} };
  begin();
  let last = {};
  let timings = null;
  let wasStopped = false;
  const looking = lookNowAndThen(asked);
  try {
    for await (const chunk of chat(body, running.signal)) {
      const choice = chunk.choices[0];
      timings = chunk.timings ?? timings;
      if (!choice) continue;
      if (choice.delta?.content) append(choice.delta.content);
      if (choice.finish_reason) last = choice;
    }
  } catch (error) {
    wasStopped = error.name === "AbortError";
    if (!wasStopped) $("failure").textContent = error.message;
    if (error instanceof ApiError && error.status === 401) askKey();
  }
  await looking.end();
  answer.confidences = last.confidence ?? {};
  if (answer.text) await look(asked, last.finish_reason === "stop" && last.stopped_by !== "closed");
  end(wasStopped ? "Stopped." : summary(last, timings));
}

function begin() {
  running = new AbortController();
  const began = performance.now();
  running.timer = setInterval(() => {
    $("clock").textContent = `${Math.round((performance.now() - began) / 1000)} s`;
  }, 1000);
  $("go").disabled = true;
  $("stop").disabled = false;
  $("exports").hidden = true;
  $("text").textContent = "";
  $("view").replaceChildren();
  $("legend").hidden = true;
  $("result").setAttribute("aria-busy", "true");
  $("status").textContent = "Reading …";
}

function append(text) {
  if (!answer.text) $("status").textContent = "Answering …";
  answer.text += text;
  const box = $("text");
  const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 8;
  box.append(text);
  if (atEnd) box.scrollTop = box.scrollHeight;
}

function end(message) {
  clearInterval(running.timer);
  running = null;
  $("clock").textContent = "";
  $("go").disabled = false;
  $("stop").disabled = true;
  $("result").setAttribute("aria-busy", "false");
  $("status").textContent = message;
  $("exports").hidden = !answer.text;
  $("csv").hidden = !answer.parsed?.csv?.length;
  $("json").hidden = !(answer.parsed?.tables?.length || answer.parsed?.kind === "fields");
  $("unsure").hidden = $("legend").hidden = !$("view").querySelector("[data-least]");
}

function summary(last, timings) {
  if (!last.finish_reason) return "The answer is not complete.";
  const parts = [];
  if (last.finish_reason === "length" || last.stopped_by === "closed") {
    parts.push(last.stopped_by === "repetition" ? "Stopped, as it repeated itself." : "The answer reached its limit.");
  }
  if (last.schema_error) parts.push(`It is not as the schema wants it: ${last.schema_error}`);
  if (answer.parsed?.error) parts.push(`It is not as the task wants it: ${answer.parsed.error}`);
  if (timings) {
    const speed = timings.predicted_per_second ? `, ${timings.predicted_per_second.toFixed(1)} a second` : "";
    parts.push(`${timings.predicted_n} tokens${speed}; ${timings.cache_n} of ${timings.cache_n + timings.prompt_n} prompt tokens from the cache.`);
  }
  return parts.join(" ") || "Done.";
}

// --- the answer ---

/** Reads the answer with the server's parsers, and shows it. */
async function look(asked, ended) {
  try {
    answer.parsed = await parse(asked, answer.text, ended);
  } catch (error) {
    $("failure").textContent ||= error.message;
    return;
  }
  $("view").replaceChildren(...show(answer.parsed, answer.confidences));
}

/** Parses an answer at intervals while it is generated; `end` waits for the last parse. */
function lookNowAndThen(asked) {
  let latest = Promise.resolve();
  let seen = "";
  let isBusy = false;
  const timer = setInterval(() => {
    if (isBusy || answer.text === seen || asked === QUESTION) return;
    seen = answer.text;
    isBusy = true;
    latest = look(asked, false).finally(() => {
      isBusy = false;
    });
  }, PARSE_MS);
  return {
    end: () => {
      clearInterval(timer);
      return latest;
    },
  };
}

function download(name, content, type) {
  const url = URL.createObjectURL(new Blob([content], { type }));
  element("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

const fileName = () => (attached[0]?.name ?? "answer").replace(/\.[^.]*$/, "");

function downloadCsv() {
  const { csv } = answer.parsed;
  csv.forEach((one, i) => download(`${fileName()}${csv.length > 1 ? `-${i + 1}` : ""}.csv`, one, "text/csv"));
}

function downloadJson() {
  const { tables, value } = answer.parsed;
  download(`${fileName()}.json`, JSON.stringify(tables ?? value, null, 2), "application/json");
}

/** Moves the focus to the next cell or field, in order of confidence, from the least certain one on. */
function nextUnsure() {
  const found = [...$("view").querySelectorAll("[data-least]")].sort((a, b) => a.dataset.least - b.dataset.least);
  const next = found[(found.indexOf(document.activeElement) + 1) % found.length];
  if (next.tagName !== "INPUT") next.tabIndex = -1;
  next.scrollIntoView({ block: "center", inline: "center" });
  next.focus();
  $("status").textContent = `${next.value ?? next.firstChild?.data ?? ""}: ${next.title}`;
}

// --- events ---

$("files").addEventListener("change", async () => {
  await attach($("files").files);
  $("files").value = "";
});
for (const name of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", name === "dragover");
    if (name === "drop") attach(event.dataTransfer.files);
  });
}
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) attach(event.clipboardData.files);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) ask();
  if (event.key === "Escape") running?.abort();
});
$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
$("stop").addEventListener("click", () => running?.abort());
$("task").addEventListener("change", taskChanged);
$("csv").addEventListener("click", downloadCsv);
$("json").addEventListener("click", downloadJson);
$("copy").addEventListener("click", () => navigator.clipboard.writeText(answer.text));
$("copy").hidden = !navigator.clipboard; // pages loaded over plain HTTP from another host have none
$("unsure").addEventListener("click", nextUnsure);
$("open-key").addEventListener("click", askKey);
$("key-cancel").addEventListener("click", () => $("key-dialog").close());
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set($("key").value);
  $("key-dialog").close();
  connect();
});

$("schema").value = JSON.stringify(SCHEMA, null, 2);
fillTasks();
connect();
