"""benchmarks/ and experiments/ at tiny sizes: they run, and their last line is JSON with the quoted figures."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from texts import install

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))  # as when they are run as scripts

import bench_data  # noqa: E402
import bench_engine  # noqa: E402
import bench_generate  # noqa: E402
import bench_memory  # noqa: E402
import bench_puzzles  # noqa: E402
import bench_rag  # noqa: E402
import bench_train  # noqa: E402
import common  # noqa: E402

from experiments import classify, depth, release  # noqa: E402
from src.checkpoint import load_model, save_checkpoint  # noqa: E402
from src.config import build  # noqa: E402
from src.data import corpus  # noqa: E402
from src.errors import UserError  # noqa: E402
from src.metrics import flops_per_token  # noqa: E402
from src.model import TRMConfig, TRMModel  # noqa: E402
from src.tokenizer import ByteLevelTokenizer  # noqa: E402


def last_json(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


# --- bench_train ------------------------------------------------------------------------------------------------------


def test_bench_train(capsys):
    bench_train.main(["--quick", "--compile", "false", "--device", "cpu"])
    facts = last_json(capsys)
    assert facts["benchmark"] == "train" and facts["machine"]["torch"] == torch.__version__
    assert [row["family"] for row in facts["rows"]] == ["none", "loop", "trm"]
    args = bench_train.parse_args(["--quick"])[0]
    for row in facts["rows"]:
        flops = flops_per_token(bench_train.model_config(args, row["family"]))
        assert row["model_gflops"] == pytest.approx(row["tokens_per_s"] * flops.train_matmul / 1e9, rel=1e-3)
        assert row["ratio"] == pytest.approx(row["model_gflops"] / row["matmul_gflops"], rel=1e-3)
        assert row["ratio_attention"] == pytest.approx(row["ratio"] * flops.train / flops.train_matmul, rel=1e-3)
        assert row["shapes_gflops"] > 0 and row["best"]["tokens_per_s"] >= row["tokens_per_s"]


def test_bench_train_has_the_sizes_that_are_asked_for():
    args, _ = bench_train.parse_args([])
    assert (args.batch_size, args.seq_len, args.d_model, args.n_heads, args.vocab_size) == (64, 256, 384, 6, 65)
    plain, loop, trm = (bench_train.model_config(args, family) for family in ("none", "loop", "trm"))
    assert (plain.n_layers, loop.n_layers, loop.deep_steps, trm.n_layers) == (6, 2, 3, 2)
    assert (trm.latent_steps, trm.deep_steps, trm.supervision_steps) == (2, 2, 2)
    assert flops_per_token(plain).train == flops_per_token(loop).train
    assert [bench_train.forwards_per_backward(c) for c in (plain, loop, trm)] == [1, 1, 2]


def test_bench_train_compares_a_recipe_with_plain(capsys, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    sizes = "vocab_size: 50\nd_model: 32\nn_heads: 2\nmax_seq_len: 8\nbatch_size: 2\n"
    recipe.write_text(sizes + "recursion: loop\ndeep_steps: 3\nrecursion_from: 0.6\noptimizer: muoneq\n")
    bench_train.main(["--recipe", str(recipe), "--steps", "3", "--compile", "false", "--device", "cpu"])
    facts = last_json(capsys)
    assert facts["mflops_per_token"]["recipe"] == facts["mflops_per_token"]["plain"] > 0
    speeds, paired = facts["tokens_per_s"], facts["paired"]
    assert min(speeds.values()) > 0 and 0 < paired["low"] <= paired["median"] <= paired["high"]
    trm = TRMConfig(vocab_size=50, d_model=32, n_heads=2)  # 12 visits of 2 layers; half have no gradient, for a third
    assert bench_train.plain_of_equal_flops(trm).n_layers == 16


def test_profile_groups_operations(capsys):
    bench_train.main(["--quick", "--compile", "false", "--device", "cpu", "--profile", "--families", "trm"])
    kinds = last_json(capsys)["ms"]["trm"]
    assert kinds["products of linear layers"] > 0 and kinds["eager elementwise and copies"] > 0
    for name, kind in (
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention backward products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention forward"),
        ("graph_0_cpp_fused__scaled_dot_product_flash_attention_for_cpu_add_1", "compiled elementwise kernels"),
        ("aten::mm", "products of linear layers"),
        ("aten::mul", "eager elementwise and copies"),
        ("TorchDynamo Cache Lookup", "Python, dispatch and the rest"),
    ):
        assert bench_train.kind_of(name) == kind


def test_block_products_count_what_they_multiply():
    config = TRMConfig(vocab_size=5, d_model=16, n_heads=2, d_ff=24)
    products = bench_train.BlockProducts(config, 10, torch.float32, torch.device("cpu"))
    assert products.flops == 2 * 10 * (4 * 16**2 + 3 * 16 * 24)
    for job in products.jobs.values():
        job()
    assert products.ceiling({"forward": 2.0, "grad_input": 3.0, "grad_weight": 1.0}, 2.0) == products.flops * 4 / 8


# --- bench_engine -----------------------------------------------------------------------------------------------------


def test_bench_engine(capsys):
    assert bench_engine.main(["--quick"]) == 0
    out, err = capsys.readouterr()
    assert "train:" in err and "validation" not in err  # evaluations are switched off
    row = json.loads(out.splitlines()[-1])
    each = row["seconds_per_step"]
    assert row["overhead"] == pytest.approx(each["engine"] / each["bare"] - 1, rel=1e-3) and row["steps"] == 4
    assert each["engine"] > 0.3 * each["bare"]  # it really did all its steps
    assert "the engine costs" in out


# --- bench_generate ---------------------------------------------------------------------------------------------------


def test_bench_generate(capsys):
    assert bench_generate.main(["--quick"]) == 0
    facts = last_json(capsys)
    (row,), cache = facts["rows"], facts["cache"]
    assert row["same_tokens"] is True and cache["same_tokens"] is True
    assert row["ratio"] == pytest.approx(row["plain_tokens_per_s"] / row["transformers_tokens_per_s"], rel=1e-3)
    assert row["loop_ratio"] == pytest.approx(row["loop_tokens_per_s"] / row["plain_tokens_per_s"], rel=1e-3)
    assert cache["ratio"] == pytest.approx(cache["cached_tokens_per_s"] / cache["uncached_tokens_per_s"], rel=1e-3)
    assert cache["prompt_tokens"] + cache["new_tokens"] == 32


def test_bench_generate_tells_of_different_tokens(capsys, monkeypatch):
    other = bench_generate.Greedy(lambda: torch.zeros(1, 12))
    monkeypatch.setattr(bench_generate, "transformers_job", lambda *given: other)
    assert bench_generate.main(["--quick"]) == 1
    out = capsys.readouterr()
    assert json.loads(out.out.splitlines()[-1])["rows"][0]["same_tokens"] is False and "tiny" in out.err


def test_loop_has_the_flops_of_plain():
    args = bench_generate.parse_args([])
    for shape in args.shapes:
        sizes = {"max_seq_len": args.max_seq_len, **bench_generate.SHAPES[shape]}
        plain, loop = (build(TRMConfig, sizes | family) for family in (bench_generate.PLAIN, bench_generate.LOOP))
        assert flops_per_token(plain, 512) == flops_per_token(loop, 512)


# --- bench_memory -----------------------------------------------------------------------------------------------------


def test_memory_of_one_training_setting(capsys):
    settings = {"supervision_steps": 2, "deep_steps": 2}
    bench_memory.main(["--quick", "--child", json.dumps(settings)])
    facts = last_json(capsys)
    assert 2**26 < facts["before"] <= facts["peak"] < 2**34


def test_memory_of_a_corpus(tmp_path, capsys):
    path = tmp_path / "corpus.jsonl.gz"
    bench_memory.write_corpus(path, 2e5)
    assert 1e5 < path.stat().st_size < 4e5
    job = {"path": str(path), "cache_dir": str(tmp_path / "cache"), "tokenizer": "byte", "seq_len": 16}
    bench_memory.main(["--child", json.dumps({"corpus": job})])
    facts = last_json(capsys)
    assert facts["tokens"] > 3e5 and facts["text_bytes"] > 3e5 and facts["peak"] > 2**26


@pytest.mark.slow
def test_bench_memory(capsys):
    bench_memory.main(["--quick"])
    facts = last_json(capsys)
    assert {row["varies"] for row in facts["training"]} == {"supervision_steps", "deep_steps", "full_bptt"}
    assert all(row["peak"] == row["before"] + row["step"] for row in facts["training"])
    assert facts["corpus"]["peak"] < 2**30


# --- bench_data -------------------------------------------------------------------------------------------------------


def test_memory_of_a_stream(tmp_path, capsys):
    args = bench_data.parse_args(["--quick"])
    texts = bench_data.read_texts(args)
    (file,) = bench_data.write_shards(tmp_path / "shards", texts, 1)
    job = json.dumps({"files": [file], "tokenizer": "byte"})
    bench_data.main(["--batch_size", "8", "--seq_len", "64", "--shuffle_buffer", "16", "--child", job])
    facts = last_json(capsys)
    assert 2**26 < facts["before"] <= facts["peak"] and facts["end"] <= facts["peak"]
    tokens = sum(len(text.encode()) + 1 for text in texts)
    assert facts["batches"] == pytest.approx(tokens / (64 * 8), abs=4)  # the shuffle buffer delays the end of the epoch


@pytest.mark.slow
def test_bench_data(capsys):
    bench_data.main(["--quick"])
    facts = last_json(capsys)
    alone, jobs = facts["tokenizing"][:2], facts["tokenizing"][2:]
    assert [job["processes"] for job in alone + jobs] == [1, 2] * 3 and [job["ratio"] for job in alone] == [1, 1]
    for job, speed in zip(jobs, 2 * [row["mb_per_s"] for row in alone]):
        assert job["ratio"] == pytest.approx(job["mb_per_s"] / speed, rel=1e-3)
    assert [(row["set"], row["workers"]) for row in facts["loading"]] == [
        (name, workers) for name in ("tokenized", "streamed") for workers in (0, 2)
    ]
    assert all(
        row["ratio"] == pytest.approx(row["batches_per_s"] / facts["need"], rel=1e-3) for row in facts["loading"]
    )
    one, ten = facts["memory"]
    assert ten["file_bytes"] == 10 * one["file_bytes"] and ten["batches"] == pytest.approx(
        10 * one["batches"], rel=0.01
    )
    assert all(0 < row["bytes"] < 10_000 for row in facts["resume"])


# --- bench_rag --------------------------------------------------------------------------------------------------------


def test_a_step_of_bench_rag(tmp_path, capsys, monkeypatch):
    for owner, name in sum(bench_rag.PARTS.values(), []):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # the stopwatches are removed after the test
    (tmp_path / "source").mkdir()
    text = bench_rag.copy_files(bench_rag.RagBench(paths=["src/data"], quick=True), tmp_path / "source")
    assert text["lines"] >= 1000 and text["files"] == len(list(tmp_path.glob("source/*/*.py")))
    job = {"folder": str(tmp_path / "source"), "cache_dir": str(tmp_path / "cache"), "method": "tfidf", "step": "open"}
    bench_rag.main(["--child", json.dumps(job), "--searches", "3"])
    facts = last_json(capsys)
    assert facts["chunks"] > 20 and facts["peak"] > 2**26
    assert min(facts["parts"].values()) > 0 and sum(facts["parts"].values()) < facts["seconds"]
    assert all(0 < facts["search"][who]["median"] <= facts["search"][who]["p95"] for who in ("ours", "peer"))


@pytest.mark.slow
def test_bench_rag(capsys):
    bench_rag.main(["--quick"])
    facts = last_json(capsys)
    assert list(facts["methods"]) == ["tfidf", "bm25"] and facts["methods"]["tfidf"]["disk"] > 0
    for found in facts["methods"].values():
        assert found["refresh"]["chunks"] >= found["open"]["chunks"] == found["build"]["chunks"]
    build, unchanged, refresh = (facts["methods"]["tfidf"][step]["parts"] for step in bench_rag.STEPS)
    assert unchanged["cut"] == unchanged["write"] == 0 < min(refresh["cut"], refresh["write"])


# --- shared -----------------------------------------------------------------------------------------------------------


def test_rounds_alternate():
    order = []
    times = common.interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert order == ["a", "b"] * 3 and [len(t) for t in times.values()] == [3, 3]


@pytest.mark.parametrize(
    ("module", "words", "said"),
    [
        (bench_train, ["--families", "gpt"], "gpt"),
        (bench_train, ["--recipe", "configs/demo.yaml", "--profile"], "leave them out"),
        (bench_generate, ["--shapes", "9x9"], "9x9"),
        (bench_generate, ["--context", "100"], "context"),
        (bench_memory, ["--corpus_mb", "-1"], "corpus_mb"),
        (bench_data, ["--paths", "data/nowhere"], "data/nowhere does not exist"),
        (bench_data, ["--need", "0"], "need"),
        (depth, ["--max_visits", "0"], "max_visits is 0"),
        (depth, ["--least_visits", "9"], "least_visits 9"),
        (depth, ["--family", "puzzles"], "family is puzzles: choose from carries"),
        (depth, ["--models", "deep"], "models is deep"),
        (depth, ["--family", "regions", "--trained", "99"], "regions of size 8 with 99 steps"),
        (depth, ["--draw", "--output", "nowhere"], "nowhere"),
        (depth, ["--tested", "32"], "carries of size 32 with 32 steps"),
        (release, ["one"], "two folders"),
        (release, ["nowhere", "out"], "nowhere"),
    ],
)
def test_a_mistake_is_a_user_error(module, words, said):
    with pytest.raises(UserError, match=said):
        module.main(words)


# --- experiments/release.py -------------------------------------------------------------------------------------------


@pytest.fixture
def finished_run(tmp_path):
    """A run folder whose best checkpoint has averaged weights and training state, and a validation text."""
    torch.manual_seed(0)
    tokenizer = ByteLevelTokenizer()
    model = TRMModel(TRMConfig(vocab_size=tokenizer.vocab_size, d_model=16, n_heads=2, max_seq_len=16))
    average = {name: 0.5 * tensor for name, tensor in model.state_dict().items()}
    run = tmp_path / "run"
    save_checkpoint(run / "step_00000001", model, tokenizer, average, {"step": 1}, {"step": 1})
    (run / "best").symlink_to("step_00000001")
    text = tmp_path / "valid.txt"
    text.write_text("def main():\n    return 0\n" * 40)
    return run, average, text


def test_release_keeps_the_averaged_weights_in_half_the_bytes(finished_run, tmp_path, capsys, monkeypatch):
    run, average, text = finished_run
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    output = tmp_path / "released"
    assert release.main([str(run), str(output), "--valid_paths", str(text)]) == 0
    before = run / "best"
    kept = {path.name for path in before.iterdir()} - {"ema.safetensors", "state"}
    assert {path.name for path in output.iterdir()} == kept
    weights = load_file(output / "model.safetensors")
    assert weights.keys() == average.keys()
    assert all(torch.equal(weights[name], tensor.half()) for name, tensor in average.items())
    assert json.loads((output / "config.json").read_text())["info"] == {"step": 1}
    model, tokenizer = load_model(output)
    assert next(model.parameters()).dtype == torch.float32 and tokenizer.decode(tokenizer.encode("né")) == "né"
    total = sum(path.stat().st_size for path in output.iterdir())
    assert f"{total:,} bytes" in capsys.readouterr().out
    monkeypatch.setattr(release, "LARGEST_CHANGE", 0.0)  # fp16 changes the loss slightly
    assert release.main([str(run), str(output), "--valid_paths", str(text)]) == 1


def test_release_of_a_puzzle_model_needs_the_puzzles_of_its_run(tmp_path):
    with pytest.raises(UserError, match="is not in the folder of its run, whose config.yaml says which puzzles"):
        release.main([str(ROOT / "checkpoints" / "sudoku"), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_release_names_the_licences_of_the_packages_it_was_trained_on(tmp_path, monkeypatch):
    install(tmp_path, one="License: MIT", two="License: MPL-2.0", zero="License: BSD")
    for module in (corpus, release):
        monkeypatch.setattr(module, "package_roots", lambda: [tmp_path])
    assert release.licences({"train_paths": ["stdlib"]}, {}) is None
    assert release.licences({"train_paths": [str(tmp_path / "one")]}, {}) is None
    settings = {"train_paths": ["stdlib", "permissive-packages"], "valid_paths": ["site-packages/zero"]}
    rows = [line for line in release.licences(settings, {}).splitlines() if line.startswith("| ")]
    assert rows[1].startswith("| the standard library of Python 3.") and rows[2:] == ["| one 1.5 | MIT |"]
    read = {"train 1": corpus.fingerprint_files([tmp_path / "one" / "a.py"]), "valid": [["b.py", 1, ""]]}
    assert release.licences(settings, read).splitlines()[-1] == "| one 1.5 | MIT |"
    read["train 2"] = [["old.py", 9, "0123"]]
    said = "\n1 files of the run have changed since, or are no longer counted: old.py.\n"
    assert release.licences(settings, read).endswith(said)


def test_release_of_a_puzzle_model_compares_the_puzzles_it_solves(tmp_path, capsys):
    from trainers import TINY_PUZZLES, puzzle_settings

    from src.tasks.puzzle_data import read_form
    from src.tasks.puzzle_trainer import create_puzzle_trainer

    run, output = tmp_path / "run", tmp_path / "released"
    create_puzzle_trainer(puzzle_settings({**TINY_PUZZLES, "save_dir": str(run)})).train()
    assert release.main([str(run), str(output)]) == 0
    assert "share of held-out puzzles solved 0.00000 before, 0.00000 in fp16: equal enough" in capsys.readouterr().out
    assert load_file(output / "model.safetensors")["embed.weight"].dtype == torch.float16
    assert read_form(output).kind.symmetries == "relabel"


def test_release_overwrites_nothing_but_a_checkpoint(finished_run, tmp_path):
    run, _, text = finished_run
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="papers"):
        release.main([str(run), str(tmp_path / "papers"), "--valid_paths", str(text)])
    with pytest.raises(UserError, match="itself"):
        release.main([str(run), str(run / "best"), "--valid_paths", str(text)])
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="llama has files but no checkpoint of this project"):
        release.main([str(run), str(tmp_path / "llama"), "--valid_paths", str(text)])
    shutil.copytree(run / "best", tmp_path / "classifier")
    (tmp_path / "classifier" / "classifier.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="is a classifier, whose layer would be lost: use convert.py --to hub"):
        release.main([str(tmp_path / "classifier"), str(tmp_path / "out"), "--valid_paths", str(text)])
    assert (tmp_path / "papers" / "thesis.txt").exists() and (run / "best" / "ema.safetensors").exists()


# --- experiments/classify.py ------------------------------------------------------------------------------------------


def test_classifications_are_kept_and_tabled(finished_run, tmp_path, capsys):
    run, output = finished_run[0], tmp_path / "out" / "runs.jsonl"
    for task, names in (("sst", ["no", "yes", "perhaps"]), ("cfimdb", ["no", "yes"])):
        (tmp_path / f"{task}-label-mapping.json").write_text(json.dumps(names))
        for part in ("train", "dev"):
            lines = "".join(f"{i % len(names)} ||| text {i}\n" for i in range(6))
            (tmp_path / f"{task}-{part}.txt").write_text(lines)
    where = ["--models", str(run), "--data", str(tmp_path), "--output", str(output), "--device", "cpu"]
    classify.main([*where, "--seeds", "0", "1", "--epochs", "1"])
    runs = [json.loads(line) for line in output.read_text().splitlines()]
    kinds = [("prompt", 0), ("finetune", 0), ("finetune", 1)]
    assert [(r["task"], r["option"], r["seed"]) for r in runs] == [(t, *k) for t in ("sst", "cfimdb") for k in kinds]
    assert all(r["accuracy"] == r["by_step"][-1] and len(r["by_step"]) == 2 for r in runs)  # a TRM with two steps
    assert runs[1]["settings"] == classify.TASKS["sst"] | {"epochs": 1, "seed": 0}
    capsys.readouterr()
    classify.main(["--table", "--output", str(output)])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[:2] for row in rows] == [[t, o] for t in ("cfimdb", "sst") for o in ("finetune", "prompt")]
    assert f"{(runs[1]['accuracy'] + runs[2]['accuracy']) / 2:.4f}" in rows[2]


# --- bench_puzzles ----------------------------------------------------------------------------------------------------


class SideInThisProcess:
    """As bench_puzzles.Worker, without its process, which takes seconds to import PyTorch."""

    def __init__(self, **job):
        self.side = bench_puzzles.side_of(**job)

    def begin(self, what):
        self.found = getattr(self.side, what)()

    def answer(self):
        return self.found

    def ask(self, what):
        self.begin(what)
        return self.answer()

    def close(self):
        pass


@pytest.mark.parametrize("worker", [SideInThisProcess, pytest.param(bench_puzzles.Worker, marks=pytest.mark.slow)])
def test_bench_puzzles_without_a_peer(monkeypatch, capsys, worker):
    monkeypatch.setattr(bench_puzzles, "Worker", worker)
    words = "--mixers mlp --precisions fp32 --rounds 2 --batch_size 2 --cells 9 --d_model 32 --n_heads 2".split()
    words += "--latent_steps 2 --deep_steps 2 --compile false --device cpu".split()
    assert bench_puzzles.main(words) == 0
    out, err = capsys.readouterr()
    facts = json.loads(out.splitlines()[-1])
    assert "no --peer" in err and facts["benchmark"] == "puzzles" and facts["peer"] is None
    assert [(row["mixer"], row["task"]) for row in facts["rows"]] == [("mlp", "train"), ("mlp", "evaluate")]
    assert all(row["seconds"]["eager"] > 0 and row["ratios"] == {} for row in facts["rows"])
    assert out.splitlines()[1].startswith("mlp fp32 train") and out.splitlines()[0].split()[:3] == [
        "step",
        "eager",
        "s",
    ]


def test_bench_puzzles_shows_both_forms(capsys):
    seconds = {"eager": 2.0, "compiled": 1.0, "peer": 3.0, "peer_compiled": 1.5}
    row = {"mixer": "mlp", "precision": "bf16", "task": "train", "difference": 0.01, "seconds": seconds}
    bench_puzzles.show(row | {"ratios": {"eager over peer": [1.5, 1.4, 1.6]}}, True)
    header, line = capsys.readouterr().out.splitlines()
    assert line.index("1.50 (1.40 to 1.60)") == header.index("eager over peer") and line.endswith("1.0e-02")


def test_bench_puzzles_needs_a_checkout_of_the_authors_code(tmp_path):
    with pytest.raises(UserError, match="no checkout"):
        bench_puzzles.main(["--quick", "--peer", str(tmp_path)])


def test_bench_puzzles_has_the_hidden_widths_of_the_authors_code():
    args = bench_puzzles.PuzzleBench()
    mixer, plain = (bench_puzzles.model_config(args, name) for name in ("mlp", "attention"))
    assert (mixer.d_ff, mixer.mixer_ff, plain.d_ff, plain.positions) == (512, 256, 512, "rope")
