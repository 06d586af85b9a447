// Helpers for elements, icons, notifications, the clipboard and downloads.

export const $ = (id) => document.getElementById(id);
export const on = (id, type, action) =>
  $(id).addEventListener(type, action, { passive: type === "touchmove" || type === "wheel" });
export const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
export const narrow = matchMedia("(max-width: 48rem)");

export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

export function svg(tag, attributes = {}, parent = null) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  parent?.append(element);
  return element;
}

export function icon(name) {
  const drawing = svg("svg", { "aria-hidden": "true" });
  svg("use", { href: `#i-${name}` }, drawing);
  return drawing;
}

export function setFace(button, iconName, label) {
  button.replaceChildren(icon(iconName));
  button.title = button.ariaLabel = label;
  return button;
}

export const iconButton = (act, iconName, label) =>
  setFace(make("button", { type: "button", className: "icon", "data-act": act }), iconName, label);

export const pill = (act, label, type = "button") =>
  make("button", { type, className: "pill", "data-act": act, textContent: label });

export function speak(text) { // to screen readers
  const line = $("live").appendChild(make("p", { textContent: text }));
  setTimeout(() => line.remove(), 20_000);
}

let toastTimer;
export function toast(text, label = "Close", action = () => {}) {
  const close = () => $("toast").replaceChildren();
  const button = make("button", { type: "button", textContent: label, onclick: () => { close(); action(); } });
  $("toast").replaceChildren(make("span", { textContent: text }), button);
  clearTimeout(toastTimer);
  toastTimer = setTimeout(close, 8000);
}

export async function copyFrom(button, text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // navigator.clipboard exists only over HTTPS and on localhost
    const area = document.body.appendChild(make("textarea", { value: text, className: "unseen" }));
    area.select();
    document.execCommand("copy");
    area.remove();
    button.focus({ preventScroll: true });
  }
  const label = button.ariaLabel;
  setFace(button, "done", "Copied");
  speak("Copied");
  if (label !== "Copied") setTimeout(() => setFace(button, "copy", label), 1500);
}

export function download(name, text, type) {
  const href = URL.createObjectURL(new Blob([text], { type }));
  make("a", { href, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(href), 10_000);
}

export function place(popover, button) { // above or below its button, where there is more room
  const { left, top, bottom } = button.getBoundingClientRect();
  const above = top > innerHeight / 2;
  popover.style.left = `${narrow.matches ? 12 : Math.min(left, innerWidth - 240)}px`;
  popover.style.top = above ? "auto" : `${bottom + 6}px`;
  popover.style.bottom = above ? `${innerHeight - top + 6}px` : "auto";
}
