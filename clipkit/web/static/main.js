// The page: from what a person types, clicks and drops to what is searched for and shown.

import { ask, sent, thumb } from "./api.js";
import { Classify } from "./classify.js";
import { $, count, debounced, make, pictures } from "./dom.js";
import { fillFilters } from "./filters.js";
import { Details, Grid } from "./grid.js";
import { inWords, isSearch, read, terms, write } from "./state.js";

const TYPING = 140; // milliseconds without a key before a search
const SLOW = 250; // before anything says that it takes a while
const PAGE = 60;

let state = read(location.search);
let info = null;
let asked = 0; // the number of the last search: an answer to an earlier one is dropped
let running = null;
let answer = null;
let upload = null; // a picture to send with the next search

const act = (what, hit) => {
  if (what === "open") details.open(hit);
  else if (what === "like") go({ like: [hit.key], unlike: [], q: "", image: "", view: "" });
  else if (!state.unlike.includes(hit.key)) go({ unlike: [...state.unlike, hit.key] });
};
const grid = new Grid(act, () => $("q").focus());
const details = new Details(grid, act);
const classify = new Classify($("classify-view"), (values) => go(values));

// From one state to the next

// `replace`: the address changes in place; `keep`: the fields stay as they are, being written in.
function go(changes, { replace = false, keep = replace } = {}) {
  state = { ...state, ...changes };
  const address = write(state);
  if (replace) history.replaceState(null, "", address);
  else if (address !== (location.search || "/")) history.pushState(null, "", address);
  show({ keep });
}

function show({ keep = false } = {}) {
  if (!keep) {
    $("q").value = state.q;
    $("minus").value = state.minus;
    classify.fill(state);
    if (info) showFilters();
  }
  const view = state.view === "classify" ? "classify" : "search";
  $("search-view").hidden = view !== "search";
  $("classify-view").hidden = view !== "classify";
  for (const link of document.querySelectorAll("nav a")) {
    const mine = link.dataset.view === view;
    if (mine) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
    link.href = write({ ...state, view: link.dataset.view === "search" ? "" : "classify" });
  }
  document.title = isSearch(state) ? `${inWords(state)} · clipkit` : "clipkit";
  showChips();
  search();
}

async function search() {
  const number = ++asked;
  running?.abort();
  running = new AbortController();
  const { signal } = running;
  const slow = setTimeout(() => {
    $("progress").hidden = false;
    if (answer) grid.list.classList.add("stale");
    else grid.ghosts(18);
  }, SLOW);
  try {
    const found = await ask(`/search?${parameters(0)}`, { signal, ...sending() });
    if (number !== asked) return;
    if (found.image && found.image !== state.image) {
      state.image = found.image;
      upload = null;
      history.replaceState(null, "", write(state));
      showChips();
    }
    answer = found;
    showAnswer();
    scrollTo(0, 0);
    $("problem").hidden = true;
    if (nearEnd()) more(); // a tall screen, which nobody will scroll
    if (state.view === "classify") await classify.show(state, found.hits, signal);
  } catch (error) {
    if (number === asked && error.name !== "AbortError") fail(error);
  } finally {
    clearTimeout(slow);
    if (number === asked) $("progress").hidden = true;
  }
}

function parameters(offset) {
  const params = terms(state);
  if (upload) params.delete("image");
  params.set("offset", offset);
  params.set("limit", PAGE);
  return params;
}

function sending() {
  if (!upload) return {};
  const headers = { "content-type": "application/octet-stream" };
  return { method: "POST", body: upload.file, headers };
}

function fail(error) {
  if (!answer) grid.show([]);
  $("problem-text").textContent = error.message;
  $("problem").hidden = false;
  $("status").textContent = "";
  $("status").classList.remove("far");
  grid.list.classList.add("stale"); // what is still shown is no answer to this
}

// What was found

function showAnswer() {
  const far = answer.matched === false;
  grid.show(answer.hits, { far, shown: !info?.missing });
  const line = $("status");
  line.classList.toggle("far", far);
  const missing = info?.missing ? [`No picture can be shown: ${info.missing}.`] : [];
  line.textContent = [told(far), ...answer.notes, ...missing].join(" ");
  showEnd();
}

function told(far) {
  if (far) {
    return `No good match for ${inWords(state)}. The nearest of ${pictures(answer.total)} follow.`;
  }
  const among = state.where.length ? " with this filter" : "";
  if (!answer.total) return `No picture${among || " is in this index yet"}.`;
  if (!isSearch(state)) {
    return `${pictures(answer.total)}${among}. Type what you are looking for, or drop a picture.`;
  }
  const near = state.like.length === 1 && !state.q ? "like that picture" : `for ${inWords(state)}`;
  return `${pictures(answer.total)}${among}, best first ${near} · `
    + `${Math.max(1, Math.round(answer.milliseconds))} ms`;
}

function showEnd() {
  const shown = grid.hits.length;
  const most = Math.min(info?.most_hits ?? shown, answer.total);
  const all = shown >= answer.total - state.like.length;
  if (!shown) $("end").textContent = "";
  else if (all) $("end").textContent = shown > PAGE ? `All ${pictures(shown)} are shown.` : "";
  else if (shown >= most) {
    $("end").textContent = `These are the first ${count(shown)} of ${pictures(answer.total)}. `
      + "More words or a filter lead nearer.";
  } else $("end").textContent = "…";
}

async function more() {
  if (!answer || state.view === "classify" || !$("problem").hidden || more.busy) return;
  const shown = grid.hits.length;
  if (!shown || shown >= Math.min(info?.most_hits ?? 0, answer.total)) return;
  const number = asked;
  more.busy = true;
  try {
    const next = await ask(`/search?${parameters(shown)}`, { signal: running.signal });
    if (number !== asked) return;
    if (next.hits.length) {
      grid.show(next.hits, { append: true, far: answer.matched === false,
        shown: !info?.missing });
    } else answer.total = shown;
    showEnd();
  } catch (error) {
    if (number === asked && error.name !== "AbortError") fail(error);
  } finally {
    more.busy = false;
  }
  if (number === asked && nearEnd()) more();
}

const nearEnd = () => $("end").getBoundingClientRect().top < 2 * innerHeight;
new IntersectionObserver((entries) => {
  if (entries.some((entry) => entry.isIntersecting)) more();
}, { rootMargin: "100% 0px" }).observe($("end"));

// What else is searched for

function showChips() {
  const chips = [];
  const chip = (text, source, remove, less = false) => chips.push(make("li", {
    className: less ? "less" : "",
    children: [
      ...(source ? [make("img", { src: source, alt: "" })] : []),
      make("span", { text, title: text }),
      make("button", { type: "button", text: "×", "aria-label": `Remove ${text}`,
        onclick: remove }),
    ],
  }));
  const without = (name, value) => ({ [name]: state[name].filter((one) => one !== value) });
  if (upload) {
    chip("your picture", upload.address, () => {
      upload = null;
      go({ image: "" });
    });
  } else if (state.image) chip("your picture", sent(state.image), () => go({ image: "" }));
  for (const key of state.like) chip(`like ${key}`, thumb(key), () => go(without("like", key)));
  for (const key of state.unlike) {
    chip(`less like ${key}`, thumb(key), () => go(without("unlike", key)), true);
  }
  for (const text of state.where) {
    chip(text.replace(/(>=|<=|!=|=|>|<|~)/, " $1 "), null, () => go(without("where", text)));
  }
  $("chips").replaceChildren(...chips);
  $("filter-button").classList.toggle("on", state.where.length > 0);
}

function showFilters() {
  $("filter-button").hidden = !info.columns.length;
  fillFilters($("filters"), info.columns, state.where, (where) => go({ where }, { keep: true }));
}

function send(file) {
  if (!file) return;
  if (info && file.size > info.largest_upload) {
    fail(new Error(`${file.name} has ${Math.round(file.size / 2 ** 20)} MB; pictures of at most `
      + `${Math.round(info.largest_upload / 2 ** 20)} MB are taken.`));
    return;
  }
  if (upload) URL.revokeObjectURL(upload.address);
  upload = { file, address: URL.createObjectURL(file) };
  go({ image: "", like: [], unlike: [] });
}

// What a person does

const typed = debounced(TYPING, () => go(
  { q: $("q").value, minus: $("minus").value }, { replace: true }));
let writing = false; // a history entry of its own for each query, not for each letter
const commit = () => {
  typed.cancel();
  go({ q: $("q").value, minus: $("minus").value }, { replace: writing });
  writing = false;
};
// A click on a picture takes the focus from the field: a search that has been made already would
// put other elements in the place of the one that is being clicked.
const settle = () => {
  if ($("q").value !== state.q || $("minus").value !== state.minus) commit();
  typed.cancel();
  writing = false;
};
$("query").addEventListener("input", (event) => {
  if (event.target.type !== "search") return;
  if (!writing) history.pushState(null, "", write(state));
  writing = true;
  typed();
});
$("query").addEventListener("change", (event) => {
  if (event.target.type === "search" && writing) settle();
});
$("query").addEventListener("submit", (event) => {
  event.preventDefault();
  commit();
});
$("query").addEventListener("keydown", (event) => {
  if (event.key === "ArrowDown" && event.target.type === "search" && grid.hits.length) {
    event.preventDefault();
    grid.focus(0);
  }
});
$("pick").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => {
  send($("file").files[0]);
  $("file").value = "";
});
$("filter-button").addEventListener("click", () => {
  $("filters").hidden = !$("filters").hidden;
  $("filter-button").setAttribute("aria-expanded", String(!$("filters").hidden));
  if (!$("filters").hidden) $("filters").querySelector("input")?.focus();
});
$("again").addEventListener("click", () => start());
$("help-button").addEventListener("click", () => $("help").showModal());
$("help").addEventListener("click", (event) => {
  if (event.target === $("help") || event.target.closest("[data-do=close]")) $("help").close();
});
document.addEventListener("click", (event) => {
  const link = event.target.closest("nav a, #home");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  if (link.id === "home") {
    upload = null;
    go(read(""));
  } else go({ view: link.dataset.view === "search" ? "" : "classify" });
});
document.addEventListener("keydown", (event) => {
  const writing = event.target.matches("input:not([type=checkbox]), textarea");
  if (writing || document.querySelector("dialog[open]") || event.ctrlKey || event.metaKey) return;
  if (event.key === "/") {
    event.preventDefault();
    $("q").focus();
    $("q").select();
  } else if (event.key === "?") $("help").showModal();
});
addEventListener("popstate", () => {
  writing = false;
  typed.cancel();
  upload = null;
  state = read(location.search);
  show();
});

const holdsPicture = (event) => [...event.dataTransfer.types]
  .some((type) => type === "Files" || type === "application/x-clipkit");
addEventListener("dragover", (event) => {
  if (!holdsPicture(event)) return;
  event.preventDefault();
  $("drop").hidden = false;
});
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) $("drop").hidden = true;
});
addEventListener("drop", (event) => {
  if (!holdsPicture(event)) return;
  event.preventDefault();
  $("drop").hidden = true;
  const key = event.dataTransfer.getData("application/x-clipkit");
  if (key) act("like", { key });
  else send(event.dataTransfer.files[0]);
});
addEventListener("paste", (event) => {
  const file = [...(event.clipboardData?.files ?? [])].find((one) => one.type.startsWith("image/"));
  if (file) send(file);
});

// The beginning

async function start() {
  show();
  try {
    info = await ask("/info");
  } catch (error) {
    fail(error);
    return;
  }
  $("collection").textContent = `${info.name} · ${pictures(info.count)}`;
  showFilters();
  if (!answer) return;
  if (info.missing) showAnswer();
  else showEnd();
  if (nearEnd()) more();
}

start();
if (!matchMedia("(hover: none)").matches) $("q").focus();
