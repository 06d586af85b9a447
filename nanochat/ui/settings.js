// The server's configuration, and the user's settings within its limits.

import { $, make, on, place } from "./dom.js";
import { store } from "./chats.js";
import { ask } from "./server.js";
import { drawComposer } from "./composer.js";
import { setUpFocus } from "./focus.js";

export const server = { config: null };

export const FIELDS = { // label, step, help
  temperature: ["Temperature", .05, "At 0 the likeliest token is always taken; higher is more varied."],
  top_k: ["Top-k", 1, "Each token is drawn from this many of the likeliest."],
  max_tokens: ["Max tokens", 1, "An answer ends at this length."],
};

export function settings() { // chosen by the user, limited by the server; by default the server's
  const chosen = store.read("settings") ?? {};
  return Object.fromEntries(Object.keys(FIELDS).map((field) => {
    const [low, high] = server.config.limits[field];
    const value = Number.isFinite(chosen[field]) ? chosen[field] : server.config[field];
    return [field, Math.min(Math.max(value, low), high)];
  }));
}

export function choose(field, value) {
  const rounded = FIELDS[field][1] === 1 ? Math.round(value) : value;
  if (Number.isFinite(rounded)) store.write("settings", { ...store.read("settings"), [field]: rounded });
  showSettings();
}

function showSettings() {
  const values = settings();
  for (const input of $("fields").querySelectorAll("input")) input.value = values[input.name];
}

function buildSettings() {
  $("fields").replaceChildren(...Object.entries(FIELDS).flatMap(([name, [label, step, hint]]) => {
    const [min, max] = server.config.limits[name];
    const number = make("input", { type: "number", name, min, max, step, "aria-describedby": `hint-${name}` });
    const range = make("input", { type: "range", name, min, max, step, ariaLabel: label });
    number.onchange = range.oninput = ({ target }) => choose(name, target.valueAsNumber);
    return [make("label", {}, label, number), range, make("p", { className: "fine", id: `hint-${name}`, textContent: hint })];
  }));
  showSettings();
}

on("defaults", "click", () => { store.remove("settings"); showSettings(); });
on("settings", "beforetoggle", () => place($("settings"), $("settings-button")));

export async function loadConfig() {
  server.config = await ask("config");
  const { model, source, step, context_length: length, mc } = server.config;
  $("model").replaceChildren(model, " ", make("small", { textContent: `${source} · step ${step}` }));
  $("model").title = `${model}, ${source}, step ${step}, ${mc ? `a working context of ${mc.budget} entries`
    : `a context of ${length} tokens`}`;
  $("greeting").textContent = model;
  if (mc?.kept) $("kept").textContent = "History is kept in this browser, and what the model reads also on the server.";
  buildSettings();
  drawComposer();
  setUpFocus(mc);
}
