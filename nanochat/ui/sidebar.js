// The sidebar: the list of conversations, their menu, and the drawer on narrow screens.

import { $, download, icon, make, narrow, on, place, setFace } from "./dom.js";
import { asJSON, asMarkdown, chats, save, store, titleOf } from "./chats.js";
import { runs } from "./answering.js";
import { deleteChat, draw, openChat, state } from "./page.js";

function ageOf(time) {
  const days = Math.round((new Date().setHours(0, 0, 0, 0) - new Date(time).setHours(0, 0, 0, 0)) / 86_400_000);
  return days < 1 ? "Today" : days === 1 ? "Yesterday" : days < 7 ? "Last 7 days" : days < 30 ? "Last 30 days" : "Older";
}

function historyEntry(chat) {
  const title = titleOf(chat);
  const open = make("button", { type: "button", className: "open", textContent: title, title, onclick: () => openChat(chat.id) });
  const more = setFace(make("button", { type: "button", className: "icon", ariaHasPopup: "menu" }), "more", `More for “${title}”`);
  more.onclick = () => showMenu(chat, more);
  open.ondblclick = () => rename(chat);
  const item = make("li", { className: "entry" }, open, more);
  item.dataset.chat = chat.id;
  item.toggleAttribute("data-running", runs.has(chat.id));
  item.toggleAttribute("data-current", chat === state.current);
  if (chat === state.current) open.setAttribute("aria-current", "page");
  return item;
}

export function drawHistory() {
  if ($("history").querySelector("input")) return; // while a conversation is being renamed
  const groups = Map.groupBy([...chats.values()].sort((a, b) => b.updated - a.updated), (chat) => ageOf(chat.updated));
  $("history").replaceChildren(...[...groups].flatMap(([age, list]) => [
    make("h2", { textContent: age }), make("ul", {}, ...list.map(historyEntry)),
  ]));
}

// ---------------------------------------------------------------- The menu of a conversation

const fileName = (chat, ending) => `${titleOf(chat).replace(/[^\p{L}\p{N}]+/gu, " ").trim().slice(0, 60) || "chat"}.${ending}`;

const MENU = [ // icon, label, action
  ["edit", "Rename", (chat) => rename(chat)],
  ["download", "Save as Markdown", (chat) => download(fileName(chat, "md"), asMarkdown(chat), "text/markdown")],
  ["download", "Save as JSON", (chat) => download(fileName(chat, "json"), asJSON(chat), "application/json")],
  ["delete", "Delete", (chat) => deleteChat(chat)],
];

function showMenu(chat, button) {
  $("menu").ariaLabel = titleOf(chat);
  $("menu").replaceChildren(...MENU.map(([face, label, action]) => {
    const onclick = () => { $("menu").hidePopover(); action(chat); };
    return make("button", { type: "button", role: "menuitem", onclick }, icon(face), label);
  }));
  $("menu").showPopover();
  place($("menu"), button);
  $("menu").firstChild.focus();
}

on("menu", "keydown", (event) => {
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (!step) return;
  event.preventDefault();
  const items = [...$("menu").children];
  items.at((items.indexOf(document.activeElement) + step) % items.length).focus();
});

export function rename(chat) {
  const item = $("history").querySelector(`[data-chat="${chat.id}"]`);
  const input = make("input", { type: "text", value: titleOf(chat), maxLength: 80, ariaLabel: "Name of the conversation" });
  let open = true;
  const close = (keep) => {
    if (!open) return;
    open = false;
    input.remove();
    if (keep) chat.title = input.value.trim() || null;
    save(chat);
    draw();
  };
  input.onblur = () => close(true);
  input.onkeydown = (event) => {
    event.stopPropagation();
    if (event.key === "Enter" || event.key === "Escape") close(event.key === "Enter");
  };
  item.replaceChildren(input);
  input.select();
}

// ---------------------------------------------------------------- The drawer

function drawSidebar() {
  const drawer = document.body.classList.contains("drawer");
  $("sidebar").inert = narrow.matches ? !drawer : document.body.classList.contains("folded");
  document.querySelector("main").inert = drawer;
}

export function closeDrawer() {
  document.body.classList.remove("drawer");
  drawSidebar();
}

export function setSidebar(open) {
  if (narrow.matches) document.body.classList.toggle("drawer", open);
  else {
    document.body.classList.toggle("folded", !open);
    store.write("folded", !open);
  }
  drawSidebar();
  $(open ? "hide-sidebar" : "show-sidebar").focus();
}

on("show-sidebar", "click", () => setSidebar(true));
on("hide-sidebar", "click", () => setSidebar(false));
on("shade", "click", () => setSidebar(false));
on("new-chat", "click", () => openChat(null));
on("header-new", "click", () => openChat(null));
narrow.addEventListener("change", closeDrawer);
