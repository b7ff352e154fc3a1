"""experiments/ladder.py: its text, its rungs, its sweep, which runs it does, its tables and its picture."""

import json
import math
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from experiments import arms, ladder, ladder_report  # noqa: E402
from experiments.ladder_rungs import parameters_of  # noqa: E402
from src.errors import UserError  # noqa: E402
from src.metrics import flops_per_token  # noqa: E402
from src.training.depths import mean_flops  # noqa: E402

TEXT = "".join(f"Line {n} says: to be, or not to be, is the question of the {n % 7}th day.\n" for n in range(200))
SMALL = "d_model=32 n_heads=2 max_seq_len=8 batch_size=4".split()


def opened(folder, *words):
    """Returns the Ladder of these flags on a small text."""
    folder.mkdir(exist_ok=True)
    (folder / "text.txt").write_text(TEXT)
    given = ["--train_paths", str(folder / "text.txt"), "--output", str(folder / "out"), "--overrides", *SMALL]
    (config,) = ladder.parse_flags("", ladder.LadderConfig, argv=[*given, *words])
    return ladder.open_ladder(config)


@pytest.fixture(scope="module")
def all_rungs(tmp_path_factory):
    return opened(tmp_path_factory.mktemp("ladder") / "all", "--rungs", *ladder.RUNGS, "--steps", "200")


# ---- text -----------------------------------------------------------------------------------------------------------


def test_one_document_is_split_as_is_customary():
    kept, held = ladder.hold_back([TEXT], 0.1)
    assert kept == [TEXT[: int(0.9 * len(TEXT))]] and kept[0] + held[0] == TEXT
    kept, held = ladder.hold_back([TEXT[:5000], TEXT[5000:]], 0.1, most=100)
    assert len("".join(held)) == 100 and "".join(kept + held) == TEXT


def test_many_documents_are_held_back_at_equal_distances():
    documents = [f"document {n:03}" for n in range(250)]
    kept, held = ladder.hold_back(documents, 0.1)
    assert held == documents[9::10] and sorted(kept + held) == documents
    assert ladder.hold_back(documents, 0.1, most=12 * 25)[1] == documents[9::10]
    assert ladder.hold_back(documents, 0.1, most=12 * 24)[1] == documents[10::11]


def test_the_first_bytes_of_a_text():
    assert ladder.first_bytes(["äöü"], 3) == ["ä"] and ladder.first_bytes(["äöü"], 6) == ["äöü"]
    documents = [f"{n:010}" for n in range(9)]
    found = ladder.first_bytes(documents, 35)
    assert list(map(len, found)) == [10, 10, 10, 5] and set(found[:3]) <= set(documents)
    with pytest.raises(UserError, match="10 bytes less than corpus_bytes"):
        ladder.first_bytes(documents, 100)


@pytest.mark.parametrize("corpus_bytes", [None, 2000])
def test_the_three_parts_of_a_text_do_not_overlap(tmp_path, corpus_bytes):
    (tmp_path / "text.txt").write_text(TEXT)
    config = ladder.LadderConfig(train_paths=[str(tmp_path / "text.txt")], corpus_bytes=corpus_bytes)
    parts = {name: "".join(documents) for name, documents in ladder.split_text(config).items()}
    rest = TEXT[: int(0.9 * len(TEXT))]
    assert parts["valid"] == TEXT[len(rest) :] and parts["slice"] == rest[int(0.95 * len(rest)) :]
    assert parts["train"] == (rest[: int(0.95 * len(rest))] if corpus_bytes is None else rest[:2000])


def test_training_documents_that_are_validation_text_are_left_out(tmp_path, capsys):
    lines = [json.dumps({"text": f"document {n}"}) for n in range(400)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    (tmp_path / "valid.jsonl").write_text("\n".join(lines[:3]))
    paths = {"train_paths": [str(tmp_path / "train.jsonl")], "valid_paths": [str(tmp_path / "valid.jsonl")]}
    parts = ladder.split_text(ladder.LadderConfig(**paths))
    assert parts["valid"] == ["document 0", "document 1", "document 2"]
    assert len(parts["slice"]) == 19 and len(parts["train"]) == 378
    assert not {*parts["valid"]} & {*parts["train"], *parts["slice"]} and not {*parts["train"]} & {*parts["slice"]}
    assert "3 training documents left out" in capsys.readouterr().err


def test_copies_of_text_that_is_held_back_are_left_out(tmp_path, capsys):
    lines = [json.dumps({"text": f"document {n % 207}"}) for n in range(400)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    parts = ladder.split_text(ladder.LadderConfig(train_paths=[str(tmp_path / "train.jsonl")]))
    assert not {*parts["valid"]} & {*parts["train"], *parts["slice"]} and not {*parts["train"]} & {*parts["slice"]}
    said = capsys.readouterr().err
    assert "they are validation text" in said and "they are in the slice" in said and parts["train"]


def test_other_text_or_another_recipe_in_the_folder_of_a_ladder(tmp_path):
    opened(tmp_path, "--rungs", "plain")
    (tmp_path / "out" / "runs.jsonl").write_text("")
    with pytest.raises(UserError, match="had other text: choose another output"):
        opened(tmp_path, "--corpus_bytes", "1000")
    with pytest.raises(UserError, match="had d_model 32, not 16: choose another output"):
        opened(tmp_path, "--rungs", "plain", "--overrides", *SMALL[1:], "d_model=16")


# ---- rungs ----------------------------------------------------------------------------------------------------------


def test_rungs_have_equal_parameters(all_rungs):
    sizes = {name: parameters_of(rung.model) for name, rung in all_rungs.rungs.items()}
    assert all(sizes[name] == pytest.approx(sizes["plain"], rel=0.02) for name in sizes if name not in ladder.BIGGER)
    assert all(sizes[name] > 1.3 * sizes["plain"] for name in ladder.BIGGER)


def test_rungs_have_equal_flops(all_rungs):
    rungs = all_rungs.rungs
    assert rungs["two-stream"].steps == 200
    effort = {name: rung.steps * flops_per_token(rung.model).train for name, rung in rungs.items() if name != "late"}
    assert effort == pytest.approx(dict.fromkeys(effort, effort["two-stream"]), rel=0.02)
    cost = {name: rung.flops for name, rung in rungs.items()}
    assert cost["plain-deep"] == cost["loop"] == cost["two-stream"] == cost["trm"] / 2
    assert cost["plain-wide"] == pytest.approx(cost["two-stream"], rel=0.3)  # heads are few and large here


def test_rungs_are_what_they_are_called(all_rungs):
    models = {name: rung.model for name, rung in all_rungs.rungs.items()}
    family = {name: model.recursion for name, model in models.items()}
    assert family == dict.fromkeys(("plain", "plain-deep", "plain-wide"), "none") | dict.fromkeys(
        ("loop", "loop-ends", "gated", "late"), "loop"
    ) | dict.fromkeys(("two-stream", "trm"), "trm")
    assert [models[name].injection for name in ("loop", "loop-ends", "gated", "late")] == ["none", "sum", "sum", "none"]
    assert [name for name, model in models.items() if model.gate] == ["gated"]
    for name in ("loop-ends", "gated", "late"):
        c = models[name]
        assert c.prelude_layers + c.n_layers * c.deep_steps + c.coda_layers == 6 and c.grad_deep_steps == c.deep_steps
    assert (models["two-stream"].supervision_steps, models["trm"].supervision_steps) == (1, 2)
    assert not any(model.halting for model in models.values())


def test_the_flops_of_a_run_whose_depth_changes(all_rungs):
    late = all_rungs.rungs["late"]
    early = flops_per_token(replace(late.model, deep_steps=1, grad_deep_steps=1)).train
    assert late.flops == pytest.approx(2 / 3 * early + 1 / 3 * flops_per_token(late.model).train, rel=1e-3)


def test_the_flops_of_the_beginning_of_a_run(all_rungs):
    late = all_rungs.rungs["late"]
    early = flops_per_token(replace(late.model, deep_steps=1, grad_deep_steps=1)).train
    assert mean_flops(late.train, late.model, 0.5) == early < late.flops
    assert mean_flops(late.train, late.model, 0.9) > early


def test_a_rung_with_other_settings(tmp_path):
    rungs = opened(tmp_path, "--rungs", "trm", "trm+gate=true+supervision_steps=3+lr=0.01").rungs
    plain, other = rungs.values()
    assert other.model.gate and not plain.model.gate and (plain.steps, other.steps) == (750, 473)
    assert other.flags == {"gate": True, "supervision_steps": 3, "lr": 0.01}


def test_a_rung_with_other_batches_has_as_many_tokens_and_flops(tmp_path):
    names = ["plain", "plain+batch_size=8", "plain+max_seq_len=4", "plain+norm=pre"]
    rungs = opened(tmp_path, "--rungs", *names, "--steps", "100").rungs
    plain, large, short, _ = (rungs[name] for name in names)
    assert (plain.tokens, large.tokens, short.tokens) == (32, 64, 16)
    assert [rung.equal_steps for rung in rungs.values()] == [100, 50, 200, 100]
    assert large.steps == round(plain.steps / 2)
    for rung in rungs.values():
        assert rung.steps * rung.tokens * rung.flops == pytest.approx(plain.steps * 32 * plain.flops, rel=0.01)


def test_a_setting_among_the_overrides_is_not_swept(tmp_path):
    it = opened(tmp_path, "--rungs", "plain", "--sweep", "lr=0.1,0.2", "--overrides", *SMALL, "lr=0.3")
    assert it.config.choices == {} and it.settings.train.lr == 0.3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rungs", "plain", "lopo"], "there is no rung lopo: choose from plain, plain-deep"),
        (["--rungs", "plain+gate"], "'gate' is no setting: write it as name=value"),
        (["--rungs", "plain+gaet=true"], "there is no setting --gaet: did you mean --gate"),
        (["--sweep", "lr"], "'lr' is no setting"),
        (["--sweep", "lrr=1"], "there is no setting --lrr"),
        (["--steps", "0"], "steps or corpus_bytes is under 1"),
        (["--budgets", "1.5"], "budgets are shares"),
        (["--control", "plain-wide"], "control is plain-wide: name one or two of the rungs"),
        (["--overrides", "recursion=loop"], "the recipe must have recursion trm"),
        (["--overrides", "max_minutes=3"], "max_minutes ends a run by time"),
        (["--overrides", "d_model"], "overrides has d_model: write it as name=value"),
        (["--jobs", "0"], "jobs is 0"),
        (["--corpus_bytes", "1000000"], "less than corpus_bytes"),
        (["--train_paths", "nowhere.txt"], "nowhere.txt does not exist"),
        (["--rungs", "plain", "--table"], "has no reported run of these rungs and lengths; start it without --table"),
        (["--corpus_bytes", "0"], "steps or corpus_bytes is under 1"),
        (["--rungs", "plain+seed=5"], "seed is set by the ladder itself: leave it out of sweep and rungs"),
        (["--rungs", "plain+warmup_steps=5"], "warmup_steps is set by the ladder itself"),
        (["--sweep", "max_steps=5"], "max_steps is set by the ladder itself: leave it out of sweep and rungs"),
        (["--overrides", "eval_every=5"], "eval_every is set by the ladder itself: leave it out of overrides"),
        (["--overrides", "gate=true"], "gate makes some of the rungs: leave it out of the recipe, or write rung"),
        (["--rungs", "gated", "--sweep", "gate=true,false"], "gate makes the rung gated or changes its cost: write"),
        (["--rungs", "plain", "--sweep", "batch_size=32,64"], "batch_size makes the rung plain or changes its cost"),
        (["--overrides", "sample_depth=true", "least_depth=2"], "least_depth is 2: set it to 1 or less"),
        (["--rungs", "loop+supervision_weights=0,0,1,0+recursion_from=0.5"], "train at smaller depths too"),
        (["--rungs", "loop", "--sweep", "d_ff=64,128"], r"changes its cost: write loop\+d_ff="),
    ],
)
def test_mistakes(words, message, tmp_path, monkeypatch):
    monkeypatch.setattr(ladder, "run_job", lambda *args: pytest.fail("a run was started"))
    (tmp_path / "text.txt").write_text(TEXT)
    with pytest.raises(UserError, match=message):
        ladder.main(["--train_paths", str(tmp_path / "text.txt"), "--output", str(tmp_path / "out"), *words])


@pytest.mark.parametrize(("swept", "said"), [("lr=abc", "--lr abc"), ("norm=post,middle", "--norm middle")])
def test_a_wrong_value_of_the_sweep(swept, said, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        opened(tmp_path, "--rungs", "plain", "--sweep", swept)
    assert said in capsys.readouterr().err.splitlines()[-1]


# ---- runs -----------------------------------------------------------------------------------------------------------


def test_the_text_of_each_kind_of_run(all_rungs):
    def paths(job, **changes):
        config = replace(all_rungs.config, **changes)
        flags = ladder.run_flags(all_rungs._replace(config=config), job)
        return [path.name for path in flags["train_paths"]], [path.name for path in flags["valid_paths"]]

    of_sweep, reported = (arms.Job("trm", (("max_steps", 40),), 0, is_sweep) for is_sweep in (True, False))
    judged = (["train.jsonl"], ["slice.jsonl"])
    assert paths(of_sweep) == judged and paths(reported) == (["train.jsonl", "slice.jsonl"], ["valid.jsonl"])
    assert paths(of_sweep, corpus_bytes=9) == paths(reported, corpus_bytes=9) == judged


def record_of(job, **more):
    return {"arm": job.arm, "changes": dict(job.changes), "seed": job.seed, "is_sweep": job.is_sweep} | more


def test_the_sweep_chooses_one_setting_after_the_other(tmp_path, capsys):
    words = ["--sweep", "lr=0.1,0.2,0.4", "norm=post,pre", "dropout=0.1", "--rungs", "plain", "trm", "--steps", "100"]
    it, done = opened(tmp_path, *words), []

    def do(job):
        done.append(job)
        changes = dict(job.changes)
        best = {"plain": 0.2, "trm": 0.4}[job.arm]
        bits = abs(changes["lr"] - best) + (changes["norm"] == "post") * (0.1 if job.arm == "plain" else -0.1)
        bits = math.inf if changes["lr"] == 0.1 else bits  # diverged
        return record_of(job, bits_per_byte=bits, updates=1, seconds=1.0)

    best = ladder.choose(it, do)
    assert best["plain"] == {"lr": 0.2, "norm": "pre", "dropout": 0.1}
    assert best["trm"] == {"lr": 0.4, "norm": "post", "dropout": 0.1}
    assert len(done) == 8 and {(job.is_sweep, job.seed) for job in done} == {(True, ladder.SWEEP_SEED)}
    steps = {(job.arm, dict(job.changes)["max_steps"]) for job in done}
    assert steps == {(name, round(0.2 * rung.steps)) for name, rung in it.rungs.items()}
    assert "trm: lr 0.4 is at the end of the values tried" in capsys.readouterr().err
    assert ladder.choose(it, do) == best and len(done) == 8  # all of them are in runs.jsonl


def test_a_setting_in_the_name_of_a_rung_is_not_swept(tmp_path, capsys):
    words = ["--sweep", "lr=0.1,0.2", "norm=pre", "--rungs", "plain", "trm+lr=0.2", "late+norm=post+lr=0.3"]
    it, done = opened(tmp_path, *words), []

    def do(job):
        done.append(job)
        return record_of(job, bits_per_byte=dict(job.changes)["lr"], updates=1, seconds=1.0)

    best = ladder.choose(it, do)
    assert best["plain"] == {"lr": 0.1, "norm": "pre"} and best["trm+lr=0.2"] == {"lr": 0.2, "norm": "pre"}
    assert best["late+norm=post+lr=0.3"] == {"lr": 0.3, "norm": "post"}
    assert [(job.arm, dict(job.changes)["lr"]) for job in done] == [("plain", 0.1), ("plain", 0.2)]
    assert capsys.readouterr().err.count("is at the end of the values tried") == 1  # of plain only


def test_reported_runs(all_rungs):
    best = dict.fromkeys(all_rungs.rungs, {"lr": 0.1})
    config = replace(all_rungs.config, seeds=[0, 1])
    steps = {}
    for job in ladder.jobs_of(all_rungs._replace(config=config), best):
        steps.setdefault((job.arm, job.seed), []).append(dict(job.changes)["max_steps"])
    assert len(steps) == 2 * len(ladder.RUNGS) and steps["two-stream", 1] == [200] and steps["trm", 0] == [200, 100]
    assert steps["plain-deep", 0] == [all_rungs.rungs["plain-deep"].steps]
    small = replace(config, corpus_bytes=1000, budgets=[0.5, 1.0])
    found = [j for j in ladder.jobs_of(all_rungs._replace(config=small), best) if j.seed == 0]
    assert [dict(j.changes)["max_steps"] for j in found if j.arm in ("plain-deep", "trm")] == [100, 200, 100]


def test_the_state_is_deleted_when_the_record_is_written(tmp_path):
    it = opened(tmp_path, "--rungs", "plain")
    jobs = [arms.Job("plain", (("lr", 0.1), ("max_steps", 9)), 0, is_sweep) for is_sweep in (True, False)]

    def do(job):
        folder = job.folder(it.config.output) / "step_00000009"
        (folder / "state").mkdir(parents=True)
        (folder / "model.safetensors").write_text("")
        return record_of(job, bits_per_byte=1.0, updates=9, seconds=1.0)

    ladder.do_all(it, jobs, do)
    left = [[str(p.relative_to(f)) for p in f.rglob("*")] for f in (job.folder(it.config.output) for job in jobs)]
    assert left == [[], ["step_00000009", "step_00000009/model.safetensors"]]


def test_only_missing_runs_are_done_and_finished_ones_are_kept(tmp_path):
    config, done = arms.RunsConfig(output=str(tmp_path)), []
    jobs = [arms.Job("plain", (("lr", 0.1), ("max_steps", n)), 0, False) for n in (1, 2, 3)]

    def do(job, fails=None):
        done.append(job)
        if job == fails:
            raise UserError("it failed")
        return record_of(job, exact=0.5, updates=1, seconds=1.0)

    arms.do_all(config, jobs[:1], do)
    with pytest.raises(UserError, match="it failed"):
        arms.do_all(config, jobs, lambda job: do(job, fails=jobs[1]))
    assert done == jobs[:2] and set(arms.known_runs(tmp_path)) == {jobs[0]}  # the third was not started
    done.clear()
    records = arms.do_all(config, [*jobs, jobs[0]], do)
    assert done == jobs[1:] and list(map(arms.job_of, records)) == [*jobs, jobs[0]]
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 3
    together = arms.RunsConfig(output=str(tmp_path / "two"), jobs=2)
    both = threading.Barrier(2)

    def do_together(job):
        both.wait(10)
        time.sleep(0 if job == jobs[0] else 0.1)
        return do(job, fails=jobs[0])

    with pytest.raises(UserError, match="it failed"):
        arms.do_all(together, jobs[:2], do_together)
    assert set(arms.known_runs(tmp_path / "two")) == {jobs[1]}  # it ran beside the one that failed
    (tmp_path / "runs.jsonl").write_text("[1]\n")
    with pytest.raises(UserError, match="not a file of runs"):
        arms.do_all(config, jobs, do)


# ---- report ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("freedom", "value"), [(1, 12.706), (2, 4.303), (10, 2.228), (11, 2.201), (30, 2.0423)])
def test_quantiles_of_the_t_distribution(freedom, value):
    assert ladder_report.t_quantile(freedom) == pytest.approx(value, abs=2e-4)


def test_a_paired_difference():
    mean, half = ladder_report.paired({0: 1.3, 1: 1.2, 2: 1.1, 9: 5.0}, {0: 1.0, 1: 1.0, 2: 1.0, 8: 5.0})
    assert mean == pytest.approx(0.2) and half == pytest.approx(4.303 * 0.1 / math.sqrt(3))
    assert ladder_report.paired({0: 1.5}, {0: 1.0}) == (0.5, math.inf)
    assert ladder_report.paired({0: 1.5}, {1: 1.0}) is None
    assert ladder_report.difference({0: 1.0, 1: 1.0}, {0: 1.25, 1: 1.25}) == "**-0.2500 (-0.2500 to -0.2500)**"
    assert ladder_report.difference({0: 1.0, 1: 1.5}, {0: 1.25, 1: 1.25}) == "+0.0000 (-3.1765 to +3.1765)"
    assert ladder_report.difference({0: 1.5}, {0: 1.0}) == "+0.5000 (one seed)"


def scored(nats):
    return {"nats_per_char": nats, "bits_per_byte": nats / math.log(2), "bytes": 100, "chars": 90}


def reported(arm, seed, nats, steps=200, **more):
    job = arms.Job(arm, (("lr", 0.01), ("max_steps", steps)), seed, False)
    size = {"parameters": 1_640_000, "tokens": 1000 * steps, "flops": 3e9 * steps}
    return record_of(job, **size, last=scored(nats + 0.01), averaged=scored(nats), **more)


def test_a_table_of_known_runs():
    groups = {
        "plain": [reported("plain", seed, nats) for seed, nats in enumerate((1.6, 1.62, 1.64))],
        "trm": [reported("trm", seed, nats) for seed, nats in enumerate((1.5, 1.51, 1.55))],
    }
    text = ladder_report.report({"equal tokens": groups}, [])
    assert text.startswith("validation text: 100 bytes, 90 characters; figures in nats per character\n\nequal tokens:")
    heads, _, plain, trm = text.splitlines()[-4:]
    assert "difference from plain" in heads
    cells = ["plain", "1.64M", "200K", "600B", "1.6300 ± 0.0200", "1.6200 ± 0.0200", "2.3372", "1.6000, 1.6200, 1.6400"]
    assert plain == f"| {' | '.join(cells)} |  | lr0.01 |"
    spread = 4.303 * math.sqrt(1 / 3) * 0.01  # the differences are -0.1, -0.11, -0.09
    assert f"| **-0.1000 (-{0.1 + spread:.4f} to -{0.1 - spread:.4f})** |" in trm
    groups["trm"][0]["averaged"]["bytes"] = 99
    with pytest.raises(UserError, match="texts of different sizes"):
        ladder_report.report({"equal tokens": groups}, [])


def test_the_control_of_a_table():
    groups = dict.fromkeys(("loop", "plain", "plain-deep"))
    assert ladder_report.control_of("equal tokens", groups, []) == "plain"
    assert ladder_report.control_of("equal FLOPs", groups, []) == "plain-deep"
    assert ladder_report.control_of("equal FLOPs", {"loop": None}, []) == "loop"
    assert [ladder_report.control_of(t, groups, ["plain", "loop"]) for t in ("equal tokens", "FLOPs")] == [
        "plain",
        "loop",
    ]
    assert ladder_report.control_of("equal FLOPs", groups, ["plain"]) == "plain"


def test_a_control_that_a_table_does_not_have():
    groups = dict.fromkeys(("loop", "plain"))
    assert ladder_report.control_of("equal tokens", groups, ["plain-deep"]) == "plain"


def test_tables_do_not_mix_settings(capsys):
    old, other = (reported("plain", seed, 1.5) for seed in (0, 1))
    new = reported("plain", 0, 1.4)
    new["changes"] = {"lr": 0.02, "max_steps": 200}
    sweep = reported("plain", 1000, 1.3) | {"is_sweep": True}
    steps = {"plain": [200]}
    assert ladder.of_newest_settings([old, other, new, sweep], steps) == [new]
    assert "2 runs left out: newer ones have other settings" in capsys.readouterr().err
    new["changes"]["max_steps"] = 100
    assert ladder.of_newest_settings([old, other, new, sweep], steps) == [old, other] and not capsys.readouterr().err


def test_runs_find_their_tables(all_rungs, tmp_path):
    deep = all_rungs.rungs["plain-deep"].steps
    records = [reported(arm, seed, 1.5, steps) for seed in (1, 0) for arm, steps in (("trm", 200), ("trm", 100))]
    records += [reported("plain-deep", 0, 1.6, deep), reported("two-stream", 0, 1.4, 200), reported("trm", 0, 1.7, 100)]
    tables = ladder.tables_of(all_rungs, records)
    steps = {
        title: {n: [r["changes"]["max_steps"] for r in runs] for n, runs in t.items()} for title, t in tables.items()
    }
    assert steps == {
        "equal tokens": {"two-stream": [200], "trm": [200, 200]},
        "equal FLOPs": {"plain-deep": [deep], "two-stream": [200], "trm": [100, 100]},
    }
    runs = tables["equal FLOPs"]["trm"]
    assert [(r["seed"], r["averaged"]["nats_per_char"]) for r in runs] == [(0, 1.7), (1, 1.5)]  # the last run counts
    assert ladder_report.draw(tables, tmp_path / "ladder.png").stat().st_size > 20_000


def test_a_small_corpus_reports_the_best_evaluation_at_the_best_budget(all_rungs, tmp_path):
    small = replace(all_rungs.config, corpus_bytes=1000, budgets=[0.5, 1.0])
    it = all_rungs._replace(config=small)
    half, full = ladder.lengths(small, "plain-deep", it.rungs["plain-deep"])
    assert (half, full, ladder.lengths(small, "trm", it.rungs["trm"])) == (100, 200, [100])

    def run_of(arm, seed, steps, on_slice, best):
        curve = [[1e9 * steps, on_slice], [2e9 * steps, on_slice + 0.1]]
        return reported(arm, seed, 2.0, steps, slice=on_slice, curve=curve, best=scored(best))

    records = [run_of("plain-deep", 0, half, 1.9, 1.70), run_of("plain-deep", 0, full, 1.8, 1.60)]
    records += [run_of("plain-deep", 1, half, 1.7, 1.50), run_of("plain-deep", 1, full, 1.8, 1.40)]
    records += [run_of("trm", seed, 100, 1.75, 1.45) for seed in (0, 1)]
    ((title, groups),) = ladder.tables_of(it, records).items()
    assert [(r["seed"], r["changes"]["max_steps"]) for r in groups["plain-deep"]] == [(0, full), (1, half)]
    text = ladder_report.report({title: groups}, small.control)
    assert "| 1.5500 ± 0.0707 | 2.2362 | 1.6000, 1.5000 |  |" in text and "| -0.1000 (-" in text
    assert ladder_report.draw({title: groups}, tmp_path / "small.png").stat().st_size > 20_000


@pytest.mark.slow
@pytest.mark.parametrize("small", [False, True])
def test_a_ladder_continues_where_it_stopped(tmp_path, capsys, small):
    (tmp_path / "text.txt").write_text(TEXT)
    words = ["--train_paths", str(tmp_path / "text.txt"), "--output", str(tmp_path / "out"), "--seeds", "0"]
    words += ["--steps", "20", "--sweep", "lr=0.01,0.02", *(["--corpus_bytes", "3000"] if small else [])]
    words += ["--budgets", "1.0", "--overrides", *SMALL, "compile=false", "precision=fp32"]
    ladder.main([*words, "--rungs", "two-stream"])
    first = (tmp_path / "out" / "runs.jsonl").read_text()
    ladder.main([*words, "--rungs", "two-stream", "late"])
    lines = (tmp_path / "out" / "runs.jsonl").read_text()
    runs = [json.loads(line) for line in lines.splitlines()]
    assert lines.startswith(first) and len(first.splitlines()) == 3 and len(runs) == (6 if small else 7)
    whole = [r for r in runs if not r["is_sweep"]]
    assert all(r["averaged"]["bytes"] == len(TEXT) - int(0.9 * len(TEXT)) for r in whole)
    assert all(r["updates"] == r["changes"]["max_steps"] for r in runs)
    assert ("best" in whole[0]) == small and not list((tmp_path / "out").glob("sweep_*/step_*"))
    assert "| late |" in capsys.readouterr().out and (tmp_path / "out" / "ladder.png").exists()
