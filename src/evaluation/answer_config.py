"""Settings of `eval_lm.py --exact_match`, readable without PyTorch."""

from dataclasses import dataclass, fields

from src.config import check_png


@dataclass
class AnswerConfig:
    """How the questions of records are answered.

    Args:
        exact_match: answer the questions of the records in `paths`, and report the share of right answers by depth and
            by difficulty. Depths are all recursion steps up to that of training, or up to --max_recursion_depth
        question_field: name of the records' field with the question; default the known names, such as question
        answer_field: name of the records' field with the answer; default the known names, such as answer
        difficulty_field: name of the records' field with the difficulty; default `difficulty`, or, if a record has no
            such field, the number of digits of the longest number in its question
        best_of: also sample this many answers to each question, of which the one that the model finds most probable
            counts
        max_new_tokens: most tokens of an answer; default one more than the longest expected answer has
        wrong: .jsonl file to write, with the wrong answers at each depth: question, expected, got, depth
        plot: .png file to draw, with the share of right answers for each difficulty and depth
    """

    exact_match: bool = False
    question_field: str | None = None
    answer_field: str | None = None
    difficulty_field: str | None = None
    best_of: int | None = None
    max_new_tokens: int | None = None
    wrong: str | None = None
    plot: str | None = None

    def __post_init__(self):
        for name in ("best_of", "max_new_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: set it to 1 or more")
        check_png("plot", self.plot)
        given = [f.name for f in fields(self) if getattr(self, f.name) is not None and f.name != "exact_match"]
        if given and not self.exact_match:
            raise ValueError(f"{given[0]} needs exact_match: add --exact_match, or leave out {given[0]}")
