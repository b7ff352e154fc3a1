"""Fine-tunes a language model as a classifier: all weights, only the classifier's new layer, or LoRA adapters.

The run folder is like that of a language model: checkpoints `best` (on the dev set) and `last`, metrics.jsonl, and
TensorBoard events. A checkpoint is the tuned language model, which can still generate text, plus
`classifier.safetensors` and the label names in config.json. A run may be killed at any point: resumed with
`--resume true`, it ends with the same weights as an uninterrupted run.
"""

import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from src import checkpoint
from src.checkpoint import CLASSIFIER_FILE
from src.data.corpus import content_hash, fingerprint_files
from src.data.samples import Sample, collate_batch
from src.errors import UserError
from src.model_config import loss_weights
from src.optim import learning_rate_factor, set_learning_rates
from src.runtime import Interrupt, autocast, mix_seed
from src.tasks.classification import Example, LlamaEmbeddingClassifier, encode, predict
from src.tasks.config import FinetuneConfig
from src.training import run_folder
from src.training.depths import least_depth
from src.training.monitor import TRMTrainingLogger
from src.training.parallel import load_optimizer
from src.training.train_config import TrainConfig

ADAPTED = ["qkv", "out", "gate_up", "down"]  # the linear layers that get LoRA adapters
COUNTERS = ("step", "best", "best_loss")
INPUTS = {  # of the settings in config.yaml, those that are no flags
    "labels": "the list of labels",
    "train_texts": "the training texts",
    "dev_texts": "the dev texts",
    "weights": "the weights of the checkpoint",
}
SORTED = 16  # rows of so many batches are sorted by length together, which keeps padding low


def load_classifier(folder, device="cpu") -> tuple[LlamaEmbeddingClassifier, object]:
    """Loads (classifier in eval mode, tokenizer) from a fine-tuned checkpoint or run folder, else raises UserError."""
    folder = checkpoint.resolve(folder)
    if not (folder / CLASSIFIER_FILE).exists():
        raise UserError(f"{folder} is not a classifier (no {CLASSIFIER_FILE}): train one with --option finetune")
    model, tokenizer = checkpoint.load_model(folder, device, trains=True)
    names = checkpoint.read_info(folder).get("labels")
    if not isinstance(names, list) or len(names) < 2 or not all(isinstance(name, str) for name in names):
        raise UserError(f"{folder / 'config.json'} has no list of labels in its info: copy the folder again")
    classifier = LlamaEmbeddingClassifier(model, names).to(device).eval()
    path = folder / CLASSIFIER_FILE
    checkpoint.load_weights(classifier.classifier, checkpoint.read_weights(path), path)
    return classifier, tokenizer


def add_adapters(model, rank: int):
    """Adds LoRA adapters (arXiv:2106.09685) to the model's linear layers in place, and freezes all other weights."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError(f"tune lora needs peft ({error}): pip install peft==0.21.2") from None
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=ADAPTED), model)


def language_weights(classifier) -> dict:
    """Returns the language model's weights under their usual names, with its head and with LoRA adapters merged."""
    weights, suffix = checkpoint.own_state(classifier.model), ".base_layer.weight"  # peft's name of an adapted weight
    for name, module in classifier.model.named_modules():
        if name + suffix in weights:
            base = weights.pop(name + suffix)
            weights[name + ".weight"] = base + module.get_delta_weight("default")
    if not classifier.model.config.tie_embeddings:
        weights["head.weight"] = classifier.head.weight
    return {name: tensor for name, tensor in weights.items() if ".lora_" not in name}


class Finetuner:
    """A fine-tuning run of a classifier. `train` runs it until it is done or a signal arrives."""

    def __init__(self, config: FinetuneConfig, classifier, tokenizer, train_set, dev_set, precision, numbered=True):
        self.config, self.classifier, self.tokenizer = config, classifier, tokenizer
        self.precision, self.numbered = precision, numbered
        self.train_set, self.dev_set, self.folder = train_set, dev_set, Path(config.save_dir)
        self.device = classifier.classifier.weight.device
        self.step = 0
        self.best, self.best_loss = -1.0, torch.inf  # on the dev set; -1: not evaluated yet
        for parameter in classifier.model.parameters():
            parameter.requires_grad_(config.tune == "full")
        if config.tune == "lora":
            add_adapters(classifier.model, config.lora_rank)
        self.trained = {name: p for name, p in classifier.named_parameters() if p.requires_grad}
        self.optimizer = self._make_optimizer()
        self.epoch_steps = -(-len(train_set) // config.batch_size)  # rounded up
        self.total_steps = config.epochs * self.epoch_steps
        self.class_weights = self._weigh_classes()

    def _make_optimizer(self):
        c, own = self.config, set(self.classifier.classifier.parameters())
        inner = [p for p in self.trained.values() if p not in own]
        groups = [
            {"params": list(own), "peak_lr": c.head_lr, "weight_decay": 0.0},
            {"params": [p for p in inner if p.ndim > 1], "peak_lr": c.lr, "weight_decay": c.weight_decay},
            {"params": [p for p in inner if p.ndim < 2], "peak_lr": c.lr, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, 0.98), fused=True)

    def _weigh_classes(self):
        counts = torch.bincount(labels_of(self.train_set), minlength=len(self.classifier.names))
        for name, count in zip(self.classifier.names, counts.tolist()):
            if count == 0:
                print(f"no training text has the label {name!r}: it will rarely be predicted", file=sys.stderr)
        if not self.config.balance:
            return None
        # inverse frequency: the texts of each label have the same total weight
        weights = counts.sum() / counts.clamp(min=1) / (counts > 0).sum()
        return weights.to(self.device, torch.float32)

    def train(self) -> bool:
        """Trains to the end and returns True, or until a signal arrives and returns False."""
        log = TRMTrainingLogger(self.folder, self.step)
        bar = tqdm(total=self.total_steps, initial=self.step, unit="step", desc=self.config.tune)
        with log, bar, Interrupt() as interrupt:
            while self.step < self.total_steps and not interrupt.requested:
                for rows in self._batches():
                    loss = self._train_step(rows, log)
                    bar.set_postfix_str(f"loss {loss:.3f}" + f", dev {self.best:.3f}" * (self.best >= 0), refresh=False)
                    bar.update()
                    if interrupt.requested:
                        break
                self._save(is_best=self.step % self.epoch_steps == 0 and self._judge(log))
        if self.step < self.total_steps:
            print(f"{interrupt.signal_name} after step {self.step}: continue with --resume true", file=sys.stderr)
        return self.step == self.total_steps

    def _batches(self):
        """Yields the remaining batches of this epoch: samples of similar length, in an order fixed by (seed, epoch)."""
        epoch, done = divmod(self.step, self.epoch_steps)
        draw, size = np.random.default_rng((self.config.seed, epoch)), self.config.batch_size
        order, batches = draw.permutation(len(self.train_set)).tolist(), []
        for start in range(0, len(order), SORTED * size):
            chunk = sorted(order[start : start + SORTED * size], key=lambda i: len(self.train_set[i].input_ids))
            batches += [chunk[i : i + size] for i in range(0, len(chunk), size)]
        for number in draw.permutation(len(batches))[done:]:
            yield [self.train_set[i] for i in batches[number]]

    def _train_step(self, rows, log) -> float:
        c = self.config
        torch.manual_seed(mix_seed(c.seed, self.step))  # makes dropout the same after a resume
        factor = learning_rate_factor("cosine", self.step, self.total_steps // 10, self.step / self.total_steps, 0.0)
        set_learning_rates([self.optimizer], factor)
        self.classifier.train()
        batch = {name: t.to(self.device) for name, t in collate_batch(rows).items()}
        labels = batch.pop("target_ids").amax(1)
        with autocast(self.device, self.precision):
            logits = self.classifier(**batch)
        weights = loss_weights(self.classifier.model.config, len(logits))
        # not the weighted mean of torch: it divides by the weights of the batch, and so undoes them in small batches
        losses = [
            F.cross_entropy(step.float(), labels, self.class_weights, reduction="sum") / len(labels) for step in logits
        ]
        loss = sum(w * each for w, each in zip(weights, losses)) / sum(weights)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), c.grad_clip or torch.inf)
        if not norm.isfinite():
            raise UserError(f"step {self.step + 1}: the gradient is not finite: use a smaller --lr; `last` is intact")
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        accuracy = (logits[-1].argmax(-1) == labels).float().mean()
        log.log(self.step, loss=loss.detach(), accuracy=accuracy, grad_norm=norm, lr=c.lr * factor)
        return loss.item()

    def _judge(self, log) -> bool:
        """Evaluates on the dev set. Returns whether this epoch is the best so far, by accuracy, then by loss.

        Without a dev set, every epoch counts as the best one, so the last epoch is kept."""
        epoch = self.step // self.epoch_steps
        if not self.dev_set:
            return True
        logits = predict(self.classifier, self.dev_set, self.config.batch_size, self.precision)[-1]
        labels = labels_of(self.dev_set)
        accuracy, loss = (logits.argmax(-1) == labels).float().mean().item(), F.cross_entropy(logits, labels).item()
        log.log(self.step, epoch=epoch, valid_loss=loss, valid_accuracy=accuracy)
        tqdm.write(f"epoch {epoch}: dev accuracy {accuracy:.4f}, loss {loss:.4f}", file=sys.stderr)
        is_best = (accuracy, -loss) > (self.best, -self.best_loss)
        if is_best:
            self.best, self.best_loss = accuracy, loss
        return is_best

    def _save(self, is_best):
        own = {name: tensor.detach() for name, tensor in self.classifier.classifier.state_dict().items()}
        state = {name: getattr(self, name) for name in COUNTERS}
        state |= {"optimizer": self.optimizer.state_dict(), "trained": dict(self.trained), "is_best": is_best}
        info = {"labels": self.classifier.names, "labels_are_numbered": self.numbered, "step": self.step}
        info["least_depth"] = least_depth(TrainConfig(), self.classifier.model.config, True)
        info |= {"dev_accuracy": self.best, "dev_loss": self.best_loss} if self.best >= 0 else {}
        parts = (self.classifier.model, self.tokenizer, None, state, info, language_weights(self.classifier))
        name = f"step_{self.step:08d}"
        run_folder.save(self.folder, name, is_best, 1, *parts, {CLASSIFIER_FILE: own})

    def load(self, state: dict):
        """Restores the state of a checkpoint, so that training continues exactly."""
        for name in COUNTERS:
            setattr(self, name, state[name])
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(state["trained"][name])
        load_optimizer(self.optimizer, state["optimizer"]["state"])


def labels_of(samples: list[Sample]) -> torch.Tensor:
    """Returns the (N,) labels of samples made by `classification.encode`."""
    return torch.stack([sample.target_ids[-1] for sample in samples])


def finetune(
    config: FinetuneConfig,
    source,
    train: list[Example],
    dev: list[Example],
    names: list[str],
    device,
    precision="fp32",
    numbered=True,
) -> tuple[LlamaEmbeddingClassifier, object] | None:
    """Fine-tunes a classifier from `source`, a language model's checkpoint folder, in a new or resumed run.

    numbered: whether a number may stand for a name, as its position. The classifier's config.json keeps it. Returns
    (best classifier, tokenizer), or None if a signal stopped the run. Raises UserError if config.save_dir is in
    use, or contains a run with other settings."""
    folder = Path(config.save_dir)
    settings = asdict(config) | {"checkpoint": str(checkpoint.resolve(source)), "labels": names}
    settings |= {"train_texts": _digest(train), "dev_texts": _digest(dev)}
    settings["weights"] = _digest(fingerprint_files(sorted(checkpoint.resolve(source).glob("*.safetensors"))))
    run_folder.check_writable(folder)
    run_folder.check_resume(folder, settings, config.resume, inputs=INPUTS)
    is_new = not (folder / "config.yaml").exists()
    lock = None if is_new else run_folder.RunLock(folder)
    try:
        model, tokenizer = checkpoint.load_model(source, device, trains=True)
        torch.manual_seed(config.seed)
        classifier = LlamaEmbeddingClassifier(model, names, config.dropout).to(device)
        sets = []
        for examples in (train, dev):
            samples, cut = encode(examples, tokenizer, model.config.max_seq_len)
            sets.append(samples)
            if cut:
                limit = f"longer than the context of {model.config.max_seq_len} tokens"
                print(f"{cut} of {len(samples)} texts are {limit}: only their end is used", file=sys.stderr)
        run = Finetuner(config, classifier, tokenizer, *sets, precision, numbered)
        lock = lock or run_folder.start(folder, settings)  # not before: a start that fails leaves no run behind
        newest = None if is_new else run_folder.newest_whole(folder)
        if newest:
            run_folder.link_again(folder, *newest)
            run.load(newest[1])
            print(f"resumed {newest[0]} after step {run.step}", file=sys.stderr)
        return load_classifier(folder, device) if run.train() else None
    finally:
        if lock:
            lock.release()


def _digest(examples):
    return f"{content_hash(repr(examples).encode()):016x}"
