// Lets the model write: one stream per branch, each of which can be stopped.

import { complete, post } from "./api.js";
import { count, say, unwarn, warn } from "./dom.js";
import { traces } from "./settings.js";
import { changed } from "./state.js";
import { keptBefore, textOf } from "./tokens.js";

export class Writer {
  // history: a History. card: the model card. changed(): called after each token.
  constructor(history, card, onChange) {
    Object.assign(this, { history, card, onChange });
    this.streams = new Map(); // key of a branch -> AbortController
    this.speed = null; // {rate: tokens per second, first: seconds to the first token} of the last passage
  }

  get isWriting() {
    return this.streams.size > 0;
  }

  stop() {
    for (const controller of this.streams.values()) controller.abort();
  }

  // Returns the tokens of a text that the reader typed. isFirst: whether it starts the text.
  async tokenize(text, isFirst) {
    if (!text) return [];
    const { tokens } = await post("v1/tokenize", isFirst ? { text } : { text, inside: true });
    const adds = isFirst && textOf(tokens) === ` ${text}`; // some tokenizers add a space, which is not part of the text
    if (adds) tokens[0].bytes = tokens[0].bytes.slice(1);
    return tokens.map((token) => ({ ...token, kind: "typed", steps: 0, p: 1, trace: null }));
  }

  // Returns the tokens and the start of the last passage of a branch after an edit: only what has changed is tokenized
  // again. If the edit was before the passage, it still begins where it did. If it was in both, there is none any more.
  async edited(branch, text) {
    const { kept, tail } = keptBefore(branch.tokens, text);
    const passage = textOf(branch.tokens.slice(branch.start));
    if (kept >= branch.start || !text.endsWith(passage)) {
      const tokens = [...branch.tokens.slice(0, kept), ...(await this.tokenize(tail, kept === 0))];
      return kept < branch.start ? { tokens, start: kept, note: "" } : { tokens };
    }
    const before = keptBefore(branch.tokens.slice(0, branch.start), text.slice(0, text.length - passage.length));
    const fresh = await this.tokenize(before.tail, before.kept === 0);
    const prompt = [...branch.tokens.slice(0, before.kept), ...fresh];
    const after = await this.tokenize(passage, prompt.length === 0);
    return { tokens: [...prompt, ...after], start: prompt.length };
  }

  // Writes one passage at the end of a branch, whose tokens go to the server as ids. Problems appear above the page.
  async write(key, settings) {
    const controller = new AbortController();
    this.streams.set(key, controller);
    warn("");
    const begun = performance.now();
    let [first, n, busy] = [null, 0, ""];
    const sayBusy = (seconds) => warn((busy = busyFor(seconds)));
    try {
      for await (const { tokens } of complete(this.request(key, settings), controller.signal, sayBusy)) {
        const branch = this.history.find(key);
        if (!branch || controller.signal.aborted) break; // closed, or stopped with events still to come
        if (first === null) unwarn(busy);
        first ??= performance.now();
        n += tokens.length;
        this.history.amend(changed(this.history.page, key, { tokens: [...branch.tokens, ...tokens.map(asWritten)] }));
        this.measure(begun, first, n);
        this.onChange();
      }
    } catch (error) {
      if (error.name !== "AbortError") warn(error.message);
    } finally {
      unwarn(busy);
      if (this.streams.get(key) === controller) this.streams.delete(key); // a new stream may have taken its place
      say(`${controller.signal.aborted ? "Stopped" : "Done"}: ${count(n, "token")} written.`);
      this.onChange();
    }
  }

  request(key, settings) {
    const { start, context } = this.card;
    const ids = [...start, ...seenBy(this.history.find(key).tokens, context - start.length).map(({ id }) => id)];
    return {
      model: this.card.name,
      prompt: ids.length ? ids : "",
      max_tokens: settings.length,
      temperature: settings.temperature,
      top_p: settings.top_p,
      seed: settings.seed,
      recursion: {
        depth: settings.depth,
        exit: settings.exit || null,
        threshold: settings.exit ? settings.threshold : null,
        trace: traces(this.card) && settings.trace ? settings.trace : null,
      },
    };
  }

  // Tokens that arrive together, as those of a short passage may, say nothing about the time between them.
  measure(begun, first, n) {
    const [all, later] = [begun, first].map((from) => (performance.now() - from) / 1000);
    const rate = later > 0.02 ? (n - 1) / later : n / all;
    this.speed = { rate: n > 1 ? rate : null, first: (first - begun) / 1000 };
  }
}

function busyFor(seconds) {
  return `The server is busy: trying again in ${count(seconds, "second")}. Stop gives up.`;
}

// Returns the tokens that the model gets: a text that is longer than the context is cut at its start, as generate.py
// cuts it while it writes.
function seenBy(tokens, room) {
  return tokens.length <= room ? tokens : tokens.slice(-Math.floor(room / 2));
}

function asWritten(token) {
  return { ...token, kind: "written" };
}

// Says in a few words how a passage is written.
export function noteOf(settings, card) {
  const depth = settings.depth ?? card.depth;
  const parts = [`depth ${depth}`, `seed ${settings.seed}`];
  if (card.max_depth === 1) parts.shift();
  if (settings.exit)
    parts.splice(1, 0, `exit ${settings.exit}${settings.threshold === null ? "" : ` ${settings.threshold}`}`);
  if (settings.temperature === 0) parts.splice(-1, 1, "greedy");
  return parts.join(" · ");
}
