// The page of a puzzle model: a board to type or paste, solved step by step.

import { post } from "./api.js";
import { blankOf, changedCells, conflicts, edges, EXAMPLES, isSudoku, offered, parseBoard } from "./boards.js";
import { copyLink, count, h, percent, say, setAddress, svg, warn } from "./dom.js";
import { LEVELS } from "./tokens.js";

const SURE = 0.9; // certainty from which an empty cell counts as sure
const FRAME = 700; // milliseconds per step while it plays

export class PuzzlePage {
  constructor(place, card) {
    Object.assign(this, { place, card, puzzle: card.puzzle });
    this.blank = blankOf(this.puzzle);
    this.cells = this.puzzle.rows * this.puzzle.columns;
    this.question = new Array(this.cells).fill(this.blank);
    this.steps = []; // {board, certainty, halt, changed, wrong, right}
    this.at = 0; // the step shown; 0 is the question
    this.pen = null; // symbol that a click puts on the board
    this.examples = 0;
    this.build();
    this.setQuestion(this.question);
  }

  // ---- elements -----------------------------------------------------------------------------------------------------

  build() {
    const { rows, columns } = this.puzzle;
    this.inputs = [...Array(this.cells).keys()].map((cell) => this.cellInput(cell));
    this.board = h(
      "div",
      { class: "board", role: "group", "aria-label": `Board of ${rows} by ${columns}` },
      this.inputs,
    );
    this.board.style.setProperty("--columns", columns);
    if (!isSudoku(this.puzzle)) this.board.classList.add("dense");
    this.board.addEventListener("keydown", (event) => this.onKey(event));
    this.board.addEventListener("paste", (event) => this.onPaste(event));
    this.board.addEventListener("pointerover", (event) => event.buttons === 1 && this.paint(event.target));
    this.board.addEventListener("pointerdown", (event) => this.paint(event.target));
    this.pens = h("div", { class: "pens", role: "group", "aria-label": "Symbols" });
    this.slider = h("input", { type: "range", id: "step", min: 0, max: 0, value: 0 });
    this.slider.addEventListener("input", () => this.go(Number(this.slider.value)));
    const button = (text, title, click, name) => h("button", { title, click, class: name }, text);
    this.solveButton = button("Solve", "Solve the board, step by step", () => this.solve(this.puzzle.steps), "main");
    const twice = () => Math.min(2 * this.steps.length, this.puzzle.max_steps);
    this.moreButton = button("More steps", "Let the model think longer", () => this.solve(twice()));
    this.playButton = button("Play", "Play the steps", () => this.play());
    this.backButton = button("‹ Back", "One step back (left arrow on the slider)", () => this.go(this.at - 1));
    this.onButton = button("Next ›", "One step forwards (right arrow on the slider)", () => this.go(this.at + 1));
    this.exampleButton = button("Example", "Fill in an example", () => this.example());
    this.linkButton = button("Copy link", "Copy a link to this board", () => copyLink(this.linkButton, this.fragment));
    this.chart = h("div", { class: "chart" });
    this.verdict = h("p", { class: "verdict" });
    this.stepName = h("output", { for: "step" });
    this.place.append(
      h(
        "div",
        { class: "bar", role: "group", "aria-label": "Actions" },
        this.solveButton,
        this.moreButton,
        h("span", { class: "gap" }),
        this.exampleButton,
        button("Clear", "Empty the board", () => this.setQuestion(new Array(this.cells).fill(this.blank))),
        this.linkButton,
      ),
      h("section", { class: "board-side", "aria-label": "Board" }, this.board, this.pens, this.legend()),
      h(
        "section",
        { class: "time", "aria-label": "Steps" },
        h("h2", {}, h("label", { for: "step" }, "Step "), this.stepName),
        this.verdict,
        this.chart,
        this.slider,
        h("div", { class: "row" }, this.backButton, this.playButton, this.onButton),
      ),
    );
    this.pens.append(...offered(this.puzzle).map((symbol) => this.penButton(symbol)));
  }

  cellInput(cell) {
    const { columns } = this.puzzle;
    const name = `row ${Math.floor(cell / columns) + 1}, column ${(cell % columns) + 1}`;
    const input = h("input", {
      class: ["cell", ...edges(cell, this.puzzle)].join(" "),
      "aria-label": name,
      autocomplete: "off",
      inputmode: isSudoku(this.puzzle) ? "numeric" : "text",
      tabindex: cell ? -1 : 0,
    });
    input.dataset.cell = cell;
    input.addEventListener("beforeinput", (event) => this.onType(event, cell));
    input.addEventListener("focus", () => {
      this.inputs.forEach((other) => (other.tabIndex = other === input ? 0 : -1));
      this.last = cell;
      input.select();
    });
    return input;
  }

  penButton(symbol) {
    const name = symbol === this.blank ? "blank" : symbol;
    const button = h(
      "button",
      { class: "pen", "aria-pressed": "false", "data-symbol": symbol },
      symbol === " " ? "␣" : symbol,
    );
    button.setAttribute("aria-label", `Put ${name}`);
    button.addEventListener("click", () => {
      this.pen = this.pen === symbol ? null : symbol;
      for (const pen of this.pens.children) pen.setAttribute("aria-pressed", String(pen.dataset.symbol === this.pen));
    });
    return button;
  }

  legend() {
    const scale = [...Array(LEVELS).keys()].map((n) => h("i", { class: `t${n}` }));
    return h(
      "div",
      { class: "legend" },
      h("span", {}, "unsure"),
      h("span", { class: "swatches", "aria-hidden": "true" }, scale),
      h("span", {}, "sure"),
      h("span", { class: "key changed" }, "changed"),
      h("span", { class: "key wrong" }, "wrong"),
    );
  }

  // ---- typing and drawing -------------------------------------------------------------------------------------------

  onType(event, cell) {
    event.preventDefault();
    const typed = event.data ?? "";
    if (event.inputType.startsWith("delete")) return this.put(cell, this.blank);
    if ([...typed].length > 1) return this.take(typed);
    const symbol = isSudoku(this.puzzle) && /[0 _]/.test(typed) ? this.blank : typed;
    if (!offered(this.puzzle).includes(symbol)) return warn(`A cell holds one of ${offered(this.puzzle).join(" ")}`);
    this.put(cell, symbol);
    this.inputs[Math.min(this.cells - 1, cell + 1)].focus();
  }

  onKey(event) {
    const { columns } = this.puzzle;
    const cell = Number(event.target.dataset.cell);
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[event.key];
    if (event.key === "Enter") this.solve(this.puzzle.steps);
    else if (step && this.inputs[cell + step]) this.inputs[cell + step].focus();
    else return;
    event.preventDefault();
  }

  onPaste(event) {
    event.preventDefault();
    this.take(event.clipboardData.getData("text"));
  }

  take(text) {
    const board = parseBoard(text, this.puzzle);
    if (board) this.setQuestion(board);
    else warn(`The pasted text is no board: paste ${this.cells} of the symbols ${offered(this.puzzle).join(" ")}`);
  }

  paint(target) {
    if (this.pen !== null && target.dataset.cell) this.put(Number(target.dataset.cell), this.pen);
  }

  put(cell, symbol) {
    if (this.question[cell] === symbol && this.at === 0) return;
    this.setQuestion(this.question.with(cell, symbol));
  }

  setQuestion(board) {
    this.stop();
    warn("");
    Object.assign(this, { question: board, steps: [], at: 0, answer: null });
    this.fragment = `board=${encodeURIComponent(board.every((symbol) => symbol === this.blank) ? "" : board.join(""))}`;
    this.remember();
    this.show();
  }

  example() {
    const known = EXAMPLES[this.puzzle.kind];
    this.setQuestion([...known[this.examples++ % known.length]]);
  }

  // Shows the board of an address.
  open(fragment) {
    const board = parseBoard(new URLSearchParams(fragment.slice(1)).get("board") ?? "", this.puzzle);
    if (board) this.setQuestion(board);
  }

  // Puts the board into the address.
  remember() {
    if (!this.place.hidden) setAddress(this.fragment);
  }

  // ---- solving ------------------------------------------------------------------------------------------------------

  async solve(steps) {
    if (this.isSolving) return;
    this.stop();
    warn("");
    this.isSolving = true;
    this.show();
    const [question, from] = [this.question, this.steps.length];
    try {
      const answer = await post("v1/puzzle", { board: question.join(""), steps, exit: null });
      if (question !== this.question) return; // the board was changed meanwhile
      this.answer = answer;
      this.steps = stepsOf(answer, this.puzzle);
      this.at = Math.min(from + 1, this.steps.length);
      say(answer.message);
    } catch (error) {
      warn(error.message);
    } finally {
      this.isSolving = false;
      this.show();
    }
    if (matchMedia("(prefers-reduced-motion: reduce)").matches) this.go(this.steps.length);
    else if (this.steps.length > this.at) this.play();
  }

  play() {
    if (this.timer) return this.stop();
    if (this.at >= this.steps.length) this.at = 0;
    this.timer = setInterval(() => {
      if (this.at + 1 >= this.steps.length) this.stop();
      this.step(this.at + 1);
    }, FRAME);
    this.step(this.at + 1);
  }

  stop() {
    clearInterval(this.timer);
    this.timer = null;
    this.show();
  }

  // Shows a step that the reader asked for; playing stops.
  go(step) {
    this.stop();
    this.step(step);
  }

  step(step) {
    this.at = Math.max(0, Math.min(this.steps.length, step));
    this.show();
  }

  // ---- what is shown ------------------------------------------------------------------------------------------------

  show() {
    const step = this.steps[this.at - 1];
    const board = step?.board ?? this.question;
    const wrong = step?.wrong ?? conflicts(this.question, this.puzzle);
    this.inputs.forEach((input, cell) => this.showCell(input, cell, board[cell], step, wrong));
    const last = this.steps.length;
    Object.assign(this.slider, { max: last, value: this.at, disabled: !last });
    this.slider.setAttribute("aria-valuetext", step ? `step ${this.at} of ${last}` : "your board");
    this.stepName.textContent = step ? `${this.at} of ${last}` : "0: your board";
    this.verdict.textContent = this.words(step, wrong);
    this.solveButton.disabled = Boolean(this.isSolving);
    this.solveButton.textContent = this.isSolving ? "Solving …" : "Solve";
    this.moreButton.disabled = !last || Boolean(this.isSolving);
    this.playButton.textContent = this.timer ? "Pause" : "Play";
    this.playButton.disabled = this.onButton.disabled = !last;
    this.onButton.disabled = this.at >= last;
    this.backButton.disabled = this.at === 0;
    this.exampleButton.hidden = !EXAMPLES[this.puzzle.kind]?.length;
    this.chart.replaceChildren(...(last ? [this.drawChart()] : []));
  }

  showCell(input, cell, symbol, step, wrong) {
    const isClue = isSudoku(this.puzzle) ? this.question[cell] !== this.blank : !step;
    input.value = symbol === this.blank ? "" : symbol;
    input.dataset.symbol = symbol;
    const names = ["cell", ...edges(cell, this.puzzle)];
    if (isClue && (step || symbol !== this.blank)) names.push("clue");
    else if (step && symbol !== this.blank)
      names.push(`t${Math.min(LEVELS - 1, Math.floor(LEVELS * step.certainty[cell]))}`);
    else if (step && step.certainty[cell] < SURE) names.push("doubt"); // an empty cell has no tint when it is sure
    if (step?.changed.has(cell)) names.push("changed");
    if (wrong.has(cell)) names.push("wrong");
    input.className = names.join(" ");
    input.title = step && !isClue ? `${percent(step.certainty[cell])} sure` : "";
  }

  words(step, wrong) {
    if (!step && wrong.size)
      return `${count(wrong.size, "cell")} in conflict: a digit is twice in a row, column or box.`;
    const empty = isSudoku(this.puzzle) ? ", with 0 or a space for an empty cell" : "";
    if (!step) return `Type a board${empty}; or paste one, or take an example. Then solve it.`;
    const parts = [this.at > 1 ? `${count(step.changed.size, "cell")} changed` : "The first answer"];
    // if the right answer is not known, a board may be wrong by the rules without a wrong cell
    const some = wrong.size ? `${count(wrong.size, "cell")} wrong` : "wrong";
    if (step.right !== null) parts.push(step.right ? "right" : some);
    if (step.halt !== null) parts.push(`the model is ${percent(step.halt)} sure that it is right`);
    if (this.at === this.steps.length) parts.push(`in all: ${this.answer.message}`);
    return `${parts.join("; ")}.`;
  }

  // A bar per step: how many cells changed; and a line: the halting probability.
  drawChart() {
    const n = this.steps.length;
    const most = Math.max(1, ...this.steps.map(({ changed }) => changed.size));
    const x = (step) => (100 * step) / n;
    const bars = this.steps.map(({ changed }, i) =>
      svg("rect", {
        x: x(i + 1) - 30 / n,
        width: 60 / n,
        y: 40 - (36 * changed.size) / most,
        height: (36 * changed.size) / most,
        class: i + 1 === this.at ? "bar-now" : "bar-step",
      }),
    );
    const points = this.steps.map(({ halt }, i) => `${x(i + 1)},${40 - 36 * (halt ?? 0)}`).join(" ");
    const hasHalt = this.steps.some(({ halt }) => halt !== null);
    return h(
      "figure",
      {},
      svg(
        "svg",
        {
          viewBox: "0 0 100 42",
          preserveAspectRatio: "none",
          role: "img",
          "aria-label": "Cells changed, and the halting probability, per step",
        },
        svg("line", { x1: 0, x2: 100, y1: 40, y2: 40, class: "axis" }),
        bars,
        svg("line", { x1: x(this.at), x2: x(this.at), y1: 0, y2: 40, class: "now" }),
        hasHalt ? svg("polyline", { points, class: "halting" }) : null,
      ),
      h(
        "figcaption",
        { class: "quiet" },
        h("span", { class: "key bars" }, `cells changed, up to ${most}`),
        hasHalt ? h("span", { class: "key halting" }, "how sure the model is that the board is right") : null,
      ),
    );
  }
}

// Returns the steps of an answer of the server, with the cells that changed and that are wrong. Where the right answer
// is not known, those are the cells in conflict.
function stepsOf(answer, puzzle) {
  return answer.steps.map(({ board, certainty, halt, wrong, right }, i) => {
    const symbols = [...board];
    const changed = changedCells(i ? [...answer.steps[i - 1].board] : null, symbols);
    return {
      board: symbols,
      certainty,
      halt,
      changed,
      right,
      wrong: wrong ? new Set(wrong) : conflicts(symbols, puzzle),
    };
  });
}
