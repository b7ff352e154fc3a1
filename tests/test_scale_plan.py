"""experiments/scale_plan.py: its memory against measured training steps, its other figures against sums by hand."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # for torchrun, which runs this file as a script

from trainers import TINY, trainer_of  # noqa: E402

from experiments.scale_plan import (  # noqa: E402
    PeakBytes,
    activation_bytes,
    clock,
    main,
    make_plan,
    parse_args,
    plan_memory,
    plan_speed,
)
from src.config import UserError  # noqa: E402
from src.metrics import flops_per_token  # noqa: E402
from src.model import TRMConfig  # noqa: E402
from src.runtime import GIB  # noqa: E402
from src.training.train_config import RuntimeConfig, Settings  # noqa: E402

pytest_plugins = "trainers"  # the fixtures make and corpus
WIDE = {"d_model": 64, "n_heads": 4, "d_ff": 192, "batch_size": 16}
PLAIN = "--recursion none --n_layers 1 --d_model 64 --n_heads 4 --vocab_size 100 --max_seq_len 32 --batch_size 16"


class Resizes(PeakBytes):
    """Updates the size of every storage at every operation, because sharding resizes storages outside of operations."""

    def add(self, *tensors):
        super().add(*tensors)
        self.alive = {key: (ref, ref().nbytes()) for key, (ref, _) in list(self.alive.items()) if ref() is not None}
        self.now = sum(size for _, size in self.alive.values())


def held(trainer):
    """Measure (peak bytes of one training step, peak bytes of writing a checkpoint)."""
    trainer.started = time.monotonic()
    trainer.train_step(next_batch(trainer))  # creates the state of the optimizers
    state = [v for o in trainer.optimizers for s in o.state.values() for v in s.values()]
    with Resizes() as memory:
        memory.add(*trainer.raw.parameters(), *trainer.ema.average.values(), *state)
        trainer.train_step(next_batch(trainer))
        step, memory.peak = memory.peak, 0
        trainer.save()
        return step, memory.peak


def next_batch(trainer):
    trainer.enter_stage()
    return next(trainer.loader)


def planned(trainer, world=1):
    settings = Settings(trainer.config, None, trainer.raw.config, RuntimeConfig(precision="fp32"))
    return plan_memory(sum(p.numel() for p in trainer.raw.parameters()), settings, world)


@pytest.mark.parametrize(
    "changes",
    [
        {"supervision_steps": 2, "grad_accum": 2, "tie_embeddings": True},
        {"recursion": "none"},
        {"recursion": "loop", "n_layers": 2, "gradient_checkpointing": True},
    ],
    ids=str,
)
def test_a_step_holds_what_is_planned(make, changes):
    """Eager, in fp32. The plan leaves out the batch itself, norms and other small things. If a single backward pass
    creates the gradients, the plan may be too large by up to their size."""
    trainer = make(**WIDE, **changes)
    step, checkpoint = held(trainer)
    plan = planned(trainer)["DDP"]
    slack = 0 if "grad_accum" in changes else plan["gradients"]
    assert plan["activations"] > plan["training"] / 4
    assert step / 1.04 < plan["training"] < step * 1.04 + slack
    assert plan["checkpoint"] == pytest.approx(checkpoint, rel=0.04)


def test_a_checkpoint_is_as_large_as_planned(make):
    trainer = make(**WIDE)
    trainer.train()
    files = [path for path in (trainer.folder / "last").resolve().rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    assert planned(trainer)["DDP"]["checkpoint"] == pytest.approx(size, rel=0.05)  # the rest: headers, tokenizer


class TestActivations:
    config = TRMConfig(
        vocab_size=50,
        d_model=32,
        n_heads=2,
        n_layers=1,
        latent_steps=1,
        deep_steps=1,
        supervision_steps=2,
        max_seq_len=32,
    )

    def bytes(self, rows=4, precision="bf16", **changes):
        return activation_bytes(TRMConfig(**{**vars(self.config), "grad_deep_steps": None, **changes}), rows, precision)

    def test_they_follow_the_batch_and_the_depth_that_carries_gradient(self):
        base = self.bytes()
        assert self.bytes(rows=16) == pytest.approx(4 * base, rel=0.05)
        assert self.bytes(supervision_steps=3, deep_steps=2) == base
        assert self.bytes(full_bptt=True) > 1.5 * base
        assert self.bytes(precision="fp32") > 1.2 * base

    def test_no_weight_is_made(self):
        wide = TRMConfig(vocab_size=50, d_model=16384, n_heads=128, n_layers=1, recursion="none", max_seq_len=8)
        assert activation_bytes(wide, 1) > 8 * 16384 * 4  # its weights would be 13 GB


def test_figures_by_hand():
    facts = make_plan(*parse_args(f"{PLAIN} --devices 4 --grad_accum 2 --tokens 1e9 --bytes_per_token 5".split()))
    config = TRMConfig(vocab_size=100, d_model=64, n_heads=4, n_layers=1, max_seq_len=32, recursion="none")
    flops, parameters = flops_per_token(config).train, 2 * 100 * 64 + 4 * 64**2 + 3 * 64 * 192 + 2 * 64
    assert facts["parameters"] == parameters and facts["train_flops_per_token"] == flops
    speed, (run,) = facts["speed"], facts["runs"]
    assert speed["step_tokens"] == 512 and run["steps"] == 1953125
    assert speed["tokens_per_s"] == pytest.approx(4 * 312e12 * 0.3 / flops)
    assert run["days"] == pytest.approx(1e9 * flops / (4 * 312e12 * 0.3) / 86400)
    assert speed["exchange_s"]["DDP"] == pytest.approx(2 * 4 * parameters * 3 / 4 / 25e9)
    assert speed["exchange_s"]["shard"] == pytest.approx((2 + 1) * 4 * parameters * 3 / 4 / 25e9)
    assert speed["checkpoint_bytes"] == 16 * parameters and speed["checkpoint_s"] == 16 * parameters / 1e9
    assert speed["readers"] == -(-speed["tokens_per_s"] * 5 // 2.5e6)
    assert (run["text_bytes"], run["shards"], run["token_store_bytes"]) == (5e9, 5, 2e9)
    assert run["tokenize_cpu_hours"] == pytest.approx(5e9 / 2.5e6 / 3600)
    ddp, shard = facts["memory"]["DDP"], facts["memory"]["shard"]
    assert ddp["training"] - ddp["activations"] == pytest.approx(24 * parameters)
    assert shard["training"] - shard["activations"] == pytest.approx((8 + 20 / 4) * parameters)
    assert (ddp["checkpoint"], shard["checkpoint"]) == (16 * parameters, 20 * parameters)


def test_settings_change_the_plan():
    def speed(*words):
        plan, settings = parse_args(["--vocab_size", "100", "--devices", "2", *words])
        return plan_speed(plan, settings, 1000, 1e6)

    base, paper, unaveraged = speed(), speed("--optimizer_step", "supervision"), speed("--ema_decay", "0")
    assert base["exchange_s"]["DDP"] == pytest.approx(4000 / 25e9)
    assert paper["exchange_s"]["DDP"] == pytest.approx(8000 / 25e9)
    assert (base["checkpoint_bytes"], unaveraged["checkpoint_bytes"]) == (16000, 12000)
    assert base["run_folder_bytes"] == 4 * 16000


def test_tables_and_json(capsys):
    main(["--config", str(ROOT / "configs" / "small.yaml"), "--devices", "2", "--tokens", "1e9", "1e12"])
    out = capsys.readouterr().out.splitlines()
    facts = json.loads(out[-1])
    assert facts["experiment"] == "scale_plan" and [r["tokens"] for r in facts["runs"]] == [1e9, 1e12]
    assert sum(line.startswith(("memory per", "per step", "run  ")) for line in out) == 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--devices 3", "batch_size 32 does not divide into grad_accum 1 x 3 devices: make it a multiple of 3"),
        ("--tokens 1e9 -1", "tokens is .* above 0"),
        ("--utilisation 0", "utilisation is 0.0: set it above 0"),
    ],
)
def test_refused(words, said):
    with pytest.raises(UserError, match=said):
        parse_args(f"--vocab_size 100 {words}".split())


def test_clock():
    assert [clock(days) for days in (400, 14.13, 0.5, 0.01)] == ["400 days", "14.1 days", "12 hours", "14.4 minutes"]


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_shards_hold_what_is_planned(corpus, tmp_path, world):
    """Measured in each of several real processes. Only for --shard: the buckets of DDP are allocated where this
    measurement cannot see them."""
    values = {**TINY, **corpus, **WIDE, "recursion": "none", "n_layers": 4, "batch_size": 2 * world}
    values |= {"shard": True, "save_dir": str(tmp_path / "run")}
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps(values))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, __file__, str(spec)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    for rank in range(world):
        step, checkpoint, plan = json.loads(Path(f"{spec}.{rank}").read_text())
        assert step / 1.04 < plan["training"] < (step + plan["whole weights"]) * 1.04
        assert plan["checkpoint"] == pytest.approx(checkpoint, rel=0.04)


@pytest.mark.slow
def test_the_page_says_what_the_script_prints(capsys):
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^\$ python experiments/scale_plan.py (.*?[^\\])\n(.*?)^```", page, re.S | re.M)
    assert len(blocks) == 3
    for words, printed in blocks:
        main(words.replace("\\\n", " ").split())
        *tables, _ = capsys.readouterr().out.splitlines()
        assert printed.splitlines() == tables
    trm, rows = (
        blocks[-1][0].replace("\\\n", " ").split(),
        re.findall(r"^\| (none|`--.*`) +\| (\S+) \| (.*) \|$", page, re.M),
    )
    assert len(rows) == 6
    for flags, activations, duration in rows:
        main([*trm, *(flags.strip("`").split() if flags != "none" else [])])
        facts = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert f"{facts['memory']['DDP']['activations'] / GIB:.2f}" == activations
        assert clock(facts["runs"][-1]["days"]) == duration


if __name__ == "__main__":
    trainer = trainer_of(json.loads(Path(sys.argv[1]).read_text()))
    figures = [*held(trainer), planned(trainer, trainer.world)["shard"]]
    Path(f"{sys.argv[1]}.{trainer.rank}").write_text(json.dumps(figures))
