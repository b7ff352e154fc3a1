// What can be computed from a list of tokens, without the page.
//
// A token is {id, text, bytes, kind, steps, p, trace}. bytes: its UTF-8 bytes, perhaps part of a character.
// kind: "typed", "written" by the model, or "taken": a rival that the reader chose. steps: recursion steps it took.
// p: its probability after the last of them. trace: null, or per step {halt, entropy, top: [[id, text, p], ...]}.

export const LEVELS = 7; // of the scale of tints, t0 to t6 in style.css

// Returns the text that each token completes. A token that ends inside a character gets "" for that character; the
// token that completes it gets the character.
export function shownTexts(tokens) {
  const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  return tokens.map((token) => decoder.decode(Uint8Array.from(token.bytes), { stream: true }));
}

export function textOf(tokens) {
  const bytes = tokens.flatMap((token) => token.bytes);
  return new TextDecoder("utf-8", { ignoreBOM: true }).decode(Uint8Array.from(bytes));
}

// Returns a text on one line: white space as signs, long runs of it as counts.
export function visible(text) {
  const signs = { " ": "␣", "\n": "↵", "\t": "⇥" };
  return text
    .replace(/([ \n\t])\1{3,}/g, (run) => `${signs[run[0]]}×${run.length}`)
    .replace(/[ \n\t]/g, (c) => signs[c])
    .replace(/[\p{Cc}\p{Cs}]/gu, (c) => `<U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}>`);
}

// The same in words, for screen readers.
export function spoken(text) {
  if (text.trim()) return text.trim();
  const names = [
    ["\n", "line break"],
    ["\t", "tab"],
    [" ", "space"],
  ];
  const parts = names.map(([c, name]) => [text.split(c).length - 1, name]).filter(([n]) => n);
  return parts.map(([n, name]) => (n === 1 ? name : `${n} ${name}s`)).join(", ") || "part of a character";
}

// Returns how a token is called outside the text, even if it is only a part of a character or a special token.
export function nameOf(token) {
  if (!token.bytes.length) return leaders(token).find(([id]) => id === token.id)?.[1] || token.text || `<${token.id}>`;
  try {
    return visible(new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(Uint8Array.from(token.bytes)));
  } catch {
    return token.bytes.map((byte) => `<${byte.toString(16).toUpperCase().padStart(2, "0")}>`).join("");
  }
}

// Returns how many tokens at the start of `tokens` stay as they are when the text is edited into `text`, and the rest
// of the text, which has to be tokenized. Typed tokens before the change are tokenized again with it, so that a prompt
// always has the tokens that the tokenizer gives it; what the model wrote, or the reader took, keeps its ids.
export function keptBefore(tokens, text) {
  const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  let [kept, at, start] = [0, 0, 0];
  for (const [index, token] of tokens.entries()) {
    const piece = decoder.decode(Uint8Array.from(token.bytes), { stream: true });
    if (!text.startsWith(piece, at)) break;
    at += piece.length;
    if (isWhole(tokens, index)) [kept, start] = [index + 1, at];
  }
  if (kept < tokens.length || start < text.length) {
    while (kept > 0 && tokens[kept - 1].kind === "typed") kept -= 1;
    start = textOf(tokens.slice(0, kept)).length;
  }
  return { kept, tail: text.slice(start) };
}

// Returns whether a character ends where a token ends.
function isWhole(tokens, index) {
  const next = tokens[index + 1];
  const last = tokens
    .slice(Math.max(0, index - 3), index + 1)
    .flatMap((token) => token.bytes)
    .slice(-4);
  const lead = last.findLastIndex((byte) => byte < 0x80 || byte >= 0xc0);
  if (lead < 0) return true;
  const needed = last[lead] < 0x80 ? 1 : last[lead] < 0xe0 ? 2 : last[lead] < 0xf0 ? 3 : 4;
  return last.length - lead >= needed || (next?.bytes.length > 0 && (next.bytes[0] & 0xc0) !== 0x80);
}

// Returns the likeliest token of each step: [id, text, p].
export function leaders(token) {
  return (token.trace ?? []).map((step) => step.top[0]);
}

// Returns the step (from 1) after which the likeliest token no longer changed; null without a trace.
export function settledAt(token) {
  const ids = leaders(token).map(([id]) => id);
  return ids.length ? ids.findLastIndex((id) => id !== ids.at(-1)) + 2 : null;
}

// Returns the candidates of a token: the token itself, then those that led at some step, then others, each as
// {id, text, bytes, p: a list with its probability after each step, role: "written", "leader" or "other"}.
// A candidate that is not among the likeliest of a step counts as 0 there, unless it is the written token.
export function candidates(token) {
  const found = new Map([[token.id, { id: token.id, text: token.text, bytes: token.bytes }]]);
  for (const [id, text] of [...leaders(token), ...token.trace.flatMap((step) => step.top)]) {
    if (!found.has(id)) found.set(id, { id, text, bytes: bytesOf(text) });
  }
  const led = new Set(leaders(token).map(([id]) => id));
  // a trace knows the share of the token that was written; in place of a taken one, that was another token
  const written = token.kind === "written" ? token.id : null;
  const share = (step, id) => (id === written && step.p) || (step.top.find((each) => each[0] === id)?.[2] ?? 0);
  const list = [...found.values()].map((candidate) => ({
    ...candidate,
    p: token.trace.map((step) => share(step, candidate.id)),
    role: candidate.id === token.id ? "written" : led.has(candidate.id) ? "leader" : "other",
  }));
  list[0].p[list[0].p.length - 1] = token.p;
  const others = list.filter(({ role }) => role === "other").sort((a, b) => Math.max(...b.p) - Math.max(...a.p));
  return [...list.filter(({ role }) => role !== "other"), ...others];
}

// Returns the bytes of a candidate's text: bytes:\xe3\x81 stands for a part of a character; <eos> and <7> have none.
export function bytesOf(text) {
  if (/^<(pad|unk|bos|eos|\d+)>$/.test(text)) return [];
  const part = /^bytes:((?:\\x[0-9a-f]{2})+)$/.exec(text);
  if (part) return part[1].match(/[0-9a-f]{2}/g).map((digits) => parseInt(digits, 16));
  return [...new TextEncoder().encode(text)];
}

// Returns the place of a token on the scale of tints, 0 to LEVELS - 1, or null if it has no tint.
export function level(token, tint, deepest) {
  if (tint === "none" || token.kind !== "written") return null;
  if (tint === "certainty") return Math.min(LEVELS - 1, Math.floor(LEVELS * token.p));
  const step = tint === "settled" ? settledAt(token) : token.steps;
  return step === null ? null : Math.round(((LEVELS - 1) * (step - 1)) / Math.max(1, deepest - 1));
}

// Returns the number of tokens that two texts have in common at their start; null if one continues the other.
export function partAt(one, other) {
  const shorter = Math.min(one.length, other.length);
  for (let i = 0; i < shorter; i++) if (one[i].id !== other[i].id) return i;
  return null;
}

// Returns {tokens, mean steps, most steps, last step in which the likeliest token of some token changed} of what was
// written.
export function figures(tokens) {
  const written = tokens.filter((token) => token.kind === "written");
  const settled = written.map(settledAt).filter((step) => step !== null);
  return {
    tokens: written.length,
    steps: written.reduce((sum, token) => sum + token.steps, 0) / Math.max(1, written.length),
    most: Math.max(0, ...written.map((token) => token.steps)),
    settled: settled.length ? Math.max(...settled) : null,
  };
}
