"""Merge the curves of several models, such as three seeds, that `solve_puzzles.py --curve` measured on the same boards.

    python solve_puzzles.py runs/s0 --held_out --curve runs/s0.png --copies 2 4 8   # also writes runs/s0.json
    python experiments/puzzle_curves.py runs/s0.json runs/s1.json runs/s2.json --output docs/sudoku_curve.png

Prints Markdown: the exact accuracy and the steps of every rule, as means and for every model; the steps that each rule
needs for the accuracy of all steps; the main rules by difficulty. `output` is a picture of the means.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # finds src when run as a script

from src.config import check_distinct, parse_flags, run  # noqa: E402
from src.errors import UserError  # noqa: E402
from src.tasks.curve_report import draw, merged, read_curve, report  # noqa: E402


@dataclass
class MergeConfig:
    """What to merge.

    Args:
        curves: .json files that solve_puzzles.py --curve wrote; the flag name may be left out
        output: picture (.png) of the means; without it, only the tables are printed
    """

    curves: list[str] = field(default_factory=list)
    output: str | None = None

    def __post_init__(self):
        if not self.curves:
            raise ValueError("curves is empty: give the .json files of one or more models")


def main(argv=None):
    (config,) = parse_flags(__doc__, MergeConfig, argv=argv, positional="curves")
    check_distinct([config.output], config.curves)
    curves = [read_curve(path) for path in config.curves]
    for path, curve in zip(config.curves, curves):
        for name in ("kind", "boards", "trained", "threshold"):
            if getattr(curve, name) != getattr(curves[0], name):
                values = f"{name} {getattr(curve, name)}, {config.curves[0]} has {getattr(curves[0], name)}"
                raise UserError(f"{path} has {values}: merge curves of the same boards and settings")
        if len({curves[0].digest, curve.digest} - {None}) > 1:
            raise UserError(f"{path} has other boards than {config.curves[0]}: measure both on the same boards")
    print(report(curves))
    if config.output:
        title = f"{curves[0].kind}: {curves[0].boards:,} boards"
        draw(merged(curves), config.output, title, f"means of {len(curves)} models")


if __name__ == "__main__":
    run(main)
