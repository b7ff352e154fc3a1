// Shows the branches of the text, token by token, and lets the reader select tokens and edit.

import { count, h } from "./dom.js";
import { figures, level, nameOf, partAt, shownTexts, spoken, textOf } from "./tokens.js";

const NAMES = "ABCDEFGH";

function textName(number) {
  return `Text ${NAMES[number] ?? number + 1}`;
}

export class TextView {
  // place: the element for the branches. example: a prompt to begin with, or null. on: functions select(key, index),
  // preview(key, index), edit(key, index), edited(key, text, write), close(key), activate(key).
  constructor(place, example, on) {
    Object.assign(this, { place, example, on });
    this.columns = new Map(); // key of a branch -> its column
    this.editing = null; // {key, area} while a text is edited
  }

  // look: {tint, deepest, writing: keys of the branches that are being written, selected: {key, index} or null}
  show(page, look) {
    for (const [key, column] of this.columns) {
      if (page.branches.some((branch) => branch.key === key)) continue;
      column.root.remove();
      this.columns.delete(key);
      if (this.editing?.key === key) this.editing = null;
    }
    page.branches.forEach((branch, number) => {
      const column = this.columns.get(branch.key) ?? this.addColumn(branch.key);
      if (this.place.children[number] !== column.root)
        this.place.insertBefore(column.root, this.place.children[number]);
      const neighbour = page.branches[number === 0 ? 1 : number - 1];
      const part = neighbour ? partAt(branch.tokens, neighbour.tokens) : null;
      this.showHead(column, branch, number, page, look);
      this.showTokens(column, branch, part, look);
    });
    this.place.dataset.count = page.branches.length;
  }

  addColumn(key) {
    const text = h("div", {
      class: "text",
      role: "listbox",
      "aria-orientation": "horizontal",
      "aria-describedby": "text-hint",
      dir: "auto",
      tabindex: "-1",
    });
    const head = h("header");
    const root = h("section", { class: "branch" }, head, text);
    const column = { key, root, head, text, tokens: [], spans: [] };
    text.addEventListener("click", (event) => this.onToken(event, column, "select"));
    text.addEventListener("dblclick", (event) => this.onToken(event, column, "edit"));
    text.addEventListener("pointerover", (event) => {
      if (event.pointerType === "mouse") this.onToken(event, column, "preview");
    });
    text.addEventListener("pointerleave", () => this.on.preview(null));
    text.addEventListener("keydown", (event) => this.onKey(event, column));
    text.addEventListener("focusin", (event) => this.onToken(event, column, "select"));
    this.columns.set(key, column);
    return column;
  }

  onToken(event, column, what) {
    const index = column.spans.indexOf(event.target);
    if (index >= 0) this.on[what](column.key, index);
    else if (what === "edit") this.on.edit(column.key, column.tokens.length - 1);
  }

  // The arrows walk through the tokens; up and down go to the line above and below.
  onKey(event, column) {
    const last = column.spans.length - 1;
    const isList = document.activeElement === column.text; // has the focus after an edit
    const at = isList
      ? column.spans.findIndex((span) => span.tabIndex === 0)
      : column.spans.indexOf(document.activeElement);
    if (at < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
    const to = {
      ArrowRight: isList ? at : at + 1,
      ArrowLeft: at - 1,
      Home: 0,
      End: last,
      ArrowDown: this.beside(column, at, 1),
      ArrowUp: this.beside(column, at, -1),
    }[event.key];
    if (to !== undefined) {
      column.spans[Math.max(0, Math.min(last, to))].focus();
      event.preventDefault();
    } else if (event.key === "Enter") {
      this.on.rivals();
      event.preventDefault();
    } else if (event.key.toLowerCase() === "e") {
      this.on.edit(column.key, at);
      event.preventDefault();
    }
  }

  beside(column, at, direction) {
    const here = column.spans[at].getBoundingClientRect();
    let [best, distance] = [at, Infinity];
    for (let i = at + direction; column.spans[i]; i += direction) {
      const box = column.spans[i].getBoundingClientRect();
      const lines = Math.round((direction * (box.top - here.top)) / here.height);
      if (lines >= 2 && best !== at) break;
      if (lines >= 1 && Math.abs(box.left - here.left) < distance)
        [best, distance] = [i, Math.abs(box.left - here.left)];
    }
    return best;
  }

  // ---- what is shown ----------------------------------------------------------------------------------------------

  showHead(column, branch, number, page, look) {
    const name = textName(number);
    const many = page.branches.length > 1;
    const isActive = page.branches[page.active] === branch;
    const title = many ? name : "Text";
    column.root.classList.toggle("active", many && isActive);
    column.root.setAttribute("aria-label", title);
    column.text.setAttribute("aria-label", `${title}, token by token`);
    column.text.setAttribute("aria-busy", String(look.writing.has(branch.key)));
    const facts = many ? `${title}|${branch.note}|${isActive}` : branch.note;
    if (column.facts === facts) return;
    column.facts = facts;
    const choose = () => this.on.activate(branch.key);
    const close = () => this.on.close(branch.key);
    column.head.replaceChildren(
      ...(many ? [h("button", { class: "name", "aria-pressed": String(isActive), click: choose }, name)] : []),
      h("span", { class: "note" }, branch.note),
      ...(many ? [h("button", { class: "close", "aria-label": `Close ${name}`, click: close }, "×")] : []),
    );
  }

  showTokens(column, branch, part, look) {
    const texts = shownTexts(branch.tokens);
    const { spans } = column;
    for (const span of spans.splice(branch.tokens.length)) span.remove();
    branch.tokens.forEach((token, index) => {
      const selected = look.selected?.key === branch.key && look.selected.index === index;
      const tint = level(token, look.tint, look.deepest);
      const state = `${token.kind}|${tint}|${texts[index]}|${selected}|${part === index}|${token.id}`;
      const span = (spans[index] ??= column.text.appendChild(h("span", { role: "option" })));
      if (span.state === state) return;
      span.state = state;
      span.textContent = texts[index];
      span.className = classOf(token, texts[index], tint, part === index);
      span.setAttribute("aria-selected", String(selected));
      const label = labelOf(token, texts[index], part === index);
      if (label === texts[index]) span.removeAttribute("aria-label");
      else span.setAttribute("aria-label", label);
    });
    const first = branch.start < branch.tokens.length ? branch.start : 0; // of the last passage
    const inTab = look.selected?.key === branch.key ? look.selected.index : first;
    spans.forEach((span, index) => (span.tabIndex = index === inTab ? 0 : -1));
    column.tokens = branch.tokens;
    column.text.classList.toggle("writing", look.writing.has(branch.key));
    column.text.classList.toggle("empty", !branch.tokens.length);
  }

  // Scrolls a token into view, for example from under the panel of a narrow screen.
  reveal(key, index) {
    this.columns.get(key)?.spans[index]?.scrollIntoView({ block: "nearest" });
  }

  // Keeps the end of a text in view while it is written, unless the reader has scrolled away from it.
  follow(key) {
    const last = this.columns.get(key)?.spans.at(-1);
    const below = last ? last.getBoundingClientRect().bottom - innerHeight : 0;
    if (below > 0 && below < 100) last.scrollIntoView({ block: "nearest" });
  }

  // Puts the focus on a token; without an index, on the whole text, which then does not scroll.
  focus(key, index) {
    const column = this.columns.get(key);
    if (index === null) column?.text.focus({ preventScroll: true });
    else column?.spans[index]?.focus();
  }

  // ---- editing ----------------------------------------------------------------------------------------------------

  // Replaces the tokens of a branch by a field with its text, or another one, with the cursor after a token.
  edit(key, index, text = textOf(this.columns.get(key).tokens)) {
    if (this.editing) return;
    const column = this.columns.get(key);
    const at = shownTexts(column.tokens)
      .slice(0, index + 1)
      .join("").length;
    const area = h("textarea", {
      class: "text",
      rows: 6,
      dir: "auto",
      spellcheck: "false",
      "aria-label": "The text",
      "aria-describedby": "edit-hint",
      placeholder: "Type the beginning of a text, and let the model write on.",
      keydown: (event) => {
        if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.finish(true, event.shiftKey);
        else if (event.key === "Escape") this.finish(false);
        else return;
        event.preventDefault();
        event.stopPropagation();
      },
      input: () => adapt(),
    });
    const adapt = () => {
      example.hidden = !this.example || area.value !== "";
      fit(area);
    };
    const takeExample = () => {
      area.value = this.example;
      adapt();
      area.focus();
    };
    const example = h("button", { type: "button", click: takeExample }, "Example");
    area.value = text;
    const cut = h("button", { type: "button", click: () => this.finish(true, true) }, "Write on from the cursor");
    const keys = "Ctrl+Enter writes on from the end, with Shift from the cursor; Esc shows the tokens. ";
    const hint = h("p", { class: "quiet hint" }, h("span", { id: "edit-hint" }, keys), cut, " ", example);
    column.text.replaceWith(area);
    area.after(hint);
    this.editing = { key, area, hint };
    adapt();
    area.focus();
    area.setSelectionRange(at, at);
  }

  // Ends editing; `write` lets the model write on, after the cursor if `isCut`. Without a change of the text, the
  // tokens stay as they are.
  finish(write, isCut = false) {
    if (!this.editing) return null;
    const { key, area } = this.editing;
    const hadFocus = document.activeElement === area;
    const text = isCut ? area.value.slice(0, area.selectionStart) : area.value;
    this.drop();
    if (hadFocus) this.columns.get(key).text.focus({ preventScroll: true });
    return this.on.edited(key, text, write);
  }

  // Ends editing without taking over the text.
  drop() {
    if (!this.editing) return;
    const { key, area, hint } = this.editing;
    this.editing = null;
    hint.remove();
    area.replaceWith(this.columns.get(key).text);
  }
}

function fit(area) {
  area.style.height = "auto";
  area.style.height = `${Math.max(150, area.scrollHeight + 2)}px`;
}

function classOf(token, text, tint, parts) {
  const names = ["token", token.kind];
  if (tint !== null) names.push(`t${tint}`);
  if (text.includes("\n")) names.push("line");
  if (text === "") names.push(token.bytes.length ? "half" : "end");
  if (parts) names.push("parts");
  return names.join(" ");
}

function labelOf(token, text, parts) {
  const words = text === "" && !token.bytes.length ? nameOf(token) : text.trim() ? text : spoken(text);
  return parts ? `${words} (here the texts part)` : words;
}

// Says in one line how long the active text is, and how many steps it took.
export function figuresOf(page, card) {
  const { tokens } = page.branches[page.active];
  const { tokens: n, steps, most, settled } = figures(tokens);
  const context = card.context.toLocaleString("en");
  const isLong = tokens.length > card.context;
  const fits = isLong ? `more than the context of ${context}: the model reads the end` : `context ${context}`;
  const parts = [`${count(tokens.length, "token")}, ${fits}`];
  const each = steps % 1 ? `${steps.toFixed(2)} steps on average` : `${count(steps, "step")} each`;
  if (n) parts.push(`${n} written, in ${each}`);
  if (settled !== null && most > 1) {
    if (settled === most) parts.push(`a choice changed in the last step, ${most}`);
    else parts.push(`no choice changed after step ${settled} of ${most}`);
  }
  const name = page.branches.length > 1 ? `${textName(page.active)}: ` : "";
  return name + parts.join(" · ");
}

export function partingOf(page) {
  if (page.branches.length !== 2) return "";
  const [one, other] = page.branches.map(({ tokens }) => tokens);
  const part = partAt(one, other);
  if (part !== null) return `The two texts are the same for ${count(part, "token")}, then they part.`;
  return one.length === other.length ? "The two texts are the same." : "";
}
