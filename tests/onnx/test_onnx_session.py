"""A graph in place of a model: what loads, what is refused, and how rows are aligned for it."""

import json
import shutil
import sys

import jaxtyping
import numpy as np
import pytest
import torch
from starlette.testclient import TestClient

from src.checkpoint import save_checkpoint
from src.errors import UserError
from src.exits import ExitRule
from src.page.app import create_app
from src.page.config import ServeConfig
from src.page.service import open_service
from src.sampling import generate, generate_ids
from src.tokenizer import read_tokenizer

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from src.onnx.export import OnnxExport, export_onnx  # noqa: E402
from src.onnx.session import aligned, load_onnx, provider  # noqa: E402

BYTES = 259  # tokens of the byte tokenizer


@pytest.fixture(scope="module")
def exported(tiny, tmp_path_factory):
    """(model, export folder) of a plain transformer of one block."""
    folder = tmp_path_factory.mktemp("plain")
    model = tiny(vocab_size=BYTES, d_model=32, n_heads=2, n_layers=1, recursion="none", pad_token_id=1)
    save_checkpoint(folder / "checkpoint", model, read_tokenizer("byte").set_ends(add_bos=False, ends=[5]))
    jaxtyping.config.update("jaxtyping_disable", True)  # the tracer fails with the type checker
    export_onnx(OnnxExport(str(folder / "checkpoint"), str(folder / "onnx")))
    jaxtyping.config.update("jaxtyping_disable", False)
    return model, folder / "onnx"


@pytest.fixture
def copied(exported, tmp_path):
    """A copy of the export folder, which a test may change."""
    return shutil.copytree(exported[1], tmp_path / "onnx")


def tokens(rows=3, length=6):
    return torch.randint(0, BYTES, (rows, length), generator=torch.Generator().manual_seed(5))


def test_texts_begin_and_end_as_those_of_the_checkpoint(exported):
    tokenizer = load_onnx(exported[1])[1]
    assert (tokenizer.add_bos, tokenizer.end_ids) == (False, (258, 5))


def test_rows_go_to_the_left_edge():
    ids, mask = torch.arange(1, 16).view(3, 5), torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 1], [0] * 5])
    rows, lengths, first = aligned(ids, mask)
    assert rows.shape == (3, 3) and lengths.tolist() == [3, 1, 1] and first.tolist() == [2, 4, 4]
    assert rows[0].tolist() == [3, 4, 5] and rows[1, 0] == 10
    rows, lengths, first = aligned(ids, None)
    assert np.array_equal(rows, ids.numpy()) and lengths.tolist() == [5, 5, 5] and first.tolist() == [0, 0, 0]
    ended = torch.tensor([[0, 1, 1, 0, 0], [1] * 5, [1, 0, 0, 0, 0]])
    rows, lengths, first = aligned(ids, ended)
    assert lengths.tolist() == [2, 5, 1] and first.tolist() == [1, 0, 0] and rows[0, :2].tolist() == [2, 3]
    for wrong in ([1, 1, 0, 1, 1], [0, 1, 1, 2, 2]):
        with pytest.raises(ValueError, match="attention_mask must be 1 from the first real token"):
            aligned(ids, torch.tensor([wrong] * 3))


def test_it_samples_as_the_model_does(exported):
    model, folder = exported
    graph, _ = load_onnx(folder)
    ids, mask = tokens(), torch.tensor([[1] * 6, [0] * 5 + [1], [0, 0] + [1] * 4])
    for options in ({"seed": 1}, {"seed": 2, "top_k": 5}, {"seed": 3, "top_p": 0.5, "eos_id": 3, "temperature": 2.0}):
        wanted = model.generate(ids, 25, attention_mask=mask, **options)
        assert torch.equal(generate_ids(graph, ids, 25, attention_mask=mask, **options), wanted)
    with pytest.raises(ValueError, match="the prompt has 17 tokens, the context holds 16"):
        next(generate(graph, tokens(1, 17), 1))


@pytest.mark.parametrize("use_cache", [True, False])
def test_rows_end_one_by_one(exported, use_cache):
    """The remaining rows continue past the end of the context."""
    model, graph, ids = exported[0], load_onnx(exported[1])[0], tokens()
    options = {"attention_mask": torch.tensor([[1] * 6, [0] * 5 + [1], [0, 0] + [1] * 4]), "seed": 4}
    free = model.generate(ids, 25, **options)
    eos = next(token for token in free[0, 8:].tolist() if not (free[1:, 6:] == token).any())
    wanted = model.generate(ids, 25, eos_id=eos, **options)
    assert torch.equal(wanted[1:], free[1:]) and not torch.equal(wanted[0], free[0])  # the others never choose it
    assert torch.equal(generate_ids(graph, ids, 25, eos_id=eos, use_cache=use_cache, **options), wanted)


@torch.no_grad()
def test_a_row_that_has_ended_leaves_the_others_alone(exported):
    """Its further tokens are masked, and do not become part of its text."""
    model, folder = exported
    graph, ids = load_onnx(folder)[0], tokens()
    cache, real = graph.new_cache(3), torch.tensor([[1], [0], [1]])
    graph(ids[:, :3], cache=cache)
    for t in (3, 4):
        graph(ids[:, t : t + 1], attention_mask=real, cache=cache)
    logits = graph(ids[:, 5:], cache=cache).logits[:, 0]
    whole = model(ids).logits[:, -1]
    torch.testing.assert_close(logits[[0, 2]], whole[[0, 2]], atol=1e-4, rtol=0)
    gone = model(ids[1:2, [0, 1, 2, 5]]).logits[:, -1]
    torch.testing.assert_close(logits[1:2], gone, atol=1e-4, rtol=0)


def test_what_a_graph_cannot_do(exported):
    graph, ids = load_onnx(exported[1])[0], tokens()
    output = graph(ids, exit=ExitRule())
    assert output.logits.shape == (3, 6, BYTES) and output.carry.steps.tolist() == [[1] * 6] * 3
    with pytest.raises(UserError, match="the same depth for every token: --exit kl"):
        graph(ids, exit=ExitRule("kl"))
    with pytest.raises(UserError, match="max_recursion_depth 1: export it again"):
        graph(ids, exit=ExitRule(max_recursion_depth=2))
    with pytest.raises(UserError, match="only its last recursion step"):
        next(generate(graph, ids, 1, thoughts=[]))
    with pytest.raises(UserError, match="cannot be trained"):
        graph.train()
    assert graph.eval() is graph and graph.train(False) is graph and not graph.training
    with pytest.raises(ValueError, match="positions for 16 tokens, not for 17"):
        graph(tokens(1, 17))
    cache = graph.new_cache(3, 7)
    graph(ids[:, :5], cache=cache)
    with pytest.raises(ValueError, match="2 tokens per row after the first call"):
        graph(ids[:, :2], cache=cache)
    graph(ids[:, :1], cache=cache)
    graph(ids[:, :1], cache=cache)
    with pytest.raises(ValueError, match="the cache holds 7 columns, 7 are used and 1 more"):
        graph(ids[:, :1], cache=cache)


def test_graphs_that_are_broken(copied):
    """A graph without an output, one that returns NaN, and one whose cache does not match config.json."""
    import onnx

    path = copied / "model.onnx"
    whole = onnx.load(path)
    graph = onnx.ModelProto.FromString(whole.SerializeToString())
    graph.graph.output.remove(next(entry for entry in graph.graph.output if entry.name.startswith("present")))
    onnx.save(graph, path)
    with pytest.raises(UserError, match="model.onnx lacks present"):
        load_onnx(copied)
    graph = onnx.ModelProto.FromString(whole.SerializeToString())
    weights = next(
        w for w in graph.graph.initializer if w.raw_data and w.data_type == onnx.TensorProto.FLOAT and len(w.dims) > 1
    )
    weights.raw_data = np.full(len(weights.raw_data) // 4, np.nan, np.float32).tobytes()
    onnx.save(graph, path)
    with pytest.raises(UserError, match="model.onnx returns NaN or infinity"):
        generate_ids(load_onnx(copied)[0], tokens(1), 2)
    onnx.save(whole, path)
    config = json.loads((copied / "config.json").read_text())
    config["model"]["n_kv_heads"] = 1
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="model.onnx: past.* does not fit config.json"):
        load_onnx(copied)


def test_folders_that_cannot_be_loaded(copied, exported, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"not an ONNX export \(no onnx.json\)"):
        load_onnx(tmp_path / "empty")
    with pytest.raises(UserError, match="no CUDA provider: pip install onnxruntime-gpu"):
        load_onnx(copied, "cuda:1")
    with pytest.raises(UserError, match="--device mps: with ONNX Runtime it must be cpu or cuda"):
        provider("mps")
    graph = copied / "model.onnx"
    whole = graph.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"hello"):
        graph.write_bytes(broken)
        with pytest.raises(UserError, match="model.onnx is broken or cut short"):
            load_onnx(copied)
    graph.unlink()
    with pytest.raises(UserError, match=r"not an ONNX export \(no model.onnx\)"):
        load_onnx(copied)
    graph.write_bytes(whole)
    config = json.loads((copied / "config.json").read_text())
    config["model"]["vocab_size"] = BYTES + 1
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"tokenizer has {BYTES} tokens, config.json {BYTES + 1}, the graph {BYTES}"):
        load_onnx(copied)
    for broken in ("{", "[]", '{"opset": 20}'):
        (copied / "onnx.json").write_text(broken)
        with pytest.raises(UserError, match="onnx.json (is broken|holds no|is not a JSON object)"):
            load_onnx(copied)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match="onnxruntime is not installed: pip install"):
        load_onnx(exported[1])


def test_a_graph_writes_rows_that_join_and_leave(exported, monkeypatch):
    """In serve.py's engine, texts are those of the checkpoint alone; rules that a graph cannot follow are refused."""
    model, folder = exported
    service = open_service(ServeConfig(onnx=str(folder), puzzle="none", max_rows=3))
    with TestClient(create_app(service), "http://127.0.0.1") as client:
        body = {"prompt": [row[: 2 + n].tolist() for n, row in enumerate(tokens(5, 9))], "seed": 4, "recursion": {}}
        body |= {"max_tokens": 25, "ignore_eos": True, "logprobs": 0, "echo": True}
        choices = client.post("/v1/completions", json=body).json()["choices"]
        for ids, choice in zip(body["prompt"], choices, strict=True):
            wanted = model.generate(torch.tensor([ids]), 25, seed=4)[0, len(ids) :].tolist()
            assert [token["id"] for token in choice["recursion"]["tokens"]] == wanted
            logprobs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            expected = logprobs.gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)
            found = choice["logprobs"]["token_logprobs"][1 : len(ids)]
            np.testing.assert_allclose(found, expected.detach(), atol=1e-3)
        card = client.get("/v1/model_card").json()
        assert card["backend"] == "onnx" and card["exits"] == [] and card["max_depth"] == card["depth"] == 1
        assert card["parameters"] == sum(p.numel() for p in model.parameters())
        error = client.post("/v1/completions", json={"prompt": "a", "recursion": {"trace": 1}}).json()["error"]
        assert error["message"].startswith("recursion: an ONNX graph returns only its last") and error["code"]
    monkeypatch.setitem(service.model.facts, "cache", False)
    monkeypatch.setattr("src.onnx.session.load_onnx", lambda *words: (service.model, service.tokenizer))
    with pytest.raises(UserError, match="was exported without a key/value cache: export it again"):
        open_service(ServeConfig(onnx=str(folder), puzzle="none"))
