// Shows what the model thought about one token: its likeliest rivals after every recursion step.

import { count, h, percent, svg } from "./dom.js";
import { candidates, leaders, nameOf, settledAt } from "./tokens.js";

const WIDTH = 300; // of the picture, in its own units; the page scales it
const LEFT = 22; // for the numbers of the steps
const RIGHT = 18; // for the halting probabilities
const RIVALS = 8; // that are offered

// Fills `place` with a token. index: its number in the text, from 0. act: functions take(candidate), cut(), edit(),
// write(); keep: whether a rival opens a new branch, and setKeep(flag).
export function inspect(place, token, index, act) {
  if (!token) {
    place.replaceChildren(h("h2", {}, "No token selected"), hint());
    return;
  }
  const parts = [head(token, index, act)];
  if (token.trace?.length) parts.push(why(token), picture(token), rivals(token, act), stepTable(token));
  else if (token.kind === "typed")
    parts.push(h("p", { class: "quiet" }, "Typed, or opened with the page: not predicted."));
  else if (token.kind === "written") parts.push(h("p", { class: "quiet" }, "Written without a trace."));
  parts.push(actions(act));
  place.replaceChildren(...parts);
}

function hint() {
  return h(
    "p",
    { class: "quiet" },
    "Point at a token of the text, or tap it, to see what the model thought after every recursion step, and to let it",
    " take another road.",
  );
}

function head(token, index, act) {
  const close = h("button", { class: "close", "aria-label": "Close this panel", click: act.close }, "×");
  const facts = [`token ${index + 1}`, `id ${token.id}`];
  if (token.kind === "written") facts.push(count(token.steps, "step"));
  if (token.kind === "typed") facts.push("typed");
  if (token.kind === "taken") facts.push("chosen by you");
  const change = token.kind === "written" && settledAt(token);
  if (change && token.trace.length > 1) facts.push(`decided at step ${change}`);
  return h(
    "header",
    {},
    h(
      "h2",
      {},
      h("code", {}, nameOf(token)),
      token.kind === "typed" ? null : h("span", {}, shareOf(token.p, token)),
      close,
    ),
    h("p", { class: "quiet" }, facts.join(" · ")),
  );
}

const RANKS = ["", "the likeliest", "the second likeliest", "the third likeliest"];

// Says in a sentence or two why this token is in the text.
function why(token) {
  const changes = leaders(token).filter(([id], s, all) => s === 0 || id !== all[s - 1][0]);
  const names = new Map(candidates(token).map((candidate) => [candidate.id, nameOf(candidate)]));
  const last = token.trace.at(-1).top;
  const rank = last.findIndex(([id]) => id === token.id) + 1;
  const place = RANKS[rank] || (rank ? `number ${rank} of the likeliest` : `not among the ${last.length} likeliest`);
  const how = { written: rank === 1 ? "" : ", and was drawn by chance", taken: ", and you chose it" }[token.kind];
  const parts = [`It was ${place}${how}.`];
  if (changes.length > 1) {
    const shown = changes.slice(0, 4).flatMap(([id], i) => [...(i ? [", then "] : []), h("code", {}, names.get(id))]);
    parts.push(" From step to step, the model preferred ", ...shown, changes.length > 4 ? ", …" : ".");
  }
  return h("p", { class: "why" }, parts);
}

// ---- the picture --------------------------------------------------------------------------------------------------

// Each row is the prediction after a step: a band per candidate, as wide as its probability.
function picture(token) {
  const steps = token.trace.length;
  const row = Math.min(26, Math.max(9, 260 / steps));
  const height = steps * row + 34;
  const label = `Probabilities after ${count(steps, "step")}; the table below has the same figures.`;
  return h(
    "figure",
    {},
    svg(
      "svg",
      { viewBox: `0 0 ${WIDTH} ${height}`, class: "bands", role: "img", "aria-label": label },
      bands(token, row),
      numbers(steps, row),
      leaderNames(token, row),
      halting(token, row),
      entropy(token, steps * row + 6),
    ),
    caption(token),
  );
}

function across(p) {
  return LEFT + p * (WIDTH - LEFT - RIGHT);
}

function ordered(token) {
  const list = candidates(token);
  return [...list.filter(({ role }) => role !== "other"), ...list.filter(({ role }) => role === "other").slice(0, 4)];
}

function bands(token, row) {
  const steps = token.trace.length;
  const ground = svg("rect", { x: LEFT, y: 0, width: across(1) - LEFT, height: (steps - 0.2) * row, class: "ground" });
  const left = new Array(steps).fill(0);
  let [leader, other] = [0, 0];
  const shapes = ordered(token).map(({ p, role }) => {
    const right = left.map((start, s) => start + p[s]);
    const side = (edge) =>
      edge.flatMap((x, s) => [
        [across(x), s * row],
        [across(x), (s + 0.8) * row],
      ]);
    const points = [...side(left), ...side(right).reverse()].map(([x, y]) => `${x.toFixed(1)},${y.toFixed(1)}`);
    right.forEach((x, s) => (left[s] = x));
    const name = { written: "written", leader: `rival${leader % 3}`, other: `other${other % 2}` }[role];
    if (role === "leader") leader += 1;
    if (role === "other") other += 1;
    return svg("polygon", { points: points.join(" "), class: name });
  });
  return [ground, ...shapes];
}

function numbers(steps, row) {
  const every = Math.ceil(12 / row);
  const shown = [...Array(steps).keys()].filter((s) => s % every === 0);
  return shown.map((s) => svg("text", { x: LEFT - 6, y: (s + 0.4) * row, class: "number" }, s + 1));
}

// Names the likeliest token at the first step, and wherever it changes.
function leaderNames(token, row) {
  if (row < 12) return [];
  const order = ordered(token);
  const ids = leaders(token).map(([id]) => id);
  return ids.flatMap((id, s) => {
    if (s > 0 && ids[s - 1] === id) return [];
    const at = order.findIndex((candidate) => candidate.id === id);
    const before = order.slice(0, at).reduce((sum, { p }) => sum + p[s], 0);
    const name = clip(nameOf(order[at]), 16);
    const x = Math.min(across(before) + 4, across(1) - 4 - 7.3 * name.length);
    return [svg("text", { x: Math.max(LEFT + 4, x), y: (s + 0.4) * row, class: "name" }, name)];
  });
}

function halting(token, row) {
  return token.trace.flatMap(({ halt }, s) => {
    if (halt === null) return [];
    const place = { cx: WIDTH - RIGHT / 2, cy: (s + 0.4) * row, r: Math.min(5, row / 3) };
    return [
      svg("circle", { ...place, class: "halt" }),
      svg("circle", { ...place, class: "halt-fill", "fill-opacity": halt.toFixed(2) }),
    ];
  });
}

function entropy(token, top) {
  const most = Math.max(1, ...token.trace.map((step) => step.entropy));
  const values = token.trace.map((step) => step.entropy);
  const points = (values.length === 1 ? [...values, ...values] : values).map((value, s, all) => [
    across(s / (all.length - 1)),
    top + 24 * (1 - value / most),
  ]);
  const line = points.map(([x, y]) => `${x.toFixed(1)},${y.toFixed(1)}`).join(" ");
  return [
    svg("polygon", { points: `${LEFT},${top + 26} ${line} ${across(1)},${top + 26}`, class: "entropy-area" }),
    svg("polyline", { points: line, class: "entropy" }),
  ];
}

function caption(token) {
  const { entropy, halt } = token.trace.at(-1);
  const parts = [h("span", { class: "key entropy" }, `entropy ${entropy.toFixed(1)} bits`)];
  if (halt !== null) parts.push(h("span", { class: "key halt" }, `halting ${halt.toFixed(2)}`));
  return h("figcaption", { class: "quiet" }, "after the last step: ", parts);
}

// ---- rivals and steps ---------------------------------------------------------------------------------------------

function rivals(token, act) {
  const last = token.trace.length - 1;
  const list = candidates(token)
    .map((candidate, index) => ({ ...candidate, index }))
    .sort((a, b) => b.p[last] - a.p[last] || Math.max(...b.p) - Math.max(...a.p))
    .slice(0, RIVALS);
  const most = Math.max(...list.map(({ p }) => p[last]));
  let leader = 0;
  const colours = new Map(
    candidates(token).map(({ id, role }) => [id, role === "leader" ? `rival${leader++ % 3}` : role]),
  );
  return h(
    "section",
    { class: "rivals" },
    h("h3", {}, "Take another road"),
    h(
      "ol",
      {},
      list.map((candidate) => h("li", {}, rivalButton(token, candidate, most, colours.get(candidate.id), act))),
    ),
    h(
      "label",
      { class: "check" },
      h("input", { type: "checkbox", checked: act.keep, change: (event) => act.setKeep(event.target.checked) }),
      "keep this text beside the new one",
    ),
  );
}

// A token that is not among the likeliest after the last step has less than the last of them.
function shareOf(p, token) {
  const last = token.trace?.at(-1)?.top.at(-1);
  return p > 0 || !last ? percent(p) : `< ${percent(last[2])}`.replace("< <", "<");
}

function rivalButton(token, candidate, most, colour, act) {
  const p = candidate.p.at(-1);
  const share = shareOf(p, token);
  const isWritten = candidate.id === token.id;
  const bar = svg(
    "svg",
    { viewBox: "0 0 100 6", preserveAspectRatio: "none", class: "bar-of", "aria-hidden": "true" },
    svg("rect", { width: (100 * p) / most, height: 6, class: colour }),
  );
  const name = nameOf(candidate);
  const label = isWritten ? `${name}, ${share}, as it is in the text` : `Take ${name}, ${share}`;
  return h(
    "button",
    {
      class: isWritten ? "rival same" : "rival",
      "aria-label": label,
      "aria-disabled": isWritten ? "true" : null,
      click: isWritten ? null : () => act.take(candidate),
    },
    h("code", {}, clip(name, 18)),
    bar,
    h("span", {}, share),
  );
}

function stepTable(token) {
  const hasHalt = token.trace.some(({ halt }) => halt !== null);
  const heads = ["step", "likeliest", "its share", "entropy", ...(hasHalt ? ["halting"] : [])];
  const names = new Map(candidates(token).map((candidate) => [candidate.id, nameOf(candidate)]));
  const rows = token.trace.map((step, s) => {
    const [id, , p] = step.top[0];
    return [s + 1, names.get(id), percent(p), step.entropy.toFixed(2), ...(hasHalt ? [step.halt?.toFixed(2)] : [])];
  });
  return h(
    "details",
    { class: "steps" },
    h("summary", {}, "Step by step"),
    h(
      "table",
      {},
      h(
        "thead",
        {},
        h(
          "tr",
          {},
          heads.map((head) => h("th", { scope: "col" }, head)),
        ),
      ),
      h(
        "tbody",
        {},
        rows.map((row) =>
          h(
            "tr",
            {},
            row.map((cell) => h("td", {}, cell)),
          ),
        ),
      ),
    ),
  );
}

function actions(act) {
  return h(
    "div",
    { class: "actions" },
    h("button", { click: act.write, title: "Cut the text after this token and write on" }, "Write on from here"),
    h("button", { click: act.cut, title: "Remove everything after this token" }, "Cut after it"),
    h("button", { click: act.edit }, "Edit here"),
  );
}

function clip(text, most) {
  return text.length > most ? `${text.slice(0, most - 1)}…` : text;
}
