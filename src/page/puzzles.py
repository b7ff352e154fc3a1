"""Boards solved for the page, step by step."""

import contextlib
import threading
from pathlib import Path

from src.checkpoint import load_network, resolve
from src.errors import UserError
from src.metrics import count_parameters
from src.page.errors import ApiError
from src.tasks.arc import Arc
from src.tasks.board_trace import BoardTrace
from src.tasks.puzzle_data import read_form
from src.tasks.puzzle_input import check_ids, typed_boards
from src.tasks.puzzle_solve import Effort, attempts

WAITING = 4  # boards that may wait while one is solved


class PuzzleSolver:
    """A puzzle model. Solves one board at a time."""

    def __init__(self, folder, device="cpu"):
        self.name = Path(folder).resolve().name
        folder = resolve(folder)
        self.kind, self.model = read_form(folder).kind, load_network(folder, device)
        if isinstance(self.kind, Arc):
            raise UserError(f"{folder} solves ARC tasks, not single boards: give a model of Sudoku or mazes, or none")
        self.has_steps = self.model.config.recursion == "trm"  # other models answer once
        self.steps = self.model.config.recursion_steps if self.has_steps else 1  # as in training
        self._places, self._one = threading.Semaphore(1 + WAITING), threading.Lock()

    def card(self) -> dict:
        kind = self.kind
        model = {"name": self.name, "family": self.model.config.recursion}
        model |= {"parameters": count_parameters(self.model)["total"], "steps": self.steps}
        board = {"kind": kind.name, "rows": kind.height, "columns": kind.width, "symbols": list(kind.symbols[1:])}
        return model | board

    @contextlib.contextmanager
    def place(self):
        """A place among the boards that are solved or wait. Raises ApiError if all are taken."""
        if not self._places.acquire(blocking=False):
            raise ApiError(
                429, "other boards are being solved: try again in 1 s", None, "queue_full", {"Retry-After": "1"}
            )
        try:
            yield
        finally:
            self._places.release()

    def solve(self, board: str, steps: int | None, halts: bool, is_over) -> dict:
        """Returns the board after each step. Stops early if is_over() is true. Raises ApiError for a wrong board.

        Take a `place` first. This blocks while another board is being solved."""
        if not self.has_steps and steps == 1:
            steps = None
        try:
            with self._one:
                return self._solve(board, Effort(steps=steps, halts=halts), is_over)
        except UserError as error:
            raise ApiError(400, str(error), "board", "invalid_value") from None

    def _solve(self, board, effort, is_over):
        effort.check(self.model, self.kind)
        grids = typed_boards(self.kind, [board])
        check_ids(self.model.config, self.kind, grids)
        trace = BoardTrace(self.kind, grids.inputs[0], grids.labels[0])
        for attempt in attempts(self.model, self.kind, grids.inputs, grids.puzzle_ids, effort):
            trace.add(attempt)
            if is_over():
                break
        steps = [
            {"board": step["board"], "certainty": step["probability"]}
            | {name: step[name] for name in ("halt", "changed", "wrong", "right")}
            for step in trace.steps
        ]
        message = trace.summary()
        if self.kind.has_rules and not grids.labels.any():
            if self.kind.question_problem(grids.inputs[0]) is None:  # the search for one was given up
                message += "; it is not known whether the board has a solution"
            else:
                message += "; the board has several solutions, and any of them counts as right"
        return {"steps": steps, "solved": bool(trace.steps[-1]["right"]), "message": message}
