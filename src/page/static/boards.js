// What can be computed from boards, without the page. A board is a list of symbols, row by row.

const BOXES = { 4: [2, 2], 6: [2, 3], 9: [3, 3] }; // rows and columns of a box of a Sudoku

export function isSudoku(puzzle) {
  return puzzle.kind.startsWith("sudoku") && puzzle.rows in BOXES;
}

// Returns the symbol of an empty cell.
export function blankOf(puzzle) {
  return puzzle.symbols.find((symbol) => symbol === "." || symbol === " ") ?? puzzle.symbols[0];
}

// Returns the symbols that a reader may put on a board.
export function offered(puzzle) {
  return puzzle.symbols.filter((symbol) => symbol !== "?");
}

// Returns the board in a text, or null if the text is none. Line breaks, and the lines that print between the boxes of
// a Sudoku, do not count; in a Sudoku, 0 is a blank.
export function parseBoard(text, puzzle) {
  const blank = blankOf(puzzle);
  let clean = text.replace(/\r?\n/g, "");
  if (isSudoku(puzzle)) clean = text.replace(/[\s|+-]/g, "").replace(/[0_]/g, blank);
  const symbols = [...clean];
  const fits = symbols.length === puzzle.rows * puzzle.columns && symbols.every((s) => puzzle.symbols.includes(s));
  return fits ? symbols : null;
}

// Returns the cells (from 0) whose symbol differs.
export function changedCells(before, after) {
  return new Set([...after.keys()].filter((cell) => before && before[cell] !== after[cell]));
}

// Returns the cells of a Sudoku whose digit is twice in a row, column or box.
export function conflicts(board, puzzle) {
  if (!isSudoku(puzzle)) return new Set();
  const side = puzzle.columns;
  const [rows, columns] = BOXES[side];
  const found = new Set();
  const seen = new Map();
  board.forEach((symbol, cell) => {
    if (symbol === blankOf(puzzle)) return;
    const [row, column] = [Math.floor(cell / side), cell % side];
    const box = Math.floor(row / rows) * (side / columns) + Math.floor(column / columns);
    for (const unit of [`r${row}`, `c${column}`, `b${box}`]) {
      const key = unit + symbol;
      if (seen.has(key)) found.add(cell).add(seen.get(key));
      else seen.set(key, cell);
    }
  });
  return found;
}

// Returns the sides of a cell at which a box of a Sudoku ends: "right", "below".
export function edges(cell, puzzle) {
  if (!isSudoku(puzzle)) return [];
  const [rows, columns] = BOXES[puzzle.columns];
  const [row, column] = [Math.floor(cell / puzzle.columns), cell % puzzle.columns];
  const right = (column + 1) % columns === 0 && column + 1 < puzzle.columns;
  const below = (row + 1) % rows === 0 && row + 1 < puzzle.rows;
  return [...(right ? ["right"] : []), ...(below ? ["below"] : [])];
}

// Example questions, each with one answer.
export const EXAMPLES = {
  sudoku4: ["3....2....4..1..", ".1.....33.....2."],
  sudoku6: [],
  sudoku9: [
    "......1...974..2....3..8......2..8..46.....3.8...9..6.9..8......1..273.9..6....7.",
    "7..9......8126......54.1.....6.3....8.........7...69.85....73.132......9.6..257..",
    "6.....1..8..3.......41.8.921...42.5...........87......4...6...1....219.6...9..7..",
  ],
};
