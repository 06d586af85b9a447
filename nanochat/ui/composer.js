// The message box.

import { $, on, setFace } from "./dom.js";
import { runs, stopAnswer } from "./answering.js";
import { chooseCommand, drawCommands, runCommand } from "./commands.js";
import { send, state } from "./page.js";
import { server } from "./settings.js";

const charsOf = (text) => [...text].length; // as the server counts them
const exceeds = (text, limit) => text.length > limit && charsOf(text) > limit; // characters are counted only if necessary
export const isTooLong = (text) => exceeds(text, server.config?.limits.message_chars ?? Infinity);

export function grow(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight}px`; // limited by max-height in the style sheet
}

export function sendsOnEnter(area, form) {
  area.addEventListener("input", () => grow(area));
  area.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.defaultPrevented) return;
    event.preventDefault();
    if (!runs.has(state.current.id)) form.requestSubmit();
  });
}

export function drawComposer() {
  const { value } = $("input");
  const running = runs.has(state.current.id);
  const limit = server.config?.limits.message_chars;
  const counts = exceeds(value, .9 * limit);
  setFace($("send"), running ? "stop" : "send", running ? "Stop" : "Send");
  $("send").disabled = !running && (!value.trim() || isTooLong(value));
  $("hint").textContent = counts ? `${charsOf(value).toLocaleString("en")} of ${limit.toLocaleString("en")} characters`
    : "The model is often wrong: check what matters.";
  $("hint").classList.toggle("over", isTooLong(value));
  grow($("input"));
  drawCommands();
}

export function focusInput() { // except where that opens an on-screen keyboard
  if (!matchMedia("(hover: none)").matches) $("input").focus({ preventScroll: true });
}

on("input", "keydown", chooseCommand); // registered first: it may handle Enter
sendsOnEnter($("input"), $("composer"));
on("input", "input", drawComposer);
on("composer", "submit", (event) => {
  event.preventDefault();
  const { value } = $("input");
  if (runs.has(state.current.id)) stopAnswer(state.current);
  else if (!runCommand() && value.trim() && !isTooLong(value)) {
    $("input").value = "";
    send(value);
  }
  drawComposer();
  focusInput();
});
on("suggestions", "click", ({ target }) => target.tagName === "BUTTON" && send(target.textContent));
