"""Parameter groups, schedules and averaged weights against their formulas, and our AdamW and Muon against torch's."""

import math

import pytest
import torch

from src.optim import EMA, AdamW, Muon, SparseSignSGD, learning_rate_factor, make_optimizers, newton_schulz

SHAPES = [
    {"recursion": "trm", "gate": True, "injection": "concat", "positions": "learned", "qk_norm": True},
    {"recursion": "loop", "norm": "sandwich", "prelude_layers": 1, "coda_layers": 1, "attention_gate": True},
    {"recursion": "none", "norm": "pre", "tie_embeddings": True},
    {"recursion": "trm", "mixer": "mlp", "causal": False, "norm": "pre", "coda_layers": 1, "tie_embeddings": True},
]
# last parts of the modules' names
DECAYED = {"qkv", "out", "gate_up", "down", "inject_z", "inject_y", "gate", "head", "head_gate"}
SPARED = {"embed", "pos_embed", "q_head", "norm", "attn_norm", "mlp_norm", "attn_out_norm", "mlp_out_norm"} | {
    *("q_norm", "k_norm", "coda_norm")
}


def groups_of(model, name):
    """{parameter name: (optimizer class, weight decay)}; asserts that no parameter is in two groups."""
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
    @pytest.mark.parametrize("settings", SHAPES, ids=lambda s: "-".join(map(str, s.values())))
    @pytest.mark.parametrize("name", ["adamw", "muon", "muoneq"])
    def test_every_parameter_once_and_decay_on_matrices_alone(self, tiny, settings, name):
        """Weight decay acts on matrices that mix channels; Muon gets those inside the network, AdamW the rest."""
        model = tiny(**settings)
        found = groups_of(model, name)
        assert set(found) == {n for n, _ in model.named_parameters()}
        for path, (kind, decay) in found.items():
            module, leaf = path.split(".")[-2:]
            assert module in DECAYED | SPARED, path
            assert decay == (0.1 if module in DECAYED and leaf == "weight" else 0.0), path
            inner = module in DECAYED - {"head"} and leaf == "weight"
            assert kind is (Muon if name != "adamw" and inner else torch.optim.AdamW), path

    def test_frozen_parameters_stay_out(self, tiny):
        model = tiny()
        model.embed.weight.requires_grad_(False)
        assert "embed.weight" not in groups_of(model, "adamw")


class TestMuon:
    def test_it_is_torchs_up_to_bf16(self):
        """Momentum is equal; updates differ by bf16 rounding, in which torch runs the five steps of the iteration."""
        torch.manual_seed(0)
        ours = [torch.nn.Parameter(torch.randn(shape)) for shape in [(8, 24), (24, 8), (8, 24), (16, 16)]]
        theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
        start = [p.detach().clone() for p in ours]
        a = Muon(ours, lr=0.1, weight_decay=0.05)
        b = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
        for _ in range(3):
            for p, q in zip(ours, theirs):
                p.grad = torch.randn(p.shape)
                q.grad = p.grad.clone()
            a.step()
            b.step()
        for p, q, before in zip(ours, theirs, start):
            assert torch.equal(a.state[p]["momentum_buffer"], b.state[q]["momentum_buffer"])
            assert (p - q).norm() < 0.03 * (q - before).norm()

    @pytest.mark.parametrize("shape", [(2, 6, 10), (1, 10, 6), (3, 7, 7)])
    def test_singular_values_go_through_the_polynomial(self, shape):
        torch.manual_seed(1)
        g = torch.randn(shape, dtype=torch.float64)
        u, s, v = torch.linalg.svd(g, full_matrices=False)
        s = s / s.norm(dim=-1, keepdim=True)
        for _ in range(5):
            s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
        torch.testing.assert_close(newton_schulz(g, (3.4445, -4.775, 2.0315), 5), u * s[:, None] @ v)

    @pytest.mark.parametrize("equal_rows", [False, True])
    def test_rows_of_unequal_size(self, equal_rows):
        """Some gradients are 1,000 times as large as others. Only with equal rows, all rows then move equally far."""
        torch.manual_seed(2)
        p, scale = torch.nn.Parameter(torch.zeros(8, 32)), torch.tensor([1.0, 1e-3]).repeat(4)[:, None]
        p.grad = scale * torch.randn(8, 32)
        grad = p.grad.clone()
        Muon([p], lr=0.1, weight_decay=0.0, equal_rows=equal_rows).step()
        moved = -p.detach() / (0.2 * 0.1 * 32**0.5)
        of = grad / grad.norm(dim=1, keepdim=True) if equal_rows else grad
        torch.testing.assert_close(moved, newton_schulz(of[None], (3.4445, -4.775, 2.0315), 5)[0], atol=0.02, rtol=0)
        rows = moved.norm(dim=1)
        assert (rows.min() > 0.6 * rows.max()) == equal_rows

    def test_rows_of_zeros_stay(self):
        p = torch.nn.Parameter(torch.ones(4, 4))
        p.grad = torch.diag(torch.tensor([1.0, 0.0, 1.0, 0.0]))
        Muon([p], lr=0.1, weight_decay=0.0, equal_rows=True).step()
        assert torch.equal(p[1::2], torch.ones(2, 4)) and (p[::2] != 1).any(1).all()

    def test_a_matrix_without_gradient_stays(self):
        still, moves = (torch.nn.Parameter(torch.ones(4, 4)) for _ in range(2))
        moves.grad = torch.eye(4)
        Muon([still, moves], lr=0.1, weight_decay=0.1).step()
        assert torch.equal(still, torch.ones(4, 4)) and not torch.equal(moves, torch.ones(4, 4))


@pytest.mark.parametrize(
    ("schedule", "step", "warmup", "progress", "floor", "factor"),
    [
        ("cosine", 0, 10, 0.0, 0.1, 0.1),
        ("cosine", 4, 10, 0.0, 0.1, 0.5),
        ("cosine", 9, 10, 0.0, 0.0, 1.0),
        ("cosine", 0, 0, 0.0, 0.1, 1.0),
        ("cosine", 99, 10, 0.5, 0.0, 0.5),
        ("cosine", 99, 10, 0.5, 0.2, 0.6),
        ("cosine", 99, 10, 1 / 3, 0.0, 0.75),
        ("cosine", 99, 10, 1.0, 0.05, 0.05),
        ("cosine", 99, 10, 7.0, 0.05, 0.05),  # by max_minutes, progress may exceed 1
        ("cosine", 4, 10, 0.5, 0.2, 0.3),
        ("linear", 4, 10, 0.0, 0.1, 0.5),
        ("linear", 99, 10, 0.5, 0.1, 1.0),
        ("linear", 99, 10, 0.75, 0.1, 1.0),
        ("linear", 99, 10, 0.875, 0.0, 0.5),
        ("linear", 99, 10, 0.875, 0.2, 0.6),
        ("linear", 99, 10, 1.0, 0.05, 0.05),
        ("linear", 99, 10, 7.0, 0.05, 0.05),
        ("constant", 4, 10, 0.5, 0.1, 0.5),
        ("constant", 99, 10, 1.0, 0.1, 1.0),
    ],
)
def test_schedule(schedule, step, warmup, progress, floor, factor):
    got = learning_rate_factor(schedule, step, warmup, progress, floor, cooldown_fraction=0.25)
    assert got == pytest.approx(factor, abs=1e-12)


@pytest.mark.parametrize(("schedule", "flat"), [("cosine", 0), ("linear", 79)])
def test_schedule_falls_steadily(schedule, flat):
    factors = [learning_rate_factor(schedule, 50 + s, 50, s / 100, 0.1) for s in range(101)]
    assert factors[: flat + 1] == [1.0] * (flat + 1) and factors[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in zip(factors[flat:], factors[flat + 1 :]))


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
        assert addresses == [p.data_ptr() for p in model.parameters()]  # the optimizer still refers to them

    def test_is_a_copy(self, tiny, tied):
        model = tiny(tie_embeddings=tied)
        ema = EMA(model, 0.9)
        before = {n: t.clone() for n, t in ema.average.items()}
        change(model, 1)
        assert all(torch.equal(t, before[n]) for n, t in ema.average.items())


@pytest.mark.parametrize("name", ["adamw", "muon", "muoneq"])
def test_optimizers_train(tiny, name):
    model = tiny(recursion="trm").train()
    ids = torch.randint(0, 23, (4, 9))
    optimizers = make_optimizers(model, name, lr=1e-2, weight_decay=0.01, betas=(0.9, 0.99))
    assert [type(o) for o in optimizers] == [torch.optim.AdamW] + [Muon] * (name != "adamw")
    losses = []
    for _ in range(40):
        loss = model(ids[:, :-1], ids[:, 1:]).ce_loss
        losses.append(loss.item())
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0] and losses[0] > 0.8 * math.log(23)


SETTINGS = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 0.01, "weight_decay": 0.3}  # an eps large enough to matter


def descend(make, steps=7):
    """The parameters (float64) after each step on an unevenly curved function; the last one has no gradient."""
    start = torch.linspace(-1, 2, 12, dtype=torch.float64).view(3, 4)
    params = [start.clone().requires_grad_(), start[0].clone().requires_grad_(), start.clone().requires_grad_()]
    optimizer, path = make(params), []
    for _ in range(steps):
        optimizer.zero_grad()
        ((params[0] ** 2).sum() * 3 + (params[0][1] * params[1].sin()).sum()).backward()
        optimizer.step()
        path.append([p.detach().clone() for p in params])
    return path


def far_apart(path, other):
    return max((a - b).abs().max().item() for now, then in zip(path, other) for a, b in zip(now, then))


class TestAdamW:
    def test_textbook_form_is_torchs(self):
        ours, theirs = descend(lambda p: AdamW(p, **SETTINGS)), descend(lambda p: torch.optim.AdamW(p, **SETTINGS))
        assert far_apart(ours, theirs) < 1e-14

    def test_efficient_form_is_torchs_with_a_shrinking_eps(self):
        """sqrt(v) + eps = sqrt(c2) (sqrt(v / c2) + eps / sqrt(c2))"""

        class Shrinking(torch.optim.AdamW):
            t = 0

            def step(self):
                self.t += 1
                for group in self.param_groups:
                    group["eps"] = 0.01 / math.sqrt(1 - 0.95**self.t)
                super().step()

        ours = descend(lambda p: AdamW(p, **SETTINGS, form="efficient"))
        assert far_apart(ours, descend(lambda p: Shrinking(p, **SETTINGS))) < 1e-14
        assert far_apart(ours, descend(lambda p: AdamW(p, **SETTINGS))) > 1e-3

    def test_the_forms_are_one_without_eps(self):
        ours = [descend(lambda p: AdamW(p, **(SETTINGS | {"eps": 0}), form=f)) for f in ("textbook", "efficient")]  # noqa: B023
        assert far_apart(*ours) < 1e-14

    @pytest.mark.parametrize(
        ("form", "wanted"),
        [
            # m = 0.1 g, v = 0.001 g^2 with g = 2: p = 3 (1 - 0.5 * 0.2) - 0.5 m_hat / (v_hat^(1/2) + 1), the first step
            ("textbook", 2.7 - 0.5 * 2 / (2 + 1)),
            ("efficient", 2.7 - 0.5 * 0.001**0.5 / 0.1 * 0.2 / (0.004**0.5 + 1)),
        ],
    )
    def test_first_step_by_hand(self, form, wanted):
        p = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
        p.grad = torch.tensor([2.0], dtype=torch.float64)
        AdamW([p], lr=0.5, eps=1.0, weight_decay=0.2, form=form).step()
        assert p.item() == pytest.approx(wanted, abs=1e-14)

    def test_decay_is_decoupled(self):
        """With a gradient of 0, a weight shrinks by lr x weight_decay per step, whatever its moments are."""
        p = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
        optimizer = AdamW([p], lr=0.1, weight_decay=0.5)
        for _ in range(3):
            p.grad = torch.zeros_like(p)
            optimizer.step()
        assert p.item() == pytest.approx(2 * 0.95**3, abs=1e-15)

    def test_goes_on_from_its_state(self):
        """The state is saved after 3 steps and loaded into a new optimizer: step 4 is the same."""
        runs = []
        for breaks in (False, True):
            p = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
            optimizer = AdamW([p], **SETTINGS)
            for step in range(4):
                if breaks and step == 3:
                    state, optimizer = optimizer.state_dict(), AdamW([p])
                    optimizer.load_state_dict(state)
                optimizer.zero_grad()
                loss = optimizer.step(lambda: (p**4).sum().backward() or 7.0)  # noqa: B023
            runs.append(p.detach().clone())
        assert torch.equal(*runs) and loss == 7.0

    @pytest.mark.parametrize("wrong", [{"lr": -1}, {"betas": (0.9, 1.0)}, {"eps": -1e-8}, {"form": "short"}], ids=str)
    def test_refuses(self, unchecked, wrong):
        with pytest.raises(ValueError, match="correct them|choose textbook"):
            AdamW([torch.zeros(1, requires_grad=True)], **wrong)


class TestSparseSignSGD:
    def test_rows_with_a_gradient_by_hand(self):
        """row (1 - lr decay) - lr sign(g): lr 0.5, decay 0.2. Rows 0 and 3 have no gradient and stay as they are."""
        p = torch.tensor([[1.0, 2.0], [4.0, -3.0], [0.0, 8.0], [5.0, 5.0]], requires_grad=True)
        p.grad = torch.tensor([[0.0, 0.0], [7.0, -1e-20], [0.0, 0.3], [0.0, -0.0]])
        SparseSignSGD([p], lr=0.5, weight_decay=0.2).step()
        expected = [[1, 2], [4 * 0.9 - 0.5, -3 * 0.9 + 0.5], [0, 8 * 0.9 - 0.5], [5, 5]]
        torch.testing.assert_close(p.detach(), torch.tensor(expected, dtype=torch.float32))

    def test_only_the_sign_of_the_sum_over_a_batch_counts(self):
        """Row 2 is read three times, and its gradients 1, 1, -5 sum to -3."""
        table = torch.nn.Embedding(4, 1)
        before = table.weight.detach().clone()
        (table(torch.tensor([2, 2, 2, 1])).squeeze() * torch.tensor([1.0, 1.0, -5.0, 0.1])).sum().backward()
        SparseSignSGD(table.parameters(), lr=0.25).step()
        assert (table.weight.detach() - before).squeeze().tolist() == pytest.approx([0, -0.25, 0.25, 0])

    def test_it_has_no_state_and_no_gradient_changes_nothing(self):
        p = torch.ones(3, 2, requires_grad=True)
        optimizer = SparseSignSGD([p], lr=0.1, weight_decay=0.5)
        assert optimizer.step(lambda: 7.0) == 7.0 and p.detach().eq(1).all() and optimizer.state_dict()["state"] == {}

    @pytest.mark.parametrize("wrong", [{"lr": -1.0}, {"lr": 1.0, "weight_decay": -0.1}], ids=str)
    def test_refuses(self, wrong):
        with pytest.raises(ValueError, match="must be 0 or more"):
            SparseSignSGD([torch.zeros(1, 1, requires_grad=True)], **wrong)

    @pytest.mark.parametrize("name", ["adamw", "muon"])
    def test_it_takes_the_embeddings_of_puzzles(self, tiny, name):
        model = tiny(causal=False, prefix_tokens=2, puzzle_ids=5)
        optimizers = make_optimizers(model, name, 1e-3, 0.1, (0.9, 0.95), puzzle=(1e-2, 0.3))
        assert [type(o) for o in optimizers] == [torch.optim.AdamW] + [Muon] * (name == "muon") + [SparseSignSGD]
        (group,) = optimizers[-1].param_groups
        assert group["params"] == [model.puzzle_embed.weight]
        assert (group["lr"], group["peak_lr"], group["weight_decay"]) == (1e-2, 1e-2, 0.3)
        others = [p for o in optimizers[:-1] for g in o.param_groups for p in g["params"]]
        assert len(others) == len([*model.parameters()]) - 1 and all(p is not group["params"][0] for p in others)
