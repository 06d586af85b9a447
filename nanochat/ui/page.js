// The open conversation, and drawing the page.

import { $, toast } from "./dom.js";
import { chats, forget, newChat, save, titleOf } from "./chats.js";
import { answer, runs, stopAnswer } from "./answering.js";
import { viewOf } from "./turns.js";
import { drawComposer, focusInput } from "./composer.js";
import { closeDrawer, drawHistory } from "./sidebar.js";
import { toLatest } from "./scroll.js";
import { showFocus } from "./focus.js";
import { ask } from "./server.js";
import { server } from "./settings.js";

export const state = { current: newChat() };

export function draw() {
  const { current } = state;
  const wanted = current.messages.toReversed().map((message) => viewOf(message).element); // newest first, to be rendered first
  for (const element of [...$("log").children]) if (!wanted.includes(element)) element.remove();
  wanted.forEach((element, i) => {
    const next = wanted[i - 1] ?? null;
    if (!element.parentNode || element.nextSibling !== next) $("log").insertBefore(element, next);
  });
  $("welcome").hidden = wanted.length > 0;
  document.title = wanted.length ? `${titleOf(current)} · nanochat` : "nanochat";
  document.body.classList.toggle("busy", runs.has(current.id));
  showFocus(current);
  drawComposer();
  drawHistory();
}

// Open a chat, or a new one. visit: add an entry to the browser's history.
export function openChat(id, visit = true) {
  state.current = chats.get(id) ?? newChat();
  const address = chats.has(id) ? `#${id}` : location.pathname;
  if (visit) history.pushState(null, "", address);
  else history.replaceState(null, "", address);
  draw();
  closeDrawer();
  toLatest();
  focusInput();
}

export function send(text) {
  const { current } = state;
  if (!text.trim() || runs.has(current.id)) return;
  current.messages.push({ role: "user", content: text });
  answer(current);
  history.replaceState(null, "", `#${current.id}`);
  toLatest();
  focusInput();
}

export function deleteChat(chat) {
  stopAnswer(chat);
  forget(chat);
  if (server.config?.mc) ask("forget", { conversation: chat.conversation }).catch(() => {}); // it reads it again if it must
  if (chat === state.current) openChat(null, false);
  else drawHistory();
  focusInput();
  toast("Conversation deleted.", "Undo", () => {
    chats.set(chat.id, chat);
    save(chat);
    openChat(chat.id);
  });
}
