"""llama2c_reader.c, which works like run.c, reads our .bin and tokenizer files and writes the text of generate.py."""

import io
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import sentencepiece
import torch

import generate
from src.checkpoint import load_model, save_checkpoint
from src.data.tokenizer_json import byte_characters
from src.data.tokenizer_training import train_sentencepiece, train_tokenizer
from src.errors import UserError
from src.interop.formats import read_source, write
from src.interop.llama2c import for_run_c, tokenizer_file
from src.tokenizer import ByteLevelTokenizer, HFTokenizer, TokenizerWrapper, read_tokenizer

READER = Path(__file__).with_name("llama2c_reader.c")
STORIES = Path(__file__).parents[3] / "shared" / "data" / "stories260K"
TEXTS = [
    "class A:\n    def f(self, x):\n        return  x[10:]  # no\n" * 8,
    "京都は日本の都市である。\n" * 8,
    "the cat sat on the mat and the dog ate the hat\n" * 8,
]
PROMPTS = ["", "the cat", "def f(x):", "3.14"]


@pytest.fixture(scope="module")
def run_c(tmp_path_factory):
    """A function: run_c(bin, prompt, tokens) -> text, using llama2c_reader.c."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    program = tmp_path_factory.mktemp("reader") / "reader"
    subprocess.run([compiler, "-O2", str(READER), "-o", str(program), "-lm"], check=True)

    def run(model, prompt, tokens):
        words = [program, model, tokenizer_file(model), tokens, prompt]
        return subprocess.run([str(word) for word in words], capture_output=True, check=True).stdout.decode(
            errors="replace"
        )

    return run


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder, out = tmp_path_factory.mktemp("tokenizers"), io.BytesIO()
    (folder / "t.txt").write_text("".join(TEXTS))
    lines = (line for text in TEXTS for line in text.split("\n") if line)
    options = {"model_type": "bpe", "vocab_size": 330, "byte_fallback": True, "minloglevel": 2}
    options |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=out, **options)
    return {
        "byte": ByteLevelTokenizer(),
        "bpe": train_sentencepiece(TEXTS, vocab_size=308),
        "json bpe": train_tokenizer(folder / "t.txt", 308, folder / "bpe.json"),
        "unigram": train_sentencepiece(TEXTS, vocab_size=308, model_type="unigram"),
        "with a space before": TokenizerWrapper(out.getvalue()),
    }


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["byte", "bpe", "json bpe", "unigram", "with a space before"])
def test_the_text_is_that_of_generate(run_c, tokenizers, kind, tied, tiny, tmp_path, capsys):
    tokenizer = tokenizers[kind]
    sizes = {"vocab_size": tokenizer.vocab_size, "d_model": 32, "max_seq_len": 64, "tie_embeddings": tied}
    model = tiny(recursion="none", norm="pre", seed=5, **sizes)
    shown = [bytes([b]) for b in (*range(33, 127), 9, 10, 13)]  # single bytes that run.c prints
    hidden = [i for i in range(tokenizer.vocab_size) if len(b := tokenizer.id_to_bytes(i)) == 1 and b not in shown]
    with torch.no_grad():  # these get the mean of all logits, which is never the largest
        model.head.weight[[*hidden, tokenizer.unk_id]] = model.head.weight.mean(0)
    save_checkpoint(tmp_path / "ours", model, tokenizer)
    write(read_source(tmp_path / "ours"), tmp_path / "m.bin", "llama2c")
    assert ("run.c puts a space before" in capsys.readouterr().err) == (not tokenizer.prefix)
    for prompt in PROMPTS:
        spaced = prompt if tokenizer.prefix or not prompt else f" {prompt}"
        generate.main([str(tmp_path / "ours"), "--prompt", spaced, "--max_new_tokens", "20", "--temperature", "0"])
        expected = capsys.readouterr().out.removesuffix("\n")
        assert run_c(tmp_path / "m.bin", prompt, 20) == expected[not tokenizer.prefix and expected[:1] == " " :]


@pytest.mark.parametrize("ends_with", ["eos", "bos"])
def test_it_stops_where_generate_stops(run_c, tokenizers, ends_with, tiny, tmp_path, capsys):
    """The end token swaps head rows with the fourth token, so that it comes fourth. It is not printed."""
    tokenizer = tokenizers["byte"]
    model = tiny(recursion="none", norm="pre", vocab_size=259, d_model=32, max_seq_len=64)
    written = model.generate(torch.tensor([tokenizer.encode(" ab", bos=True)]), 4, temperature=0)[0, 4:].tolist()
    assert written[3] not in written[:3]
    end = {"eos": tokenizer.eos_id, "bos": tokenizer.bos_id}[ends_with]
    with torch.no_grad():
        model.head.weight[[end, written[3]]] = model.head.weight[[written[3], end]]
    ours = ByteLevelTokenizer().set_ends(ends=[end])
    save_checkpoint(tmp_path / "ours", model, ours)
    write(read_source(tmp_path / "ours"), tmp_path / "m.bin", "llama2c")
    write(read_source(tmp_path / "m.bin"), tmp_path / "back")
    texts = [run_c(tmp_path / "m.bin", "ab", 20)]
    for folder, prompt in ((tmp_path / "ours", " ab"), (tmp_path / "back", "ab")):
        capsys.readouterr()
        generate.main([str(folder), "--prompt", prompt, "--max_new_tokens", "20", "--temperature", "0"])
        texts.append(capsys.readouterr().out.removesuffix("\n").removeprefix(" "))
    shown = bytes(b for b in written[:3] if 32 <= b < 127 or b in (9, 10, 13)).decode()
    assert texts[0] == "ab" + shown and texts[1] == texts[2] == "ab" + tokenizer.decode(written[:3])


def test_a_head_row_that_no_token_has_never_wins(tiny):
    """BOS and EOS are one token, and there is no unknown token, so run.c's ids 0 and 2 are unused."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tok = Tokenizer(models.BPE(byte_characters() | {"<|endoftext|>": 256}, []))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tok.add_special_tokens(["<|endoftext|>"])
    tokenizer = HFTokenizer(tok.to_str().encode(), {})
    weights = {"embed.weight": torch.randn(257, 8), "head.weight": torch.randn(257, 8)}
    config = tiny(recursion="none", norm="pre", vocab_size=257, d_model=8).config
    config, weights, _, _ = for_run_c(config, weights, tokenizer, "here")
    assert config.vocab_size == 259
    likeliest = (torch.randn(500, 8) @ weights["head.weight"].T).argmax(-1).tolist()
    assert {0, 2} & {*likeliest} == set() and len({*likeliest}) > 20


def test_refused_and_said(tokenizers, tiny, tmp_path, capsys):
    out = io.BytesIO()
    lines = (line for text in TEXTS for line in text.split("\n") if line)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=out, vocab_size=45, minloglevel=2)
    model = tiny(recursion="none", norm="pre", vocab_size=45)
    save_checkpoint(tmp_path / "ours", model, TokenizerWrapper(out.getvalue()))
    with pytest.raises(UserError, match="needs a token for each byte.*--to hf"):
        write(read_source(tmp_path / "ours"), tmp_path / "m.bin", "llama2c")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]
    _, _, _, said = for_run_c(
        tiny(vocab_size=308).config, {n: torch.zeros(308, 16) for n in ("embed.weight", "head.weight")},
        read_tokenizer_with(tokenizers["unigram"], tmp_path, add_bos=False, ends=[3, 9]), "here",
    )  # fmt: skip
    assert [sentence.split(",")[0] for sentence in said] == [
        "run.c puts a space before a prompt", "run.c begins every text with BOS", "run.c stops at one end token",
    ]  # fmt: skip


def read_tokenizer_with(tokenizer, folder, **ends):
    tokenizer.save(folder / "tokenizer")
    return read_tokenizer(folder / "tokenizer").set_ends(**ends)


@pytest.mark.skipif(not STORIES.exists(), reason="../shared/data/stories260K is not here")
class TestStories260K:
    @pytest.fixture
    def folder(self, tmp_path):
        write(read_source(STORIES / "stories260K.bin", STORIES / "tok512.bin"), tmp_path / "260K")
        return tmp_path / "260K"

    def test_its_ends_are_those_of_run_c(self, folder):
        assert load_model(folder)[1].end_ids == (2, 1)

    @pytest.mark.parametrize("prompt", ["", "One day, Tom"])
    def test_there_and_here_and_there(self, run_c, folder, tmp_path, prompt, capsys):
        write(read_source(folder), tmp_path / "again.bin", "llama2c")
        assert capsys.readouterr().err.count("run.c") == 0
        shutil.copy(STORIES / "stories260K.bin", tmp_path / "m.bin")
        shutil.copy(STORIES / "tok512.bin", tmp_path / "m.tokenizer.bin")
        generate.main([str(folder), "--prompt", prompt, "--max_new_tokens", "40", "--temperature", "0"])
        expected = capsys.readouterr().out.removesuffix("\n")
        assert len(expected) > 60
        assert run_c(tmp_path / "again.bin", prompt, 40) == run_c(tmp_path / "m.bin", prompt, 40) == expected
        size = struct.unpack("<i", (tmp_path / "again.tokenizer.bin").read_bytes()[:4])
        assert size == struct.unpack("<i", (STORIES / "tok512.bin").read_bytes()[:4])
