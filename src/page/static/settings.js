// The form of settings beside the text.

import { h } from "./dom.js";
import { DEFAULTS } from "./state.js";

// Returns whether this model can be asked for other depths, exits and traces; a graph of ONNX is fixed.
export function traces(card) {
  return card.backend !== "onnx";
}

// Fills the form. settings: an object that is changed in place; changed(name) is called after each change.
// Returns a function that shows the settings again, after they were changed elsewhere.
export function buildSettings(form, settings, card, changed) {
  const deep = card.max_depth > 1 && traces(card);
  const rules = card.exits.filter((rule) => rule !== "fixed");
  const controls = [
    deep ? slider("depth", "Depth", depthScale(card)) : null,
    deep && rules.length ? choice("exit", "Stop a token early", [["", "no: all steps"], ...rules.map(ruleName)]) : null,
    deep && rules.length ? slider("threshold", "Threshold", thresholdScale(settings)) : null,
    slider(
      "temperature",
      "Temperature",
      plain(0, 1.5, 0.05, (value) => (value === 0 ? "0, greedy" : value.toFixed(2))),
    ),
    slider(
      "top_p",
      "Top p",
      plain(0.05, 1, 0.05, (value) => (value === 1 ? "1, all tokens" : value.toFixed(2))),
    ),
    number("length", "Tokens to write", 1, Math.min(card.context, card.max_tokens)),
    number("seed", "Seed", 0, 2 ** 31),
    choice("tint", "Tint", tints(deep)),
    traces(card) ? toggle("trace", "Record what the model thinks", "the model writes a little slower") : null,
  ].filter(Boolean);

  form.replaceChildren(...controls.map(({ root }) => root));
  form.addEventListener("submit", (event) => event.preventDefault());
  const show = () => controls.forEach((control) => control.show());
  show();
  return show;

  function update(name, value) {
    settings[name] = value;
    if (name === "exit") settings.threshold = null;
    show();
    changed(name);
  }

  function slider(name, title, scale) {
    const input = h("input", { type: "range", id: `set-${name}`, step: scale().step });
    const output = h("output", { for: `set-${name}` });
    input.addEventListener("input", () => update(name, scale().toValue(Number(input.value))));
    const root = h("div", { class: "control" }, h("label", { for: `set-${name}` }, title), output, input);
    return {
      root,
      show() {
        const { min, max, step, fromValue, words, off } = scale();
        Object.assign(input, { min, max, step, disabled: Boolean(off), value: fromValue(settings[name]) });
        output.textContent = off || words(settings[name]);
        input.setAttribute("aria-valuetext", output.textContent);
        root.hidden = Boolean(off);
      },
    };
  }

  function number(name, title, min, max) {
    const input = h("input", { type: "number", id: `set-${name}`, min, max, step: 1 });
    const bounded = (value) => Math.max(min, Math.min(max, value));
    input.addEventListener("change", () => {
      const value = Math.round(Number(input.value));
      update(name, bounded(input.value !== "" && Number.isFinite(value) ? value : DEFAULTS[name]));
    });
    // at once, because Ctrl+Enter writes while the field has the focus; the field itself stays as it is typed
    input.addEventListener("input", () => {
      const value = Number(input.value);
      if (input.value === "" || !Number.isInteger(value) || bounded(value) !== value) return;
      settings[name] = value;
      changed(name);
    });
    const root = h("div", { class: "control short" }, h("label", { for: `set-${name}` }, title), input);
    return { root, show: () => (input.value = settings[name]) };
  }

  function choice(name, title, options) {
    const input = h(
      "select",
      { id: `set-${name}` },
      options.map(([value, words]) => h("option", { value }, words)),
    );
    input.addEventListener("change", () => update(name, input.value));
    const root = h("div", { class: "control" }, h("label", { for: `set-${name}` }, title), input);
    return { root, show: () => (input.value = settings[name]) };
  }

  function toggle(name, title, hint) {
    const input = h("input", { type: "checkbox", id: `set-${name}` });
    input.addEventListener("change", () => update(name, input.checked ? DEFAULTS.trace : 0));
    const root = h("label", { class: "check" }, input, title, h("small", {}, hint));
    return { root, show: () => (input.checked = settings[name] > 0) };
  }
}

// Returns those settings whose names are also in `names`.
export function among(settings, names) {
  return Object.fromEntries(Object.keys(names).map((name) => [name, settings[name]]));
}

// Returns those settings of a link that this model can follow; others of the link would be refused, with no control
// to change them.
export function fitting({ depth, exit, threshold, ...settings }, card) {
  if (card.max_depth === 1 || !traces(card)) return settings;
  if (depth) settings.depth = Math.min(depth, card.max_depth);
  if (card.exits.includes(exit)) Object.assign(settings, { exit }, threshold === undefined ? {} : { threshold });
  return settings;
}

// ---- scales: what a slider's positions mean -----------------------------------------------------------------------

function plain(min, max, step, words) {
  return () => ({ min, max, step, words, toValue: (at) => at, fromValue: (value) => value });
}

function depthScale(card) {
  const words = (value) => {
    const depth = value ?? card.depth;
    const isTrained = card.least_depth <= depth && depth <= card.depth;
    return `${depth} step${depth === 1 ? "" : "s"}${isTrained ? ", as trained" : ""}`;
  };
  const toValue = (at) => (at === card.depth ? null : at);
  const max = Math.min(card.max_depth, Math.max(16, 4 * card.depth)); // deeper ones are seldom useful
  return () => ({ min: 1, max, step: 1, words, toValue, fromValue: (value) => value ?? card.depth });
}

// The halting probability is linear, 0 to 1. KL divergences are powers of ten, from 0.0001 to 1 nat.
function thresholdScale(settings) {
  const usual = { halt: 0.95, kl: 0.01 };
  return () => {
    const rule = settings.exit;
    if (rule === "kl") {
      return {
        min: -4,
        max: 0,
        step: 0.25,
        toValue: (at) => Number((10 ** at).toPrecision(2)),
        fromValue: (value) => Math.log10(value ?? usual.kl),
        words: (value) => `below ${value ?? usual.kl} nats`,
      };
    }
    return {
      min: 0,
      max: 1,
      step: 0.01,
      toValue: (at) => at,
      fromValue: (value) => value ?? usual.halt,
      words: (value) => (value === null ? "that of the model" : `above ${value.toFixed(2)}`),
      off: rule ? "" : "no rule",
    };
  };
}

function ruleName(rule) {
  const names = { halt: "halt: when the model is sure", kl: "kl: when a step changes little" };
  return [rule, names[rule] ?? rule];
}

function tints(deep) {
  const all = [
    ["certainty", "certainty"],
    ["steps", "steps taken"],
    ["settled", "step of decision"],
    ["none", "none"],
  ];
  return all.filter(([name]) => deep || name === "certainty" || name === "none");
}
