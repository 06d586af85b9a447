// Scrolling: stay at the end unless the reader goes up.

import { $, on } from "./dom.js";
import { runs } from "./answering.js";
import { state } from "./page.js";
import { focusInput } from "./composer.js";

let follow = true;
let lastTop = 0;
let touched = -Infinity; // when the reader last did something here: an answer that shrinks as it is rendered scrolls up too

export function toLatest() {
  follow = true;
  $("scroller").scrollTop = $("scroller").scrollHeight;
}

function watchScroll() {
  const { scrollTop, scrollHeight, clientHeight } = $("scroller");
  const below = scrollHeight - scrollTop - clientHeight;
  if (below < 24) follow = true;
  else if (scrollTop < lastTop && (!runs.has(state.current.id) || performance.now() - touched < 1000)) follow = false;
  lastTop = scrollTop;
  $("jump").hidden = follow || below < 120;
}

const sizes = new ResizeObserver(() => {
  if (follow) toLatest();
  watchScroll();
});
sizes.observe($("log"));
sizes.observe($("scroller"));
on("scroller", "scroll", watchScroll);
for (const type of ["wheel", "touchmove", "pointerdown", "keydown"]) on("scroller", type, () => { touched = performance.now(); });
on("jump", "click", () => { toLatest(); focusInput(); });
