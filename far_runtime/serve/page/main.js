// The page: a form, the pictures that it asks for, and what was drawn before.

import * as api from "./api.js";
import { Card, element } from "./cards.js";
import { commandLine, entries, forget, remember } from "./history.js";

const by = (id) => document.getElementById(id);
let served = [], running = null;

const chosen = (id) => served.find((model) => model.id === by(id).value);

async function load() {
  try {
    served = await api.models(by("key").value);
  } catch (error) {
    by("key-field").hidden = error.status !== 401;
    by("error").textContent = error.status === 401 ? "This server wants a key." : error.message;
    return;
  }
  by("error").textContent = "";
  for (const id of ["model", "other-model"]) by(id).replaceChildren(...served.map((model) => element("option", { value: model.id }, model.id)));
  describe();
}

function describe() {
  const model = chosen("model"), text = model.far.condition === "text";
  by("about").textContent = `${model.far.system}, ${model.far.size}, ${model.far.precision}, on ${model.far.engine}`;
  by("label-field").hidden = by("label").disabled = text;
  by("prompt-field").hidden = by("negative-field").hidden = !text;
  by("prompt").required = text;
  by("prompt").disabled = by("negative").disabled = !text;
  const names = model.far.classes.length ? model.far.classes : [...Array(model.far.count ?? 0).keys()].map(String);
  by("classes").replaceChildren(...names.map((name) => element("option", { value: name })));
  by("label").placeholder = names.length ? `a name, or 0 to ${names.length - 1}` : "";
  if (!by("label").value) by("label").value = names[0] ?? "";
  by("guidance").placeholder = String(model.far.defaults.guidance ?? "");
  presets("preset", model);
  presets("other-preset", chosen("other-model"));
}

function presets(id, model) {
  const kept = by(id).value;
  const options = Object.entries(model.far.presets).map(([name, line]) => element("option", { value: name, title: line }, name));
  by(id).replaceChildren(element("option", { value: "" }, "the bundle's own"), ...options);
  by(id).value = kept in model.far.presets ? kept : "";
}

function request() {
  const model = chosen("model"), asked = { model: model.id, n: Number(by("count").value) };
  if (model.far.condition === "text") {
    asked.prompt = by("prompt").value;
    if (by("negative").value) asked.negative = by("negative").value;
  } else {
    asked.label = by("label").value;
  }
  asked.seed = by("seed").value ? Number(by("seed").value) : crypto.getRandomValues(new Uint32Array(1))[0];
  if (by("preset").value) asked.preset = by("preset").value;
  if (by("guidance").value) asked.guidance = Number(by("guidance").value);
  return asked;
}

async function draw() {
  const asked = request(), all = [asked];
  if (by("compare").checked) {
    const { preset, ...same } = asked;
    const other = by("other-preset").value;
    all.push({ ...same, model: by("other-model").value, ...(other ? { preset: other } : {}) });
  }
  running = new AbortController();
  by("draw").disabled = true;
  by("stop").disabled = false;
  by("error").textContent = "";
  by("results").replaceChildren();
  const cards = all.map((each) => cardsOf(each));
  // Side by side: the pictures of a seed next to each other.
  for (let i = 0; i < asked.n; i++) by("results").append(...cards.map((of) => of[i].root));
  try {
    for (const [i, each] of all.entries()) await follow(each, cards[i]);
  } catch (error) {
    const message = running.signal.aborted ? "stopped" : error.message;
    if (!running.signal.aborted) by("error").textContent = message;
    for (const card of cards.flat()) if (!card.done) card.fail(message);
    if (error.status === 401) by("key-field").hidden = false;
  } finally {
    by("draw").disabled = false;
    by("stop").disabled = true;
  }
}

function cardsOf(asked) {
  const what = asked.label ?? asked.prompt;
  const how = [asked.model, asked.preset ?? "the bundle's own settings"].join(", ");
  return [...Array(asked.n).keys()].map((i) => new Card(`${what}, seed ${asked.seed + i}`, how));
}

async function follow(asked, cards) {
  const finished = [];
  await api.stream(asked, by("key").value, running.signal, {
    level: (level) => cards[level.index].level(level),
    picture: (picture) => {
      const card = cards[picture.seed - asked.seed];
      card.done = true;
      finished.push(card.finish(picture, commandLine(picture.settings, picture.settings.engine)));
    },
    done: (timings) => finished.push(Promise.all(cards.map((card) => card.last)).then(() => cards.forEach((card) => card.timings(timings)))),
  });
  await Promise.all(finished);
  remember({ asked, thumbnail: cards[0].thumbnail() });
  showHistory();
}

function showHistory() {
  const found = entries();
  by("past").hidden = !found.length;
  by("history").replaceChildren(...found.map(({ asked, thumbnail }) => {
    const { model, label, prompt, ...rest } = asked;
    const text = [label ?? prompt, model, ...Object.entries(rest).map(([name, value]) => `${name} ${value}`)].join(", ");
    const button = element("button", { type: "button" }, element("img", { src: thumbnail, alt: "" }), element("span", {}, text));
    button.addEventListener("click", () => restore(asked));
    return element("li", {}, button);
  }));
}

function restore(asked) {
  if (!served.some((model) => model.id === asked.model)) {
    by("error").textContent = `${asked.model} is not served here now`;
    return;
  }
  by("model").value = asked.model;
  by("label").value = asked.label ?? "";
  by("prompt").value = asked.prompt ?? "";
  by("negative").value = asked.negative ?? "";
  by("seed").value = asked.seed;
  by("count").value = asked.n;
  by("guidance").value = asked.guidance ?? "";
  describe();
  by("preset").value = asked.preset ?? "";
  by("draw").focus();
}

by("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (served.length) draw();
  else load();
});
by("stop").addEventListener("click", () => running?.abort());
by("model").addEventListener("change", describe);
by("other-model").addEventListener("change", () => presets("other-preset", chosen("other-model")));
by("compare").addEventListener("change", () => { by("other").hidden = !by("compare").checked; });
by("key").addEventListener("change", load);
by("forget").addEventListener("click", () => { forget(); showHistory(); });
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) by("form").requestSubmit();
});

showHistory();
load();
