// Requests an answer and adds it to the conversation as it streams.

import { chats, conversation, save, saveSoon, shownAnswer } from "./chats.js";
import { Fault, events, request } from "./server.js";
import { loadConfig, server, settings } from "./settings.js";
import { draw, state } from "./page.js";
import { viewOf } from "./turns.js";
import { showFocus } from "./focus.js";

const STOPPED = "stopped";

export const runs = new Map(); // chat id → AbortController of its running answer

export const stopAnswer = (chat) => runs.get(chat.id)?.abort(STOPPED);

// Request another answer to the last question of a chat or, with goOn, the continuation of the answer that is shown.
export async function answer(chat, goOn = false) {
  const isNew = chat.messages.at(-1).role === "user";
  if (isNew) chat.messages.push({ role: "assistant", answers: [], shown: 0 });
  const message = chat.messages.at(-1);
  const messages = conversation(chat, goOn);
  if (!goOn) {
    // Drop answers that failed before their first token
    message.answers = message.answers.filter((old) => old.parts.length);
    message.shown = message.answers.push({ parts: [], end: null }) - 1;
  }
  const current = shownAnswer(message);
  Object.assign(current, { end: null, error: undefined, limit: undefined });
  const controller = new AbortController();
  chat.updated = Date.now();
  chats.set(chat.id, chat);
  runs.set(chat.id, controller);
  save(chat);
  draw();
  try {
    if (!server.config) await loadConfig();
    const session = server.config.mc && { conversation: chat.conversation, focus: true };
    const response = await request("chat/completions", { messages, ...settings(), ...session }, controller.signal);
    for await (const event of events(response, controller)) {
      if (event.focus) {
        chat.focus = event.focus;
        if (chat === state.current) showFocus(chat);
        continue;
      }
      if (event.error) throw new Fault(event.error);
      if (event.done) {
        Object.assign(current, { end: event.finish_reason, limit: event.limit });
        break;
      }
      const type = event.kind ?? "text";
      if (current.parts.at(-1)?.type === type) current.parts.at(-1).text += event.token;
      else current.parts.push({ type, text: event.token });
      viewOf(message).update();
      saveSoon(chat);
    }
    if (!current.end) throw new Fault("The connection ended before the answer was complete.");
  } catch (error) {
    const cause = controller.signal.aborted ? controller.signal.reason : error;
    current.end = cause === STOPPED ? "stopped" : "error";
    if (current.end === "error") current.error = cause.facts ?? { text: "The connection to the server was lost." };
  }
  runs.delete(chat.id);
  save(chat);
  viewOf(message).update();
  draw();
}
