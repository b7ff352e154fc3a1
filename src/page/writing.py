"""From chosen tokens to text: figures of each token, whole characters, stop strings.

A Writer belongs to one text. It gets one Token after the other and returns the text that is certain: an incomplete
character waits for its other bytes, and text that may be the beginning of a stop string waits for what follows.
"""

from dataclasses import dataclass, field
from math import log

import torch

from src.evaluation.trace import token_text
from src.page.batch import Chosen
from src.tokenizer import REPLACEMENT, StreamDecoder

LEAST = -9999.0  # stands for a log-probability of minus infinity, which JSON cannot express


@dataclass
class Token:
    """One token of a text, with what was asked for."""

    id: int
    steps: int = 0  # recursion steps
    logprob: float | None = None  # nats; None where there is nothing to predict the token from
    top: list[tuple[int, float]] = field(default_factory=list)  # likeliest ids and their log-probabilities
    trace: list[dict] | None = None  # per recursion step: halt, entropy, p, top
    text: str = ""  # the whole characters that this token completes
    offset: int = 0  # number of characters before `text`


@dataclass
class Piece:
    """What a text gets in one step."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish: str | None = None  # stop or length, as in OpenAI's API; error if the model failed
    reason: str | None = None  # eos, the stop string, max_tokens, seconds, shutdown; with error: the message


def read_tokens(chosen: Chosen, wanted: list[tuple[int, int | None, int | None]], tokenizer) -> dict[int, Token]:
    """Returns {row: Token} with probabilities.

    wanted: (row, number of likeliest tokens, number of tokens in the trace or None for no trace) for each row whose
    probabilities are wanted."""
    if not wanted:
        return {}
    rows = [row for row, _, _ in wanted]
    logprobs = chosen.logits[-1][rows].float().log_softmax(-1).cpu()
    written = [chosen.tokens[row] for row in rows]
    own = logprobs.gather(1, torch.tensor(written)[:, None]).squeeze(1).tolist()
    best = _best(logprobs, max(top or 0 for _, top, _ in wanted))
    traces = _traces(chosen, {row: top for row, _, top in wanted if top is not None}, tokenizer)
    return {
        row: Token(index, chosen.depths[row], max(p, LEAST), likeliest[: top or 0], traces.get(row))
        for (row, top, _), index, p, likeliest in zip(wanted, written, own, best)
    }


def score_prompt(tokens: list[Token], logits: torch.Tensor, top: int):
    """Writes log-probabilities into tokens of a prompt.  logits (T, V): those that predict the first, second, ..."""
    logprobs = logits[: len(tokens)].float().log_softmax(-1).cpu()
    ids = torch.tensor([token.id for token in tokens], dtype=torch.long)
    own = logprobs.gather(1, ids[:, None]).squeeze(1).tolist()
    for token, p, best in zip(tokens, own, _best(logprobs, top), strict=True):
        token.logprob, token.top = max(p, LEAST), best


def _best(logprobs, most):
    """Returns the `most` likeliest (id, log-probability) of each row of (N, V)."""
    if not most:
        return [[] for _ in logprobs]
    values, ids = logprobs.topk(min(most, logprobs.shape[-1]), dim=-1)
    return [[(i, max(v, LEAST)) for i, v in zip(*pair)] for pair in zip(ids.tolist(), values.tolist())]


def _traces(chosen: Chosen, tops: dict[int, int], tokenizer) -> dict[int, list[dict]]:
    """Returns what the model predicted after each recursion step.

    Each step is {"halt", "entropy" (bits), "p" (of the chosen token), "top": [id, text, p]}.
    tops: how many tokens for which row."""
    if not tops:
        return {}
    rows, halts = list(tops), None
    steps = max(chosen.depths[row] for row in rows)
    logprobs = chosen.logits[:steps, rows].float().log_softmax(-1)
    p = logprobs.exp()
    entropies = (p * logprobs.clamp(min=LEAST)).sum(-1).mul(-1 / log(2)).tolist()
    chosen_ids = torch.tensor([chosen.tokens[row] for row in rows], device=p.device)
    own = p.gather(-1, chosen_ids.expand(len(p), -1)[..., None]).squeeze(-1).tolist()
    values, ids = (part.tolist() for part in p.topk(min(max(tops.values()), p.shape[-1]), dim=-1))
    if chosen.halt_logits is not None:
        halts = chosen.halt_logits[:steps, rows].float().sigmoid().tolist()
    found = {}
    for number, (row, top) in enumerate(tops.items()):
        found[row] = [
            {
                "halt": None if halts is None else _short(halts[step][number]),
                "entropy": _short(entropies[step][number]),
                "p": _short(own[step][number]),
                "top": [
                    [index, token_string(tokenizer, index), _short(value)]
                    for index, value in zip(ids[step][number][:top], values[step][number])
                ],
            }
            for step in range(chosen.depths[row])
        ]
    return found


def _short(number: float) -> float:
    return float(f"{number:.6g}")


def token_string(tokenizer, index: int) -> str:
    """Returns the text of an id; bytes:\\xe3\\x81 if it is no whole character, <eos> or similar if it has none."""
    data = tokenizer.id_to_bytes(index)
    if data in (b"", REPLACEMENT):
        return token_text(tokenizer, index)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class Writer:
    """Turns the tokens of one text into pieces."""

    def __init__(self, tokenizer, prompt: list[int], stops: tuple[str, ...], ends: tuple[int, ...], most: int):
        """prompt: the tokens before. most: the most new tokens. ends: ids that end the text."""
        self.stops, self.ends, self.left = stops, ends, most
        self._decoder, self._chars = StreamDecoder(tokenizer, starts_text=True), 0
        self.prompt_tokens = [Token(index) for index in prompt]
        for token in self.prompt_tokens:
            self._read(token)
        self.prompt = "".join(token.text for token in self.prompt_tokens)
        self._longest = max(map(len, stops), default=0)
        self._text, self._sent, self._held = "", 0, []  # text so far, characters returned, tokens not yet returned
        self._first = len(self.prompt)

    def _read(self, token):
        token.offset, token.text = self._chars, self._decoder.push(token.id)
        self._chars += len(token.text)

    def take(self, token: Token) -> Piece:
        """Adds a token. Returns the text that is certain, and how the text ended if it did."""
        self.left -= 1
        self._held.append(token)
        if token.id in self.ends:
            token.offset = self._chars
            return self.end("stop", "eos")
        begin = max(0, len(self._text) - self._longest + 1)
        self._read(token)
        self._text += token.text
        found = [(at, stop) for stop in self.stops if (at := self._text.find(stop, begin)) >= 0]
        if found:
            at, stop = min(found, key=lambda pair: (pair[0], -len(pair[1])))
            return self._release(at, "stop", stop, at)
        if self.left <= 0:
            return self.end("length", "max_tokens")
        return self._release(len(self._text) - self._uncertain())

    def end(self, finish: str, reason: str) -> Piece:
        """Ends the text: returns what was held back. A character that lacks bytes becomes U+FFFD."""
        rest = self._decoder.flush()
        if rest and self._held:
            self._held[-1].text += rest
        self._text += rest
        return self._release(len(self._text), finish, reason)

    def _uncertain(self) -> int:
        """Returns how many characters at the end may be the beginning of a stop string."""
        most = min(len(self._text) - self._sent, self._longest - 1)
        return next((n for n in range(most, 0, -1) if any(stop.startswith(self._text[-n:]) for stop in self.stops)), 0)

    def _release(self, end, finish=None, reason=None, cut=None) -> Piece:
        """Returns the text up to `end`, and the tokens whose text it contains; all that begin before a cut."""
        text, self._sent = self._text[self._sent : end], max(self._sent, end)
        limit, number = self._first + end, 0
        for token in self._held:
            ends = token.offset + len(token.text)
            if cut is None and not (ends <= limit or finish) or cut is not None and token.offset >= limit:
                break
            number += 1
        tokens, self._held = self._held[:number], self._held[number:]
        return Piece(text, tokens, finish, reason)
