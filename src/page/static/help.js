// The help at the end of the page.

import { h } from "./dom.js";

const WRITING = [
  [
    "Write",
    "The model continues the text. Its words are tinted: the legend above the text says by what. Each token " +
      "shows, in the panel beside the text, what was likely after every recursion step.",
  ],
  [
    "The panel",
    "Each band is a token that the model might have written, as wide as its probability after that step, before " +
      "temperature and top p. Entropy says how undecided the model was: at 0 bits, it was certain. If the model has " +
      "a halting head, halting is how sure it was that it needs no more steps.",
  ],
  [
    "Another road",
    "Select a token and click a rival: the text is cut there and goes on with the rival. Undo returns to the old " +
      "text; a check mark keeps both, side by side.",
  ],
  [
    "Edit",
    "Press Edit, or double-click a token. Write on from the end, or from the cursor. Only what follows the change is " +
      "tokenized again.",
  ],
  [
    "Depth",
    "The slider sets the recursion steps per token; Again writes the last passage with them. The line below the text " +
      "says after which step no choice changed, and the tint “step of decision” shows it for each token.",
  ],
  [
    "Compare",
    "Writes the last passage at two depths, or with two seeds, side by side, and marks where the texts part. At " +
      "temperature 0, chance plays no part: the seed changes nothing, and texts of two depths part only where the " +
      "choice of the model differs.",
  ],
  [
    "Keys",
    "Ctrl+Enter writes, Esc stops. In the text: arrows, Home and End walk through the tokens, Enter goes to the " +
      "rivals, Esc comes back, E edits. Ctrl+Z and Ctrl+Shift+Z undo and redo.",
  ],
];

const PUZZLES = [
  [
    "Board",
    "Type into the cells; the arrows move. Or paste a whole board into a cell, or choose a symbol below the board " +
      "and click or drag.",
  ],
  [
    "Steps",
    "The slider goes forwards and backwards through the model's answers; 0 is your board. A corner marks a cell " +
      "that changed in this step.",
  ],
  ["More steps", "The model thinks twice as long. Its answers so far stay the same."],
];

export function buildHelp(place, view) {
  const entries = view === "puzzle" ? PUZZLES : WRITING;
  place.replaceChildren(
    h(
      "dl",
      {},
      entries.map(([name, text]) => h("div", {}, h("dt", {}, name), h("dd", {}, text))),
    ),
  );
}
