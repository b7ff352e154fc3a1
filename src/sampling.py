"""Choice of the next token, and `generate`, which every script uses to generate text."""

import secrets
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from src.exits import ExitRule, max_depth
from src.runtime import mix_seed

LIKELIEST = 256  # tokens among which a nucleus is looked for before all tokens are sorted


class Thought(NamedTuple):
    """What the model computed at each recursion step for one new token of every row."""

    logits: Float[Tensor, "s b v"]  # after each recursion step
    halt_logits: Float[Tensor, "s b"] | None  # None without a halting head
    depth: Int[Tensor, "b"]  # recursion steps taken
    token: Int[Tensor, "b"]  # the chosen token


def filter_logits(
    logits: Float[Tensor, "b v"], temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Float[Tensor, "b v"]:
    """Divides logits by the temperature; tokens excluded by top_k or top_p (nucleus, arXiv:1904.09751) get -inf."""
    logits = logits.double()
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        best = logits.topk(top_k, dim=-1)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, best.indices, best.values)
    if top_p is not None and top_p < 1:
        logits = _nucleus(logits, top_p)
    return logits


def _nucleus(logits, top_p, most: int | None = LIKELIEST):
    """Gives -inf to the tokens outside the nucleus, which is looked for among the `most` likeliest tokens first.

    Sorting a whole vocabulary takes up to 30 times as long as finding its likeliest tokens."""
    size = logits.shape[-1]
    most = size if most is None else min(most, size)
    p, index = logits.softmax(-1).topk(most, dim=-1)
    before = p.cumsum(-1) - p  # total probability of the tokens that are more probable than this one
    kept = logits.gather(-1, index).masked_fill(before >= top_p, -torch.inf)
    found = torch.full_like(logits, -torch.inf).scatter(-1, index, kept)
    is_larger = before[:, -1] + p[:, -1] < top_p
    if most < size and bool(is_larger.any()):
        found[is_larger] = _nucleus(logits[is_larger], top_p, None)
    return found


def choose_token(logits, temperature, top_k, top_p, generators) -> Int[Tensor, "b"]:
    """Chooses one token per row of logits (B, V): the argmax at temperature 0, else a draw from the row's generator."""
    if temperature == 0:
        return logits.argmax(-1)
    device, logits = logits.device, logits.cpu()  # MPS has no float64; this way all devices give the same text
    cumulative = filter_logits(logits, temperature, top_k, top_p).softmax(-1).cumsum(-1)
    draw = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in generators])
    point = draw[:, None] * cumulative[:, -1:]  # the total is 1 up to rounding
    chosen = torch.searchsorted(cumulative, point, right=True).squeeze(-1)
    return chosen.clamp(max=logits.shape[-1] - 1).to(device)


def left_padded(rows: list[list[int]], pad_id: int, device) -> tuple[Int[Tensor, "b t"], Int[Tensor, "b t"]]:
    """Returns (ids, attention_mask) of a batch for `generate`: the rows, padded on the left."""
    gaps = [max(map(len, rows)) - len(row) for row in rows]
    ids = torch.tensor([[pad_id] * gap + row for gap, row in zip(gaps, rows)], device=device)
    mask = torch.tensor([[0] * gap + [1] * len(row) for gap, row in zip(gaps, rows)], device=device)
    return ids, mask


def row_generator(seed: int, row: int) -> torch.Generator:
    """Returns the random generator of a row: its draws do not depend on other rows."""
    return torch.Generator().manual_seed(mix_seed(seed, row))


def tokens_kept(max_len: int) -> int:
    """Returns how many tokens a row keeps when it outgrows a context of max_len tokens."""
    return max(1, max_len // 2)


def fit_window(ids, mask, max_len: int, finished) -> tuple[Tensor, Tensor]:
    """Shortens rows of ids (B, W), left-padded where mask is 0, to at most max_len tokens.  Returns (ids, mask).

    A row longer than max_len keeps its last `tokens_kept`. A finished row keeps its last token."""
    keeps = [1 if done else tokens_kept(max_len) for done in finished]
    rows = [row[real] for row, real in zip(ids, mask.bool())]
    rows = [row[-keep:] if done or len(row) > max_len else row for row, keep, done in zip(rows, keeps, finished)]
    width = max(len(row) for row in rows)
    ids, mask = ids.new_zeros(len(rows), width), mask.new_zeros(len(rows), width)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :], mask[i, width - len(row) :] = row, 1
    return ids, mask


@torch.no_grad()
def generate(
    model,
    prompt_ids: Int[Tensor, "b t"],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    use_cache: bool = True,
    seed: int | None = None,
    eos_id: int | Sequence[int] | None = None,
    attention_mask: Int[Tensor, "b t"] | None = None,
    exit: ExitRule | None = None,
    thoughts: list[Thought] | None = None,
    depths: list | None = None,
):
    """Yields ids (B,), one new token for every row, until max_new_tokens or until every row has reached EOS.

    prompt_ids: left-padded where attention_mask is 0.
    temperature: 0 is greedy. Row i has its own generator, seeded from (seed, i), so its text does not depend on others.
    eos_id: the id or ids (a tokenizer's `end_ids`) that end a row; any of them counts as EOS. A row that has ended
        yields the config's pad_token_id, or the first eos_id if there is none.
    exit: exit rule that stops each token.
    thoughts, depths: lists; each new token appends a Thought to `thoughts`, and its numbers of recursion steps (B,) to
        `depths`: 0 for a row that had ended before.

    When a row outgrows max_seq_len, it keeps its last max_seq_len // 2 tokens, which are encoded again. Raises
    ValueError for invalid options or prompts, when the caller requests the first token.
    """
    _check(model.config, prompt_ids, max_new_tokens, temperature, top_k, top_p, attention_mask)
    if exit is None and (thoughts is not None or depths is not None):
        exit = ExitRule()  # a fixed depth; an exit rule counts steps
    read = {} if exit is None else {"exit": exit.check(model.config), "return_steps": thoughts is not None}
    was_training, choice = model.training, (temperature, top_k, top_p)
    model.eval()
    try:
        for new, output, had_ended in _generate(
            model, prompt_ids, max_new_tokens, choice, use_cache, seed, eos_id, attention_mask, read
        ):
            if depths is not None:
                depths.append(output.carry.steps[:, -1].masked_fill(had_ended, 0))
            if thoughts is not None:
                thoughts.append(_thought(new, output))
            yield new
    finally:
        model.train(was_training)


def _thought(new, output) -> Thought:
    """Returns the Thought of the last position, without steps that only other positions have run."""
    depth = output.carry.steps[:, -1]
    steps = int(depth.max())
    halt = None if output.halt_logits is None else output.halt_logits[:steps, :, -1]
    return Thought(output.logits[:steps, :, -1], halt, depth, new)


def _generate(model, ids, max_new_tokens, choice, use_cache, seed, eos_id, mask, read):
    """Yields (new ids (B,), output of the model, whether each row had ended before) for one token after another."""
    max_len, pad = model.config.max_seq_len, model.config.pad_token_id
    seed = secrets.randbits(62) if seed is None else seed
    generators = [row_generator(seed, row) for row in range(len(ids))]
    finished = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    mask = torch.ones_like(ids) if mask is None else mask.bool().long()  # other numbers would be documents
    ends = None if eos_id in (None, [], ()) else torch.tensor(eos_id, device=ids.device).view(-1)
    cache, new = None, None
    for made in range(max_new_tokens):
        # make room if the context is full, or drop padding that all rows have in common
        if ids.shape[1] > max_len or (cache is None and not bool(mask[:, 0].any())):
            ids, mask = fit_window(ids, mask, max_len, finished.tolist())
            cache = None
        with torch.inference_mode():  # faster than no_grad
            if cache is not None:
                real = mask[:, -1:] if bool(finished.any()) else None
                output = model(new[:, None], attention_mask=real, cache=cache, **read)
            else:
                depth = max_depth(model.config, read["exit"]) if read else None
                room = min(max_len, ids.shape[1] + max_new_tokens - made)
                cache = model.new_cache(len(ids), room, depth=depth, last_only=True) if use_cache else None
                output = model(ids, attention_mask=None if bool(mask.all()) else mask, cache=cache, **read)
            logits = output.logits[-1] if read.get("return_steps") else output.logits
            new = choose_token(logits[:, -1], *choice, generators)
        new = new.clone()  # outside inference mode, autograd would reject this tensor
        if ends is not None:
            new = torch.where(finished, ends[0] if pad is None else pad, new)
        yield new, output, finished
        ids = torch.cat((ids, new[:, None]), dim=1)
        mask = torch.cat((mask, (~finished).long()[:, None]), dim=1)
        if ends is not None:
            finished = finished | torch.isin(new, ends)
            if bool(finished.all()):
                return


def _check(config, prompt_ids, max_new_tokens, temperature, top_k, top_p, mask):
    problems = (
        (not config.causal, "only a causal model generates text: set causal to true"),
        (max_new_tokens < 0, f"max_new_tokens is {max_new_tokens}: set it to 0 or more"),
        (not temperature >= 0, f"temperature is {temperature}: set it to 0 (greedy) or more"),
        (top_k is not None and top_k < 1, f"top_k is {top_k}: set it to 1 or more, or leave it out"),
        (top_p is not None and not 0 < top_p <= 1, f"top_p is {top_p}: set it above 0, up to 1, or leave it out"),
        (prompt_ids.shape[1] == 0, "the prompt is empty: start it with the BOS token"),
    )
    for problem, advice in problems:
        if problem:
            raise ValueError(advice)
    if mask is not None and (
        not bool(mask[:, -1].all()) or bool((mask.bool().diff(dim=1) & ~mask.bool()[:, 1:]).any())
    ):
        raise ValueError("attention_mask must be 0 on the left and 1 from the first real token on: pad on the left")
    longest = prompt_ids.shape[1] if mask is None else int(mask.bool().sum(1).max())
    if longest > config.max_seq_len:
        raise ValueError(f"the prompt has {longest} tokens, the context holds {config.max_seq_len}: shorten the prompt")


def generate_ids(model, prompt_ids: Int[Tensor, "b t"], max_new_tokens: int, **options) -> Int[Tensor, "b u"]:
    """Runs `generate` to its end: (B, T) -> (B, T + max_new_tokens).  Fills up with padding if all rows ended early."""
    columns = list(generate(model, prompt_ids, max_new_tokens, **options))
    if len(columns) < max_new_tokens:
        pad = model.config.pad_token_id
        ends = options["eos_id"]
        end = ends if isinstance(ends, int) else ends[0]
        fill = torch.full_like(prompt_ids[:, 0], end if pad is None else pad)
        columns += [fill] * (max_new_tokens - len(columns))
    return torch.cat((prompt_ids, *(column[:, None] for column in columns)), dim=1)
