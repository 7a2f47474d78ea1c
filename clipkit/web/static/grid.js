// The grid of images, its keyboard control, and the dialog that shows one image large.

import { image, reason, thumb } from "./api.js";
import { $, bar, make, percent } from "./dom.js";

export class Grid {
  // Calls `act(what, hit)` with "open", "like" or "unlike", and `leave()` to return to the query.
  constructor(act, leave) {
    this.list = $("grid");
    this.hits = [];
    this.act = act;
    this.leave = leave;
    this.list.addEventListener("click", (event) => this.clicked(event));
    this.list.addEventListener("keydown", (event) => this.pressed(event));
    this.list.addEventListener("dragstart", (event) => this.dragged(event));
    // Errors do not bubble; this catches them in the capture phase.
    this.list.addEventListener("error", (event) => this.lost(event.target), true);
  }

  async lost(element) {
    const tile = element.closest?.(".tile");
    if (!tile) return;
    tile.classList.add("lost");
    const why = await reason(element.getAttribute("src"));
    if (why) tile.querySelector(".lost-name").replaceChildren(make("small", { text: why }));
  }

  show(hits, { append = false, far = false, shown = true } = {}) {
    const start = append ? this.hits.length : 0;
    if (append) this.hits.push(...hits);
    else this.hits = hits;
    const focused = !append && this.list.contains(document.activeElement);
    // Elements of images that stay are reused: new ones would flicker.
    const reusable = new Map(append ? [] : [...this.list.querySelectorAll("img")]
      .map((one) => [one.getAttribute("src"), one]));
    const tiles = hits.map((hit, n) => this.tile(hit, start + n, shown, reusable));
    if (append) this.list.append(...tiles);
    else this.list.replaceChildren(...tiles);
    this.list.classList.toggle("far", far);
    this.list.classList.remove("stale");
    if (focused) this.focus(0); // the focused tile is gone; the keyboard continues here
  }

  ghosts(number) {
    this.hits = [];
    const ghost = () => make("li", { className: "tile ghost", "aria-hidden": "true",
      children: [make("div", { className: "open" })] });
    this.list.replaceChildren(...Array.from({ length: number }, ghost));
  }

  tile(hit, n, shown, reusable) {
    const name = hit.captions[0] ?? hit.key;
    const element = shown ? reusable.get(thumb(hit.key)) ?? make("img", { src: thumb(hit.key), alt: "",
      loading: "lazy", decoding: "async", draggable: true }) : "";
    const match = matchText(hit);
    const open = make("button", {
      type: "button", className: "open", tabIndex: n ? -1 : 0, title: hit.key,
      "aria-label": match ? `${name}, ${match}` : name,
      children: [
        element,
        make("span", { className: "lost-name", text: hit.key }),
      ],
    });
    const more = make("button", { type: "button", className: "more", tabIndex: -1,
      text: "More like this" });
    const children = [open, more];
    if (match) children.push(matchLine(hit));
    children.push(make("p", { className: "name", text: name }));
    const tile = make("li", { className: shown ? "tile" : "tile lost", children });
    tile.dataset.n = n;
    return tile;
  }

  focus(n) {
    const tile = this.list.children[Math.max(0, Math.min(n, this.hits.length - 1))];
    if (!tile) return;
    this.list.querySelector('.open[tabindex="0"]')?.setAttribute("tabindex", "-1");
    const open = tile.querySelector(".open");
    open.tabIndex = 0;
    open.focus();
  }

  clicked(event) {
    const tile = event.target.closest(".tile:not(.ghost)");
    if (!tile) return;
    const hit = this.hits[tile.dataset.n];
    if (event.target.closest(".more")) this.act("like", hit);
    else if (event.target.closest(".open")) this.act("open", hit);
  }

  pressed(event) {
    const tile = event.target.closest(".tile");
    if (!tile || event.ctrlKey || event.metaKey || event.altKey) return;
    const n = Number(tile.dataset.n);
    const across = getComputedStyle(this.list).gridTemplateColumns.split(" ").length;
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -across, ArrowDown: across };
    if (event.key in steps) {
      event.preventDefault();
      if (n + steps[event.key] < 0) this.leave();
      else this.focus(n + steps[event.key]);
    } else if (event.key === "Home") this.focus(0);
    else if (event.key === "End") this.focus(this.hits.length - 1);
    else if (event.key === "m") this.act("like", this.hits[n]);
    else if (event.key === "x") this.act("unlike", this.hits[n]);
    else if (event.key === "Escape") this.leave();
  }

  dragged(event) {
    const tile = event.target.closest(".tile");
    if (tile) event.dataTransfer.setData("application/x-clipkit", this.hits[tile.dataset.n].key);
  }
}

function matchText(hit) {
  if (hit.probability !== null) return `matches with a probability of ${percent(hit.probability)}`;
  return hit.score === null ? "" : `score ${hit.score.toFixed(3)}`;
}

function matchLine(hit) {
  const calibrated = hit.probability !== null;
  const shown = calibrated ? percent(hit.probability) : hit.score.toFixed(3);
  return make("div", {
    className: "match",
    title: calibrated ? `probability that this image matches the text; score ${hit.score.toFixed(3)}`
      : "inner product with the query",
    children: [make("b", { text: shown }), bar(calibrated ? hit.probability : hit.score)],
  });
}

export class Details {
  constructor(grid, act) {
    this.dialog = $("details");
    this.grid = grid;
    this.hits = []; // the hits when it was opened: the grid may change meanwhile
    this.n = 0;
    const element = $("details-image");
    element.addEventListener("error", () => this.lost());
    this.dialog.addEventListener("click", (event) => {
      const what = event.target === this.dialog ? "close"
        : event.target.closest("[data-do]")?.dataset.do;
      if (what === "close") this.dialog.close();
      else if (what === "back") this.step(-1);
      else if (what === "on") this.step(1);
      else if (what) this.leaveTo(() => act(what, this.hit));
    });
    this.dialog.addEventListener("keydown", (event) => {
      if (event.key === "ArrowLeft") this.step(-1);
      else if (event.key === "ArrowRight") this.step(1);
      else if (event.key === "m") this.leaveTo(() => act("like", this.hit));
      else if (event.key === "x") this.leaveTo(() => act("unlike", this.hit));
    });
    this.dialog.addEventListener("close", () => {
      if (this.dialog.open) return; // a late event: another image is open by now
      element.removeAttribute("src");
      if (!this.left) grid.focus(this.n);
    });
  }

  get hit() {
    return this.hits[this.n];
  }

  leaveTo(work) {
    this.left = true;
    this.dialog.close();
    work();
  }

  open(hit) {
    this.left = false;
    this.hits = this.grid.hits;
    this.n = this.hits.indexOf(hit);
    this.fill();
    this.dialog.showModal();
  }

  step(by) {
    const n = this.n + by;
    if (n < 0 || n >= this.hits.length) return;
    this.n = n;
    this.fill();
  }

  fill() {
    const hit = this.hit;
    $("details-lost").hidden = true;
    $("details-image").hidden = false;
    $("details-image").src = image(hit.key);
    $("details-image").alt = hit.captions[0] ?? hit.key;
    $("details-open").href = image(hit.key);
    $("details-name").textContent = hit.key;
    const score = hit.score === null ? "" : `score ${hit.score.toFixed(3)}`;
    const match = hit.probability === null ? score
      : `probability of a match ${percent(hit.probability)}, ${score}`;
    $("details-match").textContent = [match, `number ${hit.rank}`].filter(Boolean).join(" · ");
    $("details-captions").replaceChildren(...hit.captions.map((text) => make("li", { text })));
    const facts = Object.entries({ label: hit.label, ...hit.more });
    const known = facts.filter(([, value]) => value !== null && value !== "");
    $("details-more").replaceChildren(...known.flatMap(([name, value]) => [
      make("dt", { text: name }), make("dd", { text: String(value) })]));
  }

  async lost() {
    if (!this.dialog.open) return;
    const hit = this.hit;
    $("details-image").hidden = true;
    $("details-lost").hidden = false;
    $("details-lost").textContent = "This image cannot be shown.";
    const why = await reason(image(hit.key));
    if (why && hit === this.hit) $("details-lost").textContent = why;
  }
}
