// Scrolling: follow the end of the conversation until the user scrolls up.

import { $, on } from "./dom.js";
import { runs } from "./answering.js";
import { state } from "./page.js";
import { focusInput } from "./composer.js";

let follow = true;
let lastTop = 0;
let touched = -Infinity; // time of the last user input: the position also decreases when an answer shrinks as it is rendered

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
on("jump", "click", () => {
  touched = -Infinity; // what the position does from here on is not the user's doing
  toLatest();
  focusInput();
});
