"""The sides that bench_puzzles.py compares, each for a process of its own: our model and the TRM authors' code."""

import sys
import time

import common  # noqa: F401  (puts the repository root on sys.path)
import torch

from src.losses import IGNORE
from src.model import Carry, TRMConfig, TRMModel
from src.runtime import DTYPES, autocast, compile_parts, keep_freed_memory, synchronize

VOCAB = 11


def side_of(kind: str, peer: str | None, threads: int, **job):
    """The side of this kind: eager, compiled, peer or peer_compiled."""
    torch.set_num_threads(threads)
    if "peer" in kind:
        import_peer(peer)
        return Theirs(compiles=kind == "peer_compiled", **job)
    keep_freed_memory()
    return Ours(compiles=kind == "compiled", **job)


class Side:
    """Boards of random tokens, an optimizer, and the time of a step.  A subclass has `model` and `run`."""

    def __init__(self, model, task, precision, device, batch_size, cells, compiles):
        self.device, self.precision, self.trains = torch.device(device), precision, task == "train"
        self.model, self.compiles = model.to(self.device).train(self.trains), compiles
        generator = torch.Generator().manual_seed(1)
        boards = torch.randint(1, VOCAB, (2, batch_size, cells), generator=generator)
        self.inputs, self.labels = boards.to(self.device)
        options = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 1.0, "fused": True}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), **options)
        self.carry = None

    def first_logits(self) -> torch.Tensor:
        """The logits (B, T, V) of the first step, in fp32 on the CPU."""
        self.step()
        return self.logits.detach().float().cpu()

    def step(self) -> float:
        """One supervision step; returns its seconds: CPU time with one CPU thread, else wall time."""
        is_alone = self.device.type == "cpu" and torch.get_num_threads() == 1
        clock = time.process_time if is_alone else time.perf_counter
        synchronize(self.device)
        start = clock()
        loss = self.run()
        if self.trains:
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        synchronize(self.device)
        return clock() - start


class Ours(Side):
    def __init__(self, path, config, compiles, batch_size, **job):
        config = TRMConfig(**config)
        model = TRMModel(config)
        model.load_state_dict(torch.load(path, weights_only=True)["ours"])
        super().__init__(model, batch_size=batch_size, cells=config.max_seq_len, compiles=compiles, **job)
        if compiles:
            compile_parts(model)

    def run(self):
        with torch.set_grad_enabled(self.trains):
            with autocast(self.device, self.precision):
                out = self.model(self.inputs, self.labels, supervision_steps=1, carry=self.carry)
            self.carry, self.logits = Carry(out.carry.y.float(), out.carry.z.float(), 0), out.logits
            right = (out.logits.detach().argmax(-1) == self.labels) | (self.labels == IGNORE)
            self.n_right = right.all(-1).sum()
            return out.loss


def import_peer(path: str):
    """Makes the authors' packages importable, and returns their modules of the model and of the loss."""
    if path not in sys.path:
        sys.path.insert(0, path)
    import models.losses
    import models.recursive_reasoning.trm as trm

    return trm, models.losses


class Theirs(Side):
    """The authors' model with their loss head, which also keeps the rows, counts right ones and decides on halting."""

    def __init__(self, path, config, compiles, batch_size, precision, **job):
        import models.losses
        import models.recursive_reasoning.trm as trm

        weights = torch.load(path, weights_only=True)["theirs"]
        settings = config | {
            "batch_size": batch_size, "vocab_size": VOCAB, "num_puzzle_identifiers": 1,
            "expansion": 4, "halt_exploration_prob": 0.1, "forward_dtype": str(DTYPES[precision]).split(".")[1],
        }  # fmt: skip
        model = models.losses.ACTLossHead(trm.TinyRecursiveReasoningModel_ACTV1(settings), "stablemax_cross_entropy")
        model.load_state_dict(weights)
        super().__init__(
            model, precision=precision, batch_size=batch_size, cells=config["seq_len"], compiles=compiles, **job
        )
        ids = torch.zeros(batch_size, dtype=torch.int32, device=self.device)
        self.batch = {"inputs": self.inputs.int(), "labels": self.labels, "puzzle_identifiers": ids}
        with torch.inference_mode(not self.trains), self.device:
            self.carry = model.initial_carry(self.batch)
        self.called = torch.compile(self.model) if compiles else self.model
        self.batch_size = batch_size

    def run(self):
        with torch.inference_mode(not self.trains):
            found = self.called(return_keys=["logits"], carry=self.carry, batch=self.batch)
            self.carry, loss, _, outputs, _ = found
            self.logits = outputs["logits"]
            return loss / self.batch_size
