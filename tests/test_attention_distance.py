"""The experiment that shows at which distance attention heads look."""

import json
from dataclasses import replace

import pytest
import torch

from experiments.attention_distance import (
    SHOWN,
    DistanceConfig,
    layer_names,
    length_of_mean,
    main,
    parse_args,
    read_windows,
    uniform,
    weights_by_distance,
)
from src.checkpoint import RELEASED
from src.errors import UserError
from src.tokenizer import read_tokenizer

IDS = torch.arange(64).view(2, 32) % 23


def without_scores(model):
    """The model with queries and keys of 0: each head gives all tokens that it sees the same weight."""
    for block in model.net.blocks:
        H, K, E = block.attn.n_heads, block.attn.n_kv_heads, block.attn.head_dim
        block.attn.qkv.weight.data[: (H + K) * E] = 0
    return model


@pytest.mark.parametrize("kv_heads", [4, 1])
def test_equal_scores_have_the_uniform_weight_at_every_distance(tiny, kv_heads):
    model = without_scores(tiny(recursion="loop", deep_steps=3, n_kv_heads=kv_heads, max_seq_len=32))
    weights = weights_by_distance(model, IDS)
    assert weights.shape == (len(layer_names(model.config)), 4, SHOWN) == (6, 4, SHOWN)
    expected = sum(1 / seen for seen in range(17, 33)) / 16
    torch.testing.assert_close(weights, torch.full_like(weights, expected))
    assert uniform(32) == pytest.approx(expected)


def test_a_window_ends_the_distances(tiny):
    model = without_scores(tiny(recursion="none", attention_window=4, max_seq_len=32))
    weights = weights_by_distance(model, IDS)
    torch.testing.assert_close(weights[..., :4], torch.full((2, 4, 4), 0.25))
    assert not weights[..., 4:].any()


def test_a_head_that_looks_at_the_token_before(tiny):
    """If all tokens have the same query and the same key, the rotary turn alone decides: in the channels 0 and 8 it is
    one radian per token, so for a query that is turned back by one, the score at distance d is 25 cos(d - 1)."""
    model = tiny(recursion="none", n_layers=1, n_heads=1, d_model=16, norm="pre", max_seq_len=32)
    model.embed.weight.data[:] = model.embed.weight[0]
    attn = model.net.blocks[0].attn
    attn.qkv.weight.data[:32] = 0
    h = model.net.blocks[0].attn_norm(model.embed.weight[:1])[0]
    turn = torch.zeros(16)
    turn[0], turn[8] = torch.tensor(1.0).cos(), -torch.tensor(1.0).sin()
    attn.qkv.weight.data[:16] = 100 * turn[:, None] * h / h.square().sum()
    attn.qkv.weight.data[16:32] = torch.eye(16)[0][:, None] * h / h.square().sum()
    scores = 25 * (torch.arange(32) - 1.0).cos()
    expected = torch.stack([scores[: query + 1].softmax(0)[:SHOWN] for query in range(16, 32)]).mean(0)
    torch.testing.assert_close(weights_by_distance(model, IDS)[0, 0], expected, rtol=1e-3, atol=1e-6)
    assert expected.argmax() == 1


def test_layers_are_named_in_the_order_in_which_they_run(tiny):
    config = tiny(latent_steps=1, deep_steps=1, supervision_steps=2, prelude_layers=1, coda_layers=1, n_layers=1).config
    names = layer_names(config)
    assert names == ["prelude 1", *(f"visit {i}, layer 1" for i in range(1, 5)), "coda 1"]
    assert layer_names(tiny(recursion="none").config) == ["layer 1", "layer 2"]


def test_length_of_the_mean():
    table = torch.tensor([[1.0, 5.0], [1.0, 3.0]])  # mean (1, 4), deviations (0, 1) and (0, -1)
    assert length_of_mean(table) == pytest.approx(17**0.5)


def test_windows_are_the_starts_of_documents(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in ("short", "x" * 90, "y" * 80))
    )
    tokenizer, config = read_tokenizer(str(RELEASED)), DistanceConfig(["a"], [str(tmp_path / "a.jsonl")])
    expected = [tokenizer.encode(text)[:32] for text in ("x" * 90, "y" * 80)]
    assert read_windows(tokenizer, config, 32).tolist() == expected
    assert read_windows(tokenizer, replace(config, windows=1), 32).tolist() == expected[:1]
    with pytest.raises(UserError, match="no document has 256 tokens"):
        read_windows(tokenizer, config, 256)


def test_table_and_picture(tmp_path, capsys):
    text, picture = tmp_path / "a.txt", tmp_path / "a.png"
    text.write_text("def main():\n    return 0\n" * 400)
    main([str(RELEASED), "--paths", str(text), "--window", "32", "--names", "first", "--output", str(picture)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("first: the mean of the embeddings is 0.") and "visit 1, layer 1" in lines[1]
    assert lines[-1] == f"the same weight for every token would be {uniform(32):.3f}"
    assert picture.stat().st_size > 5000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "checkpoints is empty"),
        (["a", "--window", "16"], "at least 1 and 32"),
        (["a", "--names", "x", "y"], "2 names for 1"),
        (["a", "--output", "a.pdf"], "ends in .png"),
    ],
)
def test_wrong_flags(words, message):
    with pytest.raises(UserError, match=message):
        parse_args(words)


def test_a_window_longer_than_the_context():
    with pytest.raises(UserError, match="windows need 32 to 256 tokens"):
        main([str(RELEASED), "--window", "257"])
