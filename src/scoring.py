"""How well a model predicts text: log-probabilities of tokens, of continuations, and the figures of a whole corpus.

What counts: every document is scored by itself, after BOS. Each of its tokens is a target exactly once, the first one
predicted by BOS; BOS and EOS are no targets. Bytes and characters are those of the documents' text (UTF-8).

Long documents are scored in windows of max_seq_len inputs that advance by `stride` tokens, of which only the targets
count that no window had before: each is predicted from max_seq_len - stride earlier tokens at least, where the document
has them. A smaller stride gives more context and takes longer; it changes nothing about what is counted.
"""

import itertools
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import nan
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from src.corpus import cut
from src.curves import BLUE, GREEN, GREY, INK, ORANGE, add_title, label_ends, new_figure, save_picture, style_axes
from src.errors import UserError
from src.exits import ExitRule, max_depth, visits_per_recursion_step
from src.losses import IGNORE, bits_per_byte
from src.samples import Sample, collate_batch
from src.tokenizer import warn_of_loss

SORTED = 16  # batches whose rows are sorted by length together, so that little is padded

# ---- tokens ---------------------------------------------------------------------------------------------------------


class TokenScores(NamedTuple):
    """Of every target; 0, False where there is none.  S = 1, or recursion steps that were run by any token."""

    logprobs: Float[Tensor, "s *n"]  # nats
    is_likeliest: Bool[Tensor, "s *n"]
    depth: Int[Tensor, "*n"]  # recursion steps that the token before it took


@torch.inference_mode()
def score_tokens(
    model,
    input_ids: Int[Tensor, "b t"],
    target_ids: Int[Tensor, "b t"],
    attention_mask: Int[Tensor, "b t"] | None = None,
    rule: ExitRule | None = None,
    per_step: bool = False,
) -> TokenScores:
    """Log-probabilities of the tokens of rows: target_ids[t] follows input_ids[t], -100 is no target.  (S, B, T).

    attention_mask: 0 = padding, None = every token is real; rule: when a token stops recursing, default the trained
    depth; per_step: read the answer out after each recursion step, else after each token's last."""
    output = model(input_ids, attention_mask=attention_mask, exit=rule or ExitRule(), return_steps=per_step)
    steps = output.logits if per_step else output.logits[None]
    logprobs = torch.stack([_logprobs(logits, target_ids) for logits in steps])
    return TokenScores(logprobs, steps.argmax(-1) == target_ids, output.carry.steps)


def _logprobs(logits, targets):
    flat = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none")
    return -flat.view_as(targets)


def score_samples(
    model, samples: Iterable[Sample], batch_size: int = 8, rule: ExitRule | None = None, per_step: bool = False
) -> Iterator[tuple[int, TokenScores]]:
    """(number of the sample, TokenScores (S, N) of its N targets) for each sample, those of like length first.

    Rows are padded on the right under a mask, so that a sample's scores do not depend on its batch."""
    device, numbered, was_training = model.embed.weight.device, enumerate(samples), model.training
    model.eval()
    try:
        while chunk := list(itertools.islice(numbered, SORTED * batch_size)):
            chunk.sort(key=lambda item: len(item[1].input_ids))
            for start in range(0, len(chunk), batch_size):
                numbers, rows = zip(*chunk[start : start + batch_size])
                batch = {name: t.to(device) for name, t in collate_batch(rows).items()}
                scores = [part.cpu() for part in score_tokens(model, **batch, rule=rule, per_step=per_step)]
                is_target = batch["target_ids"].cpu() != IGNORE
                for row, number in enumerate(numbers):
                    yield number, TokenScores(*(part[..., row, :][..., is_target[row]] for part in scores))
    finally:
        model.train(was_training)


def windows(prefix: list[int], pieces: Iterable[list[int]], context: int, stride: int) -> Iterator[Sample]:
    """The tokens of `pieces` after a prefix (1 to `context` ids, no targets) in windows of at most `context` inputs."""
    row, scored = list(prefix), len(prefix) - 1  # of the row's targets that no later window may count
    for piece in pieces:
        row += piece
        while len(row) > context:
            yield _window(row[: context + 1], scored)
            row, scored = row[stride:], context - stride
    if len(row) - 1 > scored:
        yield _window(row, scored)


def _window(row, scored):
    ids = torch.tensor(row)
    targets = ids[1:].clone()
    targets[:scored] = IGNORE
    return Sample(ids[:-1], targets, None)


def choose_stride(config, stride: int | None = None) -> int:
    """The stride that is asked for, else half the context.  UserError where the model or the stride cannot be."""
    if not config.causal:
        raise UserError("this model sees all positions at once (causal is false): it is no language model to score")
    if stride is not None and not 1 <= stride <= config.max_seq_len:
        raise UserError(f"stride is {stride}: set it from 1 to the context of {config.max_seq_len} tokens")
    return max(1, config.max_seq_len // 2) if stride is None else stride


# ---- continuations --------------------------------------------------------------------------------------------------


class Continuation(NamedTuple):
    logprob: float  # of all its tokens, nats
    is_greedy: bool  # each of them is the likeliest there


def encode_pair(tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """(ids of BOS and the context, ids of the continuation), split where the ids of both together part from the
    context's own. White space at the context's end belongs to the continuation, as to the tokens of words."""
    stripped = context.rstrip()
    ids, own = tokenizer.encode(context + continuation), tokenizer.encode(stripped)
    same = next((i for i, (a, b) in enumerate(zip(ids, own)) if a != b), min(len(ids), len(own)))
    return tokenizer.start(ids[:same]), ids[same:]


def score_continuations(
    model,
    pairs: Iterable[tuple[list[int], list[int]]],
    stride: int | None = None,
    batch_size: int = 8,
    rule: ExitRule | None = None,
    bar: tqdm | None = None,
) -> list[Continuation]:
    """How likely each pair's second ids are after its first (one at least, such as BOS).

    As much of the first as fits is kept, from its end; a continuation that does not fit either is scored in windows."""
    context, stride = model.config.max_seq_len, choose_stride(model.config, stride)
    owners, results = [], []

    def samples():
        for prefix, ids in pairs:
            kept = max(1, context - stride, context + 1 - len(ids))
            results.append(Continuation(0.0, True))
            for window in windows(prefix[-min(kept, context) :], [ids], context, stride):
                owners.append(len(results) - 1)
                yield window

    for number, scores in score_samples(model, samples(), batch_size, rule):
        total, is_greedy = results[owners[number]]
        logprob = total + scores.logprobs[-1].double().sum().item()
        results[owners[number]] = Continuation(logprob, is_greedy and bool(scores.is_likeliest[-1].all()))
        if bar is not None:
            bar.update(scores.depth.numel())
    return results


# ---- a corpus -------------------------------------------------------------------------------------------------------


@dataclass
class Size:
    """What was scored of a corpus."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    chars: int = 0
    lost: int = 0  # bytes that the tokens do not give back


class Figures(NamedTuple):
    """The quality of one answer, over all targets; NaN per byte and character where the tokens lose some text."""

    loss: float  # nats per token
    bits_per_byte: float
    bits_per_char: float
    perplexity: float  # per token
    accuracy: float  # share of the targets that are the likeliest token


class Score(NamedTuple):
    size: Size
    figures: Figures  # of each token's last answer
    steps: list[Figures]  # after each recursion step, where a token that has stopped keeps its answer; or []
    depth: float  # mean recursion steps per token
    visits: float  # mean applications of the network per token
    saved: float  # share of the visits at the trained depth that this leaves out


def score_corpus(
    model,
    tokenizer,
    documents: Iterable[str | tuple[str, bool]],
    stride: int | None = None,
    batch_size: int = 8,
    rule: ExitRule | None = None,
    per_step: bool = False,
    max_docs: int | None = None,
    max_tokens: int | None = None,
    bar: tqdm | None = None,
) -> Score:
    """Score of documents: texts, or the (piece, is_last) pairs of `corpus.read_pieces`; memory stays flat.

    At most max_docs documents and max_tokens tokens are read; the last document may be cut. bar counts tokens.
    Raises UserError where there is nothing to score, or `choose_stride` refuses."""
    size = Size()
    samples = corpus_windows(model.config, tokenizer, documents, size, stride, max_docs, max_tokens)
    return _score(model, samples, size, batch_size, rule, per_step, bar)


def corpus_windows(config, tokenizer, documents, size, stride=None, max_docs=None, max_tokens=None) -> Iterator[Sample]:
    """Documents as windows; arguments as in `score_corpus`. What they hold is added to `size` as they are made."""
    stride = choose_stride(config, stride)
    pieces = itertools.chain.from_iterable(cut(d) if isinstance(d, str) else (d,) for d in documents)
    for first in pieces:
        size.documents += 1
        ids = _document(itertools.chain((first,), pieces), tokenizer, size, max_tokens or sys.maxsize)
        prefix = tokenizer.start([])
        if not tokenizer.add_bos:
            piece = next(filter(None, ids), [])
            prefix, ids = piece[:1] or prefix, itertools.chain((piece[1:],), ids)
        yield from windows(prefix, ids, config.max_seq_len, stride)
        if size.documents == max_docs or size.tokens == max_tokens:
            return


def _document(pieces, tokenizer, size, max_tokens):
    """Ids of each piece of one document. Those that are scored are counted in `size`: all but the first of a document
    that does not begin with BOS, as nothing stands before it."""
    skips = not tokenizer.add_bos
    for piece, is_last in pieces:
        ids = tokenizer.encode(piece)
        size.lost += tokenizer.lost_bytes(piece, ids)
        kept = ids[: max_tokens - size.tokens + skips]
        scored, skips = kept[skips:], skips and not kept
        data = piece.encode() if len(scored) == len(ids) else tokenizer.decode_bytes(scored)
        size.tokens += len(scored)
        size.bytes += len(data)
        size.chars += len(data.decode(errors="replace"))  # half a character at the cut is one
        yield kept
        if is_last or size.tokens == max_tokens:
            return


def _score(model, samples, size, batch_size, rule, per_step, bar) -> Score:
    config, rule = model.config, rule or ExitRule()
    most = max_depth(config, rule) if per_step else 1
    sums, depth = torch.zeros(most, 2, dtype=torch.float64), 0
    for _, scores in score_samples(model, samples, batch_size, rule, per_step):
        parts = torch.stack((scores.logprobs.double().sum(-1), scores.is_likeliest.double().sum(-1)), dim=-1)
        sums += torch.cat((parts, parts[-1:].expand(most - len(parts), -1)))  # later steps, which no token here ran
        depth += scores.depth.sum().item()
        if bar is not None:
            bar.update(scores.depth.numel())
    if not size.tokens:
        raise UserError("there is no token to score: give text that is not empty")
    steps = [_figures(*row, size) for row in sums.tolist()]
    warn_of_loss(size.lost, size.bytes)
    visits = visits_per_recursion_step(config) * depth / size.tokens
    saved = 1 - depth / size.tokens / max_depth(config)
    return Score(size, steps[-1], steps if per_step else [], depth / size.tokens, visits, saved)


def _figures(logprob, likeliest, size) -> Figures:
    loss = -logprob / size.tokens
    bytes, chars = (nan, nan) if size.lost else (size.bytes, size.chars)
    perplexity = torch.tensor(loss, dtype=torch.float64).exp().item()  # inf, where math.exp would raise
    per_byte, per_char = (bits_per_byte(loss, number / size.tokens) for number in (bytes, chars))
    return Figures(loss, per_byte, per_char, perplexity, likeliest / size.tokens)


# ---- bits per byte against depth ------------------------------------------------------------------------------------

ACT_THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
KL_THRESHOLDS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
NAMES = {"fixed": "fixed depth", "halt": "halting head", "kl": "KL between steps"}
COLORS = {"fixed": ORANGE, "halt": BLUE, "kl": GREEN}


class CurvePoint(NamedTuple):
    """One setting of an exit rule, and what it costs and gives."""

    exit: str
    setting: float  # recursion steps, act_threshold or kl_threshold
    depth: float  # mean recursion steps per token
    visits: float  # mean applications of the network per token
    saved: float  # share of the visits at the trained depth that this leaves out
    loss: float  # nats per token
    bits_per_byte: float


def depth_curve(
    model,
    tokenizer,
    documents: Iterable[str | tuple[str, bool]],
    max_recursion_depth: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    act_thresholds: Iterable[float] = ACT_THRESHOLDS,
    kl_thresholds: Iterable[float] = KL_THRESHOLDS,
    max_docs: int | None = None,
    max_tokens: int | None = None,
    bar: tqdm | None = None,
) -> list[CurvePoint]:
    """Points of every exit rule that the model can obey, all on the same windows, which are kept in memory.

    One pass gives all fixed depths up to max_recursion_depth (at least the trained one); each threshold is a pass."""
    config, size = model.config, Size()
    if config.recursion == "none":
        raise UserError("recursion none is one visit: there is no depth to draw a curve over")
    deepest = max(max_depth(config), max_recursion_depth or 0)
    if deepest == 1:
        raise UserError("one recursion step is no depth to draw a curve over: add --max_recursion_depth 4")
    samples = list(corpus_windows(config, tokenizer, documents, size, stride, max_docs, max_tokens))
    if size.lost:
        raise UserError("the tokenizer does not give all of the text back: there are no bits per byte to draw")
    rules = [ExitRule("halt", deepest, act_threshold=a) for a in act_thresholds if config.recursion == "trm"]
    rules += [ExitRule("kl", deepest, kl_threshold=k) for k in kl_thresholds if deepest > 2]  # it needs two steps
    if bar is not None:
        bar.reset(size.tokens * (1 + len(rules)))
    fixed = _score(model, samples, size, batch_size, ExitRule("fixed", deepest), True, bar)
    points = [_point(config, "fixed", step, step, figures) for step, figures in enumerate(fixed.steps, 1)]
    for rule in rules:
        setting = rule.act_threshold if rule.exit == "halt" else rule.kl_threshold
        score = _score(model, samples, size, batch_size, rule, False, bar)
        points.append(_point(config, rule.exit, setting, score.depth, score.figures))
    return points


def _point(config, exit, setting, depth, figures) -> CurvePoint:
    visits, saved = visits_per_recursion_step(config) * depth, 1 - depth / max_depth(config)
    return CurvePoint(exit, setting, depth, visits, saved, figures.loss, figures.bits_per_byte)


def cheapest_points(points: list[CurvePoint], trained_depth: int, within: float = 0.01) -> dict[str, CurvePoint]:
    """{exit: point of the fewest visits that has at most (1 + within) x the trained depth's bits per byte}."""
    limit = (1 + within) * full_point(points, trained_depth).bits_per_byte
    good = [[p for p in points if p.exit == name and p.bits_per_byte <= limit] for name in NAMES]
    return {of_rule[0].exit: min(of_rule, key=lambda p: p.visits) for of_rule in good if of_rule}


def full_point(points: list[CurvePoint], trained_depth: int) -> CurvePoint:
    """The point of the depth that the model was trained with."""
    return next(point for point in points if (point.exit, point.setting) == ("fixed", trained_depth))


def draw_depth_curve(points: list[CurvePoint], trained_depth: int, path: str, title: str = "", remark: str = ""):
    """A picture (PNG) of bits per byte over mean visits per token: a curve per exit rule, its cheapest point ringed.

    Points of far more bits per byte than the trained depth has may lie above the frame."""
    figure, grid = new_figure(5.2)
    axes, full = figure.add_subplot(grid[:, :]), full_point(points, trained_depth)
    style_axes(axes, "bits per byte")
    axes.set_xlabel("mean visits of the network per token", fontsize=9, color="#555555")
    axes.axhspan(full.bits_per_byte, 1.01 * full.bits_per_byte, color=GREY, alpha=0.15, linewidth=0)
    best, labels = cheapest_points(points, trained_depth), []
    for name, color in COLORS.items():
        curve = sorted((p.visits, p.bits_per_byte) for p in points if p.exit == name)
        if curve:
            axes.plot(*zip(*curve), "o-", color=color, markersize=4, linewidth=1.6)
            labels.append((curve[-1][1], f"{NAMES[name]}\n({_saving(best.get(name))})", color))
        if name in best:
            spot = {"markersize": 11, "markerfacecolor": "none", "markeredgecolor": color, "markeredgewidth": 1.4}
            axes.plot(best[name].visits, best[name].bits_per_byte, "o", **spot, zorder=4)
    _set_curve_limits(axes, points, full)
    place = {"xytext": (0, 9), "textcoords": "offset points", "ha": "center", "fontsize": 8, "color": COLORS["fixed"]}
    for p in points:
        if p.exit == "fixed" and p.bits_per_byte < axes.get_ylim()[1]:
            axes.annotate(f"{p.setting:g}{' (trained)' * (p is full)}", (p.visits, p.bits_per_byte), **place)
    axes.plot(full.visits, full.bits_per_byte, "s", color=INK, markersize=6, zorder=5)
    inside = {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": 8, "color": GREY}
    axes.text(0.01, 1.005 * full.bits_per_byte, "at most 1 % over the trained depth", **inside)
    label_ends(axes, labels, lines=2)
    add_title(figure, title, remark)
    return save_picture(figure, path)


def _saving(point) -> str:
    if point is None:
        return "none within 1 %"
    return f"{abs(point.saved):.0%} {'fewer' if point.saved >= 0 else 'more'} visits at {point.setting:g}"


def _set_curve_limits(axes, points, full):
    bits = [point.bits_per_byte for point in points]
    low, high = min(bits), max(1.01 * full.bits_per_byte, min(max(bits), 1.2 * full.bits_per_byte))
    margin = 0.08 * (high - low)
    axes.locator_params(axis="x", integer=True)
    axes.set_xlim(0, 1.03 * max(point.visits for point in points))
    axes.set_ylim(low - margin, high + margin)
