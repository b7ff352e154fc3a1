"""An export folder on its own: no paths of this machine, names and doc strings in the graph, a runnable example."""

import json
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
from conftest import build

import generate
from src.checkpoint import load_model, save_checkpoint
from src.data.tokenizer_training import train_sentencepiece, train_tokenizer
from src.errors import UserError
from src.onnx import export as onnx_export
from src.onnx.session import load_onnx
from src.tokenizer import TokenizerWrapper, read_tokenizer

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnx.reference")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["the cat sat on the mat and the dog ate the hat\n" * 8, "京都は日本の都市である。\n人口は百四十万人。\n" * 8]
PATHS = [str(ROOT), str(Path.home()) + "/", sys.prefix, sysconfig.get_path("purelib"), "/src/", ".py", "site-packages"]
WORDS = {"batch", "length", "reads", "room"}  # names of the dynamic dimensions


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "t.txt").write_text("".join(TEXTS), encoding="utf-8")
    made = {kind: train_tokenizer(folder / "t.txt", 290, folder / kind, model_type=kind) for kind in ("bpe", "unigram")}
    made |= {"byte": read_tokenizer("byte"), "sp": train_sentencepiece(TEXTS, folder / "sp", vocab_size=340)}
    model = ModelProto.FromString((folder / "sp.model").read_bytes())
    model.normalizer_spec.add_dummy_prefix = True  # a space before every text, as in Llama's tokenizer
    return made | {"sp with prefix": TokenizerWrapper(model.SerializeToString())}


@torch.no_grad()
def silence(model, tokenizer):
    """Makes a random model never choose special tokens or parts of characters, which decoders print differently."""
    special = {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id}
    for index in range(tokenizer.vocab_size):
        if index in special or "\ufffd" in tokenizer.id_to_bytes(index).decode(errors="replace"):
            model.head.weight[index] = 0


@pytest.fixture(scope="module")
def export(tokenizers, tmp_path_factory):
    """A cached function: export(kind of tokenizer, **settings of the export) -> (checkpoint, export folder, facts)."""
    made = {}

    def export(kind, **settings):
        key = kind, *sorted(map(str, settings.items()))
        if key not in made:
            made[key] = make(kind, **settings)
        return made[key]

    def make(kind, info=None, recursion="loop", **settings):
        folder, tokenizer = tmp_path_factory.mktemp("export"), tokenizers[kind]
        sizes = {"d_model": 32, "n_heads": 2, "n_layers": 1, "max_seq_len": 24}
        model = build(vocab_size=tokenizer.vocab_size, recursion=recursion, deep_steps=2, n_kv_heads=1, **sizes)
        silence(model, tokenizer)
        save_checkpoint(folder / "checkpoint", model, tokenizer, info=info)
        jaxtyping.config.update("jaxtyping_disable", True)  # the tracer fails with the type checker
        try:
            settings = onnx_export.OnnxExport(str(folder / "checkpoint"), str(folder / "graph"), **settings)
            return folder / "checkpoint", folder / "graph", onnx_export.export_onnx(settings)
        finally:
            jaxtyping.config.update("jaxtyping_disable", False)

    return export


def run_example(folder, elsewhere, prompt, most):
    """Returns what the example in a folder's README prints, run there by a process that cannot import this project."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.S)
    assert "src" not in code and "torch" not in code
    assert len([line for line in code.splitlines() if line]) <= 28
    (elsewhere / "example.py").write_text(code, encoding="utf-8")
    words = [sys.executable, "-I", elsewhere / "example.py", prompt, str(most)]
    done = subprocess.run(words, cwd=folder, capture_output=True, timeout=100)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()  # not text=True, which would change line ends


def written(capfd, source, prompt, most):
    """Returns what generate.py prints."""
    capfd.readouterr()
    generate.main([*source, "--prompt", prompt, "--temperature", "0", "--max_new_tokens", str(most)])
    return capfd.readouterr().out


SHOWN = {  # one of each: kind of tokenizer, cache, operators, precision
    "sp with prefix": {},
    "byte": {"enable_kv_cache": False, "contrib_ops": False, "recursion": "none"},
    "bpe": {"contrib_ops": False, "quantize": "int8", "recursion": "none"},
}
EVERY = [
    pytest.param(kind, {"enable_kv_cache": cache, "contrib_ops": contrib}, marks=pytest.mark.slow)
    for kind in ("sp", "sp with prefix", "byte", "bpe", "unigram")
    for cache in (True, False)
    for contrib in (True, False)
]


@pytest.mark.parametrize("kind, settings", [*SHOWN.items(), *EVERY])
def test_the_readmes_example_writes_what_generate_py_writes(export, tmp_path, capfd, kind, settings):
    """50 tokens in a context of 24, compared with the checkpoint, or with the graph if its weights are rounded."""
    checkpoint, folder, facts = export(kind, **settings)
    source = [str(checkpoint)] if facts["precision"] == "fp32" else ["--onnx", str(folder)]
    for prompt in ("the cat", "京都は"):
        text = run_example(folder, tmp_path, prompt, 50)
        assert text == written(capfd, source, prompt, 50) and len(text) > len(prompt) + 20


def test_the_example_stops_where_a_text_ends(export, tmp_path):
    checkpoint, folder, facts = export("byte", **SHOWN["byte"])
    assert (facts["end_ids"], facts["bos_id"], facts["add_bos"]) == ([258], 257, True)
    model, tokenizer = load_model(checkpoint)
    ids = model.generate(torch.tensor([[257, *b"the cat"]]), 9, temperature=0)[0, 8:].tolist()
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "onnx.json").write_text(json.dumps(facts | {"end_ids": [258, ids[4]]}))
    until = tokenizer.decode(ids[: ids.index(ids[4])])
    assert run_example(copy, tmp_path, "the cat", 9) == f"the cat{until}\n"


def test_no_file_tells_of_the_machine(export, tmp_path, monkeypatch):
    """Covers graphs in one file, with the weights in a second file, and in int8."""
    monkeypatch.setattr(onnx_export, "ONE_FILE", 0)
    large = export("byte", info={"license": "mit"}, recursion="none", quantize="int8")
    monkeypatch.undo()
    assert {"model.onnx", "model.onnx.data"} < set(large[2]["files"])
    for _, folder, facts in (large, *(export(kind, **settings) for kind, settings in SHOWN.items())):
        assert facts["files"] == sorted(path.name for path in folder.iterdir())
        for path in folder.iterdir():
            content = path.read_bytes()
            found = [name for name in PATHS if name.encode() in content.replace(b"example.py", b"")]
            assert not found, (path.name, found)
    assert run_example(large[1], tmp_path, "the cat", 5).startswith("the cat")
    card = (large[1] / "README.md").read_text(encoding="utf-8")
    assert "MatMulNBits (com.microsoft, of ONNX Runtime).\nLicense: mit." in card
    properties = {entry.key: entry.value for entry in onnx.load(large[1] / "model.onnx").metadata_props}
    assert properties == {"family": "none", "vocab_size": "259", "context": "24", "license": "mit"}


def test_a_graph_explains_itself(export):
    _, folder, facts = export("sp with prefix")
    proto = onnx.load(folder / "model.onnx")
    ends = {value.name: value for value in (*proto.graph.input, *proto.graph.output)}
    slots = [f"{part}_{slot}" for slot in range(2) for part in ("key", "value")]
    presents, pasts = ([f"{when}_{slot}" for slot in slots] for when in ("present", "past"))
    assert list(ends) == ["input_ids", "last", "total", "read", *pasts, "logits", *presents]
    shapes = {name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for name, v in ends.items()}
    assert shapes["input_ids"] == ["batch", "length"] and shapes["last"] == ["batch"] and shapes["total"] == [1]
    assert shapes["read"] == ["reads"] and shapes["logits"] == ["reads", facts["vocab_size"]]
    assert all(shapes[name] == ["batch", 1, "room", 16] for name in (*pasts, *presents))
    assert all(value.doc_string for value in ends.values()) and proto.doc_string
    assert ends["last"].doc_string == "int32: the cache column of each row's last token"
    dims = {dim.dim_param for value in proto.graph.value_info for dim in value.type.tensor_type.shape.dim}
    assert set(re.findall(r"[a-z]\w*", " ".join(dims))) <= WORDS
    names = [node.name for node in proto.graph.node]
    assert len(set(names)) == len(names) and proto.producer_name == "pytorch"
    assert {"net.blocks.0.attn/GroupQueryAttention_1", "net.blocks.0.attn/GroupQueryAttention_2"} < set(names)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_graphs_of_onnx_own_operators(export, kind):
    """ONNX's checker accepts them, and its reference evaluator gives the model's logits. Weights are stored once."""
    checkpoint, folder, facts = export(kind, **SHOWN[kind])
    assert facts["contrib_ops"] == [] and facts["attention"] == "standard"
    proto = onnx.load(folder / "model.onnx")
    assert [entry.domain for entry in proto.opset_import] == [""] and not proto.functions
    onnx.checker.check_model(proto, full_check=True)
    assert {node.domain for node in proto.graph.node} == {""}
    ids = torch.arange(20, 26)[None]
    feeds = {"input_ids": ids.numpy(), "last": np.int32([5]), "total": np.int32([6]), "read": np.arange(6)}
    for value in proto.graph.input[4:]:
        feeds[value.name] = np.zeros((1, 1, 8, 16), dtype=np.float32)
    found = torch.from_numpy(onnx.reference.ReferenceEvaluator(proto).run(None, feeds)[0])
    wanted = load_model(checkpoint)[0](ids).logits[0]
    if facts["precision"] == "fp32":
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    else:  # rounded to one part in 254 of the largest weight of a column
        assert 0 < (found - wanted).square().mean().sqrt() < 0.02 * wanted.std()
        sizes = {tensor.name: len(tensor.raw_data) for tensor in proto.graph.initializer}
        assert sizes["model.net.blocks.0.attn.qkv.weight_int8"] == 32 * (32 + 2 * 16)
        assert sizes["model.net.blocks.0.attn.qkv.weight_scale"] == 4 * (32 + 2 * 16)
        torch.testing.assert_close(found, load_onnx(folder)[0](ids).logits[0], atol=1e-4, rtol=0)


def test_what_export_says(export, capfd, monkeypatch):
    """Each long step is announced before it begins. A message names the folder as the user gave it."""
    export("byte", recursion="none", quantize="int8")
    said = capfd.readouterr().err
    steps = "tracing 1 blocks", "checking the graph against torch", "quantizing the graph to int8"
    assert [line for step in steps for line in said.splitlines() if line.startswith(step)] == said.splitlines()[1:]
    monkeypatch.setattr(onnx_export, "save", lambda proto, path: path.write_bytes(b"cut"))
    with pytest.raises(UserError, match=r"/graph/model.onnx is broken or cut short \(.*/graph/model.onnx") as caught:
        export("byte", recursion="none")
    assert ".writing" not in str(caught.value)
