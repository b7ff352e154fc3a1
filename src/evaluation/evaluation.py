"""Evaluation during training: loss, bits per byte and accuracy on validation text, and a sample."""

import itertools

import torch
from torch.utils.data import Subset

from src.dataset import create_dataloader
from src.errors import UserError
from src.losses import IGNORE, bits_per_byte, cross_entropy
from src.runtime import autocast
from src.sampling import generate
from src.tokenizer import StreamDecoder
from src.training.progress import progress_bar


@torch.no_grad()
def evaluate(model, batches, bytes_per_token: float, precision="fp32", limit=None, accelerator=None) -> dict:
    """Returns loss (nats per target token), bits per byte and token accuracy on at most `limit` of the `batches`.

    The logits are those after the last supervision step. The batches are divided among the processes. At the end the
    model is back in the mode (train or eval) that it was in."""
    was_training, device = model.training, next(model.parameters()).device
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
    sums = torch.zeros(3, dtype=dtype, device=device)  # loss, right answers, targets
    model.eval()
    with torch.compiler.set_stance("force_eager"):  # shapes differ from training: not worth compiling
        batches = itertools.islice(batches, limit)
        while group := list(itertools.islice(batches, world)):
            batch = group[min(rank, len(group) - 1)]  # a sharded model needs all processes
            batch = {name: t.to(device) for name, t in batch.items()}
            targets = batch.pop("target_ids")
            if rank >= len(group):  # a repeated batch: it does not count
                targets = torch.full_like(targets, IGNORE)
            with autocast(device, precision):
                logits = model(**batch).logits
            valid = targets != IGNORE
            right = ((logits.argmax(-1) == targets) & valid).sum()
            sums += torch.stack((cross_entropy(logits, targets) * valid.sum(), right, valid.sum())).to(sums.dtype)
    model.train(was_training)
    loss, right, tokens = (accelerator.reduce(sums) if accelerator else sums).tolist()
    if not tokens:
        raise UserError("the validation text has no target token: give more text")
    return {
        "valid_loss": loss / tokens,
        "valid_bits_per_byte": bits_per_byte(loss / tokens, bytes_per_token),
        "valid_accuracy": right / tokens,
    }


def evaluate_rows(model, dataset, rows: int, size: int, pad_id, precision="fp32", accelerator=None) -> dict:
    """Returns the figures of `evaluate` on at most `rows` rows of a dataset, taken at equal distances, `size` at once.

    A part of the text has files of all kinds in this way. Shows a progress bar if it takes long."""
    rows = min(rows, len(dataset))
    part = Subset(dataset, [row * len(dataset) // rows for row in range(rows)])
    options = {"total": -(-rows // size), "desc": "evaluate", "unit": "batch", "delay": 2, "leave": False}  # seconds
    is_silent = accelerator is not None and not accelerator.is_main_process
    batches = progress_bar(create_dataloader(part, size, shuffle=False, pad_id=pad_id), **options, disable=is_silent)
    return evaluate(model, batches, dataset.bytes_per_token, precision, None, accelerator)


def sample_text(model, tokenizer, prompt: str, new_tokens: int, seed: int) -> str:
    """Returns a prompt with the model's continuation, sampled at temperature 0.8 and top_p 0.95, up to EOS."""
    ids = tokenizer.encode(prompt, bos=True)[: model.config.max_seq_len]
    decoder, text = StreamDecoder(tokenizer, starts_text=not prompt), prompt
    options = {"temperature": 0.8, "top_p": 0.95, "seed": seed, "eos_id": tokenizer.end_ids}
    with torch.compiler.set_stance("force_eager"):
        for token in generate(model, torch.tensor([ids], device=model.embed.weight.device), new_tokens, **options):
            if token.item() not in tokenizer.end_ids:
                text += decoder.push(token.item())
    return text + decoder.flush()
