// The dialog in which a long conversation is looked through, from far to near: a strip of all of it, and a list of parts;
// opening one lists its own parts, down to single blocks. Also the newest edits of the focus, a search for text, and
// LensNet's answer to the question where the model would look. A part is a range [first, end) of blocks.

import { $, make, on, svg } from "./dom.js";
import { shownChat } from "./focus.js";
import { ask, Fault } from "./server.js";

const PARTS = 64; // that are listed at once, at most
const EXCERPT = 40; // tokens that are shown of a part
const CELLS = 200; // of the strip
const HEIGHTS = [26, 18, 11, 6]; // of a cell, by level

let focus = null; // as in the event of this name
let blocks = 0;
let ranges = []; // opened so far, the whole first
let request = 0; // number of the newest list; answers to older ones are dropped

const number = (value) => Math.round(value).toLocaleString("en");
const level = (lod) => Math.min(lod, 3);
const tokens = (first, end) => `tokens ${number(first * focus.block_size)} – ${number(Math.min(end * focus.block_size, focus.num_tokens) - 1)}`;

// Blocks at each level in [first, end), as [level, number].
function mixture(first, end) {
  const counts = new Map();
  let start = 0;
  for (const [lod, count] of focus.lod) {
    const here = Math.min(end, start + count) - Math.max(first, start);
    if (here > 0) counts.set(lod, (counts.get(lod) ?? 0) + here);
    start += count;
  }
  return [...counts].sort(([a], [b]) => a - b);
}

// ---------------------------------------------------------------- The strip of all

let marks = []; // blocks that were found

function drawStrip() {
  const strip = $("explore-strip");
  strip.replaceChildren();
  const width = 1000;
  const group = Math.ceil(blocks / CELLS);
  const pitch = width / Math.ceil(blocks / group);
  const across = (block) => block / group * pitch;
  for (let first = 0; first < blocks; first += group) {
    const lod = level(mixture(first, Math.min(first + group, blocks))[0][0]);
    svg("rect", { class: `lod-${lod}`, x: across(first), width: pitch * .86, y: 28 - HEIGHTS[lod], height: HEIGHTS[lod] }, strip);
  }
  const { first, end } = ranges.at(-1);
  svg("rect", { class: "range", x: across(first), width: Math.max(2, across(end) - across(first)), y: 29.5, height: 3 }, strip);
  for (const block of marks) svg("path", { class: "found", d: `M${across(block + .5) - 5} 34h10l-5 -5z` }, strip);
}

// ---------------------------------------------------------------- Lists

const row = (act, place, ...content) => {
  const item = make(act ? "button" : "div", { className: "part", ...(act && { type: "button", onclick: act }) }, make("span", { className: "place" }, ...place));
  item.append(...content);
  return make("li", {}, item);
};

function bar(first, end) { // which levels the blocks of a part have
  const picture = svg("svg", { class: "mixture", viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" });
  let x = 0;
  for (const [lod, count] of mixture(first, end)) {
    const width = 100 * count / (end - first);
    svg("rect", { class: `lod-${level(lod)}`, x, width, height: 10 }, picture);
    x += width;
  }
  return picture;
}

const detail = (first, end) => mixture(first, end).map(([lod]) => `LOD ${lod}`).join(", ");

function gauge(score) { // from −1 to 1
  const picture = svg("svg", { class: "gauge", viewBox: "-1 0 2 .2", preserveAspectRatio: "none", "aria-hidden": "true" });
  svg("rect", { x: -1, width: 2, y: .06, height: .08 }, picture);
  svg("rect", { class: "value", x: Math.min(score, 0), width: Math.max(.03, Math.abs(score)), y: 0, height: .2 }, picture);
  return picture;
}

// Fill the list with what `load` gives, unless another list is asked for meanwhile.
async function list(title, load) {
  const mine = ++request;
  const items = $("explore-list");
  items.ariaBusy = true;
  try {
    const found = await load();
    if (mine !== request) return;
    $("explore-title").textContent = title;
    items.replaceChildren(...found);
    items.scrollTop = 0;
  } catch (error) {
    if (!(error instanceof Fault)) throw error;
    if (mine === request) items.replaceChildren(make("li", { className: "note", textContent: error.message }));
  } finally {
    if (mine === request) items.ariaBusy = false;
  }
  drawStrip();
}

// The first tokens of each of these blocks, as text.
async function beginnings(blocks, tokens) {
  const K = focus.block_size;
  const { texts } = await post("text", { spans: blocks.map((block) => [block * K, block * K + tokens]) });
  return texts.map((text) => text ?? "");
}

const post = (path, body) => ask(`focus/${path}`, { conversation: shownChat().conversation, ...body });

function open(first, end) { // a part of what is open, or, from a search, of anything
  const within = ranges.findLastIndex((range) => range.first <= first && end <= range.end);
  ranges = [...ranges.slice(0, within + 1), { first, end }];
  browse();
}

function browse() {
  const { first, end } = ranges.at(-1);
  const K = focus.block_size;
  let size = 1; // blocks per part
  while ((end - first) / size > PARTS) size *= K;
  const starts = [];
  for (let block = first; block < end; block += size) starts.push(block);
  $("explore-path").replaceChildren(...ranges.map((range, i) => make("button", {
    type: "button", textContent: i ? tokens(range.first, range.end) : "All", disabled: i === ranges.length - 1,
    onclick: () => { ranges = ranges.slice(0, i + 1); browse(); },
  })));
  list(size === 1 ? "Block by block" : `In parts of ${number(size * K)} tokens`, async () => {
    const texts = await beginnings(starts, size > 1 ? EXCERPT : K);
    return starts.map((block, i) => {
      const stop = Math.min(block + size, end);
      const words = make("q", { textContent: texts[i] + (size > 1 ? " …" : "") });
      return row(size > 1 && (() => open(block, stop)), [bar(block, stop), tokens(block, stop), make("small", { textContent: detail(block, stop) })], words);
    });
  });
}

// The part around a block that lists it among its neighbours.
function show(block) {
  const size = Math.max(8, Math.min(focus.block_size, PARTS));
  const first = Math.floor(block / size) * size;
  open(first, Math.min(first + size, blocks));
}

function showEdits() {
  list("Edits of the focus, newest first", async () => {
    const { edits } = await post("edits");
    if (!edits.length) return [make("li", { className: "note", textContent: "The focus has not changed yet." })];
    return edits.reverse().map(({ time, num_tokens, changes }) => {
      const chips = changes.map(([first, count, before, now]) => make("button", {
        type: "button", className: "chip", textContent: `${now < before ? "▲" : "▽"} ${tokens(first, first + count)}`,
        title: `LOD ${before} to LOD ${now}`, onclick: () => (count > 1 ? open(first, first + count) : show(first)),
      }));
      const when = new Date(1000 * time);
      return row(null, [make("time", { dateTime: when.toISOString(), textContent: when.toLocaleTimeString() }), `at token ${number(num_tokens)}`], make("span", { className: "chips" }, ...chips));
    });
  });
}

// ---------------------------------------------------------------- Search

function found(place, needle) { // a place in the text, and what is found in it
  const at = place.text.toLowerCase().indexOf(needle.toLowerCase());
  const words = make("q");
  if (at < 0) words.textContent = place.text;
  else words.append(place.text.slice(0, at), make("mark", { textContent: place.text.slice(at, at + needle.length) }), place.text.slice(at + needle.length));
  const block = Math.floor(place.start / focus.block_size);
  return row(() => show(block), [`token ${number(place.start)}`, make("small", { textContent: detail(block, block + 1) })], words);
}

function findText(text, start = 0, before = []) {
  list(`“${text}” in the text`, async () => {
    const answer = await post("find", { text, start });
    const places = [...before, ...answer.found];
    marks = places.map(({ start: token }) => Math.floor(token / focus.block_size));
    const items = places.map((place) => found(place, text));
    const until = answer.next === null ? "" : `Searched up to token ${number(answer.next)}.`;
    items.push(make("li", { className: "note" }, places.length ? until : `Nothing found. ${until}`,
      ...(answer.next === null ? [] : [make("button", { type: "button", className: "pill", textContent: "Go on", onclick: () => findText(text, answer.next, places) })])));
    return items;
  });
}

function askLens(text) {
  list(`Where the model would look for “${text}”`, async () => {
    const { found } = await post("look", { text });
    marks = found.map(({ block }) => block);
    const texts = await beginnings(marks, EXCERPT);
    if (!found.length) return [make("li", { className: "note", textContent: "The conversation is too short for that." })];
    return found.map(({ block, score }, i) => row(() => show(block),
      [gauge(score), tokens(block, block + 1), make("small", { textContent: `score ${score.toFixed(2).replace("-", "−")}` })], make("q", { textContent: texts[i] })));
  });
}

on("explore-form", "submit", (event) => {
  event.preventDefault();
  const text = $("explore-text").value.trim();
  if (text) (event.submitter?.value === "look" ? askLens : findText)(text);
});

// ---------------------------------------------------------------- The dialog

on("focus-explore", "click", () => {
  focus = shownChat().focus; // as it is now: what is looked at does not move
  blocks = Math.ceil(focus.num_tokens / focus.block_size);
  ranges = [{ first: 0, end: blocks }];
  marks = [];
  $("explore").showModal();
  browse();
});
on("explore-edits", "click", showEdits);
on("explore-strip", "click", (event) => {
  const box = $("explore-strip").getBoundingClientRect();
  show(Math.min(blocks - 1, Math.floor((event.clientX - box.left) / box.width * blocks)));
});
on("explore", "click", ({ target }) => target === $("explore") && $("explore").close()); // beside it
on("explore-close", "click", () => $("explore").close());
