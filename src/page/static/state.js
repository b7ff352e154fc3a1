// The state of the page: settings, branches of the text, and their history.
//
// A page is {branches, active}. A branch is {key, tokens, start, note, own}: start is the number of tokens before the
// last passage that was written, note says how that passage was written, own has the settings by which it was compared
// with another branch, or is null. Pages, branches and tokens are never changed in place, so the history keeps them
// without copies.

import { shownTexts, textOf } from "./tokens.js";

export const DEFAULTS = {
  depth: null, // recursion steps; null: as many as in training
  exit: "", // rule that stops a token early: "", "halt" or "kl"
  threshold: null, // of the rule; null: that of the model
  temperature: 0.8,
  top_p: 0.95,
  length: 64, // tokens of a passage
  seed: 1,
  trace: 5, // candidates per step; 0: no trace
  tint: "certainty",
  keep: false, // whether taking a rival opens a new branch
};

// Returns the settings that change what the model writes, as a text.
export function writingOf({ tint, keep, ...settings }) {
  return JSON.stringify(settings);
}

let keys = 0;

export function newBranch(tokens = [], start = 0, note = "", own = null) {
  return { key: ++keys, tokens, start, note, own };
}

export class History {
  constructor() {
    this.page = { branches: [newBranch()], active: 0 };
    this.past = [];
    this.future = [];
  }

  get branch() {
    return this.page.branches[this.page.active];
  }

  find(key) {
    return this.page.branches.find((branch) => branch.key === key);
  }

  numberOf(key) {
    return this.page.branches.findIndex((branch) => branch.key === key);
  }

  // Whether there is a passage that could be written again.
  get hasPassage() {
    return this.branch.tokens.length > 0 && this.branch.note !== "";
  }

  // Makes a branch the active one. Returns the settings by which it was compared, or null.
  activate(key) {
    this.page = { ...this.page, active: this.numberOf(key) };
    return this.branch.own;
  }

  // Replaces the page; undo returns to the one before.
  commit(page) {
    this.past.push(this.page);
    this.future = [];
    this.page = page;
  }

  // Replaces the page as a part of the last change, for example with one more token.
  amend(page) {
    this.page = page;
  }

  undo() {
    if (this.past.length) [this.page, this.future] = [this.past.pop(), [this.page, ...this.future]];
  }

  redo() {
    if (!this.future.length) return;
    this.past.push(this.page);
    [this.page, ...this.future] = this.future;
  }
}

// Returns the page with some fields of one branch changed.
export function changed(page, key, fields) {
  const branches = page.branches.map((branch) => (branch.key === key ? { ...branch, ...fields } : branch));
  return { ...page, branches };
}

// Returns the page with one branch replaced by others, the first of which becomes active.
export function replaced(page, key, others) {
  const at = page.branches.findIndex((branch) => branch.key === key);
  return { branches: page.branches.toSpliced(at, 1, ...others), active: at };
}

export function without(page, key) {
  const branches = page.branches.filter((branch) => branch.key !== key);
  return { branches, active: Math.min(page.active, branches.length - 1) };
}

// ---- the address --------------------------------------------------------------------------------------------------

// Returns the fragment of an address for a text and the settings that differ from the defaults. `start` is in
// characters, because a text is tokenized again when the address is opened.
export function toFragment(branch, settings) {
  const fields = new URLSearchParams();
  const text = textOf(branch.tokens);
  if (text) fields.set("text", text);
  // without a character that the passage completes: a text cannot be cut inside it
  const start = shownTexts(branch.tokens.slice(0, branch.start)).join("").length;
  if (text && start) fields.set("start", start);
  for (const [name, value] of Object.entries(settings)) {
    if (value !== DEFAULTS[name] && value !== null) fields.set(name, value);
  }
  return fields.toString();
}

// Returns {text, start, settings} of a fragment. What is not understood is ignored, so that old links still open.
export function fromFragment(fragment) {
  const fields = new URLSearchParams(fragment.replace(/^#/, ""));
  const settings = {};
  for (const [name, usual] of Object.entries(DEFAULTS)) {
    const value = fields.get(name);
    if (value === null) continue;
    const isNumber = typeof usual === "number" || usual === null;
    if (isNumber && value !== "" && Number.isFinite(Number(value))) settings[name] = Number(value);
    if (!isNumber) settings[name] = typeof usual === "boolean" ? value === "true" : value;
  }
  return { text: fields.get("text") ?? "", start: Number(fields.get("start")) || 0, settings };
}
