"""Tests of fine-tuning: it learns, resumes exactly, and saves a language model together with its classifier."""

import json
import os
import shutil
import signal
import sys

import pytest
import torch
from safetensors.torch import save_file
from texts import BYTE
from trainers import read_metrics

from src import checkpoint
from src.errors import UserError
from src.tasks.classification import Example, LlamaEmbeddingClassifier, encode, predict
from src.tasks.finetune import CLASSIFIER_FILE, FinetuneConfig, Finetuner, finetune, load_classifier
from src.training.run_folder import RunLock

NAMES = ["bad", "good"]
TRAIN = [Example(text, label) for text, label in zip("aa ab ba b abba a bb bab abb baa".split(), [1, 0, 1, 0] * 3)]
TRAIN = [Example(text, int(text.endswith("a"))) for text, _ in TRAIN]  # the last letter decides
DEV = TRAIN[:4]


@pytest.fixture(scope="module")
def source(tiny, tmp_path_factory):
    """Checkpoints of a TRM and of a plain transformer with tied embeddings."""
    home = tmp_path_factory.mktemp("source")
    checkpoint.save_checkpoint(home / "trm", tiny(vocab_size=BYTE.vocab_size, n_layers=1), BYTE)
    plain = tiny(vocab_size=BYTE.vocab_size, n_layers=1, recursion="none", norm="pre", tie_embeddings=True)
    checkpoint.save_checkpoint(home / "none", plain, BYTE)
    return home


def tune(source, folder, family="trm", train=TRAIN, dev=DEV, **settings):
    settings = {"epochs": 2, "batch_size": 4, "dropout": 0.2, "lr": 1e-2, "save_dir": str(folder)} | settings
    made = finetune(FinetuneConfig(**settings), source / family, train, dev, NAMES, torch.device("cpu"))
    return made and made[0]


def during(monkeypatch, step, action):
    """Runs an action in the middle of a step of the next run."""
    original = Finetuner._train_step

    def train_step(self, rows, log):
        if self.step == step - 1:
            monkeypatch.setattr(Finetuner, "_train_step", original)
            action()
        return original(self, rows, log)

    monkeypatch.setattr(Finetuner, "_train_step", train_step)


def logged(folder):
    return [(r["step"], r["loss"], r["lr"]) for r in read_metrics(folder) if "loss" in r]


def assert_same_checkpoints(a, b):
    files = sorted(path.name for path in a.glob("*.*"))
    assert files == sorted(path.name for path in b.glob("*.*")) and {"model.safetensors", CLASSIFIER_FILE} < set(files)
    for name in files:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def accuracy(classifier, examples):
    samples, _ = encode(examples, BYTE, classifier.model.config.max_seq_len)
    labels = torch.tensor([example.label for example in examples])
    return (predict(classifier, samples)[-1].argmax(-1) == labels).float().mean().item()


@pytest.fixture
def runs(monkeypatch):
    """Collects the Finetuners that a test makes."""
    made, original = [], Finetuner.__init__
    monkeypatch.setattr(Finetuner, "__init__", lambda run, *args: (made.append(run), original(run, *args))[0])
    return made


@pytest.mark.parametrize(("family", "how"), [("trm", "full"), ("none", "full"), ("trm", "lora"), ("none", "lora")])
def test_it_learns(source, tmp_path, family, how):
    if how == "lora":
        pytest.importorskip("peft")
    rate = 1e-2 if how == "lora" else 3e-3
    best = tune(source, tmp_path / "run", family, dev=TRAIN, epochs=9, dropout=0.0, tune=how, lr=rate)
    assert accuracy(best, TRAIN) == 1.0 and not best.training
    assert logged(tmp_path / "run")[-1][1] < 0.2 < logged(tmp_path / "run")[0][1]


@pytest.mark.parametrize("how", ["full", "head", "lora"])
def test_stopped_and_resumed_is_unbroken(source, tmp_path, monkeypatch, capsys, how):
    if how == "lora":
        pytest.importorskip("peft")
    tune(source, tmp_path / "straight", tune=how)
    during(monkeypatch, 2, lambda: signal.raise_signal(signal.SIGINT))
    assert tune(source, tmp_path / "broken", tune=how) is None
    assert "SIGINT after step 2: continue with --resume true" in capsys.readouterr().err
    during(monkeypatch, 5, lambda: signal.raise_signal(signal.SIGTERM))
    assert tune(source, tmp_path / "broken", tune=how, resume=True) is None
    best = tune(source, tmp_path / "broken", tune=how, resume=True)
    assert logged(tmp_path / "straight") == logged(tmp_path / "broken")
    for name in ("best", "last"):
        assert_same_checkpoints(tmp_path / "straight" / name, tmp_path / "broken" / name)
    assert torch.equal(best.classifier.weight, load_classifier(tmp_path / "straight")[0].classifier.weight)


def test_killed_and_resumed_is_unbroken(source, tmp_path, monkeypatch):
    tune(source, tmp_path / "straight")
    child = os.fork()
    if child == 0:
        during(monkeypatch, 5, lambda: os.kill(os.getpid(), signal.SIGKILL))
        tune(source, tmp_path / "broken")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert [step for step, *_ in logged(tmp_path / "broken")] == [1, 2, 3, 4]
    tune(source, tmp_path / "broken", resume=True)
    assert logged(tmp_path / "straight") == logged(tmp_path / "broken")
    assert_same_checkpoints(tmp_path / "straight" / "best", tmp_path / "broken" / "best")


def test_a_finished_run_resumes_to_its_answer(source, tmp_path):
    first, again = tune(source, tmp_path / "run"), tune(source, tmp_path / "run", resume=True)
    assert torch.equal(first.classifier.weight, again.classifier.weight)
    assert len(logged(tmp_path / "run")) == 6


def test_head_alone(source, tmp_path):
    """The language model is unchanged and can be loaded as before."""
    tune(source, tmp_path / "run", tune="head")
    before, _ = checkpoint.load_model(source / "trm")
    after, _ = checkpoint.load_model(tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(before.state_dict().values(), after.state_dict().values()))


@pytest.mark.parametrize("family", ["trm", "none"])
def test_adapters_are_merged(source, tmp_path, runs, family):
    """The checkpoint has no adapters, but gives the same logits as the model that was trained with them."""
    pytest.importorskip("peft")
    saved = tune(source, tmp_path / "run", family, tune="lora", dev=[])
    samples, _ = encode(TRAIN, BYTE, 16)
    torch.testing.assert_close(predict(saved, samples), predict(runs[0].classifier, samples), atol=1e-5, rtol=1e-5)
    names = [name for name, _ in saved.named_parameters()]
    assert not any("lora" in name or "base_layer" in name for name in names)
    before, after = (checkpoint.load_model(path)[0].state_dict() for path in (source / family, tmp_path / "run"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {f"net.blocks.0.{part}.weight" for part in ("attn.qkv", "attn.out", "mlp.gate_up", "mlp.down")}


def test_best_epoch_is_kept(source, tmp_path, monkeypatch):
    """Keeps the first epoch with the highest dev accuracy; without a dev set, the last epoch."""
    accuracies = iter((0.5, 0.75, 0.75))

    def answers(classifier, samples, *options):
        right = round(next(accuracies) * len(samples))
        labels = torch.stack([sample.target_ids[-1] for sample in samples])
        labels = torch.where(torch.arange(len(labels)) < right, labels, 1 - labels)
        return torch.nn.functional.one_hot(labels, 2).float()[None]

    monkeypatch.setattr("src.tasks.finetune.predict", answers)
    tune(source, tmp_path / "run", epochs=3)
    assert (tmp_path / "run" / "best").resolve().name == "step_00000006"
    assert (tmp_path / "run" / "last").resolve().name == "step_00000009"
    info = json.loads((tmp_path / "run" / "best" / "config.json").read_text())["info"]
    assert info.pop("labels_are_numbered") is True
    dev = {"dev_accuracy": 0.75, "dev_loss": pytest.approx(0.563, abs=1e-3)}
    assert info == {"labels": NAMES, "step": 6, "least_depth": 1, **dev}
    tune(source, tmp_path / "blind", epochs=2, dev=[])
    assert (tmp_path / "blind" / "best").resolve().name == "step_00000006"


def test_every_text_once_an_epoch(source, tmp_path, monkeypatch):
    seen, original = [], Finetuner._train_step
    monkeypatch.setattr(
        Finetuner, "_train_step", lambda run, rows, log: (seen.append(rows), original(run, rows, log))[1]
    )
    tune(source, tmp_path / "run", dev=[], batch_size=3)
    epochs = [sorted(bytes(s.input_ids[1:].tolist()) for rows in seen[i : i + 4] for s in rows) for i in (0, 4)]
    assert epochs == [sorted(example.text.encode() for example in TRAIN)] * 2
    assert sorted(map(len, seen)) == [1, 1] + [3] * 6


def test_balance_makes_labels_count_alike(source, tmp_path, runs, capsys):
    def weights(balance, train):
        tune(source, tmp_path / f"{balance}{len(train)}", train=train, dev=[], balance=balance, epochs=1)
        return runs[-1].class_weights

    rare = [Example("a", 1), *[Example("b", 0)] * 3]
    assert weights(False, rare) is None
    assert weights(True, rare).tolist() == pytest.approx([4 / 3 / 2, 4 / 1 / 2])
    assert capsys.readouterr().err.count("no training text") == 0
    assert weights(True, rare[:1]).tolist() == pytest.approx([1.0, 1.0])
    assert "no training text has the label 'bad'" in capsys.readouterr().err


def test_balance_is_the_same_in_small_batches(source, tmp_path, runs, monkeypatch):
    """With the weighted mean of each batch, a text alone in its batch would count as much as any other."""
    rows = [*[Example("b", 0)] * 3, Example("a", 1)]
    seen = []
    backward = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: (seen.append(loss.item()), backward(loss)))
    for size in (1, 4):
        options = {"balance": True, "batch_size": size, "epochs": 1, "dropout": 0.0, "lr": 1e-12}
        tune(source, tmp_path / str(size), train=rows, dev=[], **options)
    assert seen[-1] == pytest.approx(sum(seen[:4]) / 4, rel=1e-5) and len(seen) == 5


def test_empty_and_long_texts(source, tmp_path, capsys):
    examples = [Example("", 0), Example("x" * 40, 1)]
    best = tune(source, tmp_path / "run", train=examples, dev=examples, epochs=8, dropout=0.0)
    assert accuracy(best, examples) == 1.0
    assert "1 of 2 texts are longer than the context of 16 tokens: only their end is used" in capsys.readouterr().err


def test_a_start_that_fails_leaves_no_run(source, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "peft", None)  # as if it were not installed
        with pytest.raises(UserError, match="pip install peft"):
            tune(source, tmp_path / "run", epochs=1, tune="lora")
    tune(source, tmp_path / "run", epochs=1, tune="full")


def test_a_tuned_loop_says_which_step_answers(tiny, tmp_path):
    model = tiny(recursion="loop", deep_steps=3, vocab_size=BYTE.vocab_size)
    checkpoint.save_checkpoint(tmp_path / "loop", model, BYTE)
    finetune(FinetuneConfig(save_dir=str(tmp_path / "run"), epochs=1), tmp_path / "loop", TRAIN, [], NAMES, "cpu")
    assert checkpoint.least_depth(tmp_path / "run") == 3


def test_folders_that_are_refused(source, tmp_path):
    tune(source, tmp_path / "run", epochs=1)
    with pytest.raises(UserError, match="holds a run: continue it with --resume true"):
        tune(source, tmp_path / "run", epochs=1)
    with pytest.raises(UserError, match="--lr is 0.5, but the run in .* has 0.01"):
        tune(source, tmp_path / "run", epochs=1, lr=0.5, head_lr=0.1, resume=True)
    with pytest.raises(UserError, match="the training texts changed after the run in .* started"):
        tune(source, tmp_path / "run", epochs=1, train=TRAIN[1:], resume=True)
    weights = next((source / "trm").glob("*.safetensors"))
    old = weights.read_bytes()
    save_file({name: tensor + 1 for name, tensor in checkpoint.read_weights(weights).items()}, weights)
    with pytest.raises(UserError, match="the weights of the checkpoint changed"):  # the base model is another one
        tune(source, tmp_path / "run", epochs=1, resume=True)
    weights.write_bytes(old)
    lock = RunLock(tmp_path / "run")
    child = os.fork()
    if child == 0:
        try:
            tune(source, tmp_path / "run", epochs=1, resume=True)
        except UserError as error:
            os._exit(7 if "in use by another run" in str(error) else 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    lock.release()
    with pytest.raises(UserError, match="is not a classifier"):
        load_classifier(source / "trm")
    config = tmp_path / "run" / "best" / "config.json"
    whole = json.loads(config.read_text())
    for info in (None, {}, {"labels": "x"}, {"labels": ["bad"]}, {"labels": [1, 2]}):
        config.write_text(json.dumps(whole | {"info": info}))
        with pytest.raises(UserError, match="config.json has no list of labels"):
            load_classifier(tmp_path / "run")
    config.write_text(json.dumps(whole))
    weights = tmp_path / "run" / "best" / "classifier.safetensors"
    own = checkpoint.read_weights(weights)
    for tensors in (own | {"more": torch.ones(2)}, {"weight": own["weight"]}, own | {"bias": torch.ones(3)}):
        save_file(tensors, weights)
        with pytest.raises(UserError, match="classifier.safetensors does not fit its config.json"):
            load_classifier(tmp_path / "run")
    weights.write_bytes(weights.read_bytes()[:20])
    with pytest.raises(UserError, match="classifier.safetensors is broken"):
        load_classifier(tmp_path / "run")


BREAKS = {
    "a scalar": lambda s: moments(s).update(exp_avg=torch.tensor(0.0)),
    "halved": lambda s: moments(s).update(exp_avg=moments(s)["exp_avg"].flatten()[::2].clone()),
    "no state": lambda s: s["optimizer"].pop("state"),
    "no step": lambda s: s.pop("step"),
    "a step too far": lambda s: s.update(step=2**40),
    "best": lambda s: s.update(best="x"),
    "a weight is missing": lambda s: s["trained"].popitem(),
    "a weight of another shape": lambda s: s["trained"].update({next(iter(s["trained"])): torch.zeros(2)}),
}


def moments(state):
    return state["optimizer"]["state"][0]


@pytest.mark.parametrize("what", BREAKS)
def test_a_broken_state_is_told_before_it_is_used(source, tmp_path, capsys, what):
    tune(source, tmp_path / "run", epochs=1)
    path = (tmp_path / "run" / "last").resolve() / "state" / "training.pt"
    state = torch.load(path)
    BREAKS[what](state)
    torch.save(state, path)
    with pytest.raises(UserError, match="none of the checkpoints in .*run can be read"):
        tune(source, tmp_path / "run", epochs=1, resume=True)
    assert "training.pt is broken: " in capsys.readouterr().err


def test_a_copied_run_goes_on_and_a_mistyped_one_is_refused(source, tmp_path, monkeypatch):
    tune(source, tmp_path / "straight")
    during(monkeypatch, 5, lambda: signal.raise_signal(signal.SIGINT))
    assert tune(source, tmp_path / "run") is None
    shutil.copytree(tmp_path / "run", tmp_path / "copy")  # as cp -rL does
    tune(source, tmp_path / "copy", resume=True)
    assert (tmp_path / "copy" / "last").is_symlink()
    assert_same_checkpoints(tmp_path / "straight" / "last", tmp_path / "copy" / "last")
    with pytest.raises(UserError, match="typo holds no run"):
        tune(source, tmp_path / "typo", resume=True)


def test_a_gradient_that_is_not_finite_ends_the_run(source, tmp_path, monkeypatch):
    tune(source, tmp_path / "run", epochs=1)
    original = LlamaEmbeddingClassifier.forward
    monkeypatch.setattr(LlamaEmbeddingClassifier, "forward", lambda self, *a, **k: original(self, *a, **k) * torch.nan)
    with pytest.raises(UserError, match="step 1: the gradient is not finite"):
        tune(source, tmp_path / "nan", epochs=1)


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"lr": 0}, {"dropout": 1.0}, {"seed": -1}, {"lora_rank": 0}], ids=str)
def test_settings_that_cannot_be(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        FinetuneConfig(**wrong)
