// The head of the page: what is loaded, what the tints mean, and the key of the API if the server asks for one.

import { hasKey, setKey } from "./api.js";
import { byId, count, h, short, size, warn } from "./dom.js";
import { LEVELS } from "./tokens.js";

const FAMILIES = { trm: "TRM", loop: "looped transformer", none: "plain transformer" };

// Asks for the key of the API; then calls start().
export function askForKey(start) {
  warn(hasKey() ? "The API key is wrong." : "This server asks for its API key.");
  const form = byId("key");
  form.hidden = false;
  form.onsubmit = (event) => {
    event.preventDefault();
    const key = form.elements.key.value.trim();
    if (!/^[!-~]+$/.test(key)) return warn("An API key has ASCII letters, digits and signs only, without spaces.");
    setKey(key);
    start();
  };
  form.elements.key.focus();
}

// Shows what is loaded, and what the last passage cost. measured: {tokens, speed}.
export function showCard(card, measured) {
  showFacts([
    ...factsOf(card),
    [asTrained("FLOPs per token", card), card.flops_per_token ? short(card.flops_per_token) : "?"],
    ["backend", card.backend],
    [asTrained("cache", card), cacheOf(card, measured.tokens)],
    ["speed", speedOf(measured.speed)],
  ]);
}

// Shows which puzzle model is loaded.
export function showPuzzleCard(puzzle) {
  showFacts([...factsOf(puzzle), ["steps in training", puzzle.steps]]);
}

// Names a figure that is of the trained depth, whatever depth is set.
function asTrained(name, card) {
  return card.depth > 1 ? `${name}, ${card.depth} steps` : name;
}

function factsOf({ name, family, parameters }) {
  return [
    ["model", `${name}, ${FAMILIES[family] ?? family}`],
    ["parameters", short(parameters)],
  ];
}

function showFacts(facts) {
  byId("card").replaceChildren(...facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
}

function cacheOf(card, tokens) {
  const bytes = card.cache_bytes_per_token;
  return tokens ? `${size(tokens * bytes)} for ${count(tokens, "token")}` : `${size(bytes)} per token`;
}

function speedOf(speed) {
  if (!speed?.rate) return "not measured yet";
  return `${speed.rate.toFixed(speed.rate < 10 ? 1 : 0)} tokens/s, the first after ${speed.first.toFixed(2)} s`;
}

// Shows the scale of the tints. deepest: the step that the strongest tint stands for.
export function showLegend(tint, deepest, hasTaken) {
  const ends = {
    certainty: ["unsure", "sure"],
    steps: ["1 step", `${deepest} steps`],
    settled: ["decided at step 1", `at step ${deepest}`],
  }[tint];
  const parts = [];
  if (ends) {
    const swatches = [...Array(LEVELS).keys()].map((n) => h("i", { class: `t${n}` }));
    const scale = h("span", { class: "swatches", "aria-hidden": "true" }, swatches);
    parts.push(h("span", {}, ends[0]), scale, h("span", {}, ends[1]));
  }
  if (hasTaken) parts.push(h("span", { class: "taken-key" }, "chosen by you"));
  byId("legend").replaceChildren(...parts);
}
