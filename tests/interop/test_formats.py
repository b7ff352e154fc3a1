"""Complete conversions: detecting formats, converting between them, the model card, failures that write nothing."""

import json
import os
import re
import struct
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from src.checkpoint import load_model, own_state, save_checkpoint
from src.errors import UserError
from src.interop.formats import read_source, recognize, write
from src.interop.model_card import model_card
from src.tasks.finetune import load_classifier
from src.tokenizer import ByteLevelTokenizer

BYTES = ByteLevelTokenizer()


@pytest.fixture
def checkpoint(tiny, tmp_path):
    """A function: checkpoint(**settings) -> (folder, model)."""

    def make(ema=False, info=None, dtype=torch.float32, **settings):
        model = tiny(**{"vocab_size": BYTES.vocab_size, "recursion": "none", "norm": "pre"} | settings).to(dtype)
        averaged = {name: tensor + 1 for name, tensor in own_state(model).items()} if ema else None
        save_checkpoint(tmp_path / "mine", model, BYTES, ema=averaged, info=info)
        return tmp_path / "mine", model

    return make


def assert_equal(weights, expected):
    assert weights.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights.items())


class TestRecognize:
    def test_by_what_it_holds(self, checkpoint, tmp_path):
        folder, _ = checkpoint()
        for to, name in (("hf", "a Llama folder of Hugging Face"), ("hub", "a checkpoint of this project")):
            write(read_source(folder), tmp_path / to, to)
            assert recognize(tmp_path / to).name == name
        write(read_source(folder), tmp_path / "weights", "llama2c")
        torch.save({}, tmp_path / "anything")
        (tmp_path / "g").write_bytes(b"GGUF\3\0\0\0")
        names = {name: recognize(tmp_path / name).name for name in ("weights", "anything", "g", "mine")}
        assert [name.split()[-1] for name in names.values()] == ["llama2.c", "llama2.c", "GGUF", "project"]

    @pytest.mark.parametrize("content", [b"", b"hello", struct.pack("<7i", 1, 2, 3, 0, 5, 6, 7), bytes(100)])
    def test_unknown_file(self, tmp_path, content):
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(
            UserError, match="x is none of the known formats: a checkpoint of this project, a Llama folder"
        ):
            recognize(tmp_path / "x")

    def test_missing(self, tmp_path):
        with pytest.raises(UserError, match="there is no .*nowhere"):
            recognize(tmp_path / "nowhere")

    def test_gguf_without_its_package(self, tmp_path, monkeypatch):
        (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(40))
        monkeypatch.setitem(sys.modules, "gguf", None)
        with pytest.raises(UserError, match="needs the gguf package: pip install gguf==0.19.0"):
            read_source(tmp_path / "m.gguf")

    def test_a_folder_of_something_else(self, tmp_path):
        with pytest.raises(UserError, match="is neither a checkpoint"):
            read_source(tmp_path)


class TestThroughAllFormats:
    @pytest.mark.parametrize("tied", [True, False])
    def test_plain(self, checkpoint, tmp_path, tied):
        folder, model = checkpoint(tie_embeddings=tied, n_kv_heads=2)
        own, last = own_state(model), folder
        for to in ("hf", "checkpoint", "hub", "hf", "checkpoint"):
            here = tmp_path / f"{last.name}-{to}"
            write(read_source(last), here, to)
            last = here
        loaded, tokenizer = load_model(last)
        assert loaded.config == model.config and tokenizer.kind == "byte"
        assert_equal(own_state(loaded), own)

    @pytest.mark.parametrize("tied", [True, False])
    def test_llama2c_has_an_order_of_its_own(self, checkpoint, tmp_path, tied):
        """Bytes become tokens 3 to 258, and EOS takes the place where run.c stops. Converting again changes no byte."""
        folder, model = checkpoint(tie_embeddings=tied)
        write(read_source(folder), tmp_path / "1", "llama2c")
        there = read_source(tmp_path / "1")
        embed, own = there.weights["embed.weight"], own_state(model)
        head = own["embed.weight" if tied else "head.weight"]
        assert torch.equal(embed[3:], own["embed.weight"][:256]) and torch.equal(embed[1], own["embed.weight"][257])
        assert torch.equal(there.weights["head.weight"][[0, 1, 2, 3]], head[[256, 258, 257, 0]])
        assert there.tokenizer.end_ids == (2, 1)
        write(there, tmp_path / "2", "checkpoint")
        write(read_source(tmp_path / "2"), tmp_path / "3", "hf")
        write(read_source(tmp_path / "3"), tmp_path / "4", "llama2c")
        for name in ("{}", "{}.tokenizer.bin"):
            one, four = ((tmp_path / name.format(n)).read_bytes() for n in (1, 4))
            assert one == four

    @pytest.mark.parametrize("family", ["trm", "loop"])
    def test_recursive(self, checkpoint, tmp_path, family):
        folder, model = checkpoint(recursion=family, norm="post", gate=True, info={"step": 3})
        write(read_source(folder), tmp_path / "hub", "hub")
        loaded, _ = load_model(tmp_path / "hub")
        assert loaded.config == model.config
        assert_equal(own_state(loaded), own_state(model))
        assert json.loads((tmp_path / "hub" / "config.json").read_text())["info"] == {"step": 3}

    def test_averaged_weights_go_along(self, checkpoint, tmp_path, capsys):
        folder, model = checkpoint(ema=True)
        write(read_source(folder), tmp_path / "hub", "hub")
        assert "EMA weights" in capsys.readouterr().err
        assert_equal(own_state(load_model(tmp_path / "hub")[0]), {n: t + 1 for n, t in own_state(model).items()})
        assert not (tmp_path / "hub" / "ema.safetensors").exists()

    @pytest.mark.parametrize("to", ["hub", "checkpoint"])
    def test_the_licences_of_its_text_go_along(self, checkpoint, tmp_path, to):
        folder, _ = checkpoint()
        (folder / "LICENCES.md").write_text("| numpy | BSD |")
        write(read_source(folder), tmp_path / "out", to)
        assert (tmp_path / "out" / "LICENCES.md").read_text() == "| numpy | BSD |"

    def test_the_layer_of_a_classifier_goes_along(self, checkpoint, tmp_path, capsys):
        folder, _ = checkpoint(info={"labels": ["no", "yes"]})
        top = {"weight": torch.randn(2, 16), "bias": torch.randn(2)}
        save_file(top, folder / "classifier.safetensors")
        for to in ("hub", "checkpoint"):
            write(read_source(folder), tmp_path / to, to)
            assert_equal(load_file(tmp_path / to / "classifier.safetensors"), top)
            assert load_classifier(tmp_path / to)[0].names == ["no", "yes"]
        assert "left out" not in capsys.readouterr().err
        write(read_source(folder), tmp_path / "hf", "hf")
        assert "the layer that classifies is left out: --to hub keeps it" in capsys.readouterr().err

    def test_another_tokenizer_keeps_how_texts_begin_and_end(self, tiny, tmp_path):
        own = ByteLevelTokenizer().set_ends(False, [65])
        save_checkpoint(tmp_path / "mine", tiny(vocab_size=own.vocab_size), own)
        BYTES.save(tmp_path / "other")
        found = read_source(tmp_path / "mine", tmp_path / "other").tokenizer
        assert (found.add_bos, found.end_ids) == (False, own.end_ids)

    def test_half_precision_stays(self, checkpoint, tmp_path, capsys):
        folder, model = checkpoint(dtype=torch.bfloat16)
        write(read_source(folder), tmp_path / "hub", "hub")
        write(read_source(folder), tmp_path / "hf", "hf")
        assert "hf: transformers computes in bfloat16, as its weights are stored" in capsys.readouterr().err
        for path in (tmp_path / "hub", tmp_path / "hf"):
            assert_equal(read_source(path).weights, own_state(model))
        assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "bfloat16"


class TestRefused:
    @pytest.mark.parametrize("to", ["hf", "llama2c"])
    @pytest.mark.parametrize(
        ("settings", "said"),
        [
            ({"recursion": "trm"}, "a recursive model .recursion trm. is not a Llama: choose --to hub"),
            ({"recursion": "loop"}, "recursion loop"),
            ({"norm": "sandwich"}, "its norm is sandwich, but a Llama has pre; choose --to hub"),
            ({"positions": "learned"}, "positions is learned"),
            ({"qk_norm": True}, "qk_norm is True"),
            ({"attention_gate": True}, "attention_gate is True"),
            ({"coda_layers": 1}, "coda_layers is 1"),
            ({"embed_scale": 2.0}, "embed_scale is 2.0"),
        ],
    )
    def test_no_llama(self, checkpoint, tmp_path, to, settings, said):
        folder, _ = checkpoint(**settings)
        with pytest.raises(UserError, match=said):
            write(read_source(folder), tmp_path / "out", to)
        assert [path.name for path in tmp_path.iterdir()] == ["mine"]

    def test_tokenizer(self, checkpoint, tmp_path):
        folder, _ = checkpoint(vocab_size=260)
        with pytest.raises(UserError, match="has 259 tokens, but the model has 260.*--tokenizer"):
            read_source(folder)
        write(read_source(checkpoint()[0]), tmp_path / "m.bin", "llama2c")
        (tmp_path / "m.tokenizer.bin").unlink()
        with pytest.raises(UserError, match="a separate file: give it with --tokenizer"):
            read_source(tmp_path / "m.bin")
        with pytest.raises(UserError, match="nowhere.json"):
            read_source(tmp_path / "m.bin", tmp_path / "nowhere.json")

    def test_a_broken_checkpoint(self, checkpoint):
        folder, _ = checkpoint()
        config = json.loads((folder / "config.json").read_text())
        config["model"]["d_ff"] += 1
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match="does not fit its config.json"):
            read_source(folder)


class TestWriting:
    @pytest.mark.parametrize("to", ["checkpoint", "hub", "hf", "llama2c", "tokenizer"])
    def test_nothing_is_written_over(self, checkpoint, tmp_path, to):
        folder, _ = checkpoint()
        (tmp_path / "there").write_text("mine")
        with pytest.raises(UserError, match="there exists"):
            write(read_source(folder), tmp_path / "there", to)
        assert (tmp_path / "there").read_text() == "mine"

    @pytest.mark.parametrize("to", ["hub", "hf", "llama2c", "tokenizer"])
    def test_all_or_nothing(self, checkpoint, tmp_path, monkeypatch, to):
        source, rename = read_source(checkpoint()[0]), os.rename

        def full(path, new):
            if new == tmp_path / "out":
                raise OSError(28, "No space left on device")
            rename(path, new)

        monkeypatch.setattr(os, "rename", full)
        with pytest.raises(UserError, match="cannot write .*out: No space left"):
            write(source, tmp_path / "out", to)
        assert [path.name for path in tmp_path.iterdir()] == ["mine"]

    def test_a_full_disk_names_dest(self, checkpoint, tmp_path, monkeypatch):
        source, error = read_source(checkpoint()[0]), OSError(28, "No space left on device")
        monkeypatch.setattr("src.checkpoint.save_tensors", lambda *args: (_ for _ in ()).throw(error))
        with pytest.raises(
            UserError, match=f"^cannot write the checkpoint {re.escape(str(tmp_path / 'out'))}: No space"
        ):
            write(source, tmp_path / "out", "hub")
        assert [path.name for path in tmp_path.iterdir()] == ["mine"]

    def test_below_a_file(self, checkpoint, tmp_path):
        folder, _ = checkpoint()
        with pytest.raises(UserError, match="cannot write .*out"):
            write(read_source(folder), folder / "config.json" / "out", "hub")

    def test_into_new_folders(self, checkpoint, tmp_path):
        write(read_source(checkpoint()[0]), tmp_path / "a" / "b", "hub")
        assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == [
            "README.md", "config.json", "model.safetensors", "tokenizer_config.json",
        ]  # fmt: skip


class TestModelCard:
    def test_metadata_and_figures(self, tiny):
        config = tiny(vocab_size=259, recursion="trm", latent_steps=3, deep_steps=2, supervision_steps=4).config
        info = {"step": 2500, "best_valid_loss": 2.409957, "license": "mit", "nested": {"a": 1}}
        card = ModelCard(model_card("tiny-stories", config, info, "hub"))
        assert card.data.to_dict() == {
            "library_name": "generative-trm", "pipeline_tag": "text-generation", "license": "mit",
            "tags": ["generative-trm", "tiny-recursive-model"],
        }  # fmt: skip
        lines = [line for line in card.text.splitlines() if line.startswith("| ")][1:]
        rows = dict(line.strip("| ").split(" | ") for line in lines)
        total = 259 * 16 * 2 + 2 * (4 * 16 * 16 + 3 * 16 * 24 + 2 * 16) + 17  # tables, two blocks, halting head
        assert rows["parameters"] == f"{total:,}"
        assert "2 blocks, visited 32 times per token" in card.text and rows["effective depth in blocks"] == "64"
        assert (
            rows["training steps"] == "2500"
            and rows["validation loss in nats per token"] == "2.41"
            and "nested" not in rows
        )
        assert "# tiny-stories" in card.text and "python generate.py tiny-stories" in card.text

    def test_of_a_llama(self, checkpoint, tmp_path):
        write(read_source(checkpoint()[0]), tmp_path / "hf", "hf")
        card = ModelCard.load(tmp_path / "hf" / "README.md")
        assert card.data.library_name == "transformers" and "llama" in card.data.tags
        write(read_source(checkpoint(norm="post")[0]), tmp_path / "post", "hub")
        assert ModelCard.load(tmp_path / "post" / "README.md").data.tags == ["generative-trm", "transformer"]
        assert 'pipeline("text-generation", model="hf")' in card.text

    @pytest.mark.parametrize("to", ["hub", "hf"])
    def test_how_to_run_it_runs(self, checkpoint, tmp_path, monkeypatch, capsys, to):
        folder, _ = checkpoint(max_seq_len=64)
        write(read_source(folder), tmp_path / "mine-there", to)
        card = (tmp_path / "mine-there" / "README.md").read_text(encoding="utf-8")
        (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        monkeypatch.chdir(tmp_path)
        exec(compile(snippet, "the card", "exec"), {})
        assert capsys.readouterr().out.startswith("Once upon a time")

    def test_a_model_that_writes_no_text(self, tiny):
        config = tiny(vocab_size=259, causal=False).config
        assert "pipeline_tag" not in model_card("sudoku", config, {}, "hub")
