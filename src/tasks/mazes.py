"""Mazes: rules, symmetries and a generator.

The characters are those of the authors' code for arXiv:2510.04871: `#` wall, space floor, S start, G goal, o path.

The answer marks a shortest path from S to G with `o`. `Maze.verify` accepts every shortest path; the generator makes
mazes with exactly one, so that each cell has one right answer. Files in .csv form are read by `puzzles.read_csv`.
"""

import random

import numpy as np
from jaxtyping import Bool, Int64, UInt8

from src.errors import UserError
from src.tasks.puzzles import DIHEDRAL, Grids, PuzzleKind, Symmetries, dihedral, make_grids

WALL, FLOOR, START, GOAL, PATH = range(1, 6)  # tokens
CHUNK = 1000  # mazes that are searched at once
STARTS = 8  # start cells that are tried in a maze before another maze is made
MOST_MAZES = 200  # the generator gives up after so many mazes in a row without a path of the wanted length


class Maze(PuzzleKind):
    """Mazes of one size. A square maze has the eight symmetries of a square, any other maze the four of a rectangle."""

    def __init__(self, height: int = 30, width: int | None = None):
        width = height if width is None else width
        if min(height, width) < 2:
            raise UserError(f"a maze of {height} x {width} is too small: set both sides to 2 or more")
        super().__init__(f"maze{height}x{width}", height, width, "?# SGo")
        self.transforms = [t for t, (transposes, *_) in enumerate(DIHEDRAL) if height == width or not transposes]

    def from_text(self, text: str) -> UInt8[np.ndarray, "l"]:
        lines = text.replace("\r", "").strip("\n").split("\n")
        if len(lines) > 1 and any(len(line) != self.width for line in lines):
            found = f"{len(lines)} lines of {len(lines[0])} cells"
            raise UserError(f"a {self.name} board has {self.height} lines of {self.width} cells, this one has {found}")
        return super().from_text(text)

    # ---- rules ----

    def verify(self, board: UInt8[np.ndarray, "l"], answer: UInt8[np.ndarray, "l"]) -> str | None:
        without_path = np.where(answer == PATH, FLOOR, answer)
        if len(wrong := np.flatnonzero(without_path != board)):
            place = f"row {wrong[0] // self.width + 1}, column {wrong[0] % self.width + 1}"
            found, expected = (self.symbols[tokens[wrong[0]]] for tokens in (answer, board))
            return f"{place} is {found!r}, the question has {expected!r}"
        if problem := self.question_problem(board):
            return problem
        marked, n_marked = self._steps((answer >= START)[None], board[None])[0], (answer == PATH).sum()
        if marked < 0:
            return "the cells marked o do not connect S with G"
        shortest = self._steps((board != WALL)[None], board[None])[0]
        if marked > shortest:
            return f"the path has {marked} steps, the shortest {shortest}"
        if n_marked != shortest - 1:
            return f"the number of cells marked o is {n_marked}, a shortest path has {shortest - 1}"
        return None

    def are_right(self, inputs: UInt8[np.ndarray, "n l"], answers: UInt8[np.ndarray, "n l"]) -> Bool[np.ndarray, "n"]:
        is_right = (np.where(answers == PATH, FLOOR, answers) == inputs).all(1)
        is_right &= ((inputs == START).sum(1) == 1) & ((inputs == GOAL).sum(1) == 1) & (inputs >= WALL).all(1)
        shortest = self._steps(inputs != WALL, inputs)
        is_right &= (shortest > 0) & ((answers == PATH).sum(1) == shortest - 1)
        return is_right & (self._steps(answers >= START, inputs) == shortest)

    def question_problem(self, board: UInt8[np.ndarray, "l"]) -> str | None:
        for token in (START, GOAL):
            if (count := (board == token).sum()) != 1:
                return f"it has {count} cells {self.symbols[token]}, not one"
        if (wrong := (board < WALL) | (board > GOAL)).any():
            return f"cell {wrong.argmax() + 1} is no wall, floor, start or goal"
        return "no path leads from S to G" if self._steps((board != WALL)[None], board[None])[0] < 0 else None

    def difficulty(self, inputs: UInt8[np.ndarray, "n l"], labels: UInt8[np.ndarray, "n l"]) -> dict[str, np.ndarray]:
        """Returns {"path": steps from S to G}, those of the shortest path if the labels of a board are 0."""
        path, is_open = (labels == PATH).sum(1) + 1, ~labels.any(1)
        path[is_open] = self._steps(inputs[is_open] != WALL, inputs[is_open])
        return {"path": path}

    def solve(self, inputs: UInt8[np.ndarray, "n l"]) -> tuple[UInt8[np.ndarray, "n l"], Int64[np.ndarray, "n"]]:
        answers, counts = np.zeros_like(inputs), np.zeros(len(inputs), np.int64)
        for row, board in enumerate(inputs):
            if self.question_problem(board) is None:
                path, counts[row] = _shortest(board.reshape(self.height, self.width))
                answers[row] = board
                answers[row, path] = PATH
        return answers, counts

    def _steps(self, is_open, boards) -> Int64[np.ndarray, "n"]:
        """Returns the fewest steps from S to G over open cells (N, L), or -1 if there is no way or no S."""
        parts = [np.zeros(0, np.int64)]
        for start in range(0, len(boards), CHUNK):
            rows = slice(start, start + CHUNK)
            views = (
                cells[rows].reshape(-1, self.height, self.width) for cells in (is_open, boards == START, boards == GOAL)
            )
            parts.append(_steps(*views))
        return np.concatenate(parts)

    # ---- symmetries ----

    def draw_symmetries(self, rng: np.random.Generator, n: int) -> Symmetries:
        cells = np.arange(self.cells).reshape(self.height, self.width)
        orders = np.stack([dihedral(cells, number).ravel() for number in self.transforms])
        chosen = orders[rng.integers(len(orders), size=n)]
        return Symmetries(chosen, np.broadcast_to(np.arange(self.vocab_size, dtype=np.uint8), (n, self.vocab_size)))

    def orbits(self, inputs: UInt8[np.ndarray, "n l"], labels: UInt8[np.ndarray, "n l"]) -> list[bytes]:
        """Returns the least of the images of each maze under the symmetries.

        The marked path is left out, because a maze may have several shortest paths."""
        mazes = np.where(labels == PATH, FLOOR, labels).astype(np.uint8).reshape(-1, self.height, self.width)
        images = [np.ascontiguousarray(dihedral(mazes, number)).reshape(len(mazes), -1) for number in self.transforms]
        return [min(image[row].tobytes() for image in images) for row in range(len(mazes))]


def _steps(is_open, is_start, is_goal):
    """Returns (N,) fewest steps over open cells (N, H, W) from start to goal, or -1 if there is no way.

    All mazes are searched at once."""
    n, height, width = is_open.shape
    steps, rows = np.full(n, -1), np.arange(n)
    free = np.pad(is_open, ((0, 0), (1, 1), (1, 1)))  # cells not yet reached; the border saves checks at the edges
    front = np.zeros_like(free)
    front[:, 1:-1, 1:-1] = is_start
    step = 0
    while len(rows):
        arrived = (front[:, 1:-1, 1:-1] & is_goal).any((1, 2))
        steps[rows[arrived]] = step
        stays = front.any((1, 2)) & ~arrived
        if stays.sum() < 0.8 * len(rows) or not stays.any():  # copying costs more than a few idle mazes
            rows, free, front, is_goal = rows[stays], free[stays], front[stays], is_goal[stays]
        else:
            front[~stays] = False
        free &= ~front
        spread = np.zeros_like(front)
        spread[:, 1:] |= front[:, :-1]
        spread[:, :-1] |= front[:, 1:]
        spread[:, :, 1:] |= front[:, :, :-1]
        spread[:, :, :-1] |= front[:, :, 1:]
        front = spread & free
        step += 1
    return steps


def _shortest(board):
    """Returns (cells between S and G on a shortest path of a board (H, W), 2 if there are several paths, else 1)."""
    stride = board.shape[1] + 2
    tokens = np.pad(board, 1, constant_values=WALL).ravel()
    start, goal = (int((tokens == token).argmax()) for token in (START, GOAL))
    _, n_paths, parent = _explore((tokens != WALL).tolist(), stride, start)
    path, cell = [], parent[goal]
    while cell != start:
        path.append((cell // stride - 1) * board.shape[1] + cell % stride - 1)
        cell = parent[cell]
    return path, min(n_paths[goal], 2)


# ---- generator ------------------------------------------------------------------------------------------------------


def generate(height: int, width: int, n: int, path: tuple[int, int], seed: int, loops: float = 0.05) -> Grids:
    """Returns n mazes, each with exactly one shortest path. Its number of steps is in the range `path`, ends included.

    A random spanning tree joins rooms at every second row and column. Then each wall between two rooms is opened with
    probability `loops`. Of the allowed lengths that a maze has paths of, each is equally likely. Equal arguments give
    equal mazes. Raises UserError if the range is impossible, or if no such path is found."""
    kind = Maze(height, width)
    low, high = path
    if n < 1:
        raise UserError(f"the number of mazes is {n}: set it to 1 or more")
    if not 1 <= low <= high:
        raise UserError(f"path {low} to {high} is no range of steps: set both to 1 or more, the lower one first")
    if not 0 <= loops <= 1:
        raise UserError(f"loops is {loops}: set it from 0 to 1")
    rng = random.Random(f"{seed} {height} {width}")
    inputs, labels, failed = [], [], 0
    while len(inputs) < n:
        is_open = _carve(height, width, loops, rng)
        route = _find_route(is_open, width + 2, low, high, rng)
        failed = 0 if route else failed + 1
        if route:
            board = np.where(is_open, FLOOR, WALL).astype(np.uint8)
            board[route[0]], board[route[-1]] = START, GOAL
            answer = board.copy()
            answer[route[1:-1]] = PATH
            inputs.append(board)
            labels.append(answer)
        elif failed == MOST_MAZES:
            tried = f"{MOST_MAZES} mazes of {height} x {width} have no path of {low} to {high} steps"
            raise UserError(f"{tried}: allow shorter paths, or set larger sides")
    inputs, labels = (
        np.array(boards).reshape(-1, height + 2, width + 2)[:, 1:-1, 1:-1].reshape(-1, kind.cells)
        for boards in (inputs, labels)
    )
    return make_grids(inputs, labels, kind.difficulty(inputs, labels))


def _carve(height, width, loops, rng):
    """Returns the cells of a random maze as a flat list of bools, true if open, with a border of walls around it."""
    stride = width + 2
    is_open = [False] * (stride * (height + 2))
    # With an even side, one row or column beyond the last room is wall; it is sometimes the first, sometimes the last.
    tops = range(1 + rng.randrange(2 - height % 2), height + 1, 2)
    lefts = range(1 + rng.randrange(2 - width % 2), width + 1, 2)
    rooms = [row * stride + column for row in tops for column in lefts]
    is_room = set(rooms)
    stack = [rng.choice(rooms)]
    is_open[stack[0]] = True
    while stack:
        room = stack[-1]
        beside = (step for step in (-2, 2, -2 * stride, 2 * stride) if room + step in is_room)
        closed = [step for step in beside if not is_open[room + step]]
        if not closed:
            stack.pop()
            continue
        step = rng.choice(closed)
        is_open[room + step // 2] = is_open[room + step] = True
        stack.append(room + step)
    for room in rooms:
        for step in (1, stride):
            if room + 2 * step in is_room and rng.random() < loops:
                is_open[room + step] = True
    return is_open


def _find_route(is_open, stride, low, high, rng):
    """Returns the cells from a start to a goal that has only one shortest path, which is low to high steps long.

    Returns None if there is no such path from a few random starts."""
    cells = [cell for cell, open_ in enumerate(is_open) if open_]
    start = rng.choice(cells)
    for _ in range(STARTS):
        distance, n_paths, parent = _explore(is_open, stride, start)
        by_length = {}
        for cell, steps in distance.items():
            if low <= steps <= high and n_paths[cell] == 1:
                by_length.setdefault(steps, []).append(cell)
        if by_length:
            cell = rng.choice(by_length[rng.choice(sorted(by_length))])
            route = [cell]
            while cell != start:
                cell = parent[cell]
                route.append(cell)
            return route[::-1]
        longest = max(distance.values())
        start = rng.choice(cells)
        if longest < low and rng.random() < 0.5:
            start = next(reversed(distance))  # the farthest cell, whose paths are the longest ones
    return None


def _explore(is_open, stride, start):
    """Returns three dicts by cell, in which cells are in the order of their distance from start.

    They hold the distance, the number of shortest paths, and a neighbour that is one step nearer to start."""
    distance, n_paths, parent, queue = {start: 0}, {start: 1}, {}, [start]
    for cell in queue:  # the loop appends to the queue
        for step in (-1, 1, -stride, stride):
            beside = cell + step
            if not is_open[beside]:
                continue
            if beside not in distance:
                distance[beside], n_paths[beside], parent[beside] = distance[cell] + 1, n_paths[cell], cell
                queue.append(beside)
            elif distance[beside] == distance[cell] + 1:
                n_paths[beside] += n_paths[cell]
    return distance, n_paths, parent
