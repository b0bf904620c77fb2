// Turns answers into elements. Content of answers is always inserted as text, never as markup.

const LIMITS = [0.5, 0.8, 0.95]; // thresholds of the least probability; below each, the shade of a cell is stronger

/** Creates an element with properties and children; strings become text. */
export function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

const percent = (share) => `${Math.round(share * 100)}%`;

/** Shades an element by its confidence, with the figures in its title; below 0.8, hidden text in `label` says so. */
function shade(target, confidence, label = target) {
  const level = LIMITS.findIndex((limit) => confidence.least < limit);
  target.title = `least probability ${percent(confidence.least)}, mean ${percent(confidence.mean)}`;
  target.dataset.least = confidence.least;
  if (level < 0) return;
  target.classList.add(`unsure-${LIMITS.length - level}`);
  if (level < 2) label.append(element("span", { className: "hidden" }, ` (unsure, ${percent(confidence.least)})`));
}

function table(content, number, confidences) {
  const head = element("thead");
  const body = element("tbody");
  const { total_rows: nRows, header_rows: nHeaderRows, columns } = content.dimensions;
  const rows = Array.from({ length: nRows }, (_, i) => {
    const row = element("tr");
    (i < nHeaderRows ? head : body).append(row);
    return row;
  });
  for (const cell of content.cells) {
    const isHeader = cell.type === "header";
    const made = element(isHeader ? "th" : "td", { rowSpan: cell.rowspan, colSpan: cell.colspan }, cell.content);
    if (isHeader) made.scope = cell.row <= nHeaderRows ? "col" : "row";
    const confidence = confidences[`${number}/${cell.row - 1}/${cell.col - 1}`];
    if (confidence) shade(made, confidence);
    rows[cell.row - 1].append(made);
  }
  const caption = element("caption", {}, `Table ${number + 1}: ${nRows} rows, ${columns} columns`);
  const made = element("table", {}, caption);
  if (head.childElementCount) made.append(head);
  made.append(body);
  const box = element("div", { className: "scroll", tabIndex: 0 }, made);
  box.setAttribute("role", "region");
  box.setAttribute("aria-label", `Table ${number + 1}`);
  return box;
}

/** Converts the text typed into a field to the type of its old value. */
function typed(text, before) {
  if (text === "" && before === null) return null;
  if (typeof before === "number" && text.trim() !== "" && Number.isFinite(Number(text))) return Number(text);
  if (typeof before === "boolean" && ["true", "false"].includes(text)) return text === "true";
  return text;
}

const escaped = (name) => String(name).replaceAll("~", "~0").replaceAll("/", "~1");

/** Creates inputs for the members of an object or a list; typed text is written to `value`. */
function fields(value, pointer, confidences, ids) {
  const box = element("div", { className: "fields" });
  for (const [name, item] of Object.entries(value)) {
    const here = `${pointer}/${escaped(name)}`;
    const title = Array.isArray(value) ? `${Number(name) + 1}` : name;
    if (item !== null && typeof item === "object") {
      const inner = Object.keys(item).length ? fields(item, here, confidences, ids) : element("p", { className: "quiet" }, "none");
      box.append(element("fieldset", {}, element("legend", {}, title), inner));
      continue;
    }
    const input = element("input", { type: "text", id: `field-${ids.next++}`, value: item ?? "" });
    if (item === null) input.placeholder = "not found";
    const label = element("label", { htmlFor: input.id }, title);
    const before = item;
    input.addEventListener("input", () => {
      value[name] = typed(input.value, before);
    });
    if (confidences[here]) shade(input, confidences[here], label);
    box.append(label, input);
  }
  return box;
}

/** Shows a parsed answer as elements; those with a confidence have `data-least`. */
export function show(parsed, confidences) {
  if (parsed.tables) return parsed.tables.map((one, number) => table(one, number, confidences));
  if (parsed.kind === "fields" && parsed.value !== null) return [fields(parsed.value, "", confidences, { next: 0 })];
  if (parsed.kind === "prose" && parsed.value) return [element("p", { className: "prose" }, parsed.value)];
  return [];
}
