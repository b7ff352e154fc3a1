// The view of texts: connects text, settings and inspector.

import { byId, copyLink, h, say, setAddress, warn } from "./dom.js";
import { showCard, showLegend } from "./head.js";
import { inspect } from "./inspector.js";
import { connectPair } from "./pair.js";
import { among, buildSettings, fitting } from "./settings.js";
import {
  changed, DEFAULTS, fromFragment, History, newBranch, replaced, toFragment, without, writingOf,
} from "./state.js";
import { figuresOf, partingOf, TextView } from "./text_view.js";
import { textOf } from "./tokens.js";
import { noteOf, Writer } from "./writer.js";

const NARROW = matchMedia("(max-width: 70rem)"); // as in style.css: settings and inspector are below the text

const STALE = "The settings have changed: Again writes the last passage with them.";

export class WritingPage {
  constructor(card) {
    this.card = card;
    this.defaults = { ...DEFAULTS, length: Math.min(DEFAULTS.length, card.max_tokens) };
    this.settings = { ...this.defaults };
    this.history = new History();
    this.selected = null; // {key, index} of the token that was clicked or focused
    this.hovered = null;
    this.inspected = {}; // {token, key, index} of the token in the panel
    this.used = null; // the settings of the last passage, as writingOf() gives them
    this.apart = {}; // while a compared text is active: what the settings by which it was compared are otherwise
    this.writer = new Writer(this.history, card, () => this.refresh());
    this.view = new TextView(byId("branches"), card.example, {
      select: (key, index) => this.select(key, index),
      preview: (key, index) => this.preview(key, index),
      edit: (key, index) => this.edit(key, index),
      edited: (key, text, write) => this.edited(key, text, write),
      rivals: () => byId("inspector").querySelector(".rival:not(.same)")?.focus(),
      close: (key) => this.close(key),
      activate: (key) => this.activate(key),
    });
    this.showSettings = buildSettings(byId("settings"), this.settings, card, (name) => this.settingsChanged(name));
    this.fragment = ""; // of the address that shows this text
    this.connect();
  }

  connect() {
    const actions = {
      write: () => this.write(),
      stop: () => this.writer.stop(),
      again: () => this.again(0),
      reseed: () => this.again(1),
      undo: () => this.move("undo"),
      redo: () => this.move("redo"),
      edit: () => this.toggleEdit(),
      link: () => this.copyLink(),
    };
    for (const [id, action] of Object.entries(actions)) byId(id).addEventListener("click", action);
    connectPair(this.settings, this.card, (name, values) => this.compare(name, values));
    document.addEventListener("keydown", (event) => this.onKey(event));
    const fold = () => (byId("rail").open = !NARROW.matches);
    NARROW.addEventListener("change", fold);
    fold();
  }

  onKey(event) {
    if (byId("writer").hidden) return;
    const isField = event.target.matches("textarea, input, select");
    const command = event.ctrlKey || event.metaKey;
    const key = event.key.toLowerCase();
    if (event.key === "Escape" && this.writer.isWriting) this.writer.stop();
    else if (event.key === "Escape" && byId("inspector").contains(event.target)) this.focusSelected();
    else if (command && event.key === "Enter") this.write();
    else if (command && key === "z" && !isField) this.move(event.shiftKey ? "redo" : "undo");
    else if (command && key === "y" && !isField) this.move("redo");
    else return;
    event.preventDefault();
  }

  // ---- what happens -------------------------------------------------------------------------------------------------

  commit(page) {
    this.writer.stop();
    this.history.commit(page);
    this.refresh();
    this.remember();
  }

  async move(direction) {
    this.writer.stop();
    if (!(await this.endEdit())) return; // an edit that is not finished is the last change
    this.history[direction]();
    this.follow(this.history.branch.key);
    this.selected = this.hovered = null;
    this.refresh();
    this.remember();
  }

  select(key, index) {
    this.hovered = null;
    if (this.selected?.key === key && this.selected.index === index) return;
    this.selected = { key, index };
    this.view.reveal(key, index);
    if (this.history.branch.key !== key) {
      this.follow(key);
      this.remember();
    }
    this.refresh();
  }

  preview(key, index) {
    if (NARROW.matches) return; // the panel would cover the token that is pointed at
    this.hovered = key === null ? null : { key, index };
    this.showInspector();
  }

  deselect() {
    this.focusSelected();
    this.selected = this.hovered = null;
    this.refresh();
  }

  activate(key) {
    this.follow(key);
    this.selected = null;
    this.refresh();
    this.remember();
  }

  // Makes a text the active one. If it was compared, link and Again repeat the depth or seed that it was written with.
  // When comparing is over, these are again what they were.
  follow(key) {
    const own = this.history.activate(key);
    if (own) this.apart = { ...among(this.settings, own), ...this.apart };
    if (!Object.keys(this.apart).length) return;
    Object.assign(this.settings, this.apart, own);
    if (!own) this.apart = {};
    this.used = writingOf(this.settings);
    this.showSettings();
  }

  close(key) {
    this.commit(without(this.history.page, key));
    this.activate(this.history.branch.key);
  }

  focusSelected() {
    if (this.selected) this.view.focus(this.selected.key, this.selected.index);
  }

  toggleEdit() {
    if (this.view.editing) this.view.finish(false);
    else this.edit(this.history.branch.key, this.selected?.index ?? this.history.branch.tokens.length - 1);
  }

  edit(key, index) {
    this.writer.stop();
    if (this.history.branch.key !== key) this.activate(key);
    this.view.edit(key, index, textOf(this.history.find(key).tokens)); // the newest tokens may not be drawn yet
    this.refresh();
  }

  // Takes over a text that is being edited. Returns whether that went well; if not, the reader still edits.
  async endEdit() {
    await this.view.finish(false);
    return !this.view.editing;
  }

  // Takes over an edited text.
  async edited(key, text, write) {
    const branch = this.history.find(key);
    try {
      if (text !== textOf(branch.tokens)) {
        const fields = await this.writer.edited(branch, text);
        this.selected = null;
        if (write) fields.start = fields.tokens.length;
        this.commit(changed(this.history.page, key, fields));
      }
      this.refresh();
      if (write) this.writeOn(key);
    } catch (error) {
      warn(error.message);
      this.view.edit(key, 0, text); // nothing that was typed is lost
    }
  }

  write() {
    if (this.writer.isWriting) return;
    if (this.view.editing) this.view.finish(true);
    else this.writeOn(this.history.branch.key);
  }

  // Writes a passage at the end of a branch, or, with `tokens`, in place of all that follows them.
  async writeOn(key, tokens = this.history.find(key).tokens, settings = this.settings) {
    const { own } = this.history.find(key);
    const how = { note: noteOf(settings, this.card), own: own && among(settings, own) };
    const fields = { tokens, start: tokens.length, ...how };
    this.commit(changed(this.history.page, key, fields));
    await this.run(key, settings);
  }

  async run(key, settings) {
    this.used = writingOf(this.settings);
    try {
      await this.writer.write(key, { ...settings });
    } finally {
      this.remember();
    }
  }

  again(step) {
    if (this.view.editing) return this.write();
    const { key, tokens, start } = this.history.branch;
    this.settings.seed += step;
    this.showSettings();
    this.selected = null;
    this.writeOn(key, tokens.slice(0, start));
  }

  // Cuts the text before a token, puts the rival there, and writes on from it.
  take(key, index, rival) {
    const branch = this.history.find(key);
    const token = { ...rival, kind: "taken", steps: 0, p: rival.p.at(-1), trace: branch.tokens[index].trace };
    const tokens = [...branch.tokens.slice(0, index), token];
    const ends = !token.bytes.length; // a special token: there is nothing to write after it
    let at = key;
    if (this.settings.keep) {
      const own = branch.own && among(this.settings, branch.own);
      const other = newBranch(tokens, tokens.length, noteOf(this.settings, this.card), own);
      this.commit({ ...replaced(this.history.page, key, [branch, other]), active: this.history.numberOf(key) + 1 });
      at = other.key;
      if (!ends) this.run(at, this.settings);
    } else if (ends) this.commit(changed(this.history.page, key, { tokens }));
    else this.writeOn(key, tokens);
    this.returnTo(at, index);
  }

  // Puts the focus on a token, which the panel then shows. On a narrow screen, the panel would cover the new text.
  returnTo(key, index) {
    this.selected = NARROW.matches ? null : { key, index };
    this.refresh();
    requestAnimationFrame(() => this.view.focus(key, this.selected ? index : null));
  }

  // ---- two texts side by side ---------------------------------------------------------------------------------------

  // Writes the last passage once per value of a setting, each in a branch of its own. Other branches are closed; undo
  // opens them again.
  async compare(name, values) {
    if (!(await this.endEdit())) return;
    const { tokens, start, own } = this.history.branch;
    const prompt = this.history.hasPassage && start < tokens.length ? tokens.slice(0, start) : tokens;
    const runs = values.map((value) => ({ ...this.settings, [name]: value }));
    const branches = runs.map((settings, side) => {
      const now = { ...(own && among(this.settings, own)), [name]: values[side] };
      return newBranch(prompt, prompt.length, noteOf(settings, this.card), now);
    });
    this.selected = null;
    this.commit({ branches, active: 0 });
    this.follow(branches[0].key);
    await Promise.all(branches.map((branch, side) => this.run(branch.key, runs[side])));
    say(partingOf(this.history.page));
  }

  // ---- what is shown ------------------------------------------------------------------------------------------------

  // Whether writing the last passage again would use other settings.
  get isStale() {
    const isUsed = this.used === null || this.used === writingOf(this.settings);
    return !isUsed && this.history.hasPassage && !this.view.editing && !this.writer.isWriting;
  }

  settingsChanged(name) {
    delete this.apart[name];
    if (this.isStale) say(STALE);
    this.refresh();
    this.remember();
  }

  refresh() {
    if (this.drawn) return;
    this.drawn = requestAnimationFrame(() => {
      this.drawn = null;
      this.draw();
    });
  }

  draw() {
    if (byId("writer").hidden) return;
    const { page } = this.history;
    const written = page.branches.flatMap(({ tokens }) => tokens.filter(({ kind }) => kind === "written"));
    const deepest = Math.max(this.settings.depth ?? this.card.depth, ...written.map(({ steps }) => steps));
    const { tint } = this.settings;
    this.view.show(page, { tint, deepest, writing: this.writer.streams, selected: this.selected });
    if (!page.branches.some(({ tokens }) => tokens.length) && !this.view.editing && !this.writer.isWriting) {
      this.view.edit(this.history.branch.key, 0);
    }
    this.showButtons();
    this.showInspector();
    showLegend(
      tint,
      deepest,
      page.branches.some(({ tokens }) => tokens.some(({ kind }) => kind === "taken")),
    );
    const news = this.writer.isWriting ? "" : this.isStale ? STALE : partingOf(page);
    byId("figures").replaceChildren(...(news ? [h("strong", {}, news), " "] : []), figuresOf(page, this.card));
    showCard(this.card, {
      tokens: page.branches.reduce((sum, b) => sum + b.tokens.length, 0),
      speed: this.writer.speed,
    });
    if (this.writer.isWriting) this.view.follow(this.history.branch.key);
  }

  showButtons() {
    const { isWriting } = this.writer;
    const { past, future } = this.history;
    const editing = Boolean(this.view.editing);
    byId("write").hidden = isWriting;
    byId("stop").hidden = !isWriting;
    byId("again").disabled = byId("reseed").disabled = !this.history.hasPassage || editing;
    byId("again").classList.toggle("due", this.isStale);
    byId("undo").disabled = !past.length;
    byId("redo").disabled = !future.length;
    byId("edit").setAttribute("aria-pressed", String(editing));
  }

  showInspector() {
    // a token of a text that is being edited cannot be acted on
    const at = [this.hovered, this.selected].find((each) => each && each.key !== this.view.editing?.key);
    const token = at && this.history.find(at.key)?.tokens[at.index];
    const { inspected } = this; // texts beside each other share tokens
    if (token && inspected.token === token && inspected.key === at.key && inspected.index === at.index) return;
    this.inspected = { token, ...at };
    byId("inspector").classList.toggle("some", Boolean(token));
    inspect(byId("inspector"), token, at?.index, {
      take: (rival) => this.take(at.key, at.index, rival),
      cut: () => this.commit(changed(this.history.page, at.key, this.upTo(at))),
      write: () => this.writeOn(at.key, this.upTo(at).tokens),
      edit: () => this.edit(at.key, at.index),
      close: () => this.deselect(),
      keep: this.settings.keep,
      setKeep: (flag) => (this.settings.keep = flag),
    });
  }

  upTo({ key, index }) {
    const { tokens, start } = this.history.find(key);
    return { tokens: tokens.slice(0, index + 1), start: Math.min(start, index + 1) };
  }

  // ---- the address --------------------------------------------------------------------------------------------------

  remember() {
    if (byId("writer").hidden) return;
    this.fragment = toFragment(this.history.branch, this.settings);
    setAddress(this.fragment);
  }

  async open(fragment) {
    if (!(await this.endEdit())) return;
    const { text, start, settings } = fromFragment(fragment);
    Object.assign(this.settings, this.defaults, fitting(settings, this.card));
    this.apart = {};
    this.showSettings();
    this.used = writingOf(this.settings);
    let [branch, problem] = [newBranch(), null];
    try {
      const before = await this.writer.tokenize(text.slice(0, start), true);
      const after = await this.writer.tokenize(text.slice(start), !start);
      branch = { ...branch, tokens: [...before, ...after] };
      if (start) branch = { ...branch, start: before.length, note: noteOf(this.settings, this.card) };
    } catch (error) {
      problem = error;
    }
    // not before: an empty text would be drawn while the tokens are on their way, and drawing opens it for typing
    this.view.drop();
    const page = { branches: [branch], active: 0 };
    if (this.history.branch.tokens.length) this.history.commit(page);
    else this.history.amend(page);
    if (!problem) return;
    warn(problem.message);
    this.view.show(page, { tint: "none", writing: new Map(), selected: null });
    this.view.edit(branch.key, 0, text);
  }

  async copyLink() {
    if (!(await this.endEdit())) return;
    this.remember();
    copyLink(byId("link"), this.fragment);
  }
}
