// Labels for the pictures of a search, with one or two sets of prompts side by side.

import { ask, sent, thumb } from "./api.js";
import { bar, make, percent } from "./dom.js";

const SHOWN = 5;
const PICTURES = 24;

export class Classify {
  // `keep(values)` stores what was asked in the page's address.
  constructor(section, keep) {
    this.section = section;
    this.keep = keep;
    this.labels = area("Labels, one a line", "dog\nbeach\nfox: red fox, vixen", "labels");
    this.prompt = area("Prompts, with {} for the label", "the usual ones", "prompt");
    this.other = area("Compare with other prompts", "none", "other", true);
    this.go = make("button", { type: "submit", className: "main", text: "Classify" });
    this.form = make("form", { className: "ask",
      children: [this.labels.label, this.prompt.label, this.other.label, this.go] });
    this.note = make("p", { className: "name", "aria-live": "polite" });
    this.cards = make("div", { id: "cards" });
    section.append(this.form, this.note, this.cards);
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.keep(this.asked());
    });
    this.form.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.form.requestSubmit();
    });
  }

  asked() {
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

  // Classifies the first pictures among `hits`, and the one that was sent.
  async show(state, hits, signal) {
    const labels = state.labels.split(state.labels.includes("\n") ? "\n" : ",")
      .map((label) => label.trim()).filter(Boolean);
    if (!labels.length) {
      this.cards.replaceChildren();
      this.note.textContent = "Write two labels or more: what a picture may show.";
      return;
    }
    const shown = hits.slice(0, PICTURES);
    if (!shown.length && !state.image) {
      this.cards.replaceChildren();
      this.note.textContent = "There is no picture to classify.";
      return;
    }
    const pictures = { keys: shown.map((hit) => hit.key), image: state.image || null };
    const prompts = state.other.length ? [state.prompt, state.other] : [state.prompt];
    this.note.textContent = "";
    const answers = await Promise.all(prompts.map((templates) => ask("/classify", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ labels, templates, ...pictures }),
      signal,
    })));
    const names = new Map(shown.map((hit) => [hit.key, hit.captions[0] ?? hit.key]));
    this.cards.replaceChildren(...answers[0].pictures.map(({ key }, n) => card(
      key, key === null ? "your picture" : names.get(key),
      key === null ? sent(state.image) : thumb(key),
      answers[0].labels, answers.map((answer) => answer.pictures[n].probabilities))));
    const differ = answers[0].pictures.filter((_, n) => answers.length > 1
      && best(answers[0].pictures[n].probabilities) !== best(answers[1].pictures[n].probabilities));
    const of = `${answers[0].pictures.length} pictures, ${labels.length} labels`;
    this.note.textContent = answers.length === 1 ? `${of}.`
      : `${of}. The two sets of prompts disagree about ${differ.length}.`;
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
