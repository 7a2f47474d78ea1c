// The panel of conditions on columns, made from what the index says it has.

import { count, debounced, make } from "./dom.js";

// `changed(where)` is called with the conditions as the API takes them.
export function fillFilters(panel, columns, where, changed) {
  const now = () => {
    const found = [];
    for (const field of panel.querySelectorAll("input")) {
      if (field.type === "checkbox" ? field.checked : field.value.trim()) {
        found.push(field.dataset.start + (field.type === "checkbox" ? field.value
          : field.value.trim()));
      }
    }
    changed(found);
  };
  const later = debounced(400, now);
  panel.replaceChildren(...columns.map((column) => make("fieldset", {
    children: [make("legend", { text: column.name }), inner(column, where)],
  })));
  panel.onchange = now;
  panel.oninput = (event) => {
    if (event.target.type !== "checkbox") later();
  };
}

function inner(column, where) {
  if (column.values.length) {
    return make("div", { className: "values",
      children: column.values.map(([value, number]) => choice(column, value, number, where)) });
  }
  const kind = column.kind === "number" ? "number" : "text";
  const written = (start) =>
    where.find((text) => text.startsWith(start))?.slice(start.length) ?? "";
  const field = (compare, label, placeholder) => {
    const start = `${column.name}${compare}`;
    const input = make("input", { type: kind, step: "any", value: written(start), placeholder,
      "aria-label": `${column.name} ${label}` });
    input.dataset.start = start;
    return input;
  };
  if (column.kind === "text") return field("~", "contains", "contains…");
  return make("div", { className: "range", children: [
    field(">=", "from", column.low), "to", field("<=", "up to", column.high)] });
}

function choice(column, value, number, where) {
  const start = `${column.name}=`;
  const box = make("input", { type: "checkbox", value, checked: where.includes(start + value) });
  box.dataset.start = start;
  const having = make("small", { text: count(number) });
  return make("label", { children: [box, value || "(none)", having] });
}
