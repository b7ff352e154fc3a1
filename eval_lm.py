"""Measure a language model: loss, bits per byte and accuracy on text, or exact match of its answers to questions.

    python eval_lm.py                                             # the released checkpoint on its validation text
    python eval_lm.py runs/ja_wiki --paths data/ja_wiki/validation_*.jsonl.gz --max_tokens 100000 --json ja_wiki.json
    python eval_lm.py runs/trm --exit halt --act_threshold 0.8    # let each token stop recursing early
    python eval_lm.py runs/trm --depth_curve runs/curve.png       # draw bits per byte against FLOPs per token
    python eval_lm.py runs/trm --lm_eval capitals --include_path my_tasks    # EleutherAI's lm-evaluation-harness
    python eval_lm.py runs/addition --exact_match --paths data/test.jsonl --wrong wrong.jsonl --plot exact.png

Text is scored after each recursion step. Each document is scored separately, starting from BOS. Each of its tokens
counts once. BOS and EOS, which mark the beginning and the end of a document, do not count. A document longer than the
model's context is scored in overlapping windows, which advance by --stride tokens. The perplexity per word counts the
end of a line as a word, as published figures of WikiText-2 do.

With --exact_match, the model answers the questions of records greedily at each recursion depth, and each answer is
compared with that of the record as a string.

The tables go to stdout, progress and messages to stderr.
"""

import json
import sys
from dataclasses import asdict, dataclass, field
from math import isnan
from pathlib import Path
from typing import Literal

from src.config import before_torch, check_distinct, check_png, check_writable, parse_flags, run, write_json, write_text
from src.data.corpus import MAX_DOC_MB, find_files
from src.data.readers import SUFFIXES
from src.data.records import RECORD_SUFFIXES
from src.errors import UserError
from src.evaluation.answer_config import AnswerConfig
from src.model_config import ExitRule

ROWS = 8  # windows scored at once
CURVE_TOKENS = 10_000  # default for depth curves, kept small because every point is a pass over the text


@dataclass
class EvalConfig:
    """What to measure, and on which text.

    Args:
        checkpoint: checkpoint folder, or run folder (its best checkpoint is used); the flag name may be left out. If
            not given, the released checkpoint is measured
        paths: text to score, or records for --exact_match: files, globs, folders, or words such as site-packages/numpy
            (see data/README.md). If not given, the validation files of the standard library are scored
        ema: use the averaged weights if the checkpoint has them; false = the weights of its last step
        text_field: name of the JSON field or parquet column that holds the text
        max_doc_mb: skip .jsonl and .parquet documents longer than this many million characters
        max_docs: read at most this many documents or records; with --lm_eval, at most this many examples per task
        max_tokens: score at most this many tokens; a depth curve uses 10,000 if not given
        stride: tokens by which the windows over a long document advance; half the context if not given
        batch_size: windows scored at once, or questions answered at once; default 8, and 256 for --exact_match
        json: also write the figures to this JSON file
        depth_curve: .png file to draw, with bits per byte against FLOPs per token: fixed depths, each exit rule, exits
            calibrated on the other half of the text, and an oracle that knows every loss. The numbers are written to a
            .json beside it. The largest depth is that of training, or --max_recursion_depth if that is larger
        lm_eval: run these tasks of the lm-evaluation-harness (names or YAML files) instead of scoring text
        include_path: folder with additional tasks for --lm_eval
        num_fewshot: solved examples shown before each question of --lm_eval; if not given, as many as the task defines
        device: device to run on: auto (CUDA, else MPS, else CPU), cpu, cuda, cuda:1, ..., or mps
        precision: number format of weights and arithmetic
    """

    checkpoint: str | None = None
    paths: list[str] = field(default_factory=list)
    ema: bool = True
    text_field: str = "text"
    max_doc_mb: float = MAX_DOC_MB
    max_docs: int | None = None
    max_tokens: int | None = None
    stride: int | None = None
    batch_size: int | None = None
    json: str | None = None
    depth_curve: str | None = None
    lm_eval: list[str] = field(default_factory=list)
    include_path: str | None = None
    num_fewshot: int | None = None
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"

    def __post_init__(self):
        for name in ("max_docs", "max_tokens", "batch_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: set it to 1 or more")
        check_png("depth_curve", self.depth_curve)
        if self.lm_eval and (self.paths or self.depth_curve or self.stride or self.max_tokens):
            raise ValueError("lm_eval tasks have their own text: leave out paths, depth_curve, stride and max_tokens")
        if not self.lm_eval and (self.include_path is not None or self.num_fewshot is not None):
            raise ValueError("include_path and num_fewshot need lm_eval: name its tasks, or leave both out")


def curve_json(config) -> Path | None:
    """Returns the path of the depth curve's numbers: the picture's path with the suffix .json."""
    return None if config.depth_curve is None else Path(config.depth_curve).with_suffix(".json")


def outputs_of(config, answers) -> tuple:
    """Returns the paths of the files to write; None where there is none."""
    return config.json, config.depth_curve, curve_json(config), answers.wrong, answers.plot


@before_torch
def parse_args(argv=None) -> tuple[EvalConfig, AnswerConfig, ExitRule]:
    classes = (EvalConfig, AnswerConfig, ExitRule)
    config, answers, rule = parse_flags(__doc__, *classes, argv=argv, positional="checkpoint")
    if config.depth_curve is not None and rule != ExitRule(max_recursion_depth=rule.max_recursion_depth):
        raise UserError("depth_curve tries all exit rules: leave out exit, act_threshold and kl_threshold")
    if answers.exact_match:
        if config.depth_curve or config.lm_eval or config.stride or config.max_tokens or not config.paths:
            raise UserError("exact_match reads records: give paths, without depth_curve, lm_eval, stride, max_tokens")
        if rule.exit != "fixed":
            raise UserError("exact_match answers at every fixed depth: leave out exit, act_threshold and kl_threshold")
        if config.text_field != "text":
            raise UserError("text_field is for plain text, but exact_match reads records: use question_field")
    for path in outputs_of(config, answers):
        if path is not None:
            check_writable(path)
    return config, answers, rule


from tqdm import tqdm

from src.checkpoint import load_model, resolve
from src.data.corpus import read_pieces, stdlib_files
from src.data.records import read_records
from src.evaluation import exact_match
from src.evaluation.depth_curve import cheapest_points, depth_curve, draw_depth_curve, full_point
from src.evaluation.scoring import choose_stride, score_corpus
from src.exits import max_depth
from src.metrics import count_parameters, describe_model
from src.runtime import DTYPES, choose_device, choose_precision


def read_text(config):
    """Yields the documents to score, in pieces."""
    paths = config.paths
    if not paths:
        paths = stdlib_files()[1]
        print(f"no paths given: scoring {len(paths)} validation files of the Python standard library", file=sys.stderr)
    return read_pieces(paths, config.text_field, max_doc_mb=config.max_doc_mb)


def print_table(names, rows):
    """Print a table with right-aligned columns."""
    widths = [max(map(len, column)) for column in zip(names, *rows)]
    for row in (names, *rows):
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths)))


def measure_text(model, tokenizer, config, rule) -> dict:
    """Score the text.  Prints the size of the text, a row per recursion step, and the mean depth used."""
    bounds = {"max_docs": config.max_docs, "max_tokens": config.max_tokens}
    options = {"stride": config.stride, "batch_size": config.batch_size or ROWS, "rule": rule, "per_step": True}
    pieces = read_text(config)
    with tqdm(total=config.max_tokens, unit="token", unit_scale=True) as bar:
        score = score_corpus(model, tokenizer, pieces, **options, **bounds, bar=bar)
    n = score.size
    print(f"{n.documents:,} document{'s' * (n.documents != 1)}", end=", ")
    print(f"{n.tokens:,} tokens, {n.bytes:,} bytes, {n.chars:,} characters\n")
    names = ["step", "nats/token", "bits/byte", "bits/character", "perplexity", "accuracy"]
    formats = ("{:.4f}", "{:.4f}", "{:.4f}", "{:,.2f}", "{:.2%}")
    rows = []
    for i, step in enumerate(score.steps, 1):
        values = (step.loss, step.bits_per_byte, step.bits_per_char, step.perplexity, step.accuracy)
        rows.append([str(i), *("-" if isnan(v) else f.format(v) for f, v in zip(formats, values))])
    print_table(names, rows)
    print()
    last = score.figures
    if not isnan(last.nats_per_char):
        # a text without spaces has words of any length
        per_word = f", perplexity {last.word_perplexity:,.6g} per word or line end" if n.chars < 20 * n.words else ""
        print(f"in the end {last.nats_per_char:.4f} nats/character{per_word}")
    print(f"mean recursion depth {score.depth:.2f} of {max_depth(model.config)} trained, ", end="")
    changed = f"{score.saved:.1%} of the visits saved" if score.saved >= 0 else f"{-score.saved:.1%} more visits"
    print(f"{score.visits:.2f} visits per token, {changed}")
    steps = [step._asdict() for step in score.steps]
    depth = {"depth": score.depth, "visits": score.visits, "visits_saved": score.saved}
    return {**asdict(score.size), **score.figures._asdict(), **depth, "steps": steps}


def print_points(points, full):
    """Print a row per point of a depth curve; `full` is the point whose bits per byte the others are compared with."""
    rows = []
    for p in points:
        change, gain = p.bits_per_byte / full.bits_per_byte - 1, round(p.gain, 4) + 0.0  # +0.0 in place of -0.0
        error = "-" if isnan(p.gain_error) else f"{p.gain_error:.4f}"  # it needs more than one window
        row = [
            p.exit,
            f"{p.setting:g}",
            f"{p.depth:.2f}",
            f"{p.visits:.2f}",
            f"{p.saved:.1%}",
            f"{p.bits_per_byte:.4f}",
        ]
        rows.append([*row, f"{change:+.2%}", f"{p.random:.4f}", f"{gain:+.4f}", error])
    names = ["exit", "setting", "depth", "visits/token", "saved", "bits/byte", "change", "random", "gain", "error"]
    print_table(names, rows)


def draw_curve(model, tokenizer, config, rule) -> dict:
    """Draw the depth curve.  Prints its points, and each rule's cheapest point within 1 % of the trained depth."""
    bounds = {"max_docs": config.max_docs, "max_tokens": config.max_tokens or CURVE_TOKENS}
    options = {"stride": config.stride, "batch_size": config.batch_size or ROWS}
    pieces, trained = read_text(config), max_depth(model.config)
    with tqdm(unit="token", unit_scale=True) as bar:
        points = depth_curve(model, tokenizer, pieces, rule.max_recursion_depth, **options, **bounds, bar=bar)
    if all(p.exit != "calibrated" for p in points):
        print("the text is too short for calibrated exits, which need about 1,000 tokens", file=sys.stderr)
    best, full = cheapest_points(points, trained), full_point(points, trained)
    print_points(points, full)
    print("\nsetting: recursion steps, threshold, or (calibrated, oracle) the price of a step in nats")
    print("saved: share of the FLOPs at the trained depth; change: of the bits per byte there")
    print("random: bits per byte if as many tokens, chosen at random, stopped after each step")
    print("gain: bits per byte below the best mixture of fixed depths that costs no more; error: its standard error")
    print("\nfewest FLOPs within 1 % of the bits per byte at the trained depth:\n")
    print_points(best.values(), full)
    shallow = min((p for p in points if p.exit == "fixed" and p.setting <= trained), key=lambda p: p.bits_per_byte)
    if shallow.bits_per_byte < 0.999 * full.bits_per_byte:  # stopping early helps then because fewer steps are better
        print(f"\na fixed depth of {shallow.setting:g} beats the trained depth {trained}: compare the rules with it")
    draw_depth_curve(points, trained, config.depth_curve, describe_model(model), str(resolve(config.checkpoint)))
    found = {"points": [p._asdict() for p in points], "cheapest": {name: p._asdict() for name, p in best.items()}}
    write_json(curve_json(config), found)
    return found


def measure_answers(model, tokenizer, config, options, rule) -> dict:
    """Answer the questions of records.  Prints exact match by depth, and by difficulty and depth."""
    fields = options.question_field, options.answer_field
    records = read_records(config.paths, *fields, max_doc_mb=config.max_doc_mb)
    depth = max_depth(model.config, rule)
    found = exact_match.measure(model, tokenizer, records, options, depth, config.max_docs, config.batch_size)
    skipped = f"{found.skipped:,} skipped that exceed the context of {model.config.max_seq_len} tokens"
    n = found.figures["records"]
    print(f"{n:,} record{'s' * (n != 1)}, {skipped}")
    for names, rows in exact_match.tables(found.figures, options.best_of):
        print()
        print_table(names, rows)
    if options.wrong is not None:
        lines = (json.dumps(answer, ensure_ascii=False) + "\n" for answer in found.wrong)
        write_text(options.wrong, "".join(lines))
    if options.plot is not None:
        title, remark = describe_model(model), str(resolve(config.checkpoint))
        exact_match.draw_exact_match(found.figures, options.plot, title, remark)
    parameters = count_parameters(model)["total"]
    return found.figures | {"skipped": found.skipped, "parameters": parameters}


def run_harness(model, tokenizer, config, rule) -> dict:
    """Run tasks of the lm-evaluation-harness and print the table that it makes."""
    from src.evaluation.harness import run_tasks

    options = (config.include_path, config.num_fewshot, config.max_docs, config.batch_size or ROWS, rule)
    results, table = run_tasks(model, tokenizer, config.lm_eval, *options)
    print(table)
    return results


def main(argv=None):
    config, answers, rule = parse_args(argv)
    if config.paths:
        config.paths = find_files(config.paths, RECORD_SUFFIXES if answers.exact_match else SUFFIXES)
    check_distinct(outputs_of(config, answers), config.paths)
    device = choose_device(config.device)
    precision, _ = choose_precision(config.precision, device)
    model, tokenizer = load_model(config.checkpoint, device, DTYPES[precision], config.ema)
    choose_stride(model.config, config.stride)
    try:
        rule.check(model.config)
    except ValueError as error:
        raise UserError(error) from None
    if config.lm_eval:
        found = run_harness(model, tokenizer, config, rule)
    elif answers.exact_match:
        found = measure_answers(model, tokenizer, config, answers, rule)
    elif config.depth_curve:
        found = draw_curve(model, tokenizer, config, rule)
    else:
        found = measure_text(model, tokenizer, config, rule)
    if config.json is not None:
        write_json(config.json, {"checkpoint": str(resolve(config.checkpoint)), "exit": asdict(rule), **found})


if __name__ == "__main__":
    run(main)
