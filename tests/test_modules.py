"""The parts of the model beside PyTorch's own modules, or beside a formula that shares no code with them.

docs/modules.md walks through them in the same order, and names the proofs that are in other files."""

import importlib.util
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch import nn

from src import losses
from src.attention import attention
from src.layers import Attention, Context, MLPMixer1D, RMSNorm, SwiGLU, apply_rotary_emb, rotary_table, yarn
from src.losses import IGNORE, cross_entropy
from src.model import TRMConfig, TRMModel
from src.model_config import model_settings
from src.optim import make_optimizers
from src.sampling import filter_logits

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "modules.md"
NOTHING = Context(rotary=None, mask=None, is_causal=False, cache=None)

quick = settings(deadline=None, max_examples=25)
sizes = st.integers(1, 5)


def lively(module):
    """Random parameters in float64, gains too."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module.double()


def same(ours, theirs, *inputs):
    """Whether two functions give the same values, and the same gradients to their inputs and to `inputs`."""
    out, expected = ours(), theirs()
    torch.testing.assert_close(out, expected)
    weights = torch.randn_like(expected)
    gradients, wanted = (torch.autograd.grad(t, inputs, weights) for t in (out, expected))
    for gradient, other in zip(gradients, wanted):
        torch.testing.assert_close(gradient, other)


def rotated_by_transformers(q, k, positions, rope, max_len):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = LlamaConfig(head_dim=q.shape[-1], max_position_embeddings=max_len, rope_parameters=rope)
    return apply_rotary_pos_emb(q, k, *LlamaRotaryEmbedding(config)(q, positions))


def leaf(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


# --- embedding and linear ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"tie_embeddings": True}, {"positions": "learned"}, {"recursion": "none"}])
def test_embedding_is_a_one_hot_product(tiny, options):
    model, ids = tiny(dtype=torch.float64, **options), torch.tensor([[3, 1, 3], [0, 22, 7]])
    x, _ = model._enter(ids, None, None)
    expected = F.one_hot(ids, 23).double() @ model.embed.weight * (4.0 if "tie_embeddings" in options else 1.0)
    expected += model.pos_embed.weight[:3] if "positions" in options else 0.0
    torch.testing.assert_close(x, expected)
    x.sum().backward()
    assert model.embed.weight.grad.any(dim=1).nonzero().flatten().tolist() == [0, 1, 3, 7, 22]


@pytest.mark.parametrize("options", [{}, {"tie_embeddings": True}, {"weight_init": "truncated"}])
def test_embeddings_may_start_around_one_random_vector(options):
    """All embeddings shift by the same vector, in units of their standard deviation; all other weights stay."""
    torch.manual_seed(0)
    without = TRMModel(TRMConfig(vocab_size=23, d_model=512, **options)).state_dict()
    torch.manual_seed(0)
    with_mean = TRMModel(TRMConfig(vocab_size=23, d_model=512, embed_mean=2.0, **options)).state_dict()
    shift = with_mean.pop("embed.weight") - without.pop("embed.weight")
    torch.testing.assert_close(shift, shift[:1].expand_as(shift), rtol=0, atol=1e-5)
    std = 1.0 if options == {} else 512**-0.5
    assert shift[0].std().item() == pytest.approx(2 * std, rel=0.15) and abs(shift[0].mean().item()) < 0.3 * std
    others = [name for name in without if name != "head.weight" or "tie_embeddings" not in options]
    assert all(torch.equal(with_mean[name], without[name]) for name in others)


def test_only_models_without_a_constant_state_start_around_a_vector():
    for options, mean in (
        ({"recursion": "none"}, 1.0),
        ({"recursion": "loop"}, 1.0),
        ({"recursion": "trm"}, 0.0),
        ({"recursion": "loop", "causal": False}, 0.0),
        ({"recursion": "none", "embed_mean": 0.0}, 0.0),
    ):
        config = TRMConfig(vocab_size=23, **options)
        assert config.embed_mean == mean and model_settings(config)["embed_mean"] == options.get("embed_mean")


def test_one_large_linear_is_several_small_ones():
    """Queries, keys and values come from one matrix, gate and up from another: their rows one after the other."""
    layer, x = lively(Attention(TRMConfig(d_model=8, n_heads=4, n_kv_heads=2))), leaf(2, 3, 8)
    small = [nn.Linear(8, n, bias=False).double() for n in (8, 4, 4)]
    for linear, rows in zip(small, layer.qkv.weight.split([8, 4, 4])):
        linear.weight = nn.Parameter(rows.detach())
    same(lambda: layer.qkv(x), lambda: torch.cat([linear(x) for linear in small], dim=-1), x)


# --- norms ------------------------------------------------------------------------------------------------------------


@quick
@given(shape=st.lists(sizes, min_size=1, max_size=3), eps=st.sampled_from([1e-6, 1e-5, 0.1]))
def test_rms_norm_is_torchs(shape, eps):
    ours, theirs = lively(RMSNorm(shape[-1], eps)), nn.RMSNorm(shape[-1], eps).double()
    theirs.weight, x = ours.weight, leaf(*shape)
    same(lambda: ours(x), lambda: theirs(x), x, ours.weight)


def test_layer_norm_is_the_rms_norm_of_what_differs_from_the_mean():
    ours, theirs, x = RMSNorm(6, 1e-5).double(), nn.LayerNorm(6, 1e-5, bias=False).double(), leaf(4, 6)
    same(lambda: ours(x - x.mean(-1, keepdim=True)), lambda: theirs(x), x)


# --- attention and positions ------------------------------------------------------------------------------------------


@quick
@given(heads=sizes, size=sizes, rows=sizes, length=st.integers(1, 9), kind=st.sampled_from(["all", "causal", "padded"]))
def test_attention_is_torchs_multi_head_attention(heads, size, rows, length, kind):
    D = heads * size
    ours, x = lively(Attention(TRMConfig(d_model=D, n_heads=heads, positions="none"))), leaf(rows, length, D)
    theirs = nn.MultiheadAttention(D, heads, bias=False, batch_first=True).double()
    theirs.in_proj_weight, theirs.out_proj.weight = ours.qkv.weight, ours.out.weight
    hidden = torch.zeros(rows, length, dtype=torch.bool)
    hidden[:, 1:] = torch.rand(rows, length - 1) < 0.4
    sees, future = ~hidden[:, None, None].expand(-1, 1, length, -1), torch.ones(length, length).triu(1).bool()
    ctx, masks = {
        "all": (NOTHING, {}),
        "causal": (NOTHING._replace(is_causal=True), {"attn_mask": future}),
        "padded": (NOTHING._replace(mask=sees), {"key_padding_mask": hidden}),
    }[kind]
    same(lambda: ours(x, ctx, 0), lambda: theirs(x, x, x, need_weights=False, **masks)[0], x, ours.qkv.weight)


@quick
@given(kv_heads=sizes, group=sizes, size=sizes, length=st.integers(1, 9), past=st.integers(0, 4))
def test_grouped_attention_is_softmax_of_scaled_products(kv_heads, group, size, length, past):
    """Query heads j * group, ..., (j + 1) * group - 1 read key/value head j; each sees the past and itself."""
    q, (k, v) = leaf(2, kv_heads * group, length, size), leaf(2, 2, kv_heads, past + length, size)
    sees = torch.ones(length, past + length).tril(past).bool()

    def by_hand():
        scores = torch.einsum("bjgte,bjse->bjgts", q.unflatten(1, (kv_heads, group)), k) / math.sqrt(size)
        weights = scores.exp() * sees
        return torch.einsum("bjgts,bjse->bjgte", weights / weights.sum(-1, keepdim=True), v).flatten(1, 2)

    same(lambda: attention(q, k, v, sees[None, None], False, 0.0), by_hand, q)


@pytest.mark.slow  # the import of transformers
@pytest.mark.parametrize("scaling", [None, 2.5])
def test_rotary_is_that_of_transformers(scaling):
    q, k, positions = torch.randn(2, 4, 9, 16), torch.randn(2, 2, 9, 16), torch.randint(0, 500, (2, 9))
    rotary = rotary_table(positions, 16, 5000.0, scaling, torch.float32)
    rope = {"rope_theta": 5000.0} | (
        {"rope_type": "linear", "factor": scaling} if scaling else {"rope_type": "default"}
    )
    expected = rotated_by_transformers(q, k, positions, rope, 512)
    for ours, theirs in zip((q, k), expected):
        torch.testing.assert_close(apply_rotary_emb(ours, *rotary), theirs, atol=2e-4, rtol=0)  # angles of 500 in fp32


def cycles(channels, theta):
    return theta ** (-torch.arange(channels).double() / channels)


def test_yarn_keeps_fast_channels_and_slows_the_others():
    """64 channel pairs trained on 4,096 tokens: the 20th still turns 36 times, the 46th is the first under one turn."""
    before = cycles(64, 10000.0)
    after, size = yarn(before, 10000.0, 8.0, 4096)
    turns = 4096 * before / (2 * math.pi)
    first, last = (max(i for i in range(64) if turns[i] >= n) for n in (32, 1))
    assert (first, last) == (20, 45)
    for i, ratio in enumerate((after / before).tolist()):
        slowed = min(max((i - first) / (last + 1 - first), 0), 1)
        assert ratio == pytest.approx(1 - slowed + slowed / 8, rel=1e-12)
    assert size == pytest.approx(0.1 * math.log(8) + 1)


def test_yarn_without_scaling_changes_nothing(tiny):
    frequency, size = yarn(cycles(8, 10000.0), 10000.0, 1.0, 64)
    assert torch.equal(frequency, cycles(8, 10000.0)) and size == 1.0
    ids = torch.arange(12).view(1, 12)
    plain, ignored, scaled, linear = (
        tiny(rope_scaling=scaling, rope_trained_len=trained)(ids).logits
        for scaling, trained in ((None, None), (None, 4), (4.0, 4), (4.0, None))
    )
    assert torch.equal(plain, ignored) and not torch.allclose(plain, scaled) and not torch.allclose(linear, scaled)


@pytest.mark.parametrize("recursion", ["trm", "none"])
def test_yarn_writes_the_same_with_the_cache_and_without(tiny, recursion):
    model, ids = tiny(recursion=recursion, rope_scaling=4.0, rope_trained_len=4), torch.arange(6).view(2, 3)
    cached, whole = (model.generate(ids, 20, temperature=0, use_cache=use) for use in (True, False))
    assert torch.equal(cached, whole)


@pytest.mark.slow  # the import of transformers
@quick
@given(
    channels=st.sampled_from([2, 8, 32, 64]),
    theta=st.sampled_from([100.0, 10000.0, 500000.0]),
    factor=st.sampled_from([1.0, 2.0, 4.0, 40.0]),
    trained_len=st.integers(8, 8192),
)
def test_yarn_is_that_of_transformers(channels, theta, factor, trained_len):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "yarn", "rope_theta": theta, "factor": factor, "original_max_position_embeddings": trained_len}
    config = LlamaConfig(head_dim=2 * channels, max_position_embeddings=int(factor * trained_len), rope_parameters=rope)
    frequency, size = ROPE_INIT_FUNCTIONS["yarn"](config, device="cpu")
    ours, our_size = yarn(cycles(channels, theta), theta, factor, trained_len)
    torch.testing.assert_close(ours.float(), frequency, rtol=1e-5, atol=0)
    assert our_size == pytest.approx(size)
    if channels == 8:
        q, k, positions = torch.randn(1, 4, 5, 16), torch.randn(1, 2, 5, 16), torch.tensor([[0, 1, 2, 30, 100]])
        rotary = rotary_table(positions, 16, theta, factor, torch.float32, trained_len)
        for mine, theirs in zip((q, k), rotated_by_transformers(q, k, positions, rope, config.max_position_embeddings)):
            torch.testing.assert_close(apply_rotary_emb(mine, *rotary), theirs, atol=1e-4, rtol=0)


# --- feed-forward and mixer -------------------------------------------------------------------------------------------


@quick
@given(shape=st.lists(sizes, min_size=1, max_size=3), hidden=sizes)
def test_swiglu_is_torchs_glu_times_its_gate(shape, hidden):
    """silu(gate) * up = gate * (up * sigmoid(gate)), and the bracket is nn.GLU."""
    layer, x = lively(SwiGLU(shape[-1], hidden)), leaf(*shape)

    def by_glu():
        gate, up = x @ layer.gate_up.weight[:hidden].T, x @ layer.gate_up.weight[hidden:].T
        return (gate * nn.GLU()(torch.cat((up, gate), dim=-1))) @ layer.down.weight.T

    same(lambda: layer(x), by_glu, x, *layer.parameters())


@quick
@given(rows=sizes, length=sizes, channels=sizes, hidden=sizes)
def test_mixer_is_a_convolution_of_width_one_over_the_sequence(rows, length, channels, hidden):
    """To nn.Conv1d the positions are channels, and the channels a sequence on which it does the same everywhere."""
    mixer, x = lively(MLPMixer1D(length, hidden)), leaf(rows, length, channels)

    def by_convolution():
        gate, up = F.conv1d(x, mixer.mlp.gate_up.weight[..., None]).chunk(2, dim=1)
        return F.conv1d(F.silu(gate) * up, mixer.mlp.down.weight[..., None])

    same(lambda: mixer(x, NOTHING, 0), by_convolution, x, *mixer.parameters())


# --- loss and optimizer -----------------------------------------------------------------------------------------------


@quick
@given(shape=st.lists(sizes, min_size=1, max_size=3), classes=st.integers(2, 9))
def test_cross_entropy_is_torchs_and_its_gradient_softmax_minus_one_hot(shape, classes):
    logits, targets = leaf(*shape, classes), torch.randint(0, classes, shape)
    targets.view(-1)[1::3] = IGNORE
    valid = targets != IGNORE
    ours = cross_entropy(logits, targets)
    torch.testing.assert_close(ours, nn.CrossEntropyLoss()(logits[valid], targets[valid]))
    wanted = (logits.softmax(-1) - F.one_hot(targets.clamp(min=0), classes)) * valid[..., None] / valid.sum()
    torch.testing.assert_close(torch.autograd.grad(ours, logits)[0], wanted)


def test_the_optimizer_of_a_run_is_torchs_plain_adamw(tiny, unchecked):
    """Fused, in groups, against one loop over all parameters; decay on matrices other than embeddings."""
    runs = []
    for plain in (False, True):
        model, ids = tiny(dtype=torch.float64).train(), torch.arange(12).view(2, 6)
        (optimizer,) = make_optimizers(model, "adamw", lr=0.01, weight_decay=0.3, betas=(0.8, 0.9))
        if plain:
            exempt = ("embed.weight", "q_head.weight")
            decays = {n: p.ndim == 2 and n not in exempt for n, p in model.named_parameters()}
            groups = [{"params": [p], "weight_decay": 0.3 * decays[n]} for n, p in model.named_parameters()]
            optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.9), eps=1e-8, foreach=False, fused=False)
        for _ in range(3):
            optimizer.zero_grad()
            model(ids, ids.roll(1)).loss.backward()
            optimizer.step()
        runs.append(model.state_dict())
    for name, value in runs[0].items():
        torch.testing.assert_close(value, runs[1][name], rtol=1e-9, atol=1e-12)
    assert not torch.equal(runs[0]["embed.weight"], tiny(dtype=torch.float64).embed.weight)


# --- sampling ---------------------------------------------------------------------------------------------------------


def kept_by_hand(logits, temperature, top_k, top_p):
    """Probabilities after temperature, then the top_k likeliest, then the fewest of these that reach top_p."""
    likeliest = sorted(range(len(logits)), key=lambda i: -logits[i])[:top_k]
    mass = {i: math.exp((logits[i] - max(logits)) / temperature) for i in likeliest}
    kept, total = [], 0.0
    for i in likeliest:
        if total < top_p:
            kept.append(i)
            total += mass[i] / sum(mass.values())
    return [mass[i] / sum(mass[j] for j in kept) if i in kept else 0.0 for i in range(len(logits))]


@settings(deadline=None, max_examples=100)
@given(
    logits=st.lists(st.integers(-20, 20), min_size=2, max_size=12, unique=True),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([None, 1, 2, 5, 50]),
    top_p=st.floats(0.01, 1.0),
)
def test_filters_keep_what_the_definitions_keep(logits, temperature, top_k, top_p):
    expected = kept_by_hand(logits, temperature, top_k, top_p)
    assume(kept_by_hand(logits, temperature, top_k, top_p - 1e-9) == expected)  # not a matter of rounding
    found = filter_logits(torch.tensor([logits]).double(), temperature, top_k, top_p).softmax(-1)[0].tolist()
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.slow  # the import of transformers
def test_filters_are_those_of_transformers():
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(16, 200).double() * 3
    for temperature, top_k, top_p in [(0.7, 50, 0.9), (1.5, 5, 0.99), (1.0, 200, 0.3), (0.2, 1, 0.5)]:
        theirs = logits
        for warper in (TemperatureLogitsWarper(temperature), TopKLogitsWarper(top_k), TopPLogitsWarper(top_p)):
            theirs = warper(None, theirs)
        torch.testing.assert_close(filter_logits(logits, temperature, top_k, top_p).softmax(-1), theirs.softmax(-1))


# --- shapes, and the guide --------------------------------------------------------------------------------------------


def test_shapes_are_checked_here_and_nowhere_else():
    """The same file, loaded as a run loads it, has no check around its functions."""
    wrong = torch.zeros(2, 3, 5), torch.zeros(2, 3)  # targets must be whole numbers
    with pytest.raises(TypeCheckError):
        losses.cross_entropy(*wrong)
    with pytest.raises(TypeCheckError):
        losses.cross_entropy(wrong[0], torch.zeros(2, 4, dtype=torch.long))
    spec = importlib.util.spec_from_file_location("as_in_a_run", losses.__file__)
    plain = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plain)
    assert hasattr(losses.cross_entropy, "__wrapped__") and not hasattr(plain.cross_entropy, "__wrapped__")
    with pytest.raises(RuntimeError):  # torch's own complaint, from inside
        plain.cross_entropy(*wrong)


def references():
    """(path, name or "") of all code that docs/modules.md names, as `path` or `path::name`."""
    return sorted(set(re.findall(r"`((?:src|tests|docs|configs)/[\w/.]+)(?:::([\w:]+))?`", GUIDE.read_text())))


@pytest.mark.parametrize(("path", "name"), references())
def test_the_guide_names_what_is_there(path, name):
    assert (ROOT / path).is_file()
    for part in name.split("::") if name else []:
        assert re.search(rf"^ *(?:def|class) {part}\b", (ROOT / path).read_text(), re.M), part


def test_the_guide_leaves_no_module_and_no_test_out():
    named = references()
    assert len(named) > 40
    own = set(re.findall(r"^def (test_\w+)", Path(__file__).read_text(), re.M))
    assert own <= {name for path, name in named if path == "tests/test_modules.py"}
    parts = {name for path, name in named if path.startswith("src/")}
    wanted = {"RMSNorm", "Attention", "attention", "apply_rotary_emb", "SwiGLU", "MLPMixer1D", "cross_entropy", "AdamW"}
    assert wanted | {"filter_logits", "choose_token", "TinyBlock", "TRMModel"} <= parts
