// The filter panel: controls for the columns of the index that write a `where` condition, the same
// language as `clipkit search --where`. The condition can also be edited as text.

import { count, debounced, make } from "./dom.js";

const KEYWORDS = new Set(["and", "or", "not", "in", "is", "null", "none", "true", "false"]);

// A text, and a column's name, as a condition writes them.
const quote = (text) => `'${text.replaceAll("'", "''")}'`;
const plain = (name) => /^[A-Za-z_][A-Za-z0-9_]*$/.test(name) && !KEYWORDS.has(name.toLowerCase());
const columnName = (name) => (plain(name) ? name : `\`${name}\``);

// The clauses of a condition that "and" joins. One with an "or" outside of parentheses is a single
// clause, in parentheses so that others can be added to it.
export function split(where) {
  const tokens = where.match(/'(?:[^']|'')*'|"(?:[^"]|"")*"|`[^`]*`|[()]|[^\s()'"`]+|\s+|./g) ?? [];
  const clauses = [""];
  let depth = 0;
  for (const token of tokens) {
    if (token === "(") depth++;
    if (token === ")") depth--;
    if (!depth && token.toLowerCase() === "or") return [`(${where.trim()})`];
    if (!depth && token.toLowerCase() === "and") clauses.push("");
    else clauses[clauses.length - 1] += token;
  }
  return clauses.map((clause) => clause.trim()).filter(Boolean);
}

export const join = (clauses) => clauses.join(" and ");

// What the control of a column shows, and the clause that it writes; `read` returns null for a
// clause that the control cannot write.
function writers(column) {
  const name = columnName(column.name);
  const literal = (value) => (column.kind === "text" || column.kind === "time"
    ? quote(value) : value);
  if (column.values.length) {
    const values = column.values.map(([value]) => value);
    return [{
      write: (chosen) => (chosen.length > 1 ? `${name} in (${chosen.map(literal).join(", ")})`
        : `${name} = ${literal(chosen[0])}`),
      read(clause) {
        const one = values.find((value) => clause === `${name} = ${literal(value)}`);
        if (one !== undefined) return [one];
        const some = values.filter((value) => clause.includes(literal(value)));
        return some.length > 1 && clause === this.write(some) ? some : null;
      },
    }];
  }
  if (column.kind === "text") {
    const end = ` in ${name}`;
    return [{
      label: "contains", placeholder: "contains…", write: (text) => quote(text) + end,
      read: (clause) => (/^'(?:[^']|'')*'$/.test(clause.slice(0, -end.length))
        && clause.endsWith(end) ? unquote(clause.slice(0, -end.length)) : null),
    }];
  }
  const bound = (sign, label, placeholder) => {
    const start = `${name} ${sign} `;
    return { label, placeholder, write: (value) => start + literal(value), read: (clause) => {
      if (!clause.startsWith(start)) return null;
      const value = clause.slice(start.length);
      if (column.kind === "time") return /^'[^']*'$/.test(value) ? unquote(value) : null;
      return /^-?[\d.]+$/.test(value) ? value : null;
    } };
  };
  return [bound(">=", "from", column.min), bound("<=", "up to", column.max)];
}

const unquote = (text) => text.slice(1, -1).replaceAll("''", "'");

// `changed(where)` is called with the whole condition.
export function fillFilters(panel, columns, where, changed) {
  const rest = split(where);
  const fields = [];
  const take = (writer) => {
    const place = rest.findIndex((clause) => writer.read(clause) !== null);
    return place < 0 ? null : writer.read(rest.splice(place, 1)[0]);
  };
  const sets = columns.map((column) => {
    const children = writers(column).map((writer) => {
      const value = take(writer);
      if (column.values.length) {
        const boxes = column.values.map(([one, number]) => choice(one, number, value ?? []));
        fields.push(() => {
          const chosen = boxes.map((label) => label.querySelector("input"))
            .filter((box) => box.checked).map((box) => box.value);
          return chosen.length ? writer.write(chosen) : "";
        });
        return make("div", { className: "values", children: boxes });
      }
      const input = make("input", { type: column.kind === "number" ? "number" : "text",
        step: "any", value: value ?? "", placeholder: writer.placeholder,
        "aria-label": `${column.name} ${writer.label}` });
      fields.push(() => (input.value.trim() ? writer.write(input.value.trim()) : ""));
      return input;
    });
    const inner = children.length < 2 ? children
      : [make("div", { className: "range", children: [children[0], "to", children[1]] })];
    return make("fieldset", { children: [make("legend", { text: column.name }), ...inner] });
  });
  const text = make("input", { type: "text", name: "where", value: where, spellcheck: false,
    autocomplete: "off", placeholder: "year >= 2020 and label in ('dog', 'cat')" });
  const condition = make("label", { className: "field where",
    children: [make("span", { text: "Condition" }), text] });
  panel.replaceChildren(...sets, condition);
  const compose = () => {
    text.value = join([...fields.map((field) => field()).filter(Boolean), ...rest]);
    changed(text.value);
  };
  const later = debounced(400, compose);
  panel.onchange = (event) => {
    later.cancel();
    if (event.target !== text) compose();
    else {
      const written = text.value.trim();
      fillFilters(panel, columns, written, changed);
      changed(written);
    }
  };
  panel.oninput = (event) => {
    if (event.target.type !== "checkbox" && event.target !== text) later();
  };
}

function choice(value, number, chosen) {
  const box = make("input", { type: "checkbox", value, checked: chosen.includes(value) });
  const having = make("small", { text: count(number) });
  return make("label", { children: [box, value || "(none)", having] });
}
