// A card for each picture: it sharpens as its levels arrive.

import { drawSpectrum } from "./spectrum.js";

const COLOURS = ["var(--a)", "var(--b)", "var(--c)", "var(--d)", "var(--e)"];

export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

async function bitmapOf(base64) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  return createImageBitmap(new Blob([bytes]));
}

function paint(canvas, bitmap) {
  canvas.width = bitmap.width;
  canvas.height = bitmap.height;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  return context.getImageData(0, 0, bitmap.width, bitmap.height);
}

export class Card {
  constructor(title, caption) {
    this.canvas = element("canvas", { className: "picture" });
    this.canvas.setAttribute("role", "img");
    this.strip = element("div", { className: "strip", tabIndex: 0 });
    this.strip.setAttribute("aria-label", "Levels with their spectra, from low to high frequency");
    this.state = element("p", {}, "waiting");
    this.last = Promise.resolve();
    this.root = element(
      "article", {}, element("h3", {}, title), this.canvas, element("p", {}, caption), this.strip, this.state,
    );
    this.title = title;
  }

  // Pictures are shown in the order in which they came, whichever is decoded first.
  level(level) {
    this.last = this.last.then(() => this.show(level));
    return this.last;
  }

  async show(level) {
    const bitmap = await bitmapOf(level.b64_json);
    paint(this.canvas, bitmap);
    this.canvas.setAttribute("aria-label", `${this.title}, ${level.name}`);
    const small = element("canvas", { className: "level" });
    const spectrum = element("canvas", { className: "spectrum", width: 56, height: 28 });
    const image = paint(small, bitmap);
    this.strip.append(element("figure", {}, small, spectrum, element("figcaption", {}, level.name)));
    drawSpectrum(spectrum, image, getComputedStyle(this.root).getPropertyValue("--accent"));
    this.strip.scrollLeft = this.strip.scrollWidth;
    this.state.textContent = `${level.name}, ${level.step + 1} of ${level.steps}`;
  }

  async finish(picture, command) {
    await this.last;
    paint(this.canvas, await bitmapOf(picture.b64_json));
    this.canvas.setAttribute("aria-label", `${this.title}, finished`);
    const code = element("code", { tabIndex: 0 }, command);
    const button = element("button", { type: "button" }, "Copy");
    button.setAttribute("aria-label", "Copy the command line");
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(command);
      button.textContent = "Copied";
    });
    this.root.append(element("div", { className: "command" }, code, button));
  }

  timings(timings) {
    const rest = Math.max(0, timings.drawing - Object.values(timings.stages).reduce((sum, each) => sum + each, 0));
    const parts = Object.entries({ ...timings.stages, other: rest });
    const bar = element("div", { className: "bar" }), legend = element("ul", { className: "legend" });
    parts.forEach(([name, seconds], i) => {
      const colour = COLOURS[i % COLOURS.length];
      const part = element("span");
      part.style.cssText = `width: ${100 * seconds / timings.drawing}%; background: ${colour}`;
      const dot = element("i");
      dot.style.background = colour;
      bar.append(part);
      legend.append(element("li", {}, dot, `${name} ${(1000 * seconds).toFixed(0)} ms`));
    });
    this.state.textContent = `${timings.drawing.toFixed(2)} s, after ${timings.waited.toFixed(2)} s in the queue`;
    this.root.append(bar, legend);
  }

  fail(message) {
    this.state.textContent = message;
  }

  thumbnail() {
    const small = element("canvas", { width: 64, height: 64 });
    small.getContext("2d").drawImage(this.canvas, 0, 0, 64, 64);
    return small.toDataURL("image/webp", 0.8);
  }
}
