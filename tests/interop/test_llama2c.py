"""llama2.c's files: its published text and bytes, its forward pass written from the equations, and refusals."""

import os
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from src.checkpoint import load_model, own_state
from src.errors import UserError
from src.interop.formats import read_source, write
from src.interop.llama import adjacent_from_halves, halves_from_adjacent, plain_config
from src.interop.llama2c import is_bin, read_bin, read_pt, rotary_tables, write_bin
from src.model import TRMModel
from src.sampling import generate_ids

STORIES = Path(__file__).parents[3] / "shared" / "data" / "stories260K"
SAID = """Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she \
saw a big, red ball. She wanted to play with it, but it was too high.
Lily's mom said, "Lily, let's go to the park." Lily was sad and didn't know what to do. She said, "I want to play with \
your ball, but I can't find it.\""""
DIM, HIDDEN, LAYERS, HEADS, KV, VOCAB, CONTEXT = 16, 20, 2, 4, 2, 259, 12
ARGS = {"dim": DIM, "n_layers": LAYERS, "n_heads": HEADS, "n_kv_heads": KV, "vocab_size": VOCAB, "multiple_of": 4}
ARGS |= {"max_seq_len": CONTEXT, "dropout": 0.0}
BLOCK = {"attention_norm": (DIM,), "attention.wq": (DIM, DIM), "attention.wk": (8, DIM), "attention.wv": (8, DIM)}
BLOCK |= {"attention.wo": (DIM, DIM), "ffn_norm": (DIM,), "feed_forward.w1": (HIDDEN, DIM)}
BLOCK |= {"feed_forward.w2": (DIM, HIDDEN), "feed_forward.w3": (HIDDEN, DIM)}  # in the order of the .bin


def weights(tied):
    """Returns a llama2.c state dict of random weights."""
    shapes = {"tok_embeddings": (VOCAB, DIM), "norm": (DIM,)}
    shapes |= {f"layers.{i}.{name}": shape for i in range(LAYERS) for name, shape in BLOCK.items()}
    w = {f"{n}.weight": torch.rand(s) + 0.5 if len(s) == 1 else torch.randn(s) / s[1] ** 0.5 for n, s in shapes.items()}
    return w | {"output.weight": w["tok_embeddings.weight"] if tied else torch.randn(VOCAB, DIM) / 4}


def llama2c_logits(w, ids):
    """The forward pass of run.c, token by token in float64. Pairs of adjacent channels are complex numbers."""
    w, E = {name: tensor.double() for name, tensor in w.items()}, DIM // HEADS
    frequency = 10000.0 ** (-torch.arange(0, E, 2, dtype=torch.float64) / E)
    keys, values, logits = [[] for _ in range(LAYERS)], [[] for _ in range(LAYERS)], []

    def norm(x, name):
        return x / (x.square().mean() + 1e-5).sqrt() * w[name]

    def rotate(x, position):
        turn = torch.polar(torch.ones(E // 2, dtype=torch.float64), position * frequency)
        return torch.view_as_real(torch.view_as_complex(x.view(-1, E // 2, 2)) * turn).flatten(1)

    for position, token in enumerate(ids):
        x = w["tok_embeddings.weight"][token]
        for i in range(LAYERS):
            p = f"layers.{i}."
            h = norm(x, f"{p}attention_norm.weight")
            q = rotate(w[f"{p}attention.wq.weight"] @ h, position)
            keys[i].append(rotate(w[f"{p}attention.wk.weight"] @ h, position))
            values[i].append((w[f"{p}attention.wv.weight"] @ h).view(KV, E))
            heads = []
            for head in range(HEADS):
                k, v = (torch.stack([t[head // (HEADS // KV)] for t in past[i]]) for past in (keys, values))
                heads.append((k @ q[head] / E**0.5).softmax(0) @ v)
            x = x + w[f"{p}attention.wo.weight"] @ torch.cat(heads)
            h = norm(x, f"{p}ffn_norm.weight")
            gate, up = (w[f"{p}feed_forward.{n}.weight"] @ h for n in ("w1", "w3"))
            x = x + w[f"{p}feed_forward.w2.weight"] @ (gate * torch.sigmoid(gate) * up)
        logits.append(w["output.weight"] @ norm(x, "norm.weight"))
    return torch.stack(logits)


def save_pt(path, w, prefix="_orig_mod.", **more):
    model = {prefix + name: tensor for name, tensor in w.items()}
    torch.save({"model": model, "model_args": ARGS, "iter_num": 7, "best_val_loss": torch.tensor(1.5)} | more, path)


def save_bin(path, w, tied):
    """Writes a legacy .bin from the description of the format."""
    table = torch.zeros(2, CONTEXT, DIM // HEADS // 2)
    blocks = [w[f"layers.{i}.{name}.weight"] for name in BLOCK for i in range(LAYERS)]
    parts = [w["tok_embeddings.weight"], *blocks, w["norm.weight"], table] + [w["output.weight"]] * (not tied)
    header = struct.pack("<7i", DIM, HIDDEN, LAYERS, HEADS, KV, VOCAB if tied else -VOCAB, CONTEXT)
    path.write_bytes(header + b"".join(part.contiguous().numpy().tobytes() for part in parts))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["pt", "bin"])
def test_the_logits_are_llama2cs(tmp_path, kind, tied):
    w, path = weights(tied), tmp_path / f"model.{kind}"
    save_pt(path, w) if kind == "pt" else save_bin(path, w, tied)
    write(read_source(path, "byte"), tmp_path / "ours")
    model, ids = load_model(tmp_path / "ours")[0], [3, 200, 7, 7, 258, 0, 64, 1]
    assert model.config.tie_embeddings == tied
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    expected = llama2c_logits(w, ids)
    assert expected.std() > 0.3
    assert (logits - expected).abs().max() < 1e-4  # fp32 against float64


def test_figures_of_a_pt(tmp_path):
    save_pt(tmp_path / "m.pt", weights(True))
    config, _, info = read_pt(tmp_path / "m.pt")
    assert info == {"step": 7, "best_valid_loss": 1.5}
    assert (config.d_ff, config.norm_eps, config.max_seq_len, config.n_kv_heads) == (HIDDEN, 1e-5, CONTEXT, KV)


sizes = st.fixed_dictionaries(
    {"groups": st.integers(1, 3), "n_kv_heads": st.integers(1, 3), "half": st.integers(1, 4),
     "n_layers": st.integers(1, 3), "d_ff": st.integers(1, 9), "vocab_size": st.integers(1, 9),
     "max_seq_len": st.integers(1, 9), "tie_embeddings": st.booleans()}
)  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(sizes)
def test_a_round_trip_loses_nothing(tmp_path_factory, sizes):
    n_heads = sizes.pop("groups") * sizes["n_kv_heads"]
    config = plain_config("test", n_heads=n_heads, d_model=2 * sizes.pop("half") * n_heads, **sizes)
    own, path = own_state(TRMModel(config)), tmp_path_factory.mktemp("bin") / "model.bin"
    write_bin(path, config, own, "test")
    assert is_bin(path.read_bytes()[:28])
    read, weights, _ = read_bin(path)
    assert read == config and weights.keys() == own.keys()
    assert all(torch.equal(tensor, own[name]) for name, tensor in weights.items())


def test_rows_change_places():
    rows = torch.arange(12.0)[:, None]
    halves = halves_from_adjacent(rows, 2)  # two heads of six channels
    assert halves.flatten().tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    assert torch.equal(adjacent_from_halves(halves, 2), rows)


class TestRefused:
    @pytest.fixture
    def bin(self, tmp_path):
        save_bin(tmp_path / "model.bin", weights(True), True)
        return tmp_path / "model.bin"

    @pytest.mark.parametrize("change", [lambda b: b[:-1], lambda b: b[:40], lambda b: b + b"\0" * 4, lambda b: b[:28]])
    def test_a_bin_of_another_length(self, bin, change):
        bin.write_bytes(change(bin.read_bytes()))
        with pytest.raises(UserError, match=r"has \d+ bytes, but its header requires \d+"):
            read_bin(bin)

    def test_a_later_version(self, bin):
        bin.write_bytes(struct.pack("<Ii", 0x616B3432, 1) + bytes(300))
        assert is_bin(bin.read_bytes()[:28])
        with pytest.raises(UserError, match="later .bin version"):
            read_bin(bin)

    def test_an_odd_head(self, tmp_path):
        (tmp_path / "odd.bin").write_bytes(struct.pack("<7i", 3, 4, 1, 1, 1, 5, 6) + bytes(400))
        with pytest.raises(UserError, match="head size 3 is odd"):
            read_bin(tmp_path / "odd.bin")

    def test_headers_that_are_none(self):
        good = (DIM, HIDDEN, LAYERS, HEADS, KV, VOCAB, CONTEXT)
        assert is_bin(struct.pack("<7i", *good))
        for at, wrong in ((0, 15), (1, 0), (3, 3), (4, 3), (6, 2**30), (2, -1)):
            assert not is_bin(struct.pack("<7i", *good[:at], wrong, *good[at + 1 :]))
        assert not is_bin(b"too short")

    def test_code_in_a_pt(self, tmp_path):
        class Evil:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "owned"),)

        save_pt(tmp_path / "m.pt", weights(True), config=Evil())
        with pytest.raises(UserError, match="more than tensors and numbers"):
            read_pt(tmp_path / "m.pt")
        assert not (tmp_path / "owned").exists()

    def test_a_pt_of_something_else(self, tmp_path):
        torch.save({"model": {}}, tmp_path / "m.pt")
        with pytest.raises(UserError, match="not a llama2.c checkpoint"):
            read_pt(tmp_path / "m.pt")
        save_pt(tmp_path / "m.pt", weights(True), model_args=ARGS | {"n_layers": 3})
        with pytest.raises(UserError, match="lacks layers.2"):
            read_pt(tmp_path / "m.pt")

    @pytest.mark.parametrize(
        ("more", "said"),
        [
            ({"iter_num": "x"}, "m.pt: its step is 'x': it should be a finite number"),
            ({"best_val_loss": torch.tensor(torch.nan)}, "m.pt: its best_valid_loss is nan"),
            ({"model_args": ARGS | {"n_layers": 2**31}}, "m.pt, model_args: n_layers is 2147483648: set it to 10,000"),
            ({"model_args": ARGS | {"n_heads": "4"}}, "m.pt, model_args: n_heads is '4': give it a whole number"),
        ],
    )
    def test_a_pt_of_other_values(self, tmp_path, more, said):
        save_pt(tmp_path / "m.pt", weights(True), **more)
        with pytest.raises(UserError, match=said):
            read_pt(tmp_path / "m.pt")

    @pytest.mark.parametrize("broken", [None, torch.ones(2, 2).to_sparse(), torch.ones(2, device="meta"), 3])
    def test_a_pt_of_no_tensors(self, tmp_path, broken):
        save_pt(tmp_path / "m.pt", weights(True) | {"norm.weight": broken})
        with pytest.raises(UserError, match="m.pt: norm.weight is not a dense tensor"):
            read_pt(tmp_path / "m.pt")

    def test_not_finite(self, bin, tmp_path):
        data = bytearray(bin.read_bytes())
        data[28:32] = struct.pack("<f", float("inf"))
        bin.write_bytes(data)
        with pytest.raises(UserError, match="tok_embeddings.weight holds NaN, infinity"):
            read_bin(bin)

    def test_layers_of_a_bin_beyond_bounds(self, bin):
        data = bytearray(bin.read_bytes())
        struct.pack_into("<i", data, 8, 2**23)
        bin.write_bytes(data)
        with pytest.raises(UserError, match="n_layers is 8388608: set it to 10,000 or less"):
            read_bin(bin)

    def test_a_pt_cut_short(self, tmp_path):
        save_pt(tmp_path / "m.pt", weights(True))
        (tmp_path / "m.pt").write_bytes((tmp_path / "m.pt").read_bytes()[:3000])
        with pytest.raises(UserError, match="m.pt is not a llama2.c checkpoint, or it is broken"):
            read_pt(tmp_path / "m.pt")

    @pytest.mark.parametrize("settings", [{"rope_theta": 5e5}, {"norm_eps": 1e-6}, {"rope_scaling": 2.0}])
    def test_what_a_bin_cannot_hold(self, tiny, tmp_path, settings):
        model = tiny(recursion="none", norm="pre", **settings)
        with pytest.raises(UserError, match=f"{next(iter(settings))} is .*--to hf"):
            write_bin(tmp_path / "m.bin", model.config, own_state(model), "m")
        assert not (tmp_path / "m.bin").exists()


@pytest.mark.skipif(not STORIES.exists(), reason="../shared/data/stories260K is not here")
class TestStories260K:
    @pytest.fixture
    def folder(self, tmp_path):
        write(read_source(STORIES / "stories260K.bin", STORIES / "tok512.bin"), tmp_path / "260K")
        return tmp_path / "260K"

    def test_says_greedily_what_its_documentation_says(self, folder, unchecked):
        model, tokenizer = load_model(folder)
        ids = generate_ids(model, torch.tensor([[tokenizer.bos_id]]), 135, temperature=0)
        assert tokenizer.decode(ids[0].tolist()).strip().startswith(SAID)

    def test_written_again_the_weights_are_the_same_bytes(self, folder, tmp_path):
        write(read_source(folder), tmp_path / "again.bin", "llama2c")
        again, original = (tmp_path / "again.bin").read_bytes(), (STORIES / "stories260K.bin").read_bytes()
        tables = 4 * sum(
            table.numel() for table in rotary_tables(read_source(folder).config)
        )  # they are at the end, because the head is tied
        assert len(again) == len(original) and again[:-tables] == original[:-tables]
        of_rounding = torch.frombuffer(
            bytearray(original[-tables:]), dtype=torch.float32
        )  # cosines differ between CPUs
        assert torch.allclose(torch.frombuffer(bytearray(again[-tables:]), dtype=torch.float32), of_rounding, atol=1e-6)
