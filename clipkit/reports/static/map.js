const data = JSON.parse(document.getElementById("data").textContent);
const numbers = (text) =>
  new Uint16Array(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
const places = numbers(data.places);
const cluster = numbers(data.clusters);
const count = cluster.length;
const canvas = document.getElementById("map");
const pen = canvas.getContext("2d", { alpha: false });
const card = document.getElementById("card");
const EDGE = 0.06; // free share of the shorter side around the points when all are shown

// Golden-angle hues: neighbours in the list differ, however many there are.
const colour = (n) => rgb((n * 137.508 + 210) % 360, 0.62, n % 2 ? 0.44 : 0.56);
const points = new Points(places, cluster, data.names.map((_, n) => colour(n)));
const shown = data.names.map(() => true);
let matches = null; // one byte an item while something is searched for
const bright = new Uint8Array(count).fill(1);
let image = null; // the pixels of the canvas
let style = null; // the colours of the page
let labels = []; // prerendered names
let view = { x: 0.5, y: 0.5, zoom: 1 };
let pointed = -1;
let waiting = false;

// Items by cell, so that pointing at one need not look at all.
const CELLS = 128;
const cells = new Map();
for (let i = 0; i < count; i++) {
  const cell = cellOf(places[2 * i] / 65535, places[2 * i + 1] / 65535);
  if (!cells.has(cell)) cells.set(cell, []);
  cells.get(cell).push(i);
}
function cellOf(x, y) {
  const clamp = (v) => Math.min(CELLS - 1, Math.max(0, Math.floor(v * CELLS)));
  return clamp(y) * CELLS + clamp(x);
}

function scale() {
  const side = Math.min(canvas.clientWidth, canvas.clientHeight);
  return side * (1 - 2 * EDGE) * view.zoom;
}
function toScreen(x, y) {
  const s = scale();
  return [
    (x - view.x) * s + canvas.clientWidth / 2,
    (y - view.y) * s + canvas.clientHeight / 2,
  ];
}
function toMap(px, py) {
  const s = scale();
  return [
    (px - canvas.clientWidth / 2) / s + view.x,
    (py - canvas.clientHeight / 2) / s + view.y,
  ];
}
const lit = (i) => bright[i] === 1;
function relight() {
  for (let i = 0; i < count; i++) bright[i] = shown[cluster[i]] && (!matches || matches[i]) ? 1 : 0;
  redraw();
}

function draw() {
  waiting = false;
  const ratio = window.devicePixelRatio || 1;
  const width = Math.round(canvas.clientWidth * ratio);
  const height = Math.round(canvas.clientHeight * ratio);
  if (!width || !height) return;
  if (canvas.width !== width || canvas.height !== height || !image) {
    canvas.width = width;
    canvas.height = height;
    image = pen.createImageData(width, height);
  }
  style ??= readStyle();
  const size = Math.max(1.5, Math.min(9, 26 / Math.sqrt(count / 100)) * Math.sqrt(view.zoom));
  const [left, top] = toScreen(0, 0);
  const pixels = new Int32Array(image.data.buffer);
  pixels.fill(style.ground);
  const at = { left: left * ratio, top: top * ratio, unit: scale() * ratio / 65535,
    size: size * ratio };
  points.draw(pixels, width, height, at, bright);
  pen.putImageData(image, 0, 0);
  names(ratio);
  if (pointed >= 0) {
    const [x, y] = toScreen(places[2 * pointed] / 65535, places[2 * pointed + 1] / 65535);
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.strokeStyle = style.ink;
    pen.lineWidth = 2;
    pen.strokeRect(x - size / 2 - 3, y - size / 2 - 3, size + 6, size + 6);
  }
}

function readStyle() {
  const body = getComputedStyle(document.body);
  const [red, green, blue] = body.backgroundColor.match(/\d+/g).map(Number);
  return { ink: body.color, around: body.backgroundColor,
    ground: 0xff000000 | blue << 16 | green << 8 | red };
}

function names(ratio) {
  const taken = [];
  pen.setTransform(1, 0, 0, 1, 0, 0);
  data.names.forEach((one, n) => {
    if (!shown[n]) return;
    if (labels[n]?.ratio !== ratio) labels[n] = label(one.name, ratio);
    const { bitmap } = labels[n];
    const [x, y] = toScreen(one.x, one.y).map((v) => v * ratio);
    const half = bitmap.width / 2;
    const box = [x - half, y - 10 * ratio, x + half, y + 10 * ratio];
    // Larger clusters come first; a name that would cover another waits until there is room.
    if (taken.some((t) => box[0] < t[2] && t[0] < box[2] && box[1] < t[3] && t[1] < box[3])) return;
    taken.push(box);
    pen.drawImage(bitmap, Math.round(x - half), Math.round(y - bitmap.height / 2));
  });
}

// Letters with an outline take a canvas about as long as thousands of points: they are drawn once.
function label(name, ratio) {
  const bitmap = document.createElement("canvas"), ink = bitmap.getContext("2d");
  const font = "600 13px system-ui, sans-serif";
  ink.font = font;
  bitmap.width = Math.ceil((ink.measureText(name).width + 8) * ratio);
  bitmap.height = Math.ceil(24 * ratio);
  ink.font = font; // a canvas whose size is set forgets it
  ink.textAlign = "center";
  ink.textBaseline = "middle";
  ink.lineJoin = "round";
  ink.lineWidth = 4;
  ink.strokeStyle = style.around;
  ink.fillStyle = style.ink;
  ink.setTransform(ratio, 0, 0, ratio, bitmap.width / 2, bitmap.height / 2);
  ink.strokeText(name, 0, 0);
  ink.fillText(name, 0, 0);
  return { bitmap, ratio };
}

function redraw() {
  if (!waiting) {
    waiting = true;
    requestAnimationFrame(draw);
  }
}

function nearest(px, py) {
  const [x, y] = toMap(px, py);
  const reach = 12 / scale();
  let best = -1, least = reach * reach;
  const step = 1 / CELLS;
  for (let cy = y - reach - step; cy <= y + reach + step; cy += step)
    for (let cx = x - reach - step; cx <= x + reach + step; cx += step)
      for (const i of cells.get(cellOf(cx, cy)) || []) {
        if (!lit(i)) continue;
        const dx = places[2 * i] / 65535 - x, dy = places[2 * i + 1] / 65535 - y;
        if (dx * dx + dy * dy < least) {
          least = dx * dx + dy * dy;
          best = i;
        }
      }
  return best;
}

function point(i, px, py) {
  if (i !== pointed) {
    pointed = i;
    redraw();
    card.hidden = i < 0;
    if (i >= 0) {
      const image = card.querySelector("img");
      image.hidden = !data.images[i];
      if (data.images[i]) image.src = data.images[i];
      image.onerror = () => { image.hidden = true; };
      const text = card.querySelector("figcaption");
      const key = document.createElement("small");
      key.textContent = data.keys[i];
      text.replaceChildren(data.captions[i], key);
    }
  }
  if (i < 0) return;
  const width = canvas.clientWidth, height = canvas.clientHeight;
  card.style.left = `${Math.max(4, px > width / 2 ? px - card.offsetWidth - 16 : px + 16)}px`;
  card.style.top = `${Math.max(4, Math.min(height - card.offsetHeight - 8, py - 20))}px`;
}

function zoom(factor, px = canvas.clientWidth / 2, py = canvas.clientHeight / 2) {
  const before = toMap(px, py);
  view.zoom = Math.min(400, Math.max(0.5, view.zoom * factor));
  const after = toMap(px, py);
  view.x += before[0] - after[0];
  view.y += before[1] - after[1];
  redraw();
}

const fingers = new Map();
let moved = 0;
canvas.addEventListener("pointerdown", (event) => {
  canvas.setPointerCapture(event.pointerId);
  fingers.set(event.pointerId, [event.offsetX, event.offsetY]);
  moved = 0;
});
canvas.addEventListener("pointermove", (event) => {
  const at = [event.offsetX, event.offsetY];
  const from = fingers.get(event.pointerId);
  if (!from) return point(nearest(...at), ...at);
  const others = [...fingers].filter(([id]) => id !== event.pointerId).map(([, place]) => place);
  if (others.length) {
    const far = (a) => Math.hypot(a[0] - others[0][0], a[1] - others[0][1]) || 1;
    zoom(far(at) / far(from), ...others[0]);
  } else {
    view.x -= (at[0] - from[0]) / scale();
    view.y -= (at[1] - from[1]) / scale();
    moved += Math.abs(at[0] - from[0]) + Math.abs(at[1] - from[1]);
    redraw();
  }
  fingers.set(event.pointerId, at);
});
for (const end of ["pointerup", "pointercancel"])
  canvas.addEventListener(end, (event) => {
    fingers.delete(event.pointerId);
    if (end !== "pointerup" || moved > 5) return;
    const i = nearest(event.offsetX, event.offsetY);
    point(i, event.offsetX, event.offsetY);
    if (event.pointerType === "mouse" && i >= 0 && data.images[i])
      window.open(data.images[i], "_blank", "noopener");
  });
canvas.addEventListener("pointerleave", () => point(-1, 0, 0));
canvas.addEventListener("wheel", (event) => {
  event.preventDefault();
  zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0015)), event.offsetX, event.offsetY);
}, { passive: false });
canvas.addEventListener("keydown", (event) => {
  const by = 0.1 / view.zoom;
  const keys = {
    ArrowLeft: () => { view.x -= by; }, ArrowRight: () => { view.x += by; },
    ArrowUp: () => { view.y -= by; }, ArrowDown: () => { view.y += by; },
    "+": () => zoom(1.4), "=": () => zoom(1.4), "-": () => zoom(1 / 1.4),
    0: () => { view = { x: 0.5, y: 0.5, zoom: 1 }; },
  };
  if (!keys[event.key]) return;
  keys[event.key]();
  event.preventDefault();
  redraw();
});

const list = document.getElementById("clusters");
data.names.forEach((one, n) => {
  const item = document.createElement("li"), button = document.createElement("button");
  const dot = document.createElement("i"), name = document.createElement("span");
  const size = document.createElement("b");
  dot.style.background = `rgb(${colour(n).join()})`;
  name.textContent = one.name;
  size.textContent = one.size.toLocaleString("en");
  button.type = "button";
  button.setAttribute("aria-pressed", "true");
  button.append(dot, name, size);
  button.addEventListener("click", () => {
    shown[n] = !shown[n];
    button.setAttribute("aria-pressed", String(shown[n]));
    relight();
  });
  item.append(button);
  list.append(item);
});

document.getElementById("find").addEventListener("input", (event) => {
  const words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
  matches = null;
  let found = count;
  if (words.length) {
    matches = new Uint8Array(count);
    found = 0;
    for (let i = 0; i < count; i++) {
      const text = `${data.keys[i]} ${data.captions[i]}`.toLowerCase();
      if (words.every((word) => text.includes(word))) found += matches[i] = 1;
    }
  }
  document.getElementById("count").textContent =
    words.length ? `${found.toLocaleString("en")} of ${count.toLocaleString("en")}` : "";
  relight();
});
new ResizeObserver(redraw).observe(canvas);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  style = null;
  labels = [];
  redraw();
});
draw();
