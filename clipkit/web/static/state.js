// The state of the page as its URL says it, so that a search can be bookmarked, shared and undone.

const LISTS = ["like", "unlike", "prompt", "other"];
const TEXTS = ["q", "minus", "image", "where", "distinct", "view", "labels"];

export function read(search) {
  const params = new URLSearchParams(search);
  const state = {};
  for (const name of TEXTS) state[name] = params.get(name) ?? "";
  for (const name of LISTS) state[name] = params.getAll(name);
  return state;
}

export function write(state) {
  const params = new URLSearchParams();
  for (const name of TEXTS) if (state[name]) params.set(name, state[name]);
  for (const name of LISTS) for (const value of state[name]) params.append(name, value);
  const text = params.toString();
  return text ? `?${text}` : "/";
}

// Words after a minus sign, in the query itself: beach -people -"red umbrella"
function split(q) {
  const minus = [];
  const plus = q.replace(/(^|\s)-(?:"([^"]*)"|([^\s"-]\S*))/g, (_, before, quoted, word) => {
    minus.push(quoted ?? word);
    return before;
  });
  return [plus.trim(), minus];
}

// The parameters of GET /search.
export function terms(state) {
  const params = new URLSearchParams();
  const [plus, minus] = split(state.q);
  if (plus) params.set("q", plus);
  for (const text of [...minus, ...state.minus.split(",")]) {
    if (text.trim()) params.append("minus", text.trim());
  }
  for (const name of ["like", "unlike"]) {
    for (const value of state[name]) params.append(name, value);
  }
  for (const name of ["where", "image"]) if (state[name]) params.set(name, state[name]);
  if (state.distinct) params.set("distinct", "true");
  return params;
}

export function isSearch(state) {
  return Boolean(state.q.trim() || state.minus.trim() || state.image || state.like.length
    || state.unlike.length);
}

// The query in words, for the status line and the window's title.
export function inWords(state) {
  const [plus, minus] = split(state.q);
  const parts = [];
  if (plus) parts.push(`“${plus}”`);
  if (state.image) parts.push("your image");
  if (state.like.length) parts.push(state.like.length > 1 ? "those images" : "that image");
  const away = [...minus, ...state.minus.split(",")].map((text) => text.trim()).filter(Boolean);
  const less = away.length ? ` without ${away.map((text) => `“${text}”`).join(", ")}` : "";
  return (parts.join(" and ") + less).trim() || "this search";
}
