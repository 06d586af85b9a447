// The focus view: draws the focus events of MegaContext. The page calls setUpFocus when it has the server's settings, and
// showFocus when another chat is opened or its focus changes. A block is block_size tokens; each block has a level of detail
// (LOD), 0 for the tokens themselves.

import { make, sleep, svg } from "./dom.js";
import { store } from "./chats.js";
import { ask } from "./server.js";

const [MARKS, BARS, RIBBONS, RAIL] = [11, 30, 25, 10]; // heights of the rows, in pixels
const HEIGHTS = [BARS, 20, 12, 6]; // of a bar, by level
const [LEAST, MOST] = [4, 24]; // width of a cell
const SHOWN_TOKENS = 256; // maximum that the server returns at once
const REST = 120; // ms for which the pointer must rest before the text is requested

let mc = null; // the server's settings
let chat = null;
let view = null; // layout of chat.focus
let here = null; // block under the pointer
let parts = null; // elements of the picture
const texts = new Map(); // "conversation start end" → text

const at = (id) => document.getElementById(`focus-${id}`);
const number = (value) => value.toLocaleString("en");
const level = (lod) => Math.min(lod, 3);
const countOf = (count, noun) => `${number(count)} ${noun}${count === 1 ? "" : "s"}`;

function put(element, attributes) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
}

// ---------------------------------------------------------------- Layout

// Values of all blocks, from [block, value] at each change.
function steps(changes, blocks) {
  const values = new Float32Array(blocks).fill(NaN);
  changes.forEach(([block, value], i) => values.fill(value, block, changes[i + 1]?.[0] ?? blocks));
  return values;
}

// The focus as arrays: lods and scores of the blocks; before: number of entries before each block, then the total.
function unfold(state) {
  const { lod: runs, num_tokens: tokens, block_size: K } = state;
  const blocks = runs.reduce((sum, [, count]) => sum + count, 0);
  const lods = new Uint8Array(blocks);
  const before = new Float64Array(blocks + 1);
  let block = 0;
  for (const [lod, count] of runs) {
    const each = lod ? K ** (1 - lod) : K; // entries per block; a fraction if a node covers several
    for (const end = block + count; block < end; block++) {
      lods[block] = lod;
      before[block + 1] = before[block] + (lod ? each : Math.min(K, tokens - block * K));
    }
  }
  return { state, blocks, lods, before, scores: steps(state.scores, blocks) };
}

function layOut(focus, width) {
  const group = Math.ceil(focus.blocks / Math.max(1, Math.floor(width / LEAST))); // blocks per cell
  const count = Math.ceil(focus.blocks / group);
  const pitch = Math.min(MOST, width / count);
  const cells = Array.from({ length: count }, (_, i) => {
    const lods = focus.lods.subarray(i * group, (i + 1) * group);
    return { finest: Math.min(...lods), coarsest: Math.max(...lods) };
  });
  const scale = width / focus.state.budget; // pixels per entry
  return { ...focus, width, group, pitch, cells, across: (block) => block / group * pitch, along: (block) => focus.before[block] * scale };
}

// ---------------------------------------------------------------- The picture

const TOP = MARKS + BARS;
const FOOT = TOP + RIBBONS;

function build() {
  const picture = at("picture");
  parts = { ribbons: [], segments: [], cells: [] };
  const layer = () => svg("g", {}, picture);
  const ribbons = layer();
  parts.rail = svg("rect", { class: "rail", y: FOOT, height: RAIL, rx: 2 }, layer());
  const segments = layer();
  for (let lod = 3; lod >= 0; lod--) {
    parts.ribbons[lod] = svg("path", { class: `ribbon lod-${lod}` }, ribbons);
    parts.segments[lod] = svg("path", { class: `lod-${lod}` }, segments);
  }
  parts.bars = layer();
  parts.marks = layer();
  parts.here = svg("path", { class: "here" }, layer());
  parts.frame = svg("path", { class: "frame" }, layer());
}

// Path from the blocks [first, end) to their entries.
function ribbon(first, end) {
  const [a, b, c, d] = [view.across(first), view.across(end), view.along(first), view.along(end)].map((x) => +x.toFixed(2));
  const middle = TOP + RIBBONS / 2;
  return `M${a} ${TOP}C${a} ${middle} ${c} ${middle} ${c} ${FOOT}H${d}C${d} ${middle} ${b} ${middle} ${b} ${TOP}Z`;
}

function segment(first, end) {
  return `M${view.along(first).toFixed(2)} ${FOOT}H${view.along(end).toFixed(2)}v${RAIL}H${view.along(first).toFixed(2)}Z`;
}

function drawMark([first, blocks], kind) {
  const [start, end] = [view.across(first), view.across(first + blocks)];
  const x = (start + end) / 2;
  const points = kind === "expanded" ? `M${x - 3.5} 7h7l-3.5 -6z` : `M${x - 3.5} 1.5h7l-3.5 6z`;
  const line = end - start > 10 ? `M${start + .5} 9h${end - start - 1}` : "";
  svg("path", { class: `mark ${kind}`, d: points + line }, parts.marks);
}

function draw() {
  const width = at("picture").clientWidth;
  if (!chat?.focus || !width) return;
  if (!parts) build();
  view = layOut(view?.state === chat.focus ? view : unfold(chat.focus), width);
  const { state, cells, pitch } = view;
  const gap = pitch > 3 ? 1 : 0;
  while (parts.cells.length > cells.length) parts.cells.pop().remove();
  cells.forEach(({ finest }, i) => {
    parts.cells[i] ??= svg("rect", { rx: 1 }, parts.bars);
    const height = HEIGHTS[level(finest)];
    put(parts.cells[i], { class: `lod-${level(finest)}`, x: (i * pitch).toFixed(2), width: (pitch - gap).toFixed(2), y: TOP - height, height });
  });
  const paths = HEIGHTS.map(() => ["", ""]);
  let first = 0;
  for (const [lod, blocks] of state.lod) {
    paths[level(lod)][0] += ribbon(first, first + blocks);
    paths[level(lod)][1] += segment(first, first + blocks);
    first += blocks;
  }
  paths.forEach(([down, along], lod) => {
    parts.ribbons[lod].setAttribute("d", down);
    parts.segments[lod].setAttribute("d", along);
  });
  parts.rail.setAttribute("width", width);
  parts.marks.replaceChildren();
  state.collapsed.forEach((edit) => drawMark(edit, "collapsed"));
  state.expanded.forEach((edit) => drawMark(edit, "expanded"));
  at("cursor").max = cells.length - 1;
  point(here === null ? null : Math.min(here, view.blocks - 1));
}

function tell() { // figures and text beside the picture
  const { num_tokens, entries, budget, lod_counts, expanded, collapsed, swap_rate } = chat.focus;
  at("tokens").textContent = number(num_tokens);
  at("entries").textContent = number(entries);
  at("budget").textContent = number(budget);
  at("expanded").textContent = expanded.length;
  at("collapsed").textContent = collapsed.length;
  at("swaps").textContent = `${(100 * swap_rate).toFixed(1)}%`;
  at("legend").replaceChildren(...Object.entries(lod_counts).map(([lod, count]) => {
    const what = +lod ? `gists of ${countOf(chat.focus.block_size ** lod, "token")}` : "tokens themselves";
    return make("span", { title: what }, make("i", { className: `lod-${level(+lod)}` }), `LOD ${lod} `, make("b", { textContent: number(count) }));
  }));
  const counts = Object.entries(lod_counts).map(([lod, count]) => `${number(count)} at LOD ${lod}`).join(", ");
  at("summary").textContent = `Of ${countOf(num_tokens, "token")} in the conversation the model reads ${number(entries)} of at most `
    + `${countOf(budget, "entry").replace("entrys", "entries")}: ${counts}. The last refocus expanded ${expanded.length} and `
    + `collapsed ${collapsed.length}. Swap rate ${(100 * swap_rate).toFixed(1)}%.`;
}

// ---------------------------------------------------------------- Details of a block

function point(block) {
  here = block;
  const cell = block === null ? null : Math.floor(block / view.group);
  at("card").hidden = block === null;
  if (block === null) {
    parts?.here.setAttribute("d", "");
    parts?.frame.setAttribute("d", "");
    return;
  }
  const [first, end] = [cell * view.group, Math.min((cell + 1) * view.group, view.blocks)];
  const x = view.across(first) - .75;
  parts.here.setAttribute("d", ribbon(first, end) + segment(first, end));
  parts.frame.setAttribute("d", `M${x} ${MARKS - 1}h${view.pitch + .5}V${TOP + 1}h${-view.pitch - .5}Z`);
  describe(cell, first, end);
  const left = Math.max(0, Math.min(x - 24, view.width - at("card").offsetWidth));
  at("card").style.left = `${left}px`;
}

function describe(cell, first, end) {
  const { block_size: K, num_tokens } = view.state;
  const { finest, coarsest } = view.cells[cell];
  const [start, stop] = [first * K, Math.min(end * K, num_tokens)];
  const scores = view.scores.subarray(first, end).filter((score) => !Number.isNaN(score));
  const [low, high] = [Math.min(...scores), Math.max(...scores)];
  const signed = (score) => (score > 0 ? "+" : score < 0 ? "−" : "") + Math.abs(score).toFixed(2);
  const name = end - first === 1 ? `Block ${number(first)}` : `Blocks ${number(first)} – ${number(end - 1)}`;
  const detail = finest < coarsest ? `LOD ${finest} to ${coarsest}`
    : finest ? `LOD ${finest}, gists of ${number(K ** finest)} tokens` : "LOD 0, every token";
  const score = scores.length ? `LensNet ${low < high ? `${signed(low)} to ${signed(high)}` : signed(high)}` : "not scored yet";
  const place = `tokens ${number(start)} – ${number(stop - 1)}`;
  Object.assign(at("cursor"), { value: cell, ariaValueText: `${name}, ${place}, ${detail}, ${score}` });
  const line = make("p", { className: "score" });
  if (scores.length) line.append(gauge(low, high));
  line.append(score);
  const words = make("blockquote");
  at("card").replaceChildren(make("h3", { textContent: name }), make("p", { textContent: `${place} · ${detail}` }), line, words);
  showText(words, start, stop);
}

function gauge(low, high) { // from −1, collapse, to 1, expand
  const bar = svg("svg", { viewBox: "-1 0 2 .2", preserveAspectRatio: "none", "aria-hidden": "true" });
  svg("rect", { x: -1, width: 2, y: .06, height: .08 }, bar); // the whole range, and 0
  const [from, to] = [Math.min(low, 0), Math.max(high, 0)];
  svg("rect", { x: -.01, width: .02, y: 0, height: .2 }, bar);
  svg("rect", { class: "value", x: from, width: Math.max(.03, to - from), y: 0, height: .2 }, bar);
  return bar;
}

async function showText(words, start, stop) {
  const { conversation } = chat;
  const key = `${conversation} ${start} ${stop}`;
  if (!texts.has(key)) {
    await sleep(REST);
    if (!words.isConnected) return;
    const answer = await ask("focus/text", { conversation, spans: [[start, stop]] }).catch(() => ({}));
    const text = answer.texts?.[0] ?? null;
    if (texts.size > 500) texts.clear();
    if (text !== null) texts.set(key, text && text + (stop - start > SHOWN_TOKENS ? " …" : ""));
  }
  words.textContent = texts.get(key) ?? "";
  if (words.isConnected) at("cursor").ariaDescription = words.textContent;
}

// The block under the pointer, in the bars above or the entries below.
function blockAt({ clientX, clientY }) {
  const box = at("picture").getBoundingClientRect();
  const [x, y] = [clientX - box.left, clientY - box.top];
  if (y < TOP + RIBBONS / 2) return Math.floor(x / view.pitch) * view.group;
  const entry = x / view.width * view.state.budget;
  let [low, high] = [0, view.blocks]; // the last block that begins at or before this entry
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (view.before[middle] <= entry) low = middle;
    else high = middle;
  }
  return entry < view.before[view.blocks] ? low : view.blocks;
}

function follow(event) {
  if (!view) return;
  const block = blockAt(event);
  point(block >= 0 && block < view.blocks ? block : null);
}

const leave = () => view && point(null);

at("picture").addEventListener("pointermove", follow);
at("picture").addEventListener("pointerdown", follow);
at("picture").addEventListener("pointerleave", (event) => event.pointerType === "mouse" && leave());
addEventListener("pointerdown", ({ target }) => !at("body").contains(target) && leave());
at("cursor").addEventListener("focus", () => view && point(here ?? view.blocks - 1));
at("cursor").addEventListener("blur", leave);
at("cursor").addEventListener("input", ({ target }) => point(target.valueAsNumber * view.group));
at("cursor").addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  event.stopPropagation(); // otherwise it stops the answer
  leave();
});
new ResizeObserver(draw).observe(at("picture"));

// ---------------------------------------------------------------- Interface to the page

function fold(folded) {
  document.getElementById("focus").classList.toggle("folded", folded);
  at("fold").ariaExpanded = !folded;
  at("fold").title = at("fold").ariaLabel = folded ? "Show the focus" : "Hide the focus";
}

at("fold").addEventListener("click", () => {
  const folded = !document.getElementById("focus").classList.contains("folded");
  store.write("focus-folded", folded);
  fold(folded);
  draw();
});

export function setUpFocus(settings) {
  mc = settings ?? null;
  fold(store.read("focus-folded") === true);
  if (chat) showFocus(chat);
}

export const shownChat = () => chat;

export function showFocus(shown) {
  if (shown !== chat) leave();
  chat = shown;
  const section = document.getElementById("focus");
  section.hidden = !mc || !chat.focus;
  if (!section.hidden) {
    tell();
    draw();
  } else if (mc && chat.focus === undefined && chat.messages.length) recall(chat);
}

async function recall(asked) { // ask the server for the focus of a chat from before the page was loaded
  asked.focus = null;
  const answer = await ask("focus", { conversation: asked.conversation }).catch(() => ({}));
  asked.focus ??= answer.focus ?? null;
  if (asked === chat && asked.focus) showFocus(asked);
}
