// Conversations and their storage in the browser.
//
// A chat is {id, updated, title, messages}; title is null until the user sets one. Messages alternate between questions,
// {role: "user", content}, and replies, {role: "assistant", answers, shown}: answers[shown] is displayed, and sent to the
// model as its answer. An answer is {parts: [{type, text}], end, limit, error}. end: null while it is running, then
// "stop", "length", "stopped" (by the user) or "error"; limit: "max_tokens" or "context" if end is "length". With --mc a
// chat also has `conversation`, the secret name of its session on the server, and `focus`, which is not saved: null for
// none, undefined if the server has not been asked yet.

import { toast } from "./dom.js";

const PREFIX = "nanochat.";
let warned = false;

export function attempt(action, otherwise = null) {
  try { return action(); }
  catch { return otherwise; }
}

export const store = {
  read: (key) => attempt(() => JSON.parse(localStorage.getItem(PREFIX + key))),
  remove: (key) => attempt(() => localStorage.removeItem(PREFIX + key)),
  nameOf: (key) => (key?.startsWith(PREFIX) ? key.slice(PREFIX.length) : null),
  chatIds: () => attempt(() => Object.keys(localStorage), []).map(chatIdOf).filter(Boolean),
  write(key, value) {
    try {
      localStorage.setItem(PREFIX + key, JSON.stringify(value));
      warned = false;
    } catch (error) {
      const full = "The browser's storage is full: this is not being saved. Delete older conversations to make room.";
      const blocked = "The browser keeps no data for this page: conversations are not being saved.";
      if (!warned) toast(error.name === "QuotaExceededError" ? full : blocked);
      warned = true;
    }
  },
};

export const chats = new Map();
const unsaved = new Set();

export const shownAnswer = (message) => message.answers[message.shown];
export const titleOf = (chat) => chat.title ?? chat.messages[0].content.trim().replace(/\s+/g, " ").slice(0, 80);

const chatKey = (id) => `chat.${id}`;

export function chatIdOf(key) {
  const name = store.nameOf(key);
  return name?.startsWith(chatKey("")) ? name.slice(chatKey("").length) : null;
}

export function newChat() {
  const id = Date.now().toString(36) + Math.random().toString(36).slice(2, 8);
  return { id, updated: 0, title: null, messages: [], conversation: secretName(), focus: null };
}

function secretName() { // 128 bits; crypto.randomUUID exists only over HTTPS and on localhost
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

function restored(message, i) { // null if it is damaged
  if (i % 2 === 0) return typeof message.content === "string" ? message : null;
  const { answers = [message], shown = 0 } = message; // formerly a message was its only answer
  if (!answers[shown] || !answers.every((answer) => Array.isArray(answer.parts))) return null;
  for (const answer of answers) {
    if (!answer.end) Object.assign(answer, { end: "error", error: { text: "This answer was interrupted." } });
  }
  return { role: "assistant", answers, shown };
}

export function loadChat(id) {
  const chat = store.read(chatKey(id));
  const messages = attempt(() => chat.messages.map(restored), []);
  chats.delete(id);
  if (messages.length && messages.every(Boolean)) chats.set(id, { title: null, conversation: secretName(), ...chat, messages, id });
}

export function save(chat) {
  unsaved.delete(chat);
  const { updated, title, messages, conversation } = chat;
  if (chats.has(chat.id)) store.write(chatKey(chat.id), { updated, title, messages, conversation });
}

export function saveSoon(chat) {
  if (!unsaved.size) setTimeout(saveAll, 1000);
  unsaved.add(chat);
}

export const saveAll = () => unsaved.forEach(save);

export function forget(chat) {
  chats.delete(chat.id);
  store.remove(chatKey(chat.id));
}

// ---------------------------------------------------------------- Conversion

// The messages for the model, without unanswered questions. begun: include the last answer, for the model to continue.
export function conversation({ messages }, begun = false) {
  const told = [];
  for (let i = 0; i < messages.length; i += 2) {
    const [question, reply] = messages.slice(i, i + 2);
    const isLast = i + 2 >= messages.length;
    const parts = reply && (begun || !isLast) ? shownAnswer(reply).parts : [];
    if (!parts.length && !isLast) continue;
    told.push({ role: "user", content: question.content });
    if (parts.length) told.push({ role: "assistant", content: contentOf(parts) });
  }
  return told;
}

const contentOf = (parts) => (parts.length === 1 && parts[0].type === "text" ? parts[0].text : parts);

export const plainText = (parts) => parts.filter((part) => part.type === "text").map((part) => part.text).join("").trim();

export function asMarkdown(chat) {
  const turns = conversation(chat, true).map(({ role, content }) => {
    const text = typeof content === "string" ? content : content.map((part) =>
      ({ text: part.text, python: `\`${part.text}\``, python_output: ` = \`${part.text}\`\n\n` })[part.type]).join("");
    return `**${role === "user" ? "You" : "Answer"}:**\n\n${text.trim()}\n`;
  });
  return [`# ${titleOf(chat)}\n`, ...turns].join("\n");
}

export const asJSON = (chat) => `${JSON.stringify({ messages: conversation(chat, true) }, null, 2)}\n`; // a body of POST /chat/completions
