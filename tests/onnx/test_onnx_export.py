"""ONNX graphs: the same logits as the model before and after the export, shared weights, int8, and refusals."""

import functools
import json
import re
import shutil
import sys
from collections import Counter

import jaxtyping
import pytest
import torch
from conftest import AXES, mixtures, name, pairwise
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cache import configurations, padded_prompts

from src.checkpoint import save_checkpoint
from src.errors import UserError
from src.exits import ExitRule
from src.onnx.export import (
    OnnxExport,
    at_depth,
    check,
    export_onnx,
    fits_fused,
    quantization_error,
    quantize,
    save,
    trace,
)
from src.onnx.graph import Graph
from src.onnx.session import OnnxModel, load_onnx
from src.sampling import generate_ids
from src.tokenizer import read_tokenizer

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

BYTES = 259  # tokens of the byte tokenizer
WIDE = {"vocab_size": BYTES, "d_model": 32, "n_heads": 2, "n_layers": 1, "max_seq_len": 12}  # heads of 16: fused
GRAPH_AXES = {key: values for key, values in AXES.items() if key != "attention_window"} | {  # which is refused
    "rope_scaling": (None, 2.5),
    "rope_trained_len": (None, 4),
    "supervision_steps": (1, 2),
}
FORMS = {  # of a graph: attention fused or standard, or no cache
    "fused": {"recursion": "loop", "deep_steps": 2, "n_kv_heads": 1, "tie_embeddings": True},
    "standard": {"recursion": "trm", "n_heads": 4, "latent_steps": 1, "max_recursion_depth": 1, "coda_layers": 1},
    "uncached": {"recursion": "none", "norm": "pre", "enable_kv_cache": False},
}
FORM_CASES = [pytest.param(form, marks=[] if form == "fused" else pytest.mark.slow) for form in FORMS]
LEFT_PADDED = torch.tensor([[0] * 3 + [1] * 6, [1] * 9, [0] * 8 + [1]])


def tokens(model, rows=3, length=9, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab_size, (rows, length), generator=generator)


def export(tiny, folder, checked=False, **settings):
    """Saves and exports a tiny model. Returns (model, facts, export folder).

    The type checker is off meanwhile, because the tracer fails with it."""
    options = {key: settings.pop(key) for key in list(settings) if key in OnnxExport.__dataclass_fields__}
    model = tiny(**(WIDE | settings))
    save_checkpoint(folder / "checkpoint", model, read_tokenizer("byte"))
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        facts = export_onnx(OnnxExport(str(folder / "checkpoint"), str(folder / "onnx"), **options))
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    return at_depth(model, options.get("max_recursion_depth")), facts, folder / "onnx"


@pytest.fixture(scope="module")
def exports(tiny, tmp_path_factory):
    """A cached function: exports(form) -> (model, facts, folder)."""
    return functools.cache(lambda form: export(tiny, tmp_path_factory.mktemp(form), **FORMS[form]))


@pytest.mark.parametrize("case", pairwise(GRAPH_AXES), ids=name)
@torch.no_grad()
def test_the_standard_form_before_export(tiny, case):
    """Prompts of different lengths, then one token at a time, in cache buffers that are too long and filled with 99."""
    model = tiny(dtype=torch.float64, **case)
    graph, c = Graph(model, fused=False), model.config
    ids = tokens(model)
    lengths = LEFT_PADDED[:, :9].sum(1)
    rows = torch.stack([torch.cat((row[mask == 1], row[mask == 0])) for row, mask in zip(ids, LEFT_PADDED)])
    slots = model.new_cache(3).keys.shape[0]
    past = [tuple(torch.full((3, c.n_kv_heads, 14, c.head_dim), 99.0).double() for _ in "kv") for _ in range(slots)]
    last = (lengths - 1).int()
    logits, past = graph(rows, last, torch.tensor([9]).int(), torch.arange(27), past)
    whole = model(ids, attention_mask=LEFT_PADDED).logits
    for row, length in enumerate(lengths):
        torch.testing.assert_close(logits.view(3, 9, -1)[row, :length], whole[row, -length:], atol=1e-9, rtol=0)
    new, mask = tokens(model, length=3, seed=6), torch.cat((LEFT_PADDED, torch.ones(3, 3).long()), dim=1)
    whole = model(torch.cat((ids, new), dim=1), attention_mask=mask).logits
    for t in range(3):
        last = last + 1
        logits, past = graph(new[:, t : t + 1], last, last.max()[None] + 1, torch.arange(3), past)
        torch.testing.assert_close(logits, whole[:, 9 + t], atol=1e-9, rtol=0)


@pytest.mark.parametrize("form", FORM_CASES)
@torch.no_grad()
def test_an_export_gives_the_logits_of_its_model(exports, form):
    model, facts, folder = exports(form)
    graph, tokenizer = load_onnx(folder)
    assert facts["attention"] == ("standard" if form == "standard" else "fused")
    assert facts["cache"] == (form != "uncached") and facts["opset"] >= 18 and facts["errors"]["logits"] < 1e-4
    assert json.loads((folder / "onnx.json").read_text())["opset"] == facts["opset"]
    assert graph.config == model.config and tokenizer.decode(tokenizer.encode("x = é")) == "x = é"
    ids, real = tokens(model), LEFT_PADDED == 1
    whole = model(ids, attention_mask=LEFT_PADDED).logits
    found = graph(ids, attention_mask=LEFT_PADDED).logits
    torch.testing.assert_close(found[real], whole[real], atol=1e-4, rtol=0)
    cache, new = graph.new_cache(3), tokens(model, length=3, seed=6)
    steps = [graph(ids, attention_mask=LEFT_PADDED, cache=cache).logits]
    steps += [graph(new[:, t : t + 1], cache=cache).logits for t in range(3)]
    mask = torch.cat((LEFT_PADDED, torch.ones(3, 3).long()), dim=1)
    whole = model(torch.cat((ids, new), dim=1), attention_mask=mask).logits
    torch.testing.assert_close(torch.cat(steps, dim=1), whole[:, 8:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("form", FORM_CASES)
def test_an_export_writes_the_text_of_its_model(exports, form, use_cache):
    """30 tokens in a context of 12: each row is cut several times, at different steps. Rows end at EOS."""
    model, _, folder = exports(form)
    graph, ids = load_onnx(folder)[0], tokens(model)
    for options in ({"temperature": 0}, {"seed": 3}, {"seed": 3, "eos_id": 40, "top_k": 20}):
        wanted = model.generate(ids, 30, attention_mask=LEFT_PADDED, **options)
        assert torch.equal(
            generate_ids(graph, ids, 30, attention_mask=LEFT_PADDED, use_cache=use_cache, **options), wanted
        )
    assert torch.equal(generate_ids(graph, ids[:1, 3:], 30, seed=3)[0], model.generate(ids[:1, 3:], 30, seed=3)[0])


@torch.no_grad()
def check_any(tiny, data, **small):
    """Compares prefill of padded prompts, then single tokens with the cache, with the eager model."""
    draw = data.draw
    case = draw(configurations()) | {"d_model": 32, "n_heads": draw(st.sampled_from([2, 8]))} | small
    model = tiny(**case | {"n_kv_heads": min(case["n_kv_heads"], case["n_heads"])})
    (ids, mask), new = draw(padded_prompts(8)), draw(st.integers(1, 4))
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        proto = trace(model, fits_fused(model.config))
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    graph, real = OnnxModel(session, model.config, {"cache": True}, "cpu"), mask.bool()
    torch.testing.assert_close(
        graph(ids, attention_mask=mask).logits[real], model(ids, attention_mask=mask).logits[real], atol=1e-4, rtol=1e-4
    )
    more, cache = tokens(model, len(ids), new), graph.new_cache(len(ids), ids.shape[1] + new)
    steps = [graph(ids, attention_mask=mask, cache=cache).logits]
    steps += [graph(more[:, t : t + 1], cache=cache).logits for t in range(new)]
    mask = torch.cat((mask, torch.ones_like(more)), dim=1)
    whole = model(torch.cat((ids, more), dim=1), attention_mask=mask).logits[:, ids.shape[1] - 1 :]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, atol=1e-4, rtol=1e-4)


ONE_STEP = {"latent_steps": 1, "supervision_steps": 1}  # tracing takes seconds per block


@settings(max_examples=2, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_small_graph_is_its_model(tiny, data):
    small = {"n_heads": 2, "n_layers": 1, "deep_steps": 1, "prelude_layers": 0, "coda_layers": 0}
    check_any(tiny, data, **small, **ONE_STEP)


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_any_graph_is_its_model(tiny, data):
    check_any(tiny, data, **ONE_STEP)


def test_a_weight_of_several_visits_is_stored_once(exports):
    model, facts, folder = exports("fused")
    sizes = [len(tensor.raw_data) for tensor in onnx.load(folder / "model.onnx").graph.initializer]
    tied = 4 * model.head.weight.numel()  # the head's copy, as the graph multiplies by the transposed embedding
    weights = sum(4 * p.numel() for p in model.parameters()) + tied
    assert weights <= sum(sizes) < 1.05 * weights + 4 * 2 * model.config.max_seq_len * model.config.head_dim


def test_int8(exports, tmp_path):
    """Two visits of one network: small errors, weights stored once, and a row gives the same alone as in a batch."""
    model, _, folder = exports("fused")
    shutil.copytree(folder, tmp_path / "int8")
    proto = quantize(onnx.load(folder / "model.onnx"))
    save(proto, tmp_path / "int8" / "model.onnx")
    kinds = Counter(node.op_type for node in proto.graph.node)
    assert kinds["MatMul"] == 0 and kinds["MatMulNBits"] == 2 * 5 + 1
    packed = [tensor for tensor in proto.graph.initializer if tensor.data_type == onnx.TensorProto.UINT8]
    assert len(packed) == 5 + 1
    exact, graph = load_onnx(folder)[0], load_onnx(tmp_path / "int8")[0]
    error = quantization_error(model, graph)
    assert 0 < error["rms"] < 0.05 * error["deviation"] and 0 < error["nats"] < 0.01
    assert error["same_likeliest"] > 0.8 and quantization_error(model, exact)["rms"] < 1e-5
    ids = tokens(model)
    batch = graph(ids, attention_mask=LEFT_PADDED).logits
    torch.testing.assert_close(graph(ids[:1, 3:]).logits, batch[:1, 3:], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "recursion, depth, problem",
    [("trm", 0, "set it to 1 or more"), ("loop", -1, "set it to 1 or more"), ("none", 2, "set it to 1$")],
)
def test_depths_that_cannot_be(tiny, recursion, depth, problem):
    with pytest.raises(UserError, match=f"max_recursion_depth is {depth}.*{problem}"):
        at_depth(tiny(recursion=recursion), depth)


@torch.no_grad()
def test_depth_is_that_of_the_exit_rule(tiny):
    for recursion in ("trm", "loop"):
        model, ids = tiny(recursion=recursion), tokens(tiny())
        for depth in (1, 3):
            wanted = model(ids, exit=ExitRule(max_recursion_depth=depth)).logits
            torch.testing.assert_close(at_depth(model, depth)(ids).logits, wanted)
        assert torch.equal(at_depth(model)(ids).logits, model(ids).logits)


def test_what_is_refused(tiny, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="only a causal model"):
        at_depth(tiny(causal=False))
    with pytest.raises(UserError, match="--output is not given"):
        export_onnx(OnnxExport())
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="exists and is not an ONNX export"):
        export_onnx(OnnxExport(output=str(tmp_path)))
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    with pytest.raises(UserError, match="no checkpoint folder at"):
        export_onnx(OnnxExport(str(tmp_path / "nothing"), str(tmp_path / "new")))
    with pytest.raises(UserError, match="opset 99 is unknown"):
        trace(tiny(recursion="none", n_layers=1), False, opset=99)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match="onnx is not installed: pip install onnx=="):
        trace(tiny(), False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["thesis.tex"]


def test_written_again_the_users_files_stay(tiny, tmp_path, monkeypatch):
    def again(**options):
        return export(tiny, tmp_path, recursion="none", **options)[2]

    folder = again()
    first = (folder / "README.md").read_text()
    assert (again(max_seq_len=13) / "README.md").read_text() != first  # not edited, so it is replaced
    (folder / "README.md").write_text("mine")
    (folder / "notes" / "deep").mkdir(parents=True)
    (folder / "notes" / "deep" / "a.txt").write_text("mine")
    shutil.copytree(folder / "notes", folder / ".git")
    (folder / "model.onnx.data").write_bytes(b"of a large export before")
    again()
    assert (folder / "README.md").read_text() == (folder / ".git" / "deep" / "a.txt").read_text() == "mine"
    assert (folder / "notes" / "deep" / "a.txt").read_text() == "mine"
    assert not (folder / "model.onnx.data").exists() and load_onnx(folder)[0].facts["cache"]
    monkeypatch.setattr("src.onnx.export.check", lambda *args: (_ for _ in ()).throw(UserError(f"{folder} differs")))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="differs"):
        again()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "onnx"]


def test_a_graph_that_does_something_else_is_not_kept(exports, tiny):
    _, _, folder = exports("fused")
    other = tiny(seed=1, **(WIDE | FORMS["fused"]))
    with pytest.raises(UserError, match="logits differ from the model's"):
        check(other, load_onnx(folder)[0])


@pytest.mark.slow
@pytest.mark.parametrize("heads", [2, 8], ids=["fused", "standard"])
@pytest.mark.parametrize("case", mixtures(GRAPH_AXES, 6, seed=11), ids=name)
def test_exports_of_every_kind(tiny, tmp_path, case, heads):
    """Each export compares its graph with the model; that is the test."""
    case = case | {"n_heads": heads, "n_kv_heads": min(heads, case["n_kv_heads"]), "quantize": "int8"}
    _, facts, _ = export(tiny, tmp_path, **case)
    assert facts["attention"] == {2: "fused", 8: "standard"}[heads]
    assert facts["errors"]["logits"] < 1e-4 and facts["errors"]["int8"]["rms"] < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("heads", [2, 8], ids=["fused", "standard"])
def test_opsets(tiny, tmp_path, heads):
    """Each export replaces the previous one."""
    for opset in (15, 17, 18, 21, 23):
        _, facts, folder = export(tiny, tmp_path, recursion="none", n_heads=heads, opset=opset)
        assert facts["opset"] == opset and facts["errors"]["logits"] < 1e-4
        proto = onnx.load(folder / "model.onnx")
        assert opset in [entry.version for entry in proto.opset_import] and b".py" not in proto.SerializeToString()
        dims = {dim.dim_param for value in proto.graph.value_info for dim in value.type.tensor_type.shape.dim}
        assert {"batch", "length"} <= dims and not [dim for dim in dims if re.search(r"\bs\d", dim)]
        assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", "onnx"}
    with pytest.raises(UserError, match="opset 9 is not possible"):
        export(tiny, tmp_path, recursion="none", n_heads=heads, opset=9)
    assert onnx.load(folder / "model.onnx").opset_import  # the previous export is still there
