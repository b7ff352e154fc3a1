"""The released checkpoint writes one greedy text in whatever way it is run: 200 tokens, past the end of its context."""

import pytest
import torch

from src.checkpoint import RELEASED, load_model
from src.onnx.export import OnnxExport, export_onnx
from src.onnx.session import load_onnx
from src.sampling import generate_ids

pytest.importorskip("onnxruntime")


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")  # torch.export traces with symbolic sizes, which cannot be checked
def test_one_text_in_five_ways(tmp_path):
    model, tokenizer = load_model(RELEASED)
    prompt = tokenizer.encode("class Reader:\n" * 16 + "    def ", bos=True)

    def text(model, ids=None, **options):
        ids = torch.tensor([prompt]) if ids is None else ids
        return generate_ids(model, ids, 200, temperature=0, **options)[:, -200:]

    golden = text(model, use_cache=False)
    assert len(prompt) + 200 > model.config.max_seq_len and len(golden.unique()) > 10
    assert torch.equal(text(model), golden)
    others = torch.tensor([[tokenizer.pad_id] * n + prompt[: len(prompt) - n] for n in (0, 3, 9, 20)])
    mask = torch.tensor([[0] * n + [1] * (len(prompt) - n) for n in (0, 3, 9, 20)])
    assert torch.equal(text(model, others, attention_mask=mask)[:1], golden)
    for cache in (True, False):
        folder = tmp_path / str(cache)
        export_onnx(OnnxExport(str(RELEASED), output=str(folder), enable_kv_cache=cache))
        assert torch.equal(text(load_onnx(folder)[0]), golden), cache
