// Building elements. Nothing that comes from an index is ever HTML: texts are set as text.

export const $ = (id) => document.getElementById(id);

export function make(tag, { text, children = [], ...properties } = {}) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined) continue;
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  if (text !== undefined) element.textContent = text;
  element.append(...children);
  return element;
}

export const count = (number) => number.toLocaleString("en");

export function images(number) {
  return `${count(number)} ${number === 1 ? "image" : "images"}`;
}

export function percent(share) {
  if (share > 0 && share < 0.005) return "< 1 %";
  return `${Math.round(100 * share)} %`;
}

export function bar(share, second = false) {
  const fill = make("div", { className: second ? "fill second" : "fill" });
  fill.style.width = `${100 * Math.max(0, Math.min(1, share))}%`;
  return make("div", { className: "track", "aria-hidden": "true", children: [fill] });
}

export function debounced(milliseconds, work) {
  let timer;
  const later = (...args) => {
    clearTimeout(timer);
    timer = setTimeout(() => work(...args), milliseconds);
  };
  later.cancel = () => clearTimeout(timer);
  return later;
}
