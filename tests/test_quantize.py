"""Tests of int8 weights: their error against fp32, and the properties that they must keep."""

import pytest
import torch
from test_cache import CASES, LEFT_PADDED, name, prompt

import generate
from src.checkpoint import save_checkpoint
from src.quantize import Int8Linear, quantize
from src.sampling import generate_ids
from src.tokenizer import ByteLevelTokenizer


def weights_of(layer):
    return layer.weight.float() * layer.scale.float()[:, None]


@pytest.mark.parametrize("bias", [False, True])
def test_weights_are_within_half_a_level_and_the_product_is_theirs(bias):
    linear = torch.nn.Linear(48, 20, bias=bias)
    with torch.no_grad():
        linear.weight *= torch.logspace(-6, 3, 20)[:, None]  # each channel has a scale of its own
        linear.weight[3] = 0
    layer = Int8Linear(linear)
    error = (weights_of(layer) - linear.weight).abs().amax(dim=1)
    assert layer.weight.dtype == torch.int8 and (error <= layer.scale.float() / 2 * 1.0001).all()
    largest = linear.weight.abs().amax(dim=1)
    torch.testing.assert_close(layer.scale.float() * 127, largest, rtol=2**-8, atol=1e-25)  # the scale is a bf16
    x = torch.randn(2, 3, 48)
    exact = x @ weights_of(layer).T + (linear.bias if bias else 0)
    size = x.norm(dim=-1, keepdim=True) * weights_of(layer).norm(dim=1) + exact.abs()
    assert layer(x).shape == (2, 3, 20) and layer(x).dtype == torch.float32
    assert ((layer(x) - exact).abs() <= 2**-8 * size).all()  # activations and result are rounded to bf16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [172, 44, 20, 16, 17, 1])
def test_any_width_and_number_of_rows_is_fp32_within_rounding(width, dtype):
    for outputs in (1, 3, 4, 257):
        linear = torch.nn.Linear(width, outputs)
        layer = Int8Linear(linear)
        for rows in (0, 1, 4, 12, 16, 20):
            x = torch.randn(rows, width).to(dtype)
            exact, size = linear(x.float()), x.float().abs() @ linear.weight.abs().T
            # half a level for each weight; 2^-9 of its value for each bf16 input, and for the result: with and without
            # the bias, if that is bf16, too
            bound = x.float().abs().sum(-1, keepdim=True) * layer.scale.float() / 2 * (1 + 2**-8)
            bound += 2**-9 * (size + 2 * (size + linear.bias.abs())) * (1 + 2**-7)
            y = layer(x)
            assert y.shape == (rows, outputs) and y.dtype == dtype
            assert ((y.float() - exact).abs() <= bound).all()


def test_inputs_that_are_parts_of_others():
    """The kernel wants aligned rows, one after the other: a slice, a transposed and a repeated tensor are none."""
    layer = Int8Linear(torch.nn.Linear(32, 5, bias=False))
    wide = torch.randn(4, 100).bfloat16()
    for x in (wide[:1, 3:35], wide[:, 1:33], torch.randn(32, 6).bfloat16().t(), wide[:1, :32].expand(7, 32)):
        assert torch.equal(layer(x), layer(x.clone(memory_format=torch.contiguous_format)))


def test_a_row_does_not_depend_on_the_rows_beside_it():
    layer, x = Int8Linear(torch.nn.Linear(64, 40, bias=False)), torch.randn(21, 64)
    x[5] *= 1000  # under one scale for all rows the others would lose their digits
    assert torch.equal(torch.cat([layer(row[None]) for row in x]), layer(x))


@pytest.mark.parametrize("case", CASES, ids=name)
def test_logits_stay_near_and_the_cache_changes_nothing(tiny, case):
    model, ids = tiny(**case), prompt()
    before = model(ids, attention_mask=LEFT_PADDED).logits
    logits = quantize(model)(ids, attention_mask=LEFT_PADDED).logits
    real = LEFT_PADDED.bool()
    assert 0 < (logits - before)[real].norm() < 0.1 * before[real].norm()  # tiny layers: few weights to average over
    cache = model.new_cache(len(ids))
    parts = [model(ids[:, :4], attention_mask=LEFT_PADDED[:, :4], cache=cache).logits]
    for t in range(4, ids.shape[1]):
        with torch.inference_mode():
            parts.append(model(ids[:, t : t + 1], attention_mask=LEFT_PADDED[:, t : t + 1], cache=cache).logits)
    cached = torch.cat(parts, dim=1)
    assert (cached - logits)[real].norm() < 0.02 * logits[real].norm()  # sums in another order are other bf16 numbers


@pytest.mark.parametrize("case", CASES[:3], ids=name)
def test_greedy_text_with_the_cache_is_that_without(tiny, case):
    model, ids = quantize(tiny(**case)), prompt()[:, :4]
    with_cache, without = (generate_ids(model, ids, 8, temperature=0, use_cache=cache) for cache in (True, False))
    assert torch.equal(with_cache, without)


def test_what_is_replaced_and_what_stays(tiny):
    model = tiny(recursion="trm", injection="concat", gate=True, tie_embeddings=True, prelude_layers=1, coda_layers=1)
    embedding = model.embed.weight.detach().clone()
    quantize(model)
    left = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    assert left == ["q_head"] and torch.equal(model.embed.weight, embedding)
    assert isinstance(model.net.inject_z, Int8Linear) and isinstance(model.net.gate, Int8Linear)
    torch.testing.assert_close(weights_of(model.head), embedding, atol=embedding.abs().max().item() / 200, rtol=0)


def test_training_is_refused(tiny):
    model = quantize(tiny(recursion="loop"))
    with pytest.raises(ValueError, match="cannot be trained"):
        model.train()
    targets = prompt()
    with pytest.raises(RuntimeError, match="does not require grad"):
        model.eval()(prompt(), targets).loss.backward()


def test_generate_with_the_widths_of_a_llama2c_model(tiny, tmp_path, capsys):
    """d_ff of stories260K is 172; a prompt of 12 tokens and single ones."""
    tokenizer = ByteLevelTokenizer()
    sizes = {"d_model": 64, "n_heads": 8, "n_kv_heads": 4, "d_ff": 172, "max_seq_len": 32}
    model = tiny(recursion="none", norm="pre", vocab_size=tokenizer.vocab_size, **sizes)
    save_checkpoint(tmp_path / "model", model, tokenizer)
    ids = torch.tensor([tokenizer.encode("Once upon a", bos=True)])
    exact = model(ids).logits
    error = (quantize(model)(ids).logits - exact).norm() / exact.norm()
    assert ids.shape == (1, 12) and error < 0.05  # 1/127 a weight, some more in each of four products
    words = ["--prompt", "Once upon a", "--max_new_tokens", "8", "--temperature", "0", "--precision", "int8"]
    generate.main([str(tmp_path / "model"), *words])
    written = generate_ids(model, ids, 8, temperature=0, use_cache=False)[0].tolist()
    assert capsys.readouterr().out.removesuffix("\n") == tokenizer.decode(written)
