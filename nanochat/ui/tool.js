// A call of the model's calculator and its result.

import { icon, make } from "./dom.js";

export class ToolCard {
  constructor() {
    this.code = make("code");
    this.output = make("output", { textContent: "…" });
    const arrow = make("span", { className: "arrow", textContent: "→", ariaHidden: "true" });
    this.element = make("figure", { className: "tool" }, make("figcaption", {}, icon("sum"), "calculator"), this.code, arrow, this.output);
  }

  show({ type, text }, final) {
    if (type === "python") this.code.textContent = prettySum(text);
    else this.output.textContent = text.trim();
    if (type === "python" && final && this.output.textContent === "…") this.output.textContent = "no result";
  }
}

function prettySum(code) {
  if (!/^[\d\s.,+\-*/%()]+$/.test(code) || /\*\*|\/\//.test(code)) return code.trim();
  const signs = { "*": "×", "/": "÷", "-": "−" };
  const spaced = code.replace(/\s+/g, "").replace(/(?<=[\d.)])[-+*/%]/g, (sign) => ` ${signs[sign] ?? sign} `);
  return spaced.replaceAll("-", "−");
}
