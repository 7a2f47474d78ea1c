// The page: from typing, clicks and drops to a search, and from its response to the screen.

import { request, thumb, uploaded } from "./api.js";
import { Classify } from "./classify.js";
import { $, count, debounced, images, make, percent } from "./dom.js";
import { fillFilters, join, split } from "./filters.js";
import { Details, Grid } from "./grid.js";
import { inWords, isSearch, read, terms, write } from "./state.js";

const TYPING = 140; // milliseconds without a key before a search
const SLOW = 250; // milliseconds before a progress bar appears
const PAGE = 60;

let state = read(location.search);
let info = null;
let latest = 0; // number of the last search: responses to earlier ones are dropped
let running = null;
let response = null;
let upload = null; // an image to upload with the next search

const act = (what, hit) => {
  if (what === "open") details.open(hit);
  else if (what === "like") go({ like: [hit.key], unlike: [], q: "", image: "", view: "" });
  else if (!state.unlike.includes(hit.key)) go({ unlike: [...state.unlike, hit.key] });
};
const grid = new Grid(act, () => $("q").focus());
const details = new Details(grid, act);
const classify = new Classify($("classify-view"), (values) => go(values));

// From one state to the next

// `replace`: change the URL in place; `keep`: leave the fields alone, the user is typing in them.
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
  const number = ++latest;
  running?.abort();
  running = new AbortController();
  const { signal } = running;
  const slow = setTimeout(() => {
    $("progress").hidden = false;
    if (response) grid.list.classList.add("stale");
    else grid.ghosts(18);
  }, SLOW);
  try {
    const found = await request(`/search?${parameters(0)}`, { signal, ...uploading() });
    if (number !== latest) return;
    if (found.image && found.image !== state.image) {
      state.image = found.image;
      upload = null;
      history.replaceState(null, "", write(state));
      showChips();
    }
    response = found;
    showResponse();
    scrollTo(0, 0);
    $("problem").hidden = true;
    if (nearEnd()) more(); // a tall screen has nothing to scroll
    if (state.view === "classify") await classify.show(state, found.hits, signal);
  } catch (error) {
    if (number === latest && error.name !== "AbortError") fail(error);
  } finally {
    clearTimeout(slow);
    if (number === latest) $("progress").hidden = true;
  }
}

function parameters(offset) {
  const params = terms(state);
  if (upload) params.delete("image");
  params.set("offset", offset);
  params.set("k", PAGE);
  return params;
}

function uploading() {
  if (!upload) return {};
  const headers = { "content-type": "application/octet-stream" };
  return { method: "POST", body: upload.file, headers };
}

function fail(error) {
  if (!response) grid.show([]);
  $("problem-text").textContent = error.message;
  $("problem").hidden = false;
  $("status").textContent = "";
  $("status").classList.remove("far");
  grid.list.classList.add("stale"); // the tiles belong to an earlier search
}

// The hits

function showResponse() {
  const far = response.matched === false;
  grid.show(response.hits, { far, shown: !info?.missing });
  const line = $("status");
  line.classList.toggle("far", far);
  const missing = info?.missing ? [`No image can be shown: ${info.missing}.`] : [];
  line.textContent = [summary(far), ...response.notes, ...missing].join(" ");
  showEnd();
}

function summary(far) {
  if (far) {
    const chance = response.any_match === null ? "random words score as high"
      : `the ten best hits hold one with a probability of ${percent(response.any_match)}`;
    return `No good match for ${inWords(state)}: ${chance}. `
      + `The nearest of ${images(response.total)} follow.`;
  }
  const among = state.where ? " with this filter" : "";
  if (!response.total) return among ? `No image${among}.` : "This index has no images yet.";
  if (!isSearch(state)) {
    return `${images(response.total)}${among}. Type what you are looking for, or drop an image.`;
  }
  const near = state.like.length === 1 && !state.q ? "like that image" : `for ${inWords(state)}`;
  return `${images(response.total)}${among}, best first ${near} · `
    + `${Math.max(1, Math.round(response.milliseconds))} ms`;
}

function showEnd() {
  const shown = grid.hits.length;
  const most = Math.min(info?.max_hits ?? shown, response.total);
  const all = shown >= response.total - state.like.length;
  if (!shown) $("end").textContent = "";
  else if (all) $("end").textContent = shown > PAGE ? `All ${images(shown)} are shown.` : "";
  else if (shown >= most) {
    $("end").textContent = `These are the first ${count(shown)} of ${images(response.total)}. `
      + "Add words or a filter to narrow the search.";
  } else $("end").textContent = "…";
}

async function more() {
  if (!response || state.view === "classify" || !$("problem").hidden || more.busy) return;
  const shown = grid.hits.length;
  if (!shown || shown >= Math.min(info?.max_hits ?? 0, response.total)) return;
  const number = latest;
  more.busy = true;
  try {
    const next = await request(`/search?${parameters(shown)}`, { signal: running.signal });
    if (number !== latest) return;
    if (next.hits.length) {
      grid.show(next.hits, { append: true, far: response.matched === false,
        shown: !info?.missing });
    } else response.total = shown;
    showEnd();
  } catch (error) {
    if (number === latest && error.name !== "AbortError") fail(error);
  } finally {
    more.busy = false;
  }
  if (number === latest && nearEnd()) more();
}

const nearEnd = () => $("end").getBoundingClientRect().top < 2 * innerHeight;
new IntersectionObserver((entries) => {
  if (entries.some((entry) => entry.isIntersecting)) more();
}, { rootMargin: "100% 0px" }).observe($("end"));

// The other parts of the query

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
    chip("your image", upload.address, () => {
      upload = null;
      go({ image: "" });
    });
  } else if (state.image) chip("your image", uploaded(state.image), () => go({ image: "" }));
  for (const key of state.like) chip(`like ${key}`, thumb(key), () => go(without("like", key)));
  for (const key of state.unlike) {
    chip(`less like ${key}`, thumb(key), () => go(without("unlike", key)), true);
  }
  const clauses = split(state.where);
  clauses.forEach((text, n) => {
    chip(text, null, () => go({ where: join(clauses.filter((_, other) => other !== n)) }));
  });
  if (state.distinct) chip("distinct", null, () => go({ distinct: "" }));
  $("chips").replaceChildren(...chips);
  $("filter-button").classList.toggle("on", Boolean(state.where));
}

function showFilters() {
  $("filter-button").hidden = !info.columns.length;
  fillFilters($("filters"), info.columns, state.where, (where) => go({ where }, { keep: true }));
}

function send(file) {
  if (!file) return;
  if (info && file.size > info.max_upload) {
    fail(new Error(`${file.name} has ${Math.round(file.size / 2 ** 20)} MB; the limit is `
      + `${Math.round(info.max_upload / 2 ** 20)} MB.`));
    return;
  }
  if (upload) URL.revokeObjectURL(upload.address);
  upload = { file, address: URL.createObjectURL(file) };
  go({ image: "", like: [], unlike: [] });
}

// User actions

const typed = debounced(TYPING, () => go(
  { q: $("q").value, minus: $("minus").value }, { replace: true }));
let writing = false; // one history entry per query, not per letter
const commit = () => {
  typed.cancel();
  go({ q: $("q").value, minus: $("minus").value }, { replace: writing });
  writing = false;
};
// A click on an image takes the focus from the field: repeating a finished search would replace the
// element that is being clicked.
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

const hasImage = (event) => [...event.dataTransfer.types]
  .some((type) => type === "Files" || type === "application/x-clipkit");
addEventListener("dragover", (event) => {
  if (!hasImage(event)) return;
  event.preventDefault();
  $("drop").hidden = false;
});
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) $("drop").hidden = true;
});
addEventListener("drop", (event) => {
  if (!hasImage(event)) return;
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

// Start

async function start() {
  show();
  try {
    info = await request("/info");
  } catch (error) {
    fail(error);
    return;
  }
  $("collection").textContent = `${info.name} · ${images(info.count)}`;
  showFilters();
  if (!response) return;
  if (info.missing) showResponse();
  else showEnd();
  if (nearEnd()) more();
}

start();
if (!matchMedia("(hover: none)").matches) $("q").focus();
