// Slash commands in the message box, such as /temperature 0.5, and the list that completes them.

import { $, make, on, toast } from "./dom.js";
import { deleteChat, state } from "./page.js";
import { chats } from "./chats.js";
import { drawComposer } from "./composer.js";
import { FIELDS, choose, server, settings } from "./settings.js";

const wordOf = (field) => field.replaceAll("_", "");

// Name → [range of the argument, help, function of the argument]
const commands = () => ({
  ...Object.fromEntries(Object.entries(FIELDS).map(([field, [label, , help]]) => {
    const [low, high] = server.config?.limits[field] ?? [0, 0];
    return [wordOf(field), [`${low} – ${high}`, help, (text) => set(field, label, text)]];
  })),
  clear: ["", "Delete this conversation and begin another.", () => chats.has(state.current.id) && deleteChat(state.current)],
  help: ["", "Show the commands.", () => { helping = true; }],
});

let helping = false; // show the list although nothing is typed
let marked = 0; // index of the selected command

function set(field, label, text) {
  const [low, high] = server.config.limits[field];
  const value = Number(text);
  if (text && (Number.isNaN(value) || value < low || value > high)) toast(`${label} is from ${low} to ${high}, not ${text}.`);
  else {
    if (text) choose(field, value);
    toast(`${label} is ${text ? "now " : ""}${settings()[field]}.`);
  }
}

function typed() { // [name, argument] of the command that is being typed
  const [, name, rest] = /^\/(\w*)(?:\s+(\S+))?\s*$/.exec($("input").value) ?? [];
  return [name?.toLowerCase(), rest ?? ""];
}

function matching() {
  const [name] = typed();
  if (helping) return Object.keys(commands());
  return name === undefined ? [] : Object.keys(commands()).filter((command) => command.startsWith(name));
}

// Run the text in the message box if it is a command; return whether it is one.
export function runCommand() {
  const [name, rest] = typed();
  if (name === undefined || !server.config) return false;
  const run = commands()[name]?.[2];
  if (run) {
    $("input").value = "";
    helping = false;
    run(rest);
  } else toast(`There is no /${name}: /help lists the commands.`);
  return true;
}

export function drawCommands() {
  if ($("input").value) helping = false;
  const names = matching();
  marked = Math.min(marked, Math.max(0, names.length - 1));
  $("commands").hidden = !names.length;
  $("commands").replaceChildren(...names.map((name, i) => {
    const [values, help] = commands()[name];
    const onclick = () => complete(name);
    return make("div", { role: "option", id: `command-${name}`, ariaSelected: String(i === marked), onclick },
      make("code", { textContent: `/${name}` }), make("span", { className: "values", textContent: values }),
      make("span", { className: "fine", textContent: help }));
  }));
  if (names.length) $("input").setAttribute("aria-activedescendant", `command-${names[marked]}`);
  else $("input").removeAttribute("aria-activedescendant");
}

function complete(name) {
  helping = false;
  $("input").value = `/${name}${commands()[name][0] && " "}`;
  $("input").focus();
  drawComposer();
}

export function chooseCommand(event) {
  const names = matching();
  const [name] = typed();
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (!names.length) return;
  if (step) marked = (marked + step + names.length) % names.length;
  else if (event.key === "Escape" && helping) helping = false;
  else if (event.key === "Tab" || (event.key === "Enter" && !commands()[name])) complete(names[marked]);
  else return;
  event.preventDefault();
  event.stopPropagation();
  drawCommands();
}

on("input", "blur", () => setTimeout(() => { // later than a click on the list
  helping = false;
  drawCommands();
}, 200));
