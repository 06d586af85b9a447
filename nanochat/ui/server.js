// Requests to the server, their errors, and its API key.

import { $, on } from "./dom.js";
import { store } from "./chats.js";

export class Fault extends Error { // text: message; until: time of the next attempt; long: whether the conversation is too long
  constructor(text, facts = {}) {
    const sentence = text.replace(/^[a-z]+ /, (word) => word[0].toUpperCase() + word.slice(1)).replace(/[.!?]*$/, ".");
    super(sentence);
    this.facts = { text: sentence, ...facts };
  }
}

export async function request(path, body, signal) {
  const key = store.read("key") ?? sessionKey;
  const headers = { ...(body && { "Content-Type": "application/json" }), ...(key && { Authorization: `Bearer ${key}` }) };
  const options = { headers, signal, ...(body && { method: "POST", body: JSON.stringify(body) }) };
  const response = await fetch(path, options).catch((error) => {
    throw signal?.aborted ? error : new Fault("The server cannot be reached. Check that it is running.");
  });
  if (response.ok) return response;
  if (response.status === 401) {
    await askForKey(key);
    return request(path, body, signal);
  }
  const busy = response.status === 503 || response.status === 429;
  let { detail } = await response.json().catch(() => ({}));
  if (Array.isArray(detail)) detail = detail.map((item) => item.msg).join("; ");
  detail ||= busy ? "the server is busy" : `the server answered with status ${response.status}`;
  if (busy) {
    const seconds = Math.min(Number(response.headers.get("Retry-After")) || 5, 3600);
    throw new Fault(detail.split(/[:.]/)[0], { until: Date.now() + 1000 * seconds });
  }
  throw new Fault(detail, { long: response.status === 413 || /too long|new chat|context/i.test(detail) });
}

export async function ask(path, body) { // for endpoints that return JSON
  return (await request(path, body)).json();
}

const SILENCE = 60_000; // ms without any byte (the server sends pings) until the request is aborted

export async function* events(response, controller) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const timer = setTimeout(() => controller.abort(new Fault("The server has gone silent.")), SILENCE);
    const { value, done } = await reader.read().finally(() => clearTimeout(timer));
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data:")) yield JSON.parse(line.slice(5));
  }
}

// ---------------------------------------------------------------- The key

let sessionKey = null; // used if the browser has no storage
let asking = null; // promise shared by all requests that were refused

function askForKey(refused) {
  asking ??= new Promise((resolve) => {
    $("key-note").textContent = refused ? "This is not its key. " : "";
    $("key-dialog").showModal();
    $("key-dialog").addEventListener("close", resolve, { once: true });
  }).finally(() => { asking = null; });
  return asking;
}

on("key-form", "submit", (event) => {
  event.preventDefault();
  sessionKey = $("key-input").value.trim();
  store.write("key", sessionKey);
  $("key-input").value = "";
  $("key-dialog").close();
});
on("key-dialog", "cancel", (event) => event.preventDefault()); // nothing works without the key
