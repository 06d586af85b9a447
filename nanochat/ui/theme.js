// Light and dark colours.

import { $, on, setFace } from "./dom.js";
import { store } from "./chats.js";

const systemDark = matchMedia("(prefers-color-scheme: dark)");
const systemTheme = () => (systemDark.matches ? "dark" : "light");

export function drawTheme() {
  const chosen = store.read("theme");
  const dark = (chosen ?? systemTheme()) === "dark";
  document.documentElement.dataset.theme = chosen ?? "";
  setFace($("theme"), dark ? "sun" : "moon", dark ? "Light colours" : "Dark colours");
  $("theme-color").content = getComputedStyle(document.body).backgroundColor;
}

on("theme", "click", () => {
  const next = (store.read("theme") ?? systemTheme()) === "dark" ? "light" : "dark";
  if (next === systemTheme()) store.remove("theme"); // follow the system again
  else store.write("theme", next);
  drawTheme();
});
systemDark.addEventListener("change", drawTheme);
