// The form that asks for two depths, or two seeds, to write the last passage with, side by side.

import { byId } from "./dom.js";
import { traces } from "./settings.js";

const MOST_SEED = 2 ** 31;

// Connects the form. compare(name of the setting, [left, right]) is called when it is sent.
export function connectPair(settings, card, compare) {
  const [form, button] = [byId("pair"), byId("compare")];
  const { by, left, right } = form.elements;
  const deep = card.max_depth > 1 && traces(card);
  by.options[0].disabled = !deep;
  by.value = deep ? "depth" : "seed";

  button.addEventListener("click", () => {
    show(form.hidden);
    if (!form.hidden) by.focus();
  });
  by.addEventListener("change", suggest);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    show(false);
    button.focus();
    compare(by.value, [Number(left.value), Number(right.value)]);
  });
  form.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    show(false);
    button.focus();
  });

  function show(open) {
    form.hidden = !open;
    button.setAttribute("aria-expanded", String(open));
    if (open) suggest();
  }

  function suggest() {
    const isSeed = by.value === "seed";
    const depth = settings.depth ?? card.depth;
    left.min = right.min = isSeed ? 0 : 1;
    left.max = right.max = isSeed ? MOST_SEED : card.max_depth;
    left.value = isSeed ? settings.seed : card.least_depth < depth ? card.least_depth : 1;
    right.value = isSeed ? settings.seed + 1 : Math.max(2, depth);
  }
}
