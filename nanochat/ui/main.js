// Startup, keyboard shortcuts, and changes made in other tabs.

import { $, toast } from "./dom.js";
import { chatIdOf, chats, loadChat, saveAll, store } from "./chats.js";
import { runs, stopAnswer } from "./answering.js";
import { draw, openChat, state } from "./page.js";
import { loadConfig, server } from "./settings.js";
import { setSidebar } from "./sidebar.js";
import { drawTheme } from "./theme.js";
import "./explore.js";
import "./scroll.js";

document.addEventListener("keydown", (event) => {
  const plain = !event.ctrlKey && !event.metaKey && !event.altKey;
  if (event.key === "Escape" && !document.querySelector(":popover-open, dialog:open")) {
    if (document.body.classList.contains("drawer")) setSidebar(false);
    else stopAnswer(state.current);
  } else if (event.key.toLowerCase() === "o" && event.shiftKey && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    openChat(null);
  } else if (plain && /^\S$/.test(event.key) && document.activeElement === document.body) {
    $("input").focus(); // typing anywhere goes to the message box
  }
});

addEventListener("storage", ({ key }) => { // written by another tab
  const id = chatIdOf(key);
  if (store.nameOf(key) === "theme") drawTheme();
  if (!id || runs.has(id)) return;
  loadChat(id);
  if (state.current.id === id) state.current = chats.get(id) ?? state.current;
  draw();
});

addEventListener("popstate", () => openChat(location.hash.slice(1), false));
addEventListener("pagehide", saveAll);

function start() {
  loadConfig().catch(({ facts }) => {
    toast(facts.text, "Retry", start);
    if (facts.until) setTimeout(() => server.config ?? start(), facts.until - Date.now());
  });
}

store.chatIds().forEach(loadChat);
document.body.classList.toggle("folded", store.read("folded") === true);
if (/Mac|iPhone|iPad/.test(navigator.platform)) document.querySelector("#new-chat kbd").textContent = "⌘ ⇧ O";
drawTheme();
openChat(location.hash.slice(1), false);
start();
