"""Parameter groups, the learning-rate schedule against its formula, the moving average against a slow twin."""

import math

import pytest
import torch
from torch.optim import AdamW, Muon

from src.optim import EMA, cosine_schedule, make_optimizers

SHAPES = [
    {"recursion": "trm", "gate": True, "injection": "concat", "positions": "learned", "qk_norm": True},
    {"recursion": "loop", "norm": "sandwich", "prelude_layers": 1, "coda_layers": 1},
    {"recursion": "none", "norm": "pre", "tie_embeddings": True},
]


def groups_of(model, name):
    """{parameter name: (optimizer class, weight decay)}, each parameter exactly once."""
    names = {id(p): n for n, p in model.named_parameters()}
    found = {}
    for optimizer in make_optimizers(model, name, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.99)):
        for group in optimizer.param_groups:
            assert group["lr"] == group["peak_lr"] == 1e-3
            for p in group["params"]:
                assert id(p) not in [*found], names[id(p)]
                found[id(p)] = (type(optimizer), group["weight_decay"])
    return {names[i]: kind for i, kind in found.items()}


class TestGroups:
    @pytest.mark.parametrize("settings", SHAPES, ids=lambda s: s["recursion"])
    @pytest.mark.parametrize("name", ["adamw", "muon"])
    def test_every_parameter_once_and_decay_on_matrices_alone(self, tiny, settings, name):
        model = tiny(**settings)
        found = groups_of(model, name)
        assert set(found) == {n for n, _ in model.named_parameters()}
        for path, p in model.named_parameters():
            is_table = path in ("embed.weight", "pos_embed.weight", "q_head.weight")
            assert found[path][1] == (0.1 if p.ndim == 2 and not is_table else 0.0), path

    def test_muon_has_the_matrices_inside_blocks(self, tiny):
        model = tiny(recursion="trm", prelude_layers=1)
        muon = {n for n, (kind, _) in groups_of(model, "muon").items() if kind is Muon}
        inner = {n for n, p in model.named_parameters() if p.ndim == 2 and n.startswith(("net.", "prelude."))}
        assert muon == inner and inner

    def test_frozen_parameters_stay_out(self, tiny):
        model = tiny()
        model.embed.weight.requires_grad_(False)
        assert "embed.weight" not in groups_of(model, "adamw")


@pytest.mark.parametrize(
    ("step", "warmup", "progress", "floor", "factor"),
    [
        (0, 10, 0.0, 0.1, 0.1),
        (4, 10, 0.0, 0.1, 0.5),
        (9, 10, 0.0, 0.0, 1.0),
        (0, 0, 0.0, 0.1, 1.0),
        (99, 10, 0.5, 0.0, 0.5),
        (99, 10, 0.5, 0.2, 0.6),
        (99, 10, 1 / 3, 0.0, 0.75),
        (99, 10, 1.0, 0.05, 0.05),
        (99, 10, 7.0, 0.05, 0.05),  # time may run past the end
        (4, 10, 0.5, 0.2, 0.3),
    ],
)
def test_schedule(step, warmup, progress, floor, factor):
    assert cosine_schedule(step, warmup, progress, floor) == pytest.approx(factor, abs=1e-12)


def test_schedule_falls_steadily():
    factors = [cosine_schedule(50 + s, 50, s / 100, 0.1) for s in range(101)]
    assert factors[0] == 1.0 and factors[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in zip(factors, factors[1:]))


def change(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator))


@pytest.mark.parametrize("tied", [False, True])
class TestEMA:
    def test_hand_formula(self, tiny, tied):
        """average <- d average + (1 - d) weights, d = min(decay, (1 + n) / (10 + n)), one parameter in float64."""
        model = tiny(tie_embeddings=tied)
        ema, wanted = EMA(model, 0.3), {n: p.detach().double().clone() for n, p in model.named_parameters()}
        for n in range(6):  # the ramp is over when (1 + n) / (10 + n) passes 0.3, at n = 3
            change(model, n)
            ema.update(model)
            d = min(0.3, (1 + n) / (10 + n))
            for name, p in model.named_parameters():
                wanted[name] = d * wanted[name] + (1 - d) * p.detach().double()
        assert ema.updates == 6
        for name in wanted:
            assert torch.allclose(ema.average[name].double(), wanted[name], atol=1e-5), name  # fp32 against float64

    def test_tied_weights_are_kept_once(self, tiny, tied):
        names = set(EMA(tiny(tie_embeddings=tied), 0.9).average)
        assert ("head.weight" in names) != tied and "embed.weight" in names

    def test_swap_exchanges_and_twice_is_the_identity(self, tiny, tied):
        model = tiny(tie_embeddings=tied)
        ema = EMA(model, 0.9)
        change(model, 1)
        live = {n: t.clone() for n, t in model.state_dict().items()}
        average = {n: t.clone() for n, t in ema.average.items()}
        addresses = [p.data_ptr() for p in model.parameters()]
        ema.swap(model)
        assert all(torch.equal(p, average[n]) for n, p in model.named_parameters())
        assert all(torch.equal(t, live[n]) for n, t in ema.average.items())
        assert tied == (model.head.weight is model.embed.weight)
        ema.swap(model)
        assert all(torch.equal(p, live[n]) for n, p in model.named_parameters())
        assert all(torch.equal(t, average[n]) for n, t in ema.average.items())
        assert addresses == [p.data_ptr() for p in model.parameters()]  # the optimizer's references stay good

    def test_is_a_copy(self, tiny, tied):
        model = tiny(tie_embeddings=tied)
        ema = EMA(model, 0.9)
        before = {n: t.clone() for n, t in ema.average.items()}
        change(model, 1)
        assert all(torch.equal(t, before[n]) for n, t in ema.average.items())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_optimizers_train(tiny, name):
    model = tiny(recursion="trm").train()
    ids = torch.randint(0, 23, (4, 9))
    optimizers = make_optimizers(model, name, lr=1e-2, weight_decay=0.01, betas=(0.9, 0.99))
    assert [type(o) for o in optimizers] == ([AdamW] if name == "adamw" else [AdamW, Muon])
    losses = []
    for _ in range(40):
        loss = model(ids[:, :-1], ids[:, 1:]).ce_loss
        losses.append(loss.item())
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0] and losses[0] > 0.8 * math.log(23)
