"""How a model answers the cases of `capability_cases.py`: it continues prompts, and ranks candidates or characters.

A prompt need not end where a token ends: a line break and the indentation after it are often one token, and so are a
quote and the bracket after it. So the end of a prompt is not encoded as tokens. The model continues from the tokens
before it, and may choose any tokens that spell the same characters.
"""

import bisect
from collections.abc import Callable
from itertools import takewhile
from typing import NamedTuple

import torch

from src.evaluation.capability_cases import Choice
from src.evaluation.scoring import score_continuations
from src.runtime import mix_seed
from src.sampling import generate, left_padded
from src.tokenizer import StreamDecoder

ROWS = 32  # texts in a batch
MOST_LOGITS = 50_000_000  # numbers in a batch of logits, which take 200 MB


class Answer(NamedTuple):
    """What a model wrote after a prompt."""

    text: str
    has_ended: bool  # with EOS


class Spelling:
    """The tokens of a vocabulary by their bytes."""

    def __init__(self, tokenizer):
        pairs = sorted((tokenizer.id_to_bytes(i), i) for i in range(tokenizer.vocab_size))
        self._bytes, self._ids = [data for data, _ in pairs], [i for _, i in pairs]

    def starting_with(self, start: bytes) -> list[int]:
        """Returns the ids of the tokens whose bytes start with `start`, which is not empty."""
        low = bisect.bisect_left(self._bytes, start)
        return self._ids[low : bisect.bisect_right(self._bytes, start, low, key=lambda data: data[: len(start)])]

    def first_of(self, text: bytes) -> list[int]:
        """Returns the ids of the tokens with which a text that starts with `text` can start."""
        ids = self.starting_with(text)
        for size in range(1, len(text)):
            part = text[:size]
            ids += self._ids[bisect.bisect_left(self._bytes, part) : bisect.bisect_right(self._bytes, part)]
        return ids


def write(
    model,
    tokenizer,
    prompts: list[str],
    new_tokens: int,
    is_done: Callable[[str], bool] = lambda text: False,
    in_word: bool = False,
    seed: int = 0,
    **options,
) -> list[Answer]:
    """Continues each prompt by at most `new_tokens` tokens, up to EOS or until is_done(its text), in cached batches.

    White space at the end of a prompt is not encoded, see above, and with in_word=True neither is its last token. Of a
    prompt that does not fit the context, the last tokens are kept. Options are those of `sampling.generate`."""
    spelling, answers = Spelling(tokenizer), {}
    rows = []  # (ids, bytes of the prompt that are not encoded, number of the prompt)
    for number, prompt in enumerate(prompts):
        text = prompt.rstrip()
        ids = fitting_ids(tokenizer, text, model.config.max_seq_len - new_tokens)
        owed = prompt[len(text) :].encode()
        if in_word:
            ids, owed = ids[:-1], tokenizer.id_to_bytes(ids[-1]) + owed
        rows.append((ids, owed, number))
    rows.sort(key=lambda row: (len(row[0]), row[2]))
    for start in range(0, len(rows), ROWS):
        batch = rows[start : start + ROWS]
        spelt = _spell(model, tokenizer, spelling, batch)
        texts = _continue(model, tokenizer, spelt, new_tokens, is_done, seed=mix_seed(seed, start), **options)
        answers |= {number: answer for (_, _, number), answer in zip(batch, texts)}
    return [answers[number] for number in range(len(prompts))]


def fitting_ids(tokenizer, text: str, room: int) -> list[int]:
    """Returns the last `room` ids (at least 1) of BOS and the text."""
    text = text[-16 * max(1, room) :]  # long enough: few tokens have over 16 characters
    return tokenizer.start(tokenizer.encode(text))[-max(1, room) :]


@torch.inference_mode()
def _spell(model, tokenizer, spelling, batch):
    """Returns [(ids, further ids, bytes)] of a batch: further ids that spell the bytes, each the likeliest one."""
    spelt = [(ids, [], owed) for ids, owed, _ in batch]
    device, longest = model.embed.weight.device, model.config.max_seq_len
    while True:
        owed = [data[len(tokenizer.decode_bytes(more)) :] for _, more, data in spelt]
        if not any(owed):
            return spelt
        ids, mask = left_padded([(first + more)[-longest:] for first, more, _ in spelt], tokenizer.pad_id, device)
        cache = model.new_cache(*ids.shape, last_only=True)
        logits = model(ids, attention_mask=mask, cache=cache).logits[:, -1]
        for row, data in enumerate(owed):
            if data:
                allowed = spelling.first_of(data)
                spelt[row][1].append(allowed[int(logits[row, allowed].argmax())])


def _continue(model, tokenizer, spelt, new_tokens, is_done, **options) -> list[Answer]:
    decoders, texts = [StreamDecoder(tokenizer) for _ in spelt], []
    for decoder, (_, more, owed) in zip(decoders, spelt):
        texts.append("".join(map(decoder.push, more)).removeprefix(owed.decode()))
    rows = [(ids + more)[-model.config.max_seq_len :] for ids, more, _ in spelt]
    ids, mask = left_padded(rows, tokenizer.pad_id, model.embed.weight.device)
    has_ended, ends = [False] * len(rows), tokenizer.end_ids
    for column in generate(model, ids, new_tokens, eos_id=ends, attention_mask=mask, **options):
        for row, index in enumerate(column.tolist()):
            has_ended[row] = has_ended[row] or index in ends
            if not has_ended[row] and not is_done(texts[row]):
                texts[row] += decoders[row].push(index)
        if all(ended or is_done(text) for ended, text in zip(has_ended, texts)):
            break
    return [Answer(*answer) for answer in zip(texts, has_ended)]


def log_probabilities(model, tokenizer, choices: list[Choice]) -> list[list[float]]:
    """Returns the log-probability (nats) of each candidate of each choice, after the tokens that they have in common.

    The context and a candidate are encoded together."""
    pairs = []
    for context, candidates, _, _ in choices:
        rows = [tokenizer.encode(context + candidate) for candidate in candidates]
        # each candidate keeps at least one id
        shortest = min(map(len, rows)) - 1
        same = len(list(takewhile(lambda column: len(set(column)) == 1, zip(*(row[:shortest] for row in rows)))))
        pairs += [(tokenizer.start(row[:same]), row[same:]) for row in rows]
    found = iter(score_continuations(model, pairs, batch_size=ROWS // 2))
    return [[next(found).logprob for _ in choice.candidates] for choice in choices]


@torch.inference_mode()
def character_probabilities(model, tokenizer, choices: list[Choice]) -> list[list[float]]:
    """Returns the probability that each candidate, a character, comes next after the text of the context.

    The last token of the context may be the first part of a longer token that contains the character. So this token is
    taken back, and all ways to spell it together with the character count; only the character after three or more
    tokens that another token could replace is missed."""
    spelling, found = Spelling(tokenizer), {}
    config, device = model.config, model.embed.weight.device
    rows = sorted((fitting_ids(tokenizer, c.context, config.max_seq_len), n) for n, c in enumerate(choices))
    rows.sort(key=lambda row: len(row[0]))
    size = max(1, min(ROWS, MOST_LOGITS // (tokenizer.vocab_size * config.max_seq_len)))
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        ids, mask = left_padded([ids for ids, _ in batch], tokenizer.pad_id, device)
        before, after = model(ids, attention_mask=mask).logits[:, -2:].double().softmax(-1).unbind(1)
        for row, (ids, number) in enumerate(batch):
            last = tokenizer.id_to_bytes(ids[-1])
            whole = before[row, spelling.starting_with(last)].sum()
            masses = []
            for character in choices[number].candidates:
                data = character.encode()
                joined = before[row, spelling.starting_with(last + data)].sum()
                apart = before[row, ids[-1]] * after[row, spelling.starting_with(data)].sum()
                masses.append(float((joined + apart) / whole))
            found[number] = masses
    return [found[number] for number in range(len(choices))]


def credit(scores: list[float], right: int) -> float:
    """Returns 1 if the right candidate has the highest score, 1/n if it shares it with others (n in all), else 0."""
    best = max(scores)
    ties = sum(score >= best - 1e-9 * max(1, abs(best)) for score in scores)
    return 1 / ties if scores[right] >= best - 1e-9 * max(1, abs(best)) else 0.0


def edit_similarity(a: str, b: str) -> float:
    """Returns 1 - (least number of characters inserted, deleted or replaced) / (length of the longer text)."""
    if not a or not b:
        return float(a == b)
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return 1 - row[-1] / max(len(a), len(b))
