// Labels for the images of a search, with one or two sets of prompts side by side.

import { request, thumb, uploaded } from "./api.js";
import { bar, make, percent } from "./dom.js";

const SHOWN = 5;
const IMAGES = 24;

export class Classify {
  // Calls `save(values)` to store labels and prompts in the page's URL.
  constructor(section, save) {
    this.section = section;
    this.save = save;
    this.labels = area("Labels, one per line", "dog\nbeach\nfox: red fox, vixen", "labels");
    this.prompt = area("Prompts, with {} for the label", "the default prompts", "prompt");
    this.other = area("Compare with other prompts", "none", "other", true);
    this.go = make("button", { type: "submit", className: "main", text: "Classify" });
    this.form = make("form", { className: "ask",
      children: [this.labels.label, this.prompt.label, this.other.label, this.go] });
    this.note = make("p", { className: "name", "aria-live": "polite" });
    this.cards = make("div", { id: "cards" });
    section.append(this.form, this.note, this.cards);
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.save(this.values());
    });
    this.form.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.form.requestSubmit();
    });
  }

  values() {
    return {
      labels: this.labels.field.value.trim(),
      prompt: lines(this.prompt.field.value),
      other: lines(this.other.field.value),
    };
  }

  fill(state) {
    this.labels.field.value = state.labels;
    this.prompt.field.value = state.prompt.join("\n");
    this.other.field.value = state.other.join("\n");
  }

  // Classifies the first of `hits`, and the uploaded image.
  async show(state, hits, signal) {
    const labels = state.labels.split(state.labels.includes("\n") ? "\n" : ",")
      .map((label) => label.trim()).filter(Boolean);
    if (!labels.length) {
      this.cards.replaceChildren();
      this.note.textContent = "Write two or more labels: what the images may show.";
      return;
    }
    const shown = hits.slice(0, IMAGES);
    if (!shown.length && !state.image) {
      this.cards.replaceChildren();
      this.note.textContent = "There is no image to classify.";
      return;
    }
    const images = { keys: shown.map((hit) => hit.key), image: state.image || null };
    const prompts = state.other.length ? [state.prompt, state.other] : [state.prompt];
    this.note.textContent = "";
    const responses = await Promise.all(prompts.map((templates) => request("/classify", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ labels, templates, ...images }),
      signal,
    })));
    const names = new Map(shown.map((hit) => [hit.key, hit.captions[0] ?? hit.key]));
    this.cards.replaceChildren(...responses[0].images.map(({ key }, n) => card(
      key, key === null ? "your image" : names.get(key),
      key === null ? uploaded(state.image) : thumb(key),
      responses[0].labels, responses.map((one) => one.images[n].probabilities))));
    const differ = responses[0].images.filter((_, n) => responses.length > 1
      && best(responses[0].images[n].probabilities) !== best(responses[1].images[n].probabilities));
    const of = `${responses[0].images.length} images, ${labels.length} labels`;
    this.note.textContent = responses.length === 1 ? `${of}.`
      : `${of}. The two sets of prompts disagree on ${differ.length}.`;
  }
}

function card(key, name, source, labels, rows) {
  const order = labels.map((_, n) => n).sort((a, b) => rows[0][b] - rows[0][a]).slice(0, SHOWN);
  const second = rows[1] === undefined ? null : best(rows[1]);
  if (second !== null && !order.includes(second)) order[order.length - 1] = second;
  const guesses = order.map((n, place) => make("div", {
    className: place ? "guess" : "guess first",
    children: [
      make("span", { className: "label", text: labels[n], title: labels[n] }),
      make("span"),
      ...rows.flatMap((row, set) => [
        bar(row[n], set === 1), make("span", { className: "value", text: percent(row[n]) })]),
    ],
  }));
  if (second !== null && second !== order[0]) {
    guesses.push(make("p", { className: "differs",
      text: `The other prompts say ${labels[second]}.` }));
  }
  return make("article", { className: "card", children: [
    make("div", { children: [
      make("img", { src: source, alt: "", loading: "lazy" }),
      make("p", { className: "name", text: name, title: key ?? "" })] }),
    make("div", { children: guesses })] });
}

function area(text, placeholder, name, second = false) {
  const field = make("textarea", { name, placeholder, spellcheck: false });
  const swatch = name === "labels" ? []
    : [make("i", { className: second ? "swatch second" : "swatch" }), " "];
  const label = make("label", { className: "field",
    children: [make("span", { children: [...swatch, text] }), field] });
  return { field, label };
}

const lines = (text) => text.split("\n").map((line) => line.trim()).filter(Boolean);
const best = (row) => row.indexOf(Math.max(...row));
