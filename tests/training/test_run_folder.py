"""Run folders that were copied or moved, or on systems without links; and the text that a run started with."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from scripts import ROOT
from trainers import TINY, assert_same_checkpoints, during, read_metrics

import train_trm_lm
from src.checkpoint import follow, load_model, load_state, resolve
from src.data.corpus import fingerprint_files
from src.errors import UserError
from src.training import run_folder
from src.training.run_folder import RunLock, checkpoints, corpus_changes, keep_corpus, point, prune

pytest_plugins = "trainers"  # the fixtures make and corpus
pytestmark = pytest.mark.usefixtures("unchecked")


def stopped(make, name="run", step=4, **changes):
    """The folder of a run of 8 steps that was killed after `step`, with an earlier checkpoint."""
    trainer = make(name, save_every=step - 1, eval_every=2, **changes)

    def die():
        raise KeyboardInterrupt

    during(trainer, step, die)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.lock.release()
    return trainer.folder


@pytest.fixture
def files(corpus, tmp_path):
    home = tmp_path / "text"
    home.mkdir()
    for name in ("a", "b"):
        shutil.copy(corpus["train_paths"][0], home / f"{name}.jsonl")
    with open(home / "b.jsonl", "a") as file:
        file.write('{"text": "one more"}\n')
    return home


class TestCopied:
    def test_links_that_became_folders_are_links_again(self, make, tmp_path, capsys):
        make("straight", save_every=3, eval_every=2).train()
        folder = stopped(make)
        shutil.copytree(folder, tmp_path / "copy")  # follows the links, as cp -rL does
        assert not (tmp_path / "copy" / "last").is_symlink() and not (tmp_path / "copy" / "best").is_symlink()
        (tmp_path / "copy" / "best" / "notes.txt").write_text("mine")
        trainer = make("copy", save_every=3, eval_every=2, resume=True)
        assert trainer.step == 3
        trainer.train()
        for name in ("last", "best"):
            link = tmp_path / "copy" / name
            assert link.is_symlink() and link.resolve() == (tmp_path / "copy" / "step_00000008")
        assert_same_checkpoints(tmp_path / "straight" / "last", tmp_path / "copy" / "last")
        assert (tmp_path / "copy" / "best_copy" / "notes.txt").read_text() == "mine"
        assert "best was a folder, not a link" in capsys.readouterr().err
        assert not list((tmp_path / "copy").glob(".*.old"))

    def test_a_copy_that_is_the_best_still_opens(self, make, tmp_path):
        folder = stopped(make)
        shutil.copytree(folder, tmp_path / "copy")
        shutil.rmtree(tmp_path / "copy" / "step_00000003")
        assert resolve(tmp_path / "copy").name == "best"

    def test_a_crash_while_a_link_takes_a_folders_place(self, make, tmp_path):
        folder = stopped(make)
        (folder / "last").unlink()
        shutil.copytree(folder / "step_00000003", folder / ".last.old")
        assert make(save_every=3, eval_every=2, resume=True).step == 3
        assert load_state(folder / "last")["step"] == 3 and not (folder / ".last.old").exists()


class TestMoved:
    @pytest.fixture
    def moved(self, make, corpus, tmp_path):
        stopped(make).rename(tmp_path / "moved")
        return tmp_path / "moved"

    def parse(self, *words):
        return train_trm_lm.parse_args([str(word) for word in words]).train.save_dir

    @pytest.mark.parametrize("form", ["--config {}", "--config={}"])
    def test_it_goes_on_where_its_settings_lie(self, moved, capsys, form):
        words = form.format(moved / "config.yaml").split(" ")
        assert self.parse(*words, "--resume") == str(moved)
        err = capsys.readouterr().err
        assert f"resuming in {moved}, the folder of this config.yaml, not in {moved.parent / 'run'}" in err

    def test_relative_paths_are_from_the_working_directory(self, make, files, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        folder = make("here", train_paths=["text/a.jsonl"], valid_paths=["text/b.jsonl"]).folder
        monkeypatch.chdir(tmp_path / "text")
        with pytest.raises(UserError, match=rf"text/a.jsonl does not exist in {tmp_path}/text$"):
            train_trm_lm.main(["--config", str(folder / "config.yaml"), "--resume"])

    def test_a_flag_wins_and_a_new_run_takes_the_settings_alone(self, moved, tmp_path):
        words = ["--config", moved / "config.yaml"]
        assert self.parse(*words, "--resume", "--save_dir", "other") == "other"
        assert self.parse(*words) == str(tmp_path / "run")
        recipe = shutil.copy(moved / "config.yaml", tmp_path / "config.yaml")
        assert self.parse("--config", recipe, "--resume") == str(tmp_path / "run")

    def test_it_ends_as_it_would_have(self, moved, make, tmp_path):
        make("straight", save_every=3, eval_every=2).train()
        train_trm_lm.main(["--config", str(moved / "config.yaml"), "--resume"])
        assert_same_checkpoints(tmp_path / "straight" / "last", moved / "last")
        assert [r["step"] for r in read_metrics(moved) if "loss" in r] == list(range(1, 9))
        assert not (tmp_path / "run").exists()

    def test_a_mistyped_folder_is_no_new_run(self, make, tmp_path):
        with pytest.raises(UserError, match="save_dir .*typo holds no run: correct it, or start one without --resume"):
            make("typo", resume=True)
        assert not (tmp_path / "typo").exists()

    def test_resume_is_no_setting_of_the_run(self, make, tmp_path):
        folder = make().folder
        make(resume=True).lock.release()
        assert yaml.safe_load((folder / "config.yaml").read_text())["resume"] is False

    def test_a_setting_that_is_younger_than_the_run(self, make):
        path = make().folder / "config.yaml"
        path.write_text("".join(line for line in path.open() if not line.startswith(("strict", "allow_changed"))))
        assert make(resume=True).step == 0


class TestText:
    def test_the_best_checkpoint_of_other_evaluations_is_forgotten(self, make, capsys):
        best = make(max_steps=2, eval_every=1, eval_batches=1)
        best.train()
        again = {"resume": True, "max_steps": 2, "eval_every": 1}
        same = make(**again, eval_batches=1)
        assert same.best == best.best < math.inf and "chosen anew" not in capsys.readouterr().err
        same.lock.release()
        assert make(**again, eval_batches=2).best == math.inf and "chosen anew" in capsys.readouterr().err

    @pytest.mark.parametrize("streaming", [False, True])
    def test_a_change_is_told_and_refused(self, make, files, capsys, streaming):
        settings = {"train_paths": [str(files)], "streaming": streaming, "shuffle_buffer": 4}
        stopped(make, **settings)
        with open(files / "a.jsonl", "a") as file:
            file.write('{"text": "a late line"}\n')
        shutil.copy(files / "a.jsonl", files / "c.jsonl")
        (files / "b.jsonl").unlink()
        again = settings | {"resume": True, "save_every": 3, "eval_every": 2}
        said = "train files added: c.jsonl; train files removed: b.jsonl; train files changed: a.jsonl"
        with pytest.raises(UserError, match=rf"\({said}\): restore the old text, or .*--allow_changed_corpus true"):
            make(**again)
        trainer = make(**again, allow_changed_corpus=True)
        assert f"the run continues with changed text: {said}" in capsys.readouterr().err
        assert trainer.best == math.inf, "evaluations on other text do not compare"
        trainer.train()
        assert trainer.step == 8
        assert make(**again).best == trainer.best < math.inf  # from now on, this is the text of the run

    def test_validation_text_and_a_mixture(self, make, files):
        paths = [str(files / "a.jsonl"), str(files / "b.jsonl")]
        settings = {"train_paths": paths, "mixture": [1.0, 2.0], "valid_paths": [str(files / "b.jsonl")]}
        make(**settings)
        with open(files / "b.jsonl", "a") as file:
            file.write('{"text": "more"}\n')
        with pytest.raises(UserError, match=r"\(train 2 files changed: b.jsonl; valid files changed: b.jsonl\)"):
            make(**settings, resume=True)

    def test_a_corpus_that_moved_is_the_same(self, make, files, tmp_path):
        stopped(make, train_paths=[str(files)])
        files.rename(tmp_path / "elsewhere")
        trainer = make(train_paths=[str(tmp_path / "elsewhere")], resume=True, save_every=3, eval_every=2)
        assert trainer.step == 3

    def test_a_run_from_before_this_was_written_down(self, make, files):
        folder = stopped(make, train_paths=[str(files)])
        (folder / "corpus.json").unlink()
        with pytest.raises(UserError, match="--train_paths is"):
            make(train_paths=[str(files / "a.jsonl")], resume=True)
        make(train_paths=[str(files)], resume=True, save_every=3, eval_every=2)
        assert (folder / "corpus.json").exists()

    def test_the_tokenizer(self, make, files):
        """The checkpoint's tokenizer was replaced by another one of the same size."""
        folder = stopped(make, train_paths=[str(files)])
        keep_corpus(folder, {"tokenizer": "that of another"})
        with pytest.raises(UserError, match="tokenizer changed"):
            make(train_paths=[str(files)], resume=True, save_every=3, eval_every=2)

    def test_what_is_told(self, tmp_path):
        keep_corpus(tmp_path, {"train": [("a", 1, "x"), ("b", 2, "y")]})
        for now, said in (
            ([("a", 1, "x"), ("b", 2, "y")], []),
            ([("b", 2, "y"), ("a", 1, "x")], ["train files come in another order"]),
            ([("a", 1, "x")], ["train files removed: b"]),
            ([(f"{n:03}", 1, "x") for n in range(9)], ["added: 000, 001, 002 and 6 more", "removed: a, b"]),
        ):
            told = corpus_changes(tmp_path, {"train": now})
            assert len(told) == len(said) and all(map(str.endswith, told, said))

    def test_names_that_are_not_utf8(self, tmp_path):
        """A run on such a file can be resumed, and the note of an older run is read."""
        name = os.path.join(os.fsencode(tmp_path), b"caf\xe9.txt")
        Path(os.fsdecode(name)).write_text("x")
        ((shown, size, digest),) = now = fingerprint_files([os.fsdecode(name)])
        assert (shown, size) == ("caf\\xe9.txt", 1)
        keep_corpus(tmp_path, {"train": now})
        assert corpus_changes(tmp_path, {"train": now}) == []
        keep_corpus(tmp_path, {"train": [("caf\udce9.txt", size, digest)]})
        assert len(corpus_changes(tmp_path, {"train": now})) == 2

    @pytest.mark.parametrize("content", ["", "[", "3", "[1]", '{"train": 3}', '{"train": [[]]}', '{"train": [[[]]]}'])
    def test_a_broken_note_is_one_line(self, tmp_path, content):
        (tmp_path / "corpus.json").write_text(content)
        try:
            assert corpus_changes(tmp_path, {"train": [("a", 1, "x")]})
        except UserError as error:
            assert "corpus.json" in str(error)


class TestCheckpoints:
    def test_only_checkpoints_are_taken_for_some(self, make):
        trainer = make(save_every=2, eval_every=100, keep_checkpoints=1)
        for name in ("step_notes", "step_00000001", "step_1e3"):
            (trainer.folder / name).mkdir()
            (trainer.folder / name / "mine.txt").write_text("mine")
        during(trainer, 3, lambda: (trainer.folder / "step_00000002" / "mine.txt").write_text("mine"))
        trainer.train()
        assert [path.name for path in checkpoints(trainer.folder)] == ["step_00000008"]
        kept = sorted(str(path.relative_to(trainer.folder)) for path in trainer.folder.glob("step_*/mine.txt"))
        assert kept == [f"{name}/mine.txt" for name in ("step_00000001", "step_00000002", "step_1e3", "step_notes")]
        assert [path.name for path in (trainer.folder / "step_00000002").iterdir()] == ["mine.txt"]

    def test_a_crash_between_the_renames_loses_no_checkpoint(self, make):
        folder = stopped(make)
        (folder / "step_00000003").rename(folder / ".step_00000003.old")
        assert make(resume=True, save_every=3, eval_every=2).step == 3
        prune(folder, 1)
        assert not list(folder.glob(".step*"))


class TestWithoutLinks:
    """Imitates Windows: no symbolic links and no fcntl."""

    @pytest.fixture
    def windows(self, monkeypatch):
        def refuse(*args, **kwargs):
            raise OSError(1314, "A required privilege is not held by the client")

        monkeypatch.setattr(os, "symlink", refuse)
        monkeypatch.setattr(run_folder, "fcntl", None)

    def test_a_run_its_resume_and_its_text(self, make, windows, tmp_path):
        make("straight", save_every=3, eval_every=2).train()
        folder = stopped(make)
        assert (folder / "last").read_text() == "step_00000003\n" and (folder / "best").read_text() == "step_00000002\n"
        trainer = make(resume=True, save_every=3, eval_every=2)
        trainer.train()
        assert_same_checkpoints(follow(tmp_path / "straight" / "last"), follow(folder / "last"))
        for path in (folder, folder / "last", folder / "best"):
            model, _ = load_model(path)
            assert resolve(path).name == "step_00000008" and torch.isfinite(model.embed.weight).all()

    def test_one_process_at_a_time(self, make, windows):
        trainer = make()
        with pytest.raises(UserError, match=rf"in use by another run \(process {os.getpid()}\)"):
            RunLock(trainer.folder)
        trainer.lock.release()
        RunLock(trainer.folder).release()

    @pytest.mark.parametrize(
        "content", ["", "../../etc", "step_1/x", "/step_1", "step_1\nstep_2", "\xff", "x" * 10_000]
    )
    def test_a_file_that_names_no_checkpoint(self, tmp_path, content):
        (tmp_path / "last").write_bytes(content.encode("latin-1"))
        assert follow(tmp_path / "last") == tmp_path / "last"
        with pytest.raises(UserError, match="is neither a checkpoint"):
            resolve(tmp_path)

    def test_a_file_becomes_a_link_where_there_are_some(self, tmp_path):
        (tmp_path / "last").write_text("step_00000001\n")
        point(tmp_path / "last", "step_00000002")
        assert os.readlink(tmp_path / "last") == "step_00000002"

    @pytest.mark.slow  # starts Python with torch three times
    @pytest.mark.parametrize("script", ["train_trm_lm.py", "generate.py", "train_classifier.py"])
    def test_scripts_start_without_fcntl(self, script):
        code = "import sys, runpy; sys.modules['fcntl'] = None; sys.argv = [sys.argv[1], '--help']; "
        code += "runpy.run_path(sys.argv[0], run_name='__main__')"
        done = subprocess.run([sys.executable, "-c", code, script], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and "usage:" in done.stdout, done.stderr


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002], ids=oct)
def test_modes_of_all_files_follow_the_umask(make, umask, tmp_path):
    before = os.umask(umask)
    try:
        make(draws=True, monitoring=TINY.get("monitoring") or train_trm_lm.parse_args([]).train.monitoring).train()
    finally:
        os.umask(before)
    paths = [path for path in (tmp_path / "run").rglob("*") if not path.is_symlink()]
    assert {"model.safetensors", "training.pt", "config.yaml", "learning_curve.png"} <= {path.name for path in paths}
    wrong = {
        p.name: oct(p.stat().st_mode)
        for p in paths
        if p.stat().st_mode & 0o777 != (0o777 if p.is_dir() else 0o666) & ~umask
    }
    assert not wrong
