// Markdown: rendered to HTML by the server, then rebuilt here from an allowlist.

import { iconButton, make, sleep } from "./dom.js";
import { attempt } from "./chats.js";
import { ask } from "./server.js";

const TAGS = new Set(("a blockquote br code del em h1 h2 h3 h4 h5 h6 hr li ol p pre s span strong table tbody td th thead "
  + "tr ul").split(" "));
const ATTRIBUTES = { a: ["title"], ol: ["start"], td: ["align"], th: ["align"] }; // in addition to class and href, which are checked
const DROPPED = new Set("embed iframe math noscript object script select style svg template textarea title xmp".split(" "));
const CLASS = /^(language-[\w+#.-]+|highlight|[a-z][a-z0-9]{0,2})$/; // languages of code, and Pygments' classes
const isSafeLink = (href) => attempt(() => ["http:", "https:", "mailto:"].includes(new URL(href).protocol), false);

// Copy only the allowed elements and attributes of an inert document.
function rebuild(source, target) {
  for (const node of source.childNodes) {
    const broken = node.previousSibling?.localName === "br"; // then the line break in the text is redundant
    if (node.nodeType === Node.TEXT_NODE) target.append(broken ? node.data.trimStart() : node.data);
    if (node.nodeType !== Node.ELEMENT_NODE || DROPPED.has(node.localName)) continue;
    if (!TAGS.has(node.localName)) { // keep only the content of unknown elements
      rebuild(node, target);
      continue;
    }
    const element = rebuild(node, make(node.localName));
    const classes = [...node.classList].filter((name) => CLASS.test(name));
    if (classes.length) element.className = classes.join(" ");
    for (const name of ATTRIBUTES[node.localName] ?? []) {
      if (node.hasAttribute(name)) element.setAttribute(name, node.getAttribute(name));
    }
    if (node.localName === "a" && isSafeLink(node.getAttribute("href"))) {
      Object.assign(element, { href: node.getAttribute("href"), target: "_blank", rel: "noopener noreferrer nofollow" });
    }
    if (node.localName === "pre") target.append(codeBlock(element));
    else if (node.localName === "table") target.append(make("div", { className: "tablebox" }, element));
    else target.append(element);
  }
  return target;
}

function codeBlock(pre) {
  const language = /language-(\S+)/.exec(pre.querySelector("code")?.className)?.[1] ?? "code";
  let last = pre;
  while (last.lastChild) last = last.lastChild;
  if (last.nodeType === Node.TEXT_NODE) last.data = last.data.trimEnd();
  pre.tabIndex = 0; // so that the keyboard can scroll it
  const bar = make("div", { className: "codebar" }, language, iconButton("copyCode", "copy", "Copy the code"));
  return make("div", { className: "codeblock" }, bar, pre);
}

// The only place where HTML from the server is parsed.
function fromServer(html) {
  return rebuild(new DOMParser().parseFromString(html, "text/html").body, document.createDocumentFragment());
}

const RENDER_PAUSE = 150; // ms between requests, which are sent one at a time
const waiting = new Set(); // Prose objects to render
const rendered = new Map(); // finished text → HTML
let rendering = false;

async function renderWaiting() {
  if (rendering) return;
  rendering = true;
  while (waiting.size) {
    const batch = [];
    let chars = 0;
    for (const prose of waiting) {
      chars += prose.text.length;
      if (batch.length && (chars > 30_000 || batch.length >= 30)) break;
      batch.push([prose, prose.text]);
      waiting.delete(prose);
    }
    const start = performance.now();
    const html = await ask("render", { texts: batch.map(([, text]) => text) }).then((answer) => answer.html, () => null);
    // If the request failed, the text stays plain
    if (html) batch.forEach(([prose, text], i) => prose.settle(text, html[i]));
    await sleep(html ? Math.max(RENDER_PAUSE, 2 * (performance.now() - start)) : 2000);
  }
  rendering = false;
}

// A growing text: rendered Markdown, followed by a tail that is not rendered yet.
export class Prose {
  constructor() {
    this.tail = make("span", { className: "tail" });
    this.element = make("div", { className: "prose" }, this.tail);
    this.text = this.settled = "";
  }

  show(part, final) {
    const text = part.text.replace(/^\s*\n/, ""); // what follows a tool call often begins with an empty line
    this.final = final;
    if (text === this.text) return;
    this.text = text;
    if (rendered.has(text)) {
      waiting.delete(this);
      this.settle(text, rendered.get(text));
      return;
    }
    this.showTail();
    waiting.add(this);
    renderWaiting();
  }

  settle(text, html) {
    if (text.length < this.settled.length) return; // outdated: a cached result came first
    this.settled = text;
    if (this.final) rendered.set(text, html);
    if (rendered.size > 300) rendered.delete(rendered.keys().next().value);
    this.tail.remove();
    const [before, after] = [[...this.element.childNodes], [...fromServer(html).childNodes]];
    let same = 0; // unchanged blocks keep their elements, and with them selection and scroll position
    while (same < before.length && same < after.length && before[same].isEqualNode(after[same])) same++;
    before.slice(same).forEach((node) => node.remove());
    this.element.append(...after.slice(same));
    let host = this.element; // the tail continues the innermost last element
    while (/^(P|UL|OL|LI|BLOCKQUOTE|DIV|PRE|H\d)$/.test(host.lastElementChild?.tagName)) host = host.lastElementChild;
    if (host.tagName === "PRE") host = host.querySelector("code") ?? host;
    host.append(this.tail);
    this.showTail();
  }

  showTail() {
    const rest = this.text.slice(this.settled.trimEnd().length);
    this.tail.textContent = rest.trim() && rest;
  }
}
