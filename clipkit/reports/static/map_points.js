"use strict";
// Points as squares, mixed into the pixels of an image here and not by the canvas: without a
// graphics card its fillRect takes tens of milliseconds for 50,000 of them.

const STRONG = 0.85, FAINT = 0.08; // opacity of points that are lit, and of the others

// A colour as CSS has it (Color 4, section 7.1): a hue in degrees, saturation and lightness of 1.
function rgb(hue, saturation, lightness) {
  const part = (n) => {
    const k = (n + hue / 30) % 12, a = saturation * Math.min(lightness, 1 - lightness);
    return Math.round(255 * (lightness - a * Math.max(-1, Math.min(k - 3, 9 - k, 1))));
  };
  return [part(0), part(8), part(4)];
}

class Points {
  // places: Uint16Array [2 n]; cluster: Uint16Array [n]; colours: [r, g, b] of each cluster.
  constructor(places, cluster, colours) {
    const count = cluster.length;
    // One cluster after the other, so that the later ones lie above the earlier.
    const order = Array.from({ length: count }, (_, i) => i).sort((a, b) => cluster[a] - cluster[b]);
    this.items = Uint32Array.from(order);
    this.x = Float32Array.from(order, (i) => places[2 * i]);
    this.y = Float32Array.from(order, (i) => places[2 * i + 1]);
    this.redBlue = Int32Array.from(order, (i) => colours[cluster[i]][0] | colours[cluster[i]][2] << 16);
    this.green = Int32Array.from(order, (i) => colours[cluster[i]][1] << 8);
  }

  // pixels: Int32Array [width * height], filled with an opaque ground; a point lies at
  // (left + x * unit, top + y * unit) and is a square of `size`, all in pixels; lit: a byte an item.
  draw(pixels, width, height, { left, top, unit, size }, lit) {
    for (const [pass, opacity] of [[0, FAINT], [1, STRONG]]) {
      for (let n = 0; n < this.items.length; n++) {
        if (lit[this.items[n]] !== pass) continue;
        const x0 = left + this.x[n] * unit - size / 2, x1 = x0 + size;
        const y0 = top + this.y[n] * unit - size / 2, y1 = y0 + size;
        if (x1 <= 0 || y1 <= 0 || x0 >= width || y0 >= height) continue;
        this.square(pixels, width, height, x0, y0, x1, y1, n, 256 * opacity);
      }
    }
  }

  // Pixels that are covered in part are mixed in part. `strength`: of 256.
  square(pixels, width, height, x0, y0, x1, y1, n, strength) {
    const redBlue = this.redBlue[n], green = this.green[n];
    const startX = Math.max(0, Math.floor(x0)), endX = Math.min(width, Math.ceil(x1));
    const endY = Math.min(height, Math.ceil(y1));
    for (let y = Math.max(0, Math.floor(y0)); y < endY; y++) {
      const high = strength * (Math.min(y1, y + 1) - Math.max(y0, y));
      let at = y * width + startX;
      for (let x = startX; x < endX; x++, at++) {
        const share = high * (Math.min(x1, x + 1) - Math.max(x0, x)) + 0.5 | 0, rest = 256 - share;
        const old = pixels[at];
        // Red and blue at once, a byte apart: neither product reaches the other's bits.
        pixels[at] = 0xff000000
          | (Math.imul(old & 0xff00ff, rest) + Math.imul(redBlue, share)) >>> 8 & 0xff00ff
          | (old & 0xff00) * rest + green * share >>> 8 & 0xff00;
      }
    }
  }
}
