"""A model with its tokenizer: takes text, and returns text or figures.

lm = load_model("runs/trm")               # in src/checkpoint.py
model, tokenizer = lm                     # a LanguageModel is a tuple
lm.write("Once upon", seed=1)             # the text that generate.py prints
lm.write("def f(", suffix="return x")     # fill-in-the-middle: the text with what the model writes between the two
lm.score(["One text.", "Another one."])   # loss, bits per byte and other figures of each text
lm.inspect("Once upon").logits.shape      # recursion steps x tokens x vocabulary
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from src.exits import ExitRule
from src.runtime import device_of, share_cores
from src.sampling import generate, left_padded
from src.tokenizer import StreamDecoder


class Inspection(NamedTuple):
    """What a model computed for one text: T tokens, S recursion steps, V visits of the network."""

    ids: Int[Tensor, "t"]  # BOS first
    logits: Float[Tensor, "s t vocabulary"]  # after each recursion step
    halt_logits: Float[Tensor, "s t"] | None  # after each recursion step; None without a halting head
    states: Float[Tensor, "v t d"]  # the network's output at each visit: z, ..., z, y for each deep step of trm


class LanguageModel(NamedTuple):
    """A trained model and its tokenizer."""

    model: Any  # TRMModel, or an ONNX graph in its place
    tokenizer: Any

    def write(self, text: str = "", max_new_tokens: int = 200, temperature=0.8, top_p=0.95, **options) -> str:
        """Returns the text with the model's continuation, like generate.py; if there is a suffix, it follows.

        More options: suffix (see `continue_texts`), stop_at_eos (default: True) and those of `sampling.generate`, such
        as top_k and seed. Raises ValueError for options or texts that the model cannot use."""
        options |= {"temperature": temperature, "top_p": top_p}
        written = continue_texts(self.model, self.tokenizer, [text], max_new_tokens, **options)
        return text + "".join(pieces[0] for pieces, _ in written) + (options.get("suffix") or "")

    def score(self, texts: list[str], **options) -> list:
        """Returns a `scoring.Figures` (loss in nats per token, bits per byte, ...) of each text, scored by itself.

        Options are those of `scoring.score_corpus`, such as stride or rule. Raises UserError for an empty text."""
        from src.evaluation.scoring import score_corpus  # imported here: generating text does not need it

        return [score_corpus(self.model, self.tokenizer, [text], **options).figures for text in texts]

    @torch.no_grad()
    def inspect(self, text: str, rule: ExitRule | None = None) -> Inspection:
        """Returns the logits after every recursion step and the hidden states after every visit.

        rule: the number of steps, and whether tokens may stop early; by default, all tokens run as many steps as in
        training. Raises ValueError if the text does not fit the context."""
        encoded = self.tokenizer.encode(text, bos=True)
        if len(encoded) > self.model.config.max_seq_len:
            holds = f"the context holds {self.model.config.max_seq_len}"
            raise ValueError(f"the text has {len(encoded)} tokens, {holds}: shorten the text")
        ids = torch.tensor([encoded], device=self.model.embed.weight.device)
        states = []
        hook = self.model.net.register_forward_hook(lambda net, inputs, state: states.append(state[0]))
        try:
            output = self.model(ids, exit=rule or ExitRule(), return_steps=True)
        finally:
            hook.remove()
        halt = None if output.halt_logits is None else output.halt_logits[:, 0]
        return Inspection(ids[0], output.logits[:, 0], halt, torch.stack(states))


class Written(NamedTuple):
    """What one generation step adds to a batch of texts."""

    pieces: list[str]  # new text of each row; "" if the row has ended or a character is still incomplete
    tokens: int  # number of new tokens, with EOS


def continue_texts(
    model,
    tokenizer,
    prompts: list[str],
    max_new_tokens: int,
    stop_at_eos: bool = True,
    suffix: str | None = None,
    **options,
) -> Iterator[Written]:
    """Continues the prompts as one batch and yields the new text of each step. Options are those of
    `sampling.generate`.

    suffix: a text that follows the continuations; the model then writes what belongs between a prompt and this text,
    and at most as much as fits into its context with both (of several prompts, with the longest). Raises ValueError as
    `sampling.generate` does, and for a suffix if the tokenizer has no sentinels of fill-in-the-middle, or if the
    context has no room for the suffix."""
    if suffix is None:
        rows, ends = [tokenizer.encode(prompt, bos=True) for prompt in prompts], tokenizer.end_ids
    else:
        rows, ends = _around(tokenizer, prompts, suffix, model.config.max_seq_len)
        # the context must not move on, because the model would lose sight of the suffix
        max_new_tokens = min(max_new_tokens, model.config.max_seq_len + 1 - max(map(len, rows)))
    ids, mask = left_padded(rows, tokenizer.pad_id, device_of(model))
    decoders = [StreamDecoder(tokenizer, starts_text=not prompt and suffix is None) for prompt in prompts]
    ends, is_open = ends if stop_at_eos else (), [True] * len(rows)
    steps = generate(model, ids, max_new_tokens, eos_id=ends or None, attention_mask=mask, **options)
    for column in share_cores(steps):
        made, pieces = sum(is_open), [""] * len(rows)
        for row, index in enumerate(column.tolist()):
            is_open[row] = is_open[row] and index not in ends
            pieces[row] = decoders[row].push(index) if is_open[row] else ""
        yield Written(pieces, made)
    yield Written([decoder.flush() for decoder in decoders], 0)


def _around(tokenizer, prompts, suffix, max_len) -> tuple[list[list[int]], tuple[int, ...]]:
    """Returns (the ids after which a model writes what is between each prompt and the suffix, the ids that end it)."""
    if tokenizer.fim is None:
        raise ValueError(
            "a suffix needs a model that was trained with --fim_rate: the tokenizer of this one has no sentinels of "
            "fill-in-the-middle; use another checkpoint, or leave out the suffix"
        )
    rows = [tokenizer.infill(prompt, suffix) for prompt in prompts]
    longest = max(map(len, rows))
    if longest > max_len:
        raise ValueError(f"prompt and suffix have {longest} tokens, the context holds {max_len}: shorten one of them")
    return rows, tokenizer.infill_ends
