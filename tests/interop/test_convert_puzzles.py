"""convert.py and puzzle models: weights of the TRM authors' code to a checkpoint, back again, and to the Hub."""

import os
import re

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from test_trm_official import golden, needs_golden

import convert
import train_puzzles
from src.checkpoint import load_config, load_network, own_state, save_checkpoint
from src.config import run
from src.files.plain_yaml import dump_yaml, read_yaml
from src.interop.formats import recognize
from src.interop.trm_official import strip_names, write_official
from src.model import TRMConfig, TRMModel
from src.tasks.puzzle_data import PuzzleForm, read_form
from src.tasks.puzzle_folder import kind_named
from src.tokenizer import ByteLevelTokenizer

NAMES = [f"{kind}_prefix{prefix}" for kind in ("att", "mlp") for prefix in (0, 16)]
SAVE = {"pt": torch.save, "safetensors": save_file}


def theirs(tmp_path, settings, weights, form="pt", prefix="", yaml=True):
    """A run folder of the authors' code: weights, and all_config.yaml as they write it."""
    folder = tmp_path / "theirs"
    folder.mkdir(exist_ok=True)
    path = folder / ("step_100" if form == "pt" else "model.safetensors")
    SAVE[form]({prefix + name: tensor.clone() for name, tensor in weights.items()}, path)
    if yaml:
        arch = {name: value for name, value in settings.items() if name not in ("batch_size", "seq_len", "vocab_size")}
        (folder / "all_config.yaml").write_text(dump_yaml({"arch": arch, "lr": 1e-4, "data_paths": ["data/x"]}))
    return path


@pytest.fixture
def made(tiny):
    """A function: made(vocabulary, cells, **settings) -> (their settings, their weights) of a small random model."""

    def make(vocab_size=11, cells=81, **settings):
        form = {"d_model": 16, "n_heads": 2, "d_ff": 256, "n_layers": 1, "embed_scale": 4.0, "norm_gain": False}
        form |= {"causal": False, "vocab_size": vocab_size, "max_seq_len": cells, "pad_token_id": 0}
        form["token_loss"] = "stablemax"
        model = tiny(**form | settings)
        weights, told = write_official(model.config, own_state(model), "made")
        return told["arch"], weights

    return make


@needs_golden
@pytest.mark.parametrize("form", ["pt", "safetensors"])
@pytest.mark.parametrize("name", NAMES)
def test_golden_logits_and_every_bit_back(tmp_path, capsys, name, form):
    settings, weights, expected = golden(name)
    source, there, back = theirs(tmp_path, settings, weights, form), tmp_path / "there", tmp_path / "back" / "m.pt"
    assert recognize(source).name == "a checkpoint of the TRM authors' code"
    convert.main([str(source), str(there)])
    out = capsys.readouterr()
    assert out.out == f"{there}\n" and "11 tokens, sudoku9" in out.err
    model = load_network(there)
    with torch.no_grad():
        logits = model(expected["inputs"], supervision_steps=1, puzzle_ids=expected.get("puzzle_identifiers")).logits
    wanted = expected["step1.logits"]
    assert (logits - wanted).abs().max() < 1e-5 * max(1, wanted.abs().max())
    assert read_form(there).kind.name == "sudoku9"
    convert.main([str(there), str(back), "--to", "trm"])
    own, written = strip_names(weights), strip_names(torch.load(back, weights_only=True))
    assert own.keys() == written.keys()
    for key in own:
        rows = slice(1) if key.startswith("q_head") else slice(None)  # their second row is dropped
        assert torch.equal(own[key][rows], written[key][rows]), key
    assert written["q_head.bias"][1] == -5 and not written["q_head.weight"][1].any()
    told = read_yaml(back.with_name("all_config.yaml"))["arch"]
    assert all(told[key] == settings[key] for key in ("num_heads", "H_cycles", "L_cycles", "expansion", "mlp_t"))


class TestForms:
    @pytest.mark.parametrize(
        ("vocab_size", "cells", "kind"), [(11, 81, "sudoku9"), (6, 900, "maze30x30"), (12, 900, "arc")]
    )
    def test_by_the_vocabulary(self, made, tmp_path, vocab_size, cells, kind):
        convert.main([str(theirs(tmp_path, *made(vocab_size, cells))), str(tmp_path / "there")])
        assert read_form(tmp_path / "there").kind.name == kind
        assert load_config(tmp_path / "there").max_seq_len == cells

    def test_by_a_flag_or_by_the_weights(self, made, tmp_path):
        convert.main([str(theirs(tmp_path, *made(6, 16))), str(tmp_path / "a"), "--puzzle", "sudoku4"])
        mixing = {"mixer": "mlp", "mixer_ff": 256, "positions": "none"}
        convert.main([str(theirs(tmp_path, *made(6, 16, **mixing))), str(tmp_path / "b")])
        learned = {"positions": "learned", "embed_scale": 8**0.5}
        convert.main([str(theirs(tmp_path, *made(8, 36, **learned))), str(tmp_path / "c")])
        kinds = [read_form(tmp_path / name).kind.name for name in "abc"]
        assert kinds == ["sudoku4", "sudoku4", "sudoku6"]

    @pytest.mark.parametrize("prefix", ["", "_orig_mod.", "_orig_mod.model."])
    @pytest.mark.parametrize("key", [None, "ema", "model", "state_dict"])
    def test_wrapped_and_nested(self, made, tmp_path, prefix, key):
        settings, weights = made()
        source = theirs(tmp_path, settings, weights, prefix=prefix)
        if key:
            torch.save({"step": 3, key: torch.load(source)}, source)
        convert.main([str(source), str(tmp_path / "there")])
        found = own_state(load_network(tmp_path / "there"))
        assert torch.equal(found["net.blocks.0.attn.qkv.weight"], strip_names(weights)[QKV])

    def test_flags_in_place_of_the_yaml(self, made, tmp_path):
        settings, weights = made(prefix_tokens=4, puzzle_ids=3, latent_steps=3, supervision_steps=5)
        with_yaml, without = theirs(tmp_path, settings, weights), tmp_path / "alone.pt"
        torch.save(weights, without)
        flags = "--n_heads 2 --deep_steps 2 --latent_steps 3 --supervision_steps 5 --prefix_tokens 4".split()
        convert.main([str(with_yaml), str(tmp_path / "a")])
        convert.main([str(without), str(tmp_path / "b"), *flags])
        assert load_config(tmp_path / "a") == load_config(tmp_path / "b")
        convert.main([str(without), str(tmp_path / "c"), *flags[:-2]])
        assert load_config(tmp_path / "c").prefix_tokens == 16  # their shipped setting

    def test_the_prefix_follows_from_the_mixer(self, made, tmp_path):
        settings, weights = made(prefix_tokens=4, puzzle_ids=3, mixer="mlp", mixer_ff=256, positions="none")
        source = theirs(tmp_path, settings, weights, yaml=False)
        convert.main([str(source), str(tmp_path / "a"), *"--n_heads 2 --deep_steps 2 --latent_steps 2".split()])
        config = load_config(tmp_path / "a")
        assert (config.prefix_tokens, config.max_seq_len) == (4, 81)


QKV = "L_level.layers.0.self_attn.qkv_proj.weight"


class TestUse:
    def test_training_starts_from_it(self, made, tmp_path, capsys):
        convert.main([str(theirs(tmp_path, *made(6, 16))), str(tmp_path / "there"), "--puzzle", "sudoku4"])
        words = "--puzzle sudoku4 --n_puzzles 60 --symmetries relabel --batch_size 4 --max_steps 2 --compile false"
        words += " --precision fp32 --device cpu"
        own = ["--init_from", str(tmp_path / "there"), "--save_dir", str(tmp_path / "run")]
        train_puzzles.main([*words.split(), *own])
        assert "done: step 2" in capsys.readouterr().err
        convert.main([str(tmp_path / "run"), str(tmp_path / "m.pt"), "--to", "trm"])
        assert "all_config.yaml has its settings" in capsys.readouterr().err
        convert.main([str(tmp_path / "m.pt"), str(tmp_path / "again")])
        best = own_state(load_network(tmp_path / "run"))
        assert all(
            torch.equal(tensor, best[name]) for name, tensor in own_state(load_network(tmp_path / "again")).items()
        )

    def test_hub(self, made, tmp_path, monkeypatch, capsys):
        convert.main([str(theirs(tmp_path, *made(6, 16))), str(tmp_path / "there"), "--puzzle", "sudoku4"])
        convert.main([str(tmp_path / "there"), str(tmp_path / "hub"), "--to", "hub", "--license", "mit"])
        card = ModelCard.load(tmp_path / "hub" / "README.md")
        assert card.data.license == "mit" and card.data.pipeline_tag is None
        assert "puzzles of the kind sudoku4" in card.text and "cells of a puzzle | 16" in card.text
        (snippet,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
        monkeypatch.chdir(tmp_path)
        (tmp_path / "puzzle.txt").write_text("1...\n..2.\n.3..\n...4\n")
        capsys.readouterr()
        exec(compile(snippet, "the card", "exec"), {})
        assert re.fullmatch(r"(?:.{4}\n){4}", capsys.readouterr().out)


@pytest.fixture
def puzzle_checkpoint(tmp_path):
    def make(**settings):
        config = {"vocab_size": 6, "max_seq_len": 16, "d_model": 16, "n_heads": 2, "n_layers": 1, "causal": False}
        model = TRMModel(TRMConfig(**config | settings))
        save_checkpoint(tmp_path / "mine", model, PuzzleForm(kind_named("sudoku4")))
        return tmp_path / "mine"

    return make


FLAGS = "--n_heads 2 --deep_steps 2 --latent_steps 2".split()


class Runs:
    """Pickles as a call: loading it without weights_only would make a folder."""

    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def remove(*names):
    def change(settings, weights):
        for name in names:
            settings.pop(name, None)
            weights.pop(f"model.inner.{name}", None)

    return change


class TestMistakes:
    def fails(self, words, capsys):
        with pytest.raises(SystemExit) as caught:
            run(lambda: convert.main([str(word) for word in words]))
        out = capsys.readouterr()
        lines = [line for line in out.err.splitlines() if line.startswith("error: ")]
        assert caught.value.code == 2 and out.out == "" and len(lines) == 1 and out.err.splitlines()[-1] == lines[0]
        return lines[0]

    @pytest.mark.parametrize(
        ("change", "flags", "said"),
        [
            (lambda s, w: None, ["--n_heads", "3"], "d_model 16 does not divide into n_heads 3"),
            (lambda s, w: None, ["--puzzle", "sudoku4"], "81 cells|sudoku4 has 16 cells"),
            (lambda s, w: None, ["--puzzle", "chess"], "puzzle kind 'chess' is not known"),
            (lambda s, w: None, ["--tokenizer", "byte"], "has no tokenizer: leave it out"),
            (remove("num_heads"), [], "'num_heads' is missing: it should be in the all_config.yaml"),
            (remove("lm_head.weight"), [], "lm_head.weight is missing"),
            (remove(f"{QKV}"), [], "attn.qkv.weight is missing"),
            (
                lambda s, w: w.update({"model.inner.lm_head.bias": torch.zeros(11)}),
                [],
                "lm_head.bias is not a weight of TRM",
            ),
            (lambda s, w: w.update({f"model.inner.{QKV}": torch.zeros(3, 16)}), [], r"shape \[3, 16\].*\[48, 16\]"),
            (
                lambda s, w: w.update({"model.inner.H_init": torch.zeros(16, dtype=torch.int32)}),
                [],
                "dtype torch.int32",
            ),
            (lambda s, w: s.update(H_cycles="many"), [], "'H_cycles' is 'many', not a whole number"),
            (lambda s, w: s.update(puzzle_emb_len=0, rope_theta="x"), [], "rope_theta"),
        ],
        ids="heads sudoku4 chess tokenizer num_heads head qkv bias shape dtype cycles theta".split(),
    )
    def test_weights_and_settings(self, made, tmp_path, capsys, change, flags, said):
        settings, weights = made()
        change(settings, weights)
        line = self.fails([theirs(tmp_path, settings, weights), tmp_path / "out", *flags], capsys)
        assert re.search(said, line) and not (tmp_path / "out").exists()

    def test_a_vocabulary_that_fits_no_puzzle(self, made, tmp_path, capsys):
        source = theirs(tmp_path, *made(7, 49))
        assert "no known puzzle has 7 tokens: name it with --puzzle" in self.fails([source, tmp_path / "out"], capsys)
        line = self.fails([source, tmp_path / "out", "--puzzle", "sudoku9"], capsys)
        assert "is a model for 81 cells and 7 tokens, but sudoku9 has 81 cells and 11 tokens" in line
        mixing = {"mixer": "mlp", "mixer_ff": 256, "positions": "none"}
        source = theirs(tmp_path, *made(7, 49, **mixing))
        assert "no known puzzle has 49 cells and 7 tokens" in self.fails([source, tmp_path / "out"], capsys)

    def test_no_yaml_and_no_flags(self, made, tmp_path, capsys):
        source = theirs(tmp_path, *made(), yaml=False)
        line = self.fails([source, tmp_path / "out"], capsys)
        assert "no all_config.yaml beside it" in line and "give --n_heads, --deep_steps, --latent_steps" in line
        assert "no all_config.yaml" in self.fails([source, tmp_path / "out", *FLAGS[:4]], capsys)
        convert.main([str(source), str(tmp_path / "out"), *FLAGS])
        assert (tmp_path / "out" / "puzzle.json").exists()

    def test_a_yaml_of_something_else(self, made, tmp_path, capsys):
        source = theirs(tmp_path, *made())
        source.with_name("all_config.yaml").write_text("arch: trm\n")
        assert "arch is 'trm', not a map" in self.fails([source, tmp_path / "out"], capsys)
        source.with_name("all_config.yaml").write_text("arch: !!python/object:os.system {}\n")
        assert "tags" in self.fails([source, tmp_path / "out"], capsys)

    def test_code_is_not_run(self, made, tmp_path, capsys, monkeypatch):
        monkeypatch.chdir(tmp_path)
        _, weights = made()
        torch.save(weights | {"more": Runs()}, tmp_path / "m.pt")
        line = self.fails([tmp_path / "m.pt", tmp_path / "out", *FLAGS], capsys)
        assert "it contains more than tensors and numbers" in line and not (tmp_path / "unpickled").exists()

    def test_cut_short(self, made, tmp_path, capsys):
        source = theirs(tmp_path, *made())
        source.write_bytes(source.read_bytes()[:-100])
        assert "m" in self.fails([source, tmp_path / "out"], capsys)
        source = theirs(tmp_path, *made(), form="safetensors")
        source.write_bytes(source.read_bytes()[:-100])
        assert "is broken or cut short" in self.fails([source, tmp_path / "out"], capsys)

    def test_names_without_a_state_dict(self, tmp_path, capsys):
        torch.save({"weights": {"H_init": torch.zeros(4)}}, tmp_path / "m.pt")
        line = self.fails([tmp_path / "m.pt", tmp_path / "out", *FLAGS], capsys)
        assert "holds no state dict, alone or under ema, model, state_dict" in line

    def test_flags_for_another_format(self, puzzle_checkpoint, tmp_path, capsys):
        line = self.fails([puzzle_checkpoint(), tmp_path / "out", "--n_heads", "2"], capsys)
        assert "--n_heads is for a checkpoint of the TRM authors' code" in line

    @pytest.mark.parametrize(
        ("settings", "to", "said"),
        [
            ({}, "hf", "a recursive model .recursion trm. is not a Llama: choose --to hub"),
            ({"recursion": "none", "norm": "pre"}, "llama2c", "its causal is False, but a Llama has True"),
            ({"recursion": "loop"}, "trm", "the authors' code has no recursion other than trm"),
            ({}, "tokenizer", "a puzzle model, which has no tokenizer: choose another model"),
            ({"d_ff": 256}, "trm", "has no embed_scale 1.0"),
            ({"embed_scale": 4.0}, "trm", "has no hidden width 64"),
        ],
    )
    def test_formats_that_cannot_hold_it(self, puzzle_checkpoint, tmp_path, capsys, settings, to, said):
        line = self.fails([puzzle_checkpoint(**settings), tmp_path / "m.pt", "--to", to], capsys)
        assert re.search(said, line) and sorted(path.name for path in tmp_path.iterdir()) == ["mine"]

    def test_a_language_model(self, tiny, tmp_path, capsys):
        save_checkpoint(tmp_path / "lm", tiny(vocab_size=259), ByteLevelTokenizer())
        assert "has no causal model" in self.fails([tmp_path / "lm", tmp_path / "m.pt", "--to", "trm"], capsys)

    def test_nothing_is_written_over(self, puzzle_checkpoint, tmp_path, capsys):
        folder = puzzle_checkpoint(d_ff=256, embed_scale=4.0, norm_gain=False)
        (tmp_path / "all_config.yaml").write_text("mine")
        assert "all_config.yaml exists" in self.fails([folder, tmp_path / "m.pt", "--to", "trm"], capsys)
        assert (tmp_path / "all_config.yaml").read_text() == "mine" and not (tmp_path / "m.pt").exists()
