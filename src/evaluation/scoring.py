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

from src.data.corpus import cut
from src.data.samples import Sample, collate_batch
from src.errors import UserError
from src.exits import ExitRule, max_depth, visits_per_recursion_step
from src.losses import IGNORE, bits_per_byte
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
    return score_windows(model, samples, size, batch_size, rule, per_step, bar)


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


def score_windows(model, samples, size, batch_size, rule, per_step, bar) -> Score:
    """Score of the windows that `corpus_windows` makes, of which `size` tells what they hold."""
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
