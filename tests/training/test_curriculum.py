"""Curriculum stages, and models that grow wider: the output and the gradient stay the same, and new weights learn."""

import dataclasses
import math

import pytest
import torch
import yaml
from conftest import AXES, TINY, batch, name, pairwise

from src.config import parse_flags
from src.errors import UserError
from src.metrics import flops_per_token
from src.model import TRMConfig, TRMModel
from src.optim import EMA, make_optimizers
from src.training.curriculum import (
    CurriculumScheduler,
    grow_average,
    grow_optimizers,
    grow_width,
    grown_config,
    place,
    set_depth,
)
from src.training.depths import mean_flops
from src.training.train_config import CurriculumConfig, CurriculumStage, TrainConfig

WIDE = 32  # grown from 16; a multiple of the head group in all cases
BASE = TRMConfig(**TINY)
MIXER = [{"recursion": family, "norm": "pre", "mixer": "mlp", "causal": False} for family in ("trm", "loop", "none")]
CAN_GROW = {key: values for key, values in AXES.items() if key != "norm_gain"}
SHAPES = [*pairwise(CAN_GROW), *MIXER, {"recursion": "loop", "injection": "none"}]
FEW = [
    {"recursion": "trm"},
    {"recursion": "trm", "injection": "concat", "gate": True, "tie_embeddings": True, "qk_norm": True},
    {"recursion": "trm", "norm": "sandwich", "attention_gate": True, "n_kv_heads": 2, "coda_layers": 1},
    {"recursion": "trm", "norm": "pre", "mixer": "mlp", "causal": False},
    {"recursion": "loop", "injection": "none", "prelude_layers": 1, "norm": "pre"},
    {"recursion": "none", "norm": "pre", "tie_embeddings": True, "n_kv_heads": 1},
]


def plan(*stages, model=BASE, batch_size=8, max_steps=100):
    """A scheduler for stages given as dicts, with a text of 1,600 tokens."""
    stages = [CurriculumStage(**stage) for stage in stages]
    return CurriculumScheduler(stages, model, batch_size, max_steps, lambda seq_len: 1600 // seq_len)


class TestPlan:
    def test_hand_worked(self):
        """100 windows of 16 are 12.5 batches of 8; 200 windows of 8 are 12.5 batches of 16, twice."""
        got = plan({"epochs": 1}, {"epochs": 2, "seq_len": 8, "batch_size": 16}, {"steps": 7, "seq_len": 16})
        assert got.starts == [0, 12, 37] and got.total_steps == 44
        assert [(s.index, s.steps, s.seq_len, s.batch_size) for s in got.stages] == [
            (0, 12, 16, 8), (1, 25, 8, 16), (2, 7, 16, 16)
        ]  # fmt: skip
        wanted = [0] * 12 + [1] * 25 + [2] * 9  # after the end, the last stage
        assert [got.at(step).index for step in range(46)] == wanted
        per_step = [16 * 8] * 12 + [8 * 16] * 25 + [16 * 16] * 7
        assert [got.tokens(step) for step in range(45)] == [sum(per_step[:step]) for step in range(45)]
        assert str(got.stages[1]) == "stage 2: steps 12 to 37, batches of 16 x 8 tokens, 12 visits, d_model 16"

    def test_without_stages_the_run_is_one(self):
        (stage,) = plan().stages
        assert (stage.start, stage.steps, stage.seq_len, stage.batch_size, stage.lr_factor) == (0, 100, 16, 8, 1.0)
        assert stage.model == BASE

    def test_what_is_left_out_stays(self):
        change = {"latent_steps": 3, "supervision_steps": 4, "batch_size": 2, "lr_factor": 0.5, "seq_len": 4}
        first, second, third = plan({"steps": 1, **change}, {"steps": 1}, {"steps": 1, "deep_steps": 3}).stages
        for stage in (first, second, third):
            assert (stage.model.latent_steps, stage.model.supervision_steps) == (3, 4)
            assert (stage.batch_size, stage.lr_factor, stage.seq_len) == (2, 0.5, 4)
        assert (second.model.deep_steps, third.model.deep_steps) == (2, 3)

    @pytest.mark.parametrize(
        ("settings", "wanted"), [({"recursion": "trm"}, 1), ({"recursion": "loop"}, 5), ({"full_bptt": True}, 5)]
    )
    def test_grad_deep_steps_follows_unless_given(self, settings, wanted):
        model = dataclasses.replace(BASE, grad_deep_steps=None, **settings)
        assert plan({"steps": 1, "deep_steps": 5}, model=model).stages[0].model.grad_deep_steps == wanted
        given = dataclasses.replace(BASE, deep_steps=3, grad_deep_steps=2)
        assert plan({"steps": 1, "deep_steps": 5}, model=given).stages[0].model.grad_deep_steps == 2
        loop = dataclasses.replace(BASE, recursion="loop", deep_steps=4, grad_deep_steps=2)
        stages = plan({"steps": 1, "deep_steps": 2}, {"steps": 1, "deep_steps": 4}, model=loop).stages
        assert [stage.model.grad_deep_steps for stage in stages] == [2, 2]  # 2 is not the default of the first stage

    def test_width_goes_through_the_stages(self):
        first, second, third = plan({"steps": 1}, {"steps": 1, "dim": 24}, {"steps": 1, "dim": 32, "d_ff": 100}).stages
        assert first.model == BASE
        assert second.model == grown_config(BASE, 24)
        assert third.model == grown_config(second.model, 32, 100)

    @pytest.mark.parametrize(
        ("stage", "said"),
        [
            ({"seq_len": 17}, "seq_len 17 is over max_seq_len 16"),
            ({"dim": 12}, "dim 12 is less than"),
            ({"dim": 18}, "dim 18 is not a multiple of 4"),
            ({"d_ff": 20}, "d_ff 20 is less than"),
            ({"dim": 24, "d_ff": 20}, "d_ff 20 is less than"),
        ],
        ids=str,
    )
    def test_refuses_what_the_model_cannot_follow(self, stage, said):
        with pytest.raises(UserError, match=rf"curriculum.stages\[1\]: {said}"):
            plan({"steps": 3}, {"steps": 1, **stage})

    def test_refuses_by_the_model(self):
        mixer = TRMConfig(**TINY, mixer="mlp", causal=False)
        with pytest.raises(UserError, match="mixer mlp"):
            plan({"steps": 1, "seq_len": 8}, model=mixer)
        given = dataclasses.replace(BASE, deep_steps=3, grad_deep_steps=2)
        with pytest.raises(UserError, match="grad_deep_steps 2 is more than deep_steps 1"):
            plan({"steps": 1, "deep_steps": 1}, model=given)
        grouped = dataclasses.replace(BASE, n_kv_heads=1)
        with pytest.raises(UserError, match=r"dim 24 is not a multiple of 16, which is 4 query heads"):
            plan({"steps": 1, "dim": 24}, model=grouped)

    def test_a_resume_checks_where_stages_begin(self):
        state = plan({"epochs": 1}, {"steps": 5}).state_dict()
        plan({"steps": 12}, {"steps": 9}).load_state_dict(state)
        with pytest.raises(UserError, match=r"\[0, 12\], but now at \[0, 6\]"):
            plan({"epochs": 0.5}, {"steps": 5}).load_state_dict(state)

    @pytest.mark.parametrize(
        ("values", "said"),
        [
            ({}, "either steps or epochs"),
            ({"steps": 1, "epochs": 1.0}, "either steps or epochs"),
            ({"steps": 0}, "steps is 0: set it to 1 or more"),
            ({"epochs": -0.5}, "epochs is -0.5: set it over 0"),
            ({"epochs": math.nan}, "epochs is nan"),
            ({"steps": 1, "batch_size": 0}, "batch_size is 0"),
            ({"steps": 1, "lr_factor": math.inf}, "lr_factor is inf"),
        ],
        ids=str,
    )
    def test_a_stage_refuses(self, values, said):
        with pytest.raises(ValueError, match=said):
            CurriculumStage(**values)


@dataclasses.dataclass
class Run:
    """Settings of a run.

    Args:
        lr: learning rate
        curriculum: its stages
    """

    lr: float = 1.0
    curriculum: CurriculumConfig = dataclasses.field(default_factory=CurriculumConfig)


class TestSettings:
    def parse(self, tmp_path, text, *flags):
        (tmp_path / "c.yaml").write_text(text)
        return parse_flags("About.", Run, argv=["--config", str(tmp_path / "c.yaml"), *flags])[0]

    def test_yaml_to_stages_and_back(self, tmp_path):
        run = self.parse(tmp_path, "curriculum:\n  stages:\n  - {epochs: 1, seq_len: 8}\n  - {steps: 5, dim: 32}\n")
        assert run.curriculum.stages == [CurriculumStage(epochs=1.0, seq_len=8), CurriculumStage(steps=5, dim=32)]
        assert self.parse(tmp_path, yaml.safe_dump(dataclasses.asdict(run))) == run

    @pytest.mark.parametrize("text", ["lr: 2\n", "lr: 2\ncurriculum:\n", "curriculum: {stages: []}\n"])
    def test_no_stages(self, tmp_path, text):
        assert not self.parse(tmp_path, text).curriculum.stages

    def test_a_flag_goes_over_the_file(self, tmp_path):
        flag = '--curriculum.stages=[{"steps": 3}]'
        run = self.parse(tmp_path, "curriculum: {stages: [{steps: 1}, {steps: 2}]}\n", flag)
        assert run.curriculum.stages == [CurriculumStage(steps=3)]

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("curriculum: {stages: [{steps: x}]}", ["curriculum.stages", "steps x", "int"]),
            ("curriculum: {stages: [{step: 3}]}", ["curriculum.stages", "step"]),
            ("curriculum: {stages: [3]}", ["curriculum.stages", "3"]),
            ("curriculum: {stage: []}", ["curriculum", "stage"]),
            ("curriculum: 3", ["curriculum is 3"]),
            ("curriculum: {stages: [{steps: 1}, {steps: 0}]}", ["curriculum", "stages[1]", "steps is 0"]),
            ("curriculum: {stages: [{seq_len: 8}]}", ["curriculum", "stages[0]", "steps or epochs"]),
        ],
        ids=str,
    )
    def test_a_mistake_is_one_line(self, tmp_path, capsys, text, said):
        with pytest.raises((SystemExit, UserError)) as caught:
            self.parse(tmp_path, text)
        line = capsys.readouterr().err or f"{caught.value}\n"
        assert line.count("\n") == 1 and all(part in line for part in said), line


class TestDepth:
    @pytest.mark.parametrize("family", ["trm", "loop", "none"])
    def test_is_that_of_a_model_made_so(self, tiny, family):
        made = tiny(recursion=family, latent_steps=3, deep_steps=3, supervision_steps=1)
        live = tiny(recursion=family)
        shallow, (ids, targets) = live.config, batch()
        before = live(ids, targets).loss
        set_depth(live, made.config)
        assert live.config == made.config and shallow != made.config  # the config object itself was not modified
        assert torch.equal(live(ids, targets).loss, made(ids, targets).loss)
        assert torch.equal(live.generate(ids, 5, temperature=0.0), made.generate(ids, 5, temperature=0.0))
        set_depth(live, shallow)
        assert torch.equal(live(ids, targets).loss, before)

    def test_training_follows(self, tiny):
        """Counts the visits with gradient at the network: they must match the new depth."""
        live, visits = tiny(latent_steps=1, deep_steps=1, supervision_steps=1), []
        live.net.register_forward_hook(lambda net, inputs, out: visits.append(out.requires_grad))
        deeper = dataclasses.replace(live.config, latent_steps=2, deep_steps=3, supervision_steps=2)
        for config, wanted in ((live.config, [True] * 2), (deeper, ([False] * 6 + [True] * 3) * 2)):
            set_depth(live, config)
            visits.clear()
            live(*batch())
            assert visits == wanted


def grown(tiny, settings, dtype=torch.float32):
    model = tiny(dtype=dtype, **settings)
    return model, grow_width(model, WIDE, seed=1)


def new_part(model, wide):
    """{name: mask of the entries that growth added}, found by placing a marker for each old entry."""
    masks = {}
    for path, p in wide.named_parameters():
        old = torch.zeros(p.shape)
        place(path, torch.ones(model.get_parameter(path).shape), old, model.config, wide.config, power=0)
        masks[path] = old == 0
    return masks


class TestWidth:
    @pytest.mark.parametrize("settings", SHAPES, ids=name)
    def test_same_output(self, tiny, settings):
        """Compares logits and halting logits of every step in float64; embeddings are small, so that eps matters."""
        model = tiny(dtype=torch.float64, **settings)
        ids, targets = batch(length=TINY["max_seq_len"])
        with torch.no_grad():
            model.embed.weight.mul_(0.01)
        wide = grow_width(model, WIDE)
        a, b = model(ids, targets, return_steps=True), wide(ids, targets, return_steps=True)
        for wanted, got in zip(a[:5], b[:5]):
            assert (wanted is None and got is None) or torch.allclose(got, wanted, rtol=0, atol=1e-9)
        assert torch.allclose(b.carry.y[..., :16], a.carry.y, atol=1e-9) and not b.carry.y[..., 16:].any()
        assert wide.config.d_model == WIDE and wide.config.head_dim == model.config.head_dim
        assert wide.config.n_heads // wide.config.n_kv_heads == model.config.n_heads // model.config.n_kv_heads

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"norm_gain": False}, "set norm_gain to true"),
            ({"mixer": "mlp", "causal": False}, "choose norm pre"),
            ({"prefix_tokens": 2, "causal": False}, "several prefix_tokens"),
        ],
        ids=["no gain", "norm over the sequence", "prefix"],
    )
    def test_models_that_cannot_grow(self, settings, message):
        with pytest.raises(ValueError, match=message):
            grown_config(TRMConfig(**TINY, **settings), WIDE)

    @pytest.mark.parametrize("settings", SHAPES[::2], ids=name)
    def test_same_output_in_fp32(self, settings):
        """Agrees to 1e-5 or, if recursion magnifies rounding, to a few times the old model's own error."""
        model = TRMModel(TRMConfig(**{**TINY, **settings})).eval()
        ids, targets = batch(length=TINY["max_seq_len"])
        with torch.no_grad():
            a, b = model(ids, targets), grow_width(model, WIDE)(ids, targets)
            off = (model.double()(ids).logits - a.logits).abs().max()
        assert (a.loss - b.loss).abs() < 1e-5
        assert (a.logits - b.logits).abs().max() < max(1e-5, 4 * off)

    def test_twice_and_a_chosen_d_ff(self, tiny):
        model = tiny(dtype=torch.float64, **FEW[1])
        wide = grow_width(grow_width(model, 24, d_ff=30), 40)
        assert (wide.config.n_heads, wide.config.d_ff, wide.config.norm_eps) == (10, 64, pytest.approx(1e-5 * 16 / 40))
        assert torch.allclose(wide(batch()[0]).logits, model(batch()[0]).logits, rtol=0, atol=1e-9)
        deep = grow_width(model, 16, d_ff=40)  # only the width of SwiGLU
        assert (deep.config.d_model, deep.config.d_ff, deep.config.norm_eps) == (16, 40, 1e-5)
        assert torch.allclose(deep(batch()[0]).logits, model(batch()[0]).logits, rtol=0, atol=1e-9)

    @pytest.mark.parametrize("settings", [s for s in FEW if "mixer" not in s], ids=name)
    def test_cached_decoding_is_the_same(self, tiny, settings):
        model, wide = grown(tiny, settings, torch.float64)
        ids = batch()[0]
        assert torch.equal(wide.generate(ids, 4, temperature=0.0), model.generate(ids, 4, temperature=0.0))

    def test_config_and_weights_are_all_there_is(self, tiny):
        """A checkpoint holds config and weights, which rebuild the same model: eps and scales are in the config."""
        _, wide = grown(tiny, FEW[1])
        again = TRMModel(TRMConfig(**wide.config.to_dict())).eval()
        again.load_state_dict(wide.state_dict())
        assert torch.equal(again(batch()[0]).logits, wide(batch()[0]).logits)
        assert again.head.weight is again.embed.weight and wide.head.weight is wide.embed.weight

    def test_new_entries_depend_on_the_seed_alone(self, tiny):
        model = tiny().train()
        state, wide = torch.get_rng_state(), grow_width(model, WIDE, seed=3)
        assert torch.equal(torch.get_rng_state(), state) and wide.training
        torch.manual_seed(99)
        again, other = grow_width(model, WIDE, seed=3).state_dict(), grow_width(model, WIDE, seed=4)
        assert all(torch.equal(t, again[n]) for n, t in wide.state_dict().items())
        assert not torch.equal(other.head.weight, wide.head.weight)

    @pytest.mark.parametrize("settings", FEW[1:], ids=name)
    def test_the_new_part_learns(self, tiny, settings):
        """New entries get gradients and move within three steps; they also train with all old entries frozen."""
        model, wide = grown(tiny, settings)
        ids, targets = batch(rows=4, length=TINY["max_seq_len"])
        masks, start = new_part(model, wide), {n: p.detach().clone() for n, p in wide.named_parameters()}
        optimizer, losses = torch.optim.Adam(wide.parameters(), lr=2e-2), []
        for step in range(15):
            out = wide(ids, targets)
            losses.append(out.ce_loss.item())
            optimizer.zero_grad()
            out.loss.backward()
            for path, p in wide.named_parameters():
                p.grad *= masks[path]
            optimizer.step()
            if step == 2:
                moved = {n: (p != start[n])[masks[n]].float().mean() for n, p in wide.named_parameters()}
                assert all(share > 0.9 for n, share in moved.items() if masks[n].any()), moved  # one token is unseen
        assert all(torch.equal(p[~masks[n]], start[n][~masks[n]]) for n, p in wide.named_parameters())
        assert losses[-1] < 0.85 * losses[0]


class TestTrainingState:
    @pytest.mark.parametrize("settings", FEW, ids=name)
    def test_gradients_stand_where_moments_are_put(self, tiny, settings):
        """Old entries have the old model's gradients, moved by `place`, so Adam's moments can be moved likewise."""
        model, wide = grown(tiny, settings, torch.float64)
        ids, targets = batch(length=TINY["max_seq_len"])
        for each in (model, wide):
            each(ids, targets).loss.backward()
        for path, mask in new_part(model, wide).items():
            got, wanted = wide.get_parameter(path).grad, torch.zeros(mask.shape, dtype=torch.float64)
            place(path, model.get_parameter(path).grad, wanted, model.config, wide.config, power=-1)
            assert torch.allclose(got[~mask], wanted[~mask], rtol=1e-7, atol=1e-10), path

    @pytest.mark.parametrize("kind", ["adamw", "muon"])
    def test_optimizers(self, tiny, kind):
        def make(model):
            return make_optimizers(model, kind, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.99))

        def train(model, optimizers, steps):
            for _ in range(steps):
                model(*batch()).loss.backward()
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()

        model = tiny(qk_norm=True, n_kv_heads=2)
        old = make(model)
        train(model, old, 3)
        wide = grow_width(model, WIDE)
        new = grow_optimizers(model, wide, old, make)
        assert [type(o) for o in new] == [type(o) for o in old]

        def state(model, optimizers, path):
            return next(
                o.state[p] for o in optimizers for n, p in model.named_parameters() if n == path and p in o.state
            )

        def both(path):
            return state(model, old, path), state(wide, new, path)

        a, b = both("embed.weight")
        assert a["step"] == b["step"] == 3
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(b[key][:, :16], a[key]) and not b[key][:, 16:].any()
        a, b = both("net.blocks.0.attn_norm.weight")  # a gain times s has a gradient divided by s; here s = sqrt(1/2)
        assert torch.allclose(b["exp_avg"][:16], a["exp_avg"] * 2**0.5) and not b["exp_avg"][16:].any()
        assert torch.allclose(b["exp_avg_sq"][:16], a["exp_avg_sq"] * 2)
        a, b = both("net.blocks.1.attn.qkv.weight")  # from 4 + 2 + 2 to 8 + 4 + 4 heads of 4 channels
        a, b = (s["momentum_buffer" if kind == "muon" else "exp_avg"] for s in (a, b))
        for start, wide_start, size, factor in ((0, 0, 16, 2**0.5), (16, 32, 8, 2**0.5), (24, 48, 8, 1.0)):
            part = b[wide_start : wide_start + 2 * size]
            assert torch.allclose(part[:size, :16], a[start : start + size] * factor)
            assert not part[size:].any() and not part[:, 16:].any()
        train(wide, new, 1)
        assert state(wide, new, "embed.weight")["step"] == 4 and state(model, old, "embed.weight")["step"] == 3

    @pytest.mark.parametrize("settings", FEW, ids=name)
    def test_averaged_model_is_the_same(self, tiny, settings):
        """The grown average computes the same as the old one, and can average the wider model's next weights."""
        model = tiny(dtype=torch.float64, **settings)
        ema = EMA(model, 0.9)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p), alpha=0.1)
        ema.update(model)
        wide = grow_width(model, WIDE)
        average = grow_average(ema.average, model, wide)
        assert not {t.data_ptr() for t in average.values()} & {t.data_ptr() for t in wide.state_dict().values()}
        ema.swap(model)
        ids = batch(length=TINY["max_seq_len"])[0]
        wanted = model(ids).logits
        ema.average = average
        ema.swap(wide)
        assert torch.allclose(wide(ids).logits, wanted, rtol=0, atol=1e-9)
        ema.swap(wide)
        ema.update(wide)


def test_the_work_that_is_left_costs_more_after_recursion_from():
    loop = TRMConfig(vocab_size=50, d_model=32, n_heads=2, recursion="loop", deep_steps=3)
    early, late = (flops_per_token(dataclasses.replace(loop, deep_steps=n, grad_deep_steps=n)).train for n in (1, 3))
    config, run = TrainConfig(recursion_from=0.6), plan(model=loop)
    assert run.work_left(config, 30) == pytest.approx((0.3 * early + 0.4 * late) / (0.3 * early))
    assert run.work_left(config, 80) == pytest.approx(0.2 * late / (0.6 * early + 0.2 * late))
    assert run.work_left(config, 100) == 0
    assert run.work_left(TrainConfig(), 25) == 3


def test_the_work_that_is_left_counts_the_stages():
    run = plan({"steps": 40, "batch_size": 2}, {"steps": 60, "batch_size": 8})
    assert run.work_left(TrainConfig(), 40) == pytest.approx(60 * 8 / (40 * 2))
    one, all_steps = (run.work_left(TrainConfig(recursion_from=0.5), 25, alone) for alone in (True, False))
    assert one < all_steps  # a step of puzzles is one supervision step, so it costs less once there are several


def test_mean_flops_of_drawn_depths():
    loop = TRMConfig(vocab_size=20, recursion="loop", deep_steps=4)
    cut = [dataclasses.replace(loop, deep_steps=n, grad_deep_steps=n) for n in range(1, 5)]
    drawn = mean_flops(TrainConfig(sample_depth=True), loop)
    assert drawn == pytest.approx(sum(flops_per_token(model).train for model in cut) / 4, rel=0.05)
