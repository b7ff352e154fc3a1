"""metrics.py: counts against torch's own counters, the log's resume, the learning curve's file."""

import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from src.config import UserError
from src.metrics import (
    METRICS_FILE,
    RunLog,
    cache_bytes_per_token,
    count_parameters,
    effective_depth,
    flops_per_token,
    format_params,
    plot_learning_curve,
    read_metrics,
)
from src.model import TRMConfig, TRMModel

FAMILIES = {
    "none": {"recursion": "none", "n_layers": 3, "norm": "pre"},
    "none_ends": {"recursion": "none", "prelude_layers": 1, "coda_layers": 2},
    "loop": {"recursion": "loop", "deep_steps": 3},
    "loop_cut": {"recursion": "loop", "deep_steps": 3, "grad_deep_steps": 1, "gate": True},
    "loop_concat": {"recursion": "loop", "injection": "concat", "prelude_layers": 1},
    "loop_plain": {"recursion": "loop", "injection": "none", "n_kv_heads": 2},
    "trm": {},
    "trm_steps": {"latent_steps": 3, "deep_steps": 3, "supervision_steps": 3, "grad_deep_steps": 2},
    "trm_all": {"prelude_layers": 1, "coda_layers": 1, "injection": "concat", "gate": True, "n_kv_heads": 1},
    "trm_full": {"full_bptt": True, "prelude_layers": 1},
    "trm_tied": {"tie_embeddings": True, "positions": "learned"},
    "trm_puzzle": {"causal": False, "mixer": "mlp", "positions": "none"},
}


def model_of(name):
    return TRMModel(TRMConfig(**{"vocab_size": 23, "d_model": 16, "d_ff": 24, "max_seq_len": 16, **FAMILIES[name]}))


def batch_of(config, batch=2):
    ids = torch.randint(config.vocab_size, (batch, config.max_seq_len))
    return ids, ids.roll(-1, dims=1)


def counted(work, tokens):
    """FLOPs per token as torch counts them: (weights' products, attention's)."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    by_op = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    attention = sum(n for op, n in by_op.items() if "bmm" in op)
    return (sum(by_op.values()) - attention) / tokens, attention / tokens


@pytest.mark.parametrize("name", FAMILIES)
def test_decode_flops_are_those_of_a_forward_pass(name):
    model = model_of(name).eval()
    ids, _ = batch_of(model.config)
    with torch.no_grad():
        matmul, attention = counted(lambda: model(ids), ids.numel())
    flops = flops_per_token(model.config)
    if model.config.mixer == "mlp":  # batched products across the sequence belong to its weights
        matmul, attention = matmul + attention, 0
    assert flops.decode_matmul == pytest.approx(matmul, abs=1)  # abs: a share of the halting head's product
    assert flops.decode_attention == attention
    assert flops.decode == flops.decode_matmul + flops.decode_attention


@pytest.mark.parametrize("name", FAMILIES)
def test_train_flops_are_those_of_forward_and_backward(name):
    model = model_of(name)
    ids, targets = batch_of(model.config)

    def train():
        if model.config.full_bptt:
            model(ids, targets).loss.backward()
            return
        carry = None
        for _ in range(model.config.train_steps):
            out = model(ids, targets, supervision_steps=1, carry=carry)
            out.loss.backward()
            carry = out.carry

    matmul, attention = counted(train, ids.numel())
    flops = flops_per_token(model.config)
    if model.config.mixer == "mlp":
        matmul, attention = matmul + attention, 0
    assert flops.train_matmul == pytest.approx(matmul, abs=3 * model.config.train_steps)
    assert flops.train_attention == attention
    assert flops.train == flops.train_matmul + flops.train_attention


def test_stable_halting_counts_its_second_read_out():
    config = {"vocab_size": 23, "d_model": 16, "d_ff": 24, "max_seq_len": 16, "coda_layers": 1}
    stable, correct = TRMConfig(act_target="stable", **config), TRMConfig(**config)
    block = 16 * 48 + 16 * 16 + 3 * 16 * 24
    more = flops_per_token(stable).train_matmul - flops_per_token(correct).train_matmul
    assert more == 2 * (block + 16 * 23 + 16)  # one more look without gradient, at the second of two steps


def test_flops_by_hand():
    """6 x matmul parameters for the plain transformer; 6 x one cycle + 2 x the other, twice, for TRM (2, 2, 2)."""
    plain = TRMConfig(vocab_size=65, d_model=384, n_heads=6, n_layers=6, d_ff=1024, recursion="none")
    block = 4 * 384**2 + 3 * 384 * 1024
    assert flops_per_token(plain).train_matmul == 6 * (6 * block + 65 * 384)
    assert flops_per_token(plain).train_attention == 12 * 256 * 384 * 6
    assert flops_per_token(plain, context=512).train_attention == 2 * 12 * 256 * 384 * 6
    trm = TRMConfig(vocab_size=65, d_model=384, n_heads=6, n_layers=2, d_ff=1024)
    assert flops_per_token(trm).train_matmul == 2 * (6 * (6 * block + 65 * 384 + 384) + 2 * 6 * block)
    assert flops_per_token(trm).decode_matmul == 2 * (2 * 6 * 2 * block + 65 * 384 + 384)


def test_count_parameters():
    n = count_parameters(model_of("trm"))
    block = 4 * 16**2 + 3 * 16 * 24 + 2 * 16
    assert n["per_module"] == {
        "embed": 23 * 16, "prelude": 0, "net": 2 * block, "coda": 0, "head": 23 * 16, "q_head": 17,
    }  # fmt: skip
    assert n["total"] == n["trainable"] == 2 * 23 * 16 + 2 * block + 17
    assert n["embedding"] == 23 * 16 and n["recursive_core"] == 2 * block


def test_count_parameters_counts_tied_ones_once_and_frozen_ones_not_as_trainable():
    model = model_of("trm_tied")
    model.pos_embed.weight.requires_grad_(False)
    n = count_parameters(model)
    assert n["per_module"]["embed"] == 23 * 16 and n["per_module"]["head"] == 0
    assert n["embedding"] == 23 * 16 + 16 * 16
    assert n["total"] - n["trainable"] == 16 * 16
    assert n["total"] == sum(n["per_module"].values()) == sum(p.numel() for p in model.parameters())


def test_a_network_visited_once_is_no_recursive_core():
    assert count_parameters(model_of("none"))["recursive_core"] == 0
    assert count_parameters(model_of("loop"))["recursive_core"] > 0


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00K"),
        (12345, "12.3K"),
        (999_499, "999K"),
        (999_500, "1.00M"),
        (1_234_567, "1.23M"),
        (9_999_000, "10.0M"),
        (99_990_000, "100M"),
        (4_560_000_000, "4.56B"),
        (1.5e12, "1.50T"),
    ],
)
def test_format_params(n, text):
    assert format_params(n) == text


def test_effective_depth():
    config = TRMConfig(n_layers=2, latent_steps=3, deep_steps=2, supervision_steps=4, prelude_layers=1, coda_layers=2)
    assert effective_depth(config) == (1 + 2 * 4 * 2 + 2, 1 + 4 * 2 * 4 * 2 + 2)
    assert effective_depth(TRMConfig(recursion="none", n_layers=6)) == (6, 6)
    assert effective_depth(TRMConfig(recursion="loop", n_layers=2, deep_steps=3)) == (6, 6)


@pytest.mark.parametrize("name", ["none_ends", "loop_plain", "trm_all"])
def test_cache_bytes_are_those_of_the_cache(name):
    model = model_of(name).to(torch.bfloat16)
    cache = model.new_cache(batch=3, max_len=16)
    held = sum(t.numel() * t.element_size() for t in vars(cache).values() if torch.is_tensor(t) and t.dim() > 3)
    assert held == 3 * 16 * cache_bytes_per_token(model.config, 2)


def test_a_model_that_cannot_decode_has_no_cache():
    assert cache_bytes_per_token(TRMConfig(causal=False), 4) == 0


def test_log_appends_numbers_and_reads_them_back(tmp_path):
    with RunLog(tmp_path, tensorboard=False) as log:
        log.log(1, loss=torch.tensor(2.5), lr=1e-3, tokens=10)
        log.log(2, valid_loss=float("nan"), absent=None)
        first, second = read_metrics(tmp_path)  # flushed: readable while the run goes on
    assert (first["step"], first["loss"], first["lr"], first["tokens"]) == (1, 2.5, 1e-3, 10)
    assert second["valid_loss"] is None and "absent" not in second
    assert second["time"] >= first["time"] > 1.6e9


def test_a_half_line_is_dropped_and_never_joined_to_the_next(tmp_path):
    with RunLog(tmp_path, tensorboard=False) as log:
        log.log(1, loss=1.0)
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 2, "lo')
    assert [r["step"] for r in read_metrics(tmp_path)] == [1]
    with RunLog(tmp_path, tensorboard=False) as log:
        log.log(3, loss=0.5)
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 3]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    (tmp_path / METRICS_FILE).write_text('{"step": 1}\noops\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2"):
        read_metrics(tmp_path)
    with pytest.raises(UserError, match="No such file"):
        read_metrics(tmp_path / "nowhere")


def test_resume_drops_later_steps(tmp_path):
    with RunLog(tmp_path, tensorboard=False) as log:
        for step in range(1, 6):
            log.log(step, loss=float(step))
    with RunLog(tmp_path, tensorboard=False, resume_step=3) as log:
        log.log(4, loss=40.0)
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]


def test_tensorboard_events_hold_the_values(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunLog(tmp_path) as log:
        log.log(10, loss=2.0)
        log.log(20, loss=1.0, valid_loss=1.5)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(10, 2.0), (20, 1.0)]
    assert [e.value for e in events.Scalars("valid/valid_loss")] == [1.5]


def write_run(folder, steps, **gaps):
    lines = []
    for step in range(1, steps + 1):
        loss = 2.0 + 7.0 / step
        lines.append({"step": step, "loss": loss, "bits_per_byte": loss / 2, "lr": 1e-3, "grad_norm": 1.0 / step})
        if step % 5 == 0:
            lines.append({"step": step, "valid_loss": loss + 0.1, "valid_bits_per_byte": loss / 2})
    lines = [{name: value for name, value in line.items() if name not in gaps} for line in lines]
    (folder / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    ("steps", "gaps"),
    [(200, {}), (1, {}), (5, {}), (20, {"bits_per_byte": 0, "valid_loss": 0, "grad_norm": 0, "lr": 0})],
)
def test_plot_writes_one_whole_picture(tmp_path, steps, gaps):
    write_run(tmp_path, steps, **gaps)
    path = plot_learning_curve(tmp_path, "a run")
    assert path.read_bytes().startswith(b"\x89PNG") and len(path.read_bytes()) > 10_000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["learning_curve.png", METRICS_FILE]


def test_plot_of_a_diverged_run(tmp_path):
    lines = [{"step": s, "loss": None if s > 3 else 1.0, "grad_norm": None if s > 3 else 0.0} for s in range(1, 9)]
    (tmp_path / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert plot_learning_curve(tmp_path, "diverged").exists()


def test_plot_of_nothing_is_no_picture(tmp_path):
    (tmp_path / METRICS_FILE).write_text("")
    assert plot_learning_curve(tmp_path, "empty") is None
    assert not (tmp_path / "learning_curve.png").exists()
