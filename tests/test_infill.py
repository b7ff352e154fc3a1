"""Fill-in-the-middle with a trained model: the middle of its one document, generate.py --suffix, and mistakes."""

import dataclasses

import jaxtyping
import numpy as np
import pytest
import torch

import generate
from src.checkpoint import load_model, save_checkpoint
from src.config import run
from src.data.fim import FillInMiddle
from src.data.samples import collate_batch, window_sample
from src.language_model import LanguageModel, continue_texts
from src.model import TRMConfig, TRMModel
from src.tokenizer import ByteLevelTokenizer

BYTE = ByteLevelTokenizer({"fill_in_the_middle": True})
TEXT = "def x(bamo):yk+lu-3\n"  # no character twice, so that its order is quickly learned


def trained(order, path):
    """Trains a model on one document, in one order of its parts, writes it to a folder, and returns the folder."""
    torch.manual_seed(0)
    byte = ByteLevelTokenizer({"fill_in_the_middle": True, "suffix_first": order == "spm"})
    jaxtyping.config.update("jaxtyping_disable", True)  # the checks would take most of the time
    size = {"d_model": 32, "n_heads": 2, "n_layers": 2, "d_ff": 64, "max_seq_len": 48, "recursion": "none"}
    ids = {"vocab_size": BYTE.vocab_size, "pad_token_id": BYTE.pad_id}
    model = TRMModel(TRMConfig(**size, **ids, norm="pre", tie_embeddings=True))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    row = np.array([BYTE.eos_id, *BYTE.encode(TEXT, eos=True)])
    row, fim, steps = window_sample(row, None, (BYTE.bos_id, BYTE.eos_id)), FillInMiddle(byte, 0.9), 200
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * min(1, step / 20) * (1 - step / steps)
        batch = collate_batch([fim(row, (step, number), 48) for number in range(16)])
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    jaxtyping.config.update("jaxtyping_disable", False)
    save_checkpoint(path, model, byte)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return trained("psm", tmp_path_factory.mktemp("infill") / "one")


@pytest.fixture
def call(folder, capfd):
    """call(*words) runs generate.py on the model, greedily, and returns (exit code, stdout, stderr)."""

    def call(*words, checkpoint=folder):
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            run(lambda: generate.main([str(checkpoint), "--temperature", "0", *map(str, words)]))
        return caught.value.code or 0, *capfd.readouterr()

    return call


def share_right(lm):
    """Returns the share of middles that are written as they were."""
    places = [(start, end) for start in range(1, 20, 3) for end in range(start + 2, len(TEXT), 3)]
    return np.mean([lm.write(TEXT[:a], 30, temperature=0, suffix=TEXT[b:]) == TEXT for a, b in places])


def test_the_suffix_may_come_first(tmp_path):
    lm = load_model(trained("spm", tmp_path / "spm"))
    assert lm.tokenizer.suffix_first and share_right(lm) >= 0.9


def test_it_writes_what_is_between_prefix_and_suffix(folder):
    lm = load_model(folder)
    assert share_right(lm) >= 0.9
    assert lm.write(TEXT[:5], 30, temperature=0) == TEXT  # text without a suffix is continued as before
    before = {lm.write(TEXT[:3], 30, temperature=0, suffix=TEXT[b:]) for b in (6, 10, 15)}
    assert before == {TEXT}  # the suffix decides where the middle ends


def test_the_middle_is_printed_with_its_surroundings_or_alone(call, tmp_path):
    words = ["--prompt", TEXT[:4], "--suffix", TEXT[12:]]
    code, out, err = call(*words)
    assert (code, out) == (0, TEXT + "\n") and "9 tokens in" in err  # 8 characters and EOS
    assert call(*words, "--middle_only")[1] == TEXT[4:12] + "\n"
    assert call(*words, "--max_new_tokens", 0)[1] == TEXT[:4] + TEXT[12:] + "\n"
    (tmp_path / "suffix.txt").write_text(TEXT[12:])
    assert call("--prompt", TEXT[:4], "--suffix_file", tmp_path / "suffix.txt")[1] == out
    several = ["--prompt", TEXT[:4], TEXT[:8], "--suffix", TEXT[12:]]
    assert call(*several)[1] == f"{TEXT}\n\n{TEXT}\n"
    assert call(*several, "--middle_only", "--no_cache")[1] == f"{TEXT[4:12]}\n\n{TEXT[8:12]}\n"
    code, out, err = call(*words, "--trace")
    assert out == TEXT + "\n" and "step" in err


def test_a_prompt_is_streamed_before_the_middle_and_the_suffix_last(folder, monkeypatch):
    printed = []
    monkeypatch.setattr("builtins.print", lambda text="", **options: printed.append((text, options.get("file"))))
    generate.main([str(folder), "--prompt", TEXT[:4], "--suffix", TEXT[12:], "--temperature", "0"])
    texts = [text for text, file in printed if file is None]
    assert texts[0] == TEXT[:5] and texts[-1] == TEXT[12:] and [*TEXT[5:12]] == [t for t in texts[1:-1] if t]


def test_retrieved_code_is_part_of_the_prefix(call, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "a.py").write_text("bamo=1\n")
    words = ["--prompt", "bamo", "--suffix", ")", "--rag", tmp_path / "lib", "--rag_tokens", 40]
    read = []
    infill = ByteLevelTokenizer.infill
    monkeypatch.setattr(
        ByteLevelTokenizer, "infill", lambda self, *texts: read.append(texts) or infill(self, *texts), raising=False
    )
    code, out, err = call(*words)
    assert code == 0 and out.startswith("bamo") and out.endswith(")\n") and "retrieved a.py:1-1" in err, err
    assert read == [("bamo=1\n# ---- current file ----\nbamo", ")")]


def test_it_stops_before_it_loses_sight_of_the_suffix(folder):
    """A middle that does not end is cut off when the context is full."""
    model, tokenizer = load_model(folder)
    prompts = ["zzzz", "zz"]
    longest = len(tokenizer.infill("zzzz", "\n"))
    rows = list(continue_texts(model, tokenizer, prompts, 500, stop_at_eos=False, suffix="\n", temperature=0))
    assert len(rows) - 1 == 48 - longest + 1
    assert len(list(continue_texts(model, tokenizer, ["z" * 43], 500, suffix="\n", temperature=0))) <= 2


def test_a_sentinel_ends_the_middle(folder, monkeypatch):
    model, tokenizer = load_model(folder)
    ids = [*TEXT[4:6].encode(), tokenizer.fim.prefix, *b"xyz"]
    columns = (torch.tensor([index]) for index in ids)
    monkeypatch.setattr("src.language_model.generate", lambda *args, **options: columns)
    written = continue_texts(model, tokenizer, [TEXT[:4]], 20, suffix="x")
    assert "".join(pieces[0] for pieces, _ in written) == TEXT[4:6]


def test_mistakes(call, folder, tmp_path):
    plain = tmp_path / "plain"
    model = load_model(folder).model
    smaller = dataclasses.replace(model.config, vocab_size=ByteLevelTokenizer.vocab_size)
    save_checkpoint(plain, TRMModel(smaller), ByteLevelTokenizer())
    for words, said, options in [
        (["--suffix", "x"], "the tokenizer of this one has no sentinels", {"checkpoint": plain}),
        (["--suffix", "x" * 99], "prompt and suffix have 103 tokens, the context holds 48: shorten one", {}),
        (["--suffix", "x", "--suffix_file", "a.txt"], "--suffix and --suffix_file both give the suffix", {}),
        (["--suffix_file", tmp_path / "nowhere.txt"], "nowhere.txt", {}),
        (["--suffix", "x", "--interactive"], "leave out the suffix", {}),
        (["--middle_only"], "--middle_only needs a suffix", {}),
    ]:
        code, out, err = call(*words, **options)
        assert code == 2 and out == "" and "Traceback" not in err
        assert err.splitlines()[-1].startswith("error: ") and said in err, err
    with pytest.raises(ValueError, match="needs a model that was trained with --fim_rate"):
        LanguageModel(model, ByteLevelTokenizer()).write("a", suffix="b")
