// Views of questions and answers, and their buttons.

import { $, copyFrom, iconButton, make, on, pill, speak } from "./dom.js";
import { plainText, save, shownAnswer } from "./chats.js";
import { Prose } from "./markdown.js";
import { ToolCard } from "./tool.js";
import { answer, runs } from "./answering.js";
import { openChat, send, state } from "./page.js";
import { drawComposer, focusInput, grow, isTooLong, sendsOnEnter } from "./composer.js";

const views = new WeakMap(); // message → its view
const owners = new WeakMap(); // element of its view → message

export function viewOf(message) {
  if (!views.has(message)) {
    views.set(message, message.role === "user" ? new Question(message) : new Reply(message));
    owners.set(views.get(message).element, message);
  }
  return views.get(message);
}

class Question {
  constructor(message) {
    this.message = message;
    this.bubble = make("div", { className: "bubble", textContent: message.content });
    this.element = make("article", { className: "turn said" }, make("h2", { className: "unseen", textContent: "You" }), this.bubble,
      make("div", { className: "actions" }, iconButton("copy", "copy", "Copy the message"), iconButton("edit", "edit", "Edit the message")));
  }

  get text() { return this.message.content; }

  edit() {
    const area = make("textarea", { value: this.message.content, rows: 1, ariaLabel: "Edit the message" });
    const form = make("form", {}, area, make("div", {}, pill("cancel", "Cancel"), pill("", "Send", "submit")));
    form.lastChild.lastChild.classList.add("primary");
    form.onsubmit = (event) => {
      event.preventDefault();
      const { current } = state;
      if (!area.value.trim() || isTooLong(area.value) || runs.has(current.id)) return;
      this.cancel();
      current.messages.splice(current.messages.indexOf(this.message));
      send(area.value);
    };
    form.onkeydown = (event) => {
      if (event.key !== "Escape") return;
      event.stopPropagation();
      this.cancel();
    };
    sendsOnEnter(area, form);
    this.bubble.replaceWith(form);
    this.element.classList.add("editing");
    this.form = form;
    grow(area);
    area.focus();
  }

  cancel() {
    this.form.replaceWith(this.bubble);
    this.element.classList.remove("editing");
    focusInput();
  }
}

// One answer to a question.
class Version {
  constructor(answer) {
    this.answer = answer;
    this.pieces = []; // one per part; a tool call and its result share one
    this.spoken = answer.end ? Infinity : 0; // characters announced to screen readers
    this.body = make("div", { className: "body" });
    this.note = make("div", { className: "note" });
    this.element = make("div", { className: "version" }, this.body, this.note);
  }

  update() {
    const { parts, end } = this.answer;
    this.element.classList.toggle("running", !end);
    parts.forEach((part, i) => {
      if (!this.pieces[i]) {
        const joins = part.type === "python_output" && parts[i - 1]?.type === "python";
        this.pieces[i] = joins ? this.pieces[i - 1] : part.type === "text" ? new Prose() : new ToolCard();
        if (!joins) this.body.append(this.pieces[i].element);
      }
      this.pieces[i].show(part, Boolean(end) || (part.type === "text" && i < parts.length - 1));
    });
    this.explain();
  }

  explain() { // why an answer ended early
    const { parts, end, limit, error } = this.answer;
    const cut = end === "stopped" || end === "length";
    this.note.className = "note";
    this.note.removeAttribute("role");
    this.note.replaceChildren();
    if (end === "error") {
      const text = make("span", { textContent: error.text });
      const button = error.long ? pill("move", "New chat") : pill("regenerate", error.until ? "Try again" : "Retry");
      this.note.className = "note error";
      this.note.setAttribute("role", "alert");
      this.note.append(text, button);
      if (error.until) this.countDown(text, button);
    } else if (end && !parts.length) {
      this.note.append(end === "stopped" ? "Stopped before the answer began." : "The model gave an empty answer.");
    } else if (end === "length" && limit === "context") {
      this.note.append("Cut off: the conversation fills what the model can hold.", pill("fresh", "New chat"));
    } else if (cut) {
      this.note.append(end === "stopped" ? "Stopped." : "Cut off at the length set under Settings.");
      if (parts.at(-1).type === "text") this.note.append(pill("goOn", "Continue"));
    }
  }

  countDown(text, button) {
    const { error } = this.answer;
    const seconds = Math.ceil((error.until - Date.now()) / 1000);
    button.disabled = seconds > 0;
    text.textContent = seconds > 0 ? `${error.text.slice(0, -1)}, try again in ${seconds} s.` : error.text;
    if (seconds > 0) setTimeout(() => this.countDown(text, button), 250);
  }

  readOut() { // announce whole sentences
    const { parts, end } = this.answer;
    const text = parts.map((part) => (part.type === "python" ? ` ${part.text} = ` : part.text)).join("");
    const whole = end ? text.length : Math.max(...[". ", "? ", "! ", "\n"].map((mark) => text.lastIndexOf(mark))) + 1;
    if (whole <= this.spoken) return;
    speak(text.slice(this.spoken, whole));
    this.spoken = whole;
  }
}

// All answers to a question, one at a time or side by side.
class Reply {
  constructor(message) {
    this.message = message;
    this.versions = new Map(); // answer → Version
    this.spread = false;
    this.row = make("div", { className: "versions" });
    this.count = make("span", { className: "count" });
    this.pager = make("div", { className: "pager", role: "group", ariaLabel: "Answers to this question" },
      iconButton("previous", "left", "The answer before"), this.count, iconButton("next", "right", "The next answer"),
      iconButton("spread", "columns", "Side by side"));
    this.actions = make("div", { className: "actions" },
      iconButton("copy", "copy", "Copy the answer"), iconButton("regenerate", "regenerate", "Answer again"), this.pager);
    this.element = make("article", { className: "turn answer" },
      make("h2", { className: "unseen", textContent: "Answer" }), this.row, this.actions);
    this.row.addEventListener("click", ({ target }) => this.choose(target.closest(".version")));
    this.update();
  }

  get text() { return plainText(shownAnswer(this.message).parts); }

  update() {
    const { answers, shown } = this.message;
    for (const answer of answers) {
      if (!this.versions.has(answer)) this.versions.set(answer, new Version(answer));
      this.versions.get(answer).update();
      this.versions.get(answer).element.classList.toggle("shown", answer === answers[shown]);
    }
    const elements = answers.map((answer) => this.versions.get(answer).element);
    if (elements.some((element, i) => element !== this.row.children[i])) this.row.replaceChildren(...elements);
    const several = answers.length > 1;
    this.element.classList.toggle("spread", this.spread && several);
    this.element.classList.toggle("running", answers.some((answer) => !answer.end));
    if (several) this.element.style.setProperty("--versions", answers.length);
    this.actions.firstChild.hidden = !answers[shown].parts.length;
    this.pager.hidden = !several;
    this.pager.firstChild.disabled = shown === 0;
    this.count.nextSibling.disabled = shown === answers.length - 1;
    this.count.textContent = `${shown + 1} of ${answers.length}`;
    if (state.current.messages.at(-1) === this.message) this.versions.get(answers[shown]).readOut();
  }

  show(index) { // the answer that is shown is the one sent to the model
    if (runs.has(state.current.id)) return;
    this.message.shown = Math.min(Math.max(index, 0), this.message.answers.length - 1);
    this.update();
    this.reveal();
    save(state.current);
  }

  reveal() { // where they are side by side and wider than the page
    const { element } = this.versions.get(shownAnswer(this.message));
    this.row.scrollLeft = element.offsetLeft - (this.row.clientWidth - element.offsetWidth) / 2;
  }

  choose(element) {
    const index = [...this.row.children].indexOf(element);
    if (this.spread && index >= 0 && getSelection().isCollapsed) this.show(index);
  }
}

const actions = { // data-act of a button → action
  copy: (message, button) => copyFrom(button, viewOf(message).text),
  copyCode: (message, button) => copyFrom(button, button.closest(".codeblock").querySelector("pre").textContent),
  edit: (message) => viewOf(message).edit(),
  cancel: (message) => viewOf(message).cancel(),
  previous: (message) => viewOf(message).show(message.shown - 1),
  next: (message) => viewOf(message).show(message.shown + 1),
  spread(message) {
    viewOf(message).spread = !viewOf(message).spread;
    viewOf(message).update();
    viewOf(message).reveal();
  },
  regenerate() {
    answer(state.current);
    focusInput();
  },
  goOn() {
    answer(state.current, true);
    focusInput();
  },
  fresh: () => openChat(null),
  move(message) { // the conversation is too long: move the question to a new one
    const { messages } = state.current;
    const { content } = messages[messages.indexOf(message) - 1];
    openChat(null);
    $("input").value = content;
    drawComposer();
  },
};

on("log", "click", (event) => {
  const button = event.target.closest("[data-act]");
  actions[button?.dataset.act]?.(owners.get(button.closest(".turn")), button);
});
