"""Scores text with a model: log-probabilities of tokens and of continuations, and figures of a whole corpus.

Every document is scored by itself, after BOS. Each of its tokens is a target exactly once; the first is predicted from
BOS. BOS and EOS are not targets. Bytes and characters are those of the documents' text (UTF-8).

Long documents are scored in windows of max_seq_len inputs. Each window starts `stride` tokens after the one before, and
only targets that no earlier window scored count. Every target is therefore predicted from at least max_seq_len - stride
earlier tokens, if the document has that many. A smaller stride gives more context and takes longer; the targets stay
the same.
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

from src.data.readers import cut
from src.data.samples import Sample, collate_batch
from src.errors import UserError
from src.evaluation.exit_controls import exit_features
from src.exits import ExitRule, max_depth, visits_per_recursion_step
from src.losses import IGNORE, bits_per_byte
from src.tokenizer import warn_of_loss

SORTED = 16  # batches whose rows are sorted by length together, which keeps padding low

# ---- tokens ---------------------------------------------------------------------------------------------------------


class TokenScores(NamedTuple):
    """Scores of every target; 0 and False if there is none. S: 1, or the most recursion steps that any token took."""

    logprobs: Float[Tensor, "s *n"]  # nats
    is_likeliest: Bool[Tensor, "s *n"]
    depth: Int[Tensor, "*n"]  # recursion steps that the model took to predict it
    features: Float[Tensor, "f s *n"]  # of `exit_controls.exit_features`, for calibrated exits; F = 0 if not asked for


@torch.inference_mode()
def score_tokens(
    model,
    input_ids: Int[Tensor, "b t"],
    target_ids: Int[Tensor, "b t"],
    attention_mask: Int[Tensor, "b t"] | None = None,
    rule: ExitRule | None = None,
    per_step: bool = False,
    features: bool = False,
) -> TokenScores:
    """Returns the scores (S, B, T) of target_ids, where target_ids[t] follows input_ids[t] and -100 means no target.

    attention_mask: 0 = padding; None = no padding.
    rule: when a token stops recursing; default: the trained depth.
    per_step: score the prediction after each recursion step; otherwise only after each token's last step.
    features: also return what a calibrated exit rule sees; needs per_step."""
    output = model(input_ids, attention_mask=attention_mask, exit=rule or ExitRule(), return_steps=per_step)
    steps = output.logits if per_step else output.logits[None]
    logprobs = torch.stack([_logprobs(logits, target_ids) for logits in steps])
    seen = logprobs.new_empty(0, *logprobs.shape)
    if features:
        halts = [None] * len(steps) if output.halt_logits is None else output.halt_logits
        seen = torch.stack([exit_features(*each) for each in zip(steps, [None, *steps[:-1]], halts)], dim=1)
    return TokenScores(logprobs, steps.argmax(-1) == target_ids, output.carry.steps, seen)


def _logprobs(logits, targets):
    flat = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none")
    return -flat.view_as(targets)


def score_samples(
    model,
    samples: Iterable[Sample],
    batch_size: int = 8,
    rule: ExitRule | None = None,
    per_step: bool = False,
    features: bool = False,
    bar: tqdm | None = None,
) -> Iterator[tuple[int, TokenScores]]:
    """Yields (number of the sample, TokenScores (S, N) of its N targets) for each sample, grouped by similar length.

    Rows are padded on the right and masked, so a sample's scores do not depend on its batch. bar counts targets."""
    device, numbered, was_training = model.embed.weight.device, enumerate(samples), model.training
    model.eval()
    try:
        while chunk := list(itertools.islice(numbered, SORTED * batch_size)):
            chunk.sort(key=lambda item: len(item[1].input_ids))
            for start in range(0, len(chunk), batch_size):
                numbers, rows = zip(*chunk[start : start + batch_size])
                batch = {name: t.to(device) for name, t in collate_batch(rows).items()}
                found = score_tokens(model, **batch, rule=rule, per_step=per_step, features=features)
                scores = [part.cpu() for part in found]
                is_target = batch["target_ids"].cpu() != IGNORE
                for row, number in enumerate(numbers):
                    if bar is not None:
                        bar.update(int(is_target[row].sum()))
                    yield number, TokenScores(*(part[..., row, :][..., is_target[row]] for part in scores))
    finally:
        model.train(was_training)


def windows(prefix: list[int], pieces: Iterable[list[int]], context: int, stride: int) -> Iterator[Sample]:
    """Yields windows of at most `context` inputs over the tokens of `pieces`.

    The prefix (1 to `context` ids) comes before the tokens. Its ids are inputs but not targets."""
    row, scored = list(prefix), len(prefix) - 1  # the first `scored` targets of the row do not count
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
    """Returns the given stride, or half the context for None. Raises UserError for an unusable model or stride."""
    if not config.causal:
        raise UserError("causal is false in this model, so it cannot be scored as a language model: use a causal one")
    if stride is not None and not 1 <= stride <= config.max_seq_len:
        raise UserError(f"stride is {stride}: set it from 1 to the context of {config.max_seq_len} tokens")
    return max(1, config.max_seq_len // 2) if stride is None else stride


# ---- continuations --------------------------------------------------------------------------------------------------


class Continuation(NamedTuple):
    logprob: float  # of all its tokens, nats
    is_greedy: bool  # whether each token is the likeliest one at its position


def encode_pair(tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokenizes context and continuation together. Returns (ids of BOS and the context, ids of the continuation).

    The split is at the first id that differs from those of the context alone. White space at the end of the context
    goes to the continuation, because tokens of words include the space before them."""
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
    """Scores the second ids of each pair as a continuation of the first (at least one id, such as BOS).

    Keeps as many of the first ids as fit, from the end. A continuation that does not fit is scored in windows."""
    context, stride = model.config.max_seq_len, choose_stride(model.config, stride)
    owners, results = [], []  # owners[i]: number of the pair that window i belongs to

    def samples():
        for prefix, ids in pairs:
            # keep the prefix that fits, but at least the context that a target has in later windows
            kept = max(1, context - stride, context + 1 - len(ids))
            results.append(Continuation(0.0, True))
            for window in windows(prefix[-min(kept, context) :], [ids], context, stride):
                owners.append(len(results) - 1)
                yield window

    for number, scores in score_samples(model, samples(), batch_size, rule, bar=bar):
        total, is_greedy = results[owners[number]]
        logprob = total + scores.logprobs[-1].double().sum().item()
        results[owners[number]] = Continuation(logprob, is_greedy and bool(scores.is_likeliest[-1].all()))
    return results


# ---- a corpus -------------------------------------------------------------------------------------------------------


@dataclass
class Size:
    """How much of a corpus was scored."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    chars: int = 0
    words: int = 0  # separated by white space; the end of a line is a word too, as in WikiText's published figures
    lost: int = 0  # bytes that the tokenizer cannot represent


class Figures(NamedTuple):
    """Figures over all targets. Those per byte, character and word are NaN if the tokenizer loses part of the text."""

    loss: float  # nats per token
    bits_per_byte: float
    bits_per_char: float
    nats_per_char: float
    perplexity: float  # per token
    word_perplexity: float
    accuracy: float  # share of targets that the model ranks first


class Score(NamedTuple):
    size: Size
    figures: Figures  # of each token's last recursion step
    steps: list[Figures]  # after each recursion step (a stopped token keeps its last prediction); [] without per_step
    depth: float  # mean recursion steps per token
    visits: float  # mean applications of the network per token
    saved: float  # share of visits saved compared with the trained depth


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
    """Scores documents, which are texts or the (piece, is_last) pairs of `corpus.read_pieces`, in constant memory.

    Reads at most max_docs documents and max_tokens tokens; the last document may be cut. bar counts tokens.
    Raises UserError if there is nothing to score, or if `choose_stride` rejects the model or the stride."""
    config, rule, size = model.config, rule or ExitRule(), Size()
    samples = corpus_windows(config, tokenizer, documents, size, stride, max_docs, max_tokens)
    most = max_depth(config, rule) if per_step else 1
    sums, depth = torch.zeros(most, 2, dtype=torch.float64), 0
    for _, scores in score_samples(model, samples, batch_size, rule, per_step, bar=bar):
        parts = torch.stack((scores.logprobs.double().sum(-1), scores.is_likeliest.double().sum(-1)), dim=-1)
        missing = most - len(parts)  # steps that no token of this sample ran: they repeat the last one
        sums += torch.cat((parts, parts[-1:].expand(missing, -1)))
        depth += scores.depth.sum().item()
    steps = [_figures(*row, size) for row in sums.tolist()]
    warn_of_loss(size.lost, size.bytes)
    visits = visits_per_recursion_step(config) * depth / size.tokens
    saved = 1 - depth / size.tokens / max_depth(config)
    return Score(size, steps[-1], steps if per_step else [], depth / size.tokens, visits, saved)


def corpus_windows(config, tokenizer, documents, size, stride=None, max_docs=None, max_tokens=None) -> Iterator[Sample]:
    """Yields documents as windows and adds what they contain to `size`. Arguments and errors as in `score_corpus`."""
    stride = choose_stride(config, stride)
    pieces = itertools.chain.from_iterable(cut(d) if isinstance(d, str) else (d,) for d in documents)
    for first in pieces:
        size.documents += 1
        ids = _document(itertools.chain((first,), pieces), tokenizer, size, max_tokens or sys.maxsize)
        prefix = tokenizer.start([])
        if not tokenizer.add_bos:  # the first token takes the place of BOS
            piece = next(filter(None, ids), [])
            prefix, ids = piece[:1] or prefix, itertools.chain((piece[1:],), ids)
        yield from windows(prefix, ids, config.max_seq_len, stride)
        if size.documents == max_docs or size.tokens == max_tokens:
            break
    if not size.tokens:
        raise UserError("there is no token to score: give non-empty text")


def _document(pieces, tokenizer, size, max_tokens):
    """Yields the ids of each piece of one document, and counts the scored ones in `size`.

    All ids are scored, except the first one of a document without BOS: there is no token to predict it from."""
    skips = not tokenizer.add_bos  # leave out the first id
    last = " "  # character of the piece before
    for piece, is_last in pieces:
        ids = tokenizer.encode(piece)
        size.lost += tokenizer.lost_bytes(piece, ids)
        kept = ids[: max_tokens - size.tokens + skips]
        space = b"" if skips else tokenizer.prefix.encode()  # that the tokenizer added before the piece
        scored, skips = kept[skips:], skips and not kept
        data = piece.encode() if len(scored) == len(ids) else tokenizer.decode_bytes(scored).removeprefix(space)
        size.tokens += len(scored)
        size.bytes += len(data)
        text = data.decode(errors="replace")
        size.chars += len(text)  # an incomplete character at the cut counts as one
        is_one_word = not (text[:1] or " ").isspace() and not last.isspace()  # of the end of a piece and the next start
        size.words += len(text.split()) + text.count("\n") - is_one_word
        last = text[-1:] or last
        yield kept
        if is_last or size.tokens == max_tokens:
            return


def _figures(logprob, likeliest, size) -> Figures:
    loss = -logprob / size.tokens
    bytes, chars, words = (nan, nan, nan) if size.lost else (size.bytes, size.chars, max(1, size.words))
    per_byte, per_char = (bits_per_byte(loss, number / size.tokens) for number in (bytes, chars))
    # of a tensor, because math.exp raises OverflowError where this gives inf
    perplexity, per_word = torch.tensor([loss, -logprob / words], dtype=torch.float64).exp().tolist()
    return Figures(loss, per_byte, per_char, -logprob / chars, perplexity, per_word, likeliest / size.tokens)
