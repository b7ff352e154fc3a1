"""Tokenizers in transformers: they give our ids and the texts of generate.py, and a message reports differences."""

import io
import json

import pytest
import sentencepiece
import torch

import generate
from src.checkpoint import save_checkpoint
from src.data.tokenizer_training import train_sentencepiece, train_tokenizer
from src.errors import UserError
from src.interop.formats import read_source, write
from src.interop.hf_tokenizer import PROBES, save_for_transformers, to_json
from src.tokenizer import ByteLevelTokenizer, TokenizerWrapper, read_tokenizer

TEXTS = [
    "class A:\n    def f(self, x):\n        if x:\n            return  x[10:]  # no\n" * 8,
    "京都は日本の都市である。\n人口は百四十万人。\n" * 8,
    "the cat sat on the mat and the dog ate the hat\n" * 8,
]
PROMPTS = ["the cat", "京都は", "def f(x):\n    if", "  <s>a</s> <pad>", "\u2581"]
KINDS = ["byte", "bpe", "unigram", "json bpe", "json unigram", "with a space before"]


def foreign(**options):
    """Returns a SentencePiece model that was trained with SentencePiece's defaults, unlike train_spm.py's models."""
    out = io.BytesIO()
    options = {"model_type": "bpe", "vocab_size": 340, "byte_fallback": True, "minloglevel": 2} | options
    lines = (line for text in TEXTS for line in text.split("\n") if line)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=out, **options)
    return TokenizerWrapper(out.getvalue())


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "t.txt").write_text("".join(TEXTS))
    made = {f"json {k}": train_tokenizer(folder / "t.txt", 316, folder / f"{k}.json", k) for k in ("bpe", "unigram")}
    made |= {k: train_sentencepiece(TEXTS, vocab_size=316, model_type=k) for k in ("bpe", "unigram")}
    llama = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    return made | {"byte": ByteLevelTokenizer(), "with a space before": foreign(**llama)}


@pytest.fixture(params=KINDS)
def tokenizer(request, tokenizers):
    return tokenizers[request.param]


@pytest.fixture
def folders(tokenizer, tiny, tmp_path):
    """(checkpoint, the same for transformers). The model writes neither parts of characters nor unknown tokens."""
    sizes = {"vocab_size": tokenizer.vocab_size, "d_model": 32, "max_seq_len": 64}
    model = tiny(recursion="none", norm="pre", seed=3, **sizes)
    parts = [i for i in range(tokenizer.vocab_size) if len(b := tokenizer.id_to_bytes(i)) == 1 and b[0] > 127]
    with torch.no_grad():  # these get the mean of all logits, which is never the largest
        model.head.weight[[*parts, tokenizer.unk_id]] = model.head.weight.mean(0)
    save_checkpoint(tmp_path / "ours", model, tokenizer)
    write(read_source(tmp_path / "ours"), tmp_path / "theirs", "hf")
    return tmp_path / "ours", tmp_path / "theirs"


def test_the_ids_and_the_roles_are_ours(tokenizer, folders):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folders[1])
    for text in [*PROBES[1:], *PROMPTS]:
        assert theirs(text).input_ids == tokenizer.encode(text, bos=True)
        assert theirs.decode(tokenizer.encode(text)) == tokenizer.prefix + text
    roles = (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert roles == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    batch = theirs(["the", "the cat sat"], padding=True)
    assert batch["attention_mask"][0][0] == 0 and batch["input_ids"][0][0] == tokenizer.pad_id


def test_the_texts_are_those_of_generate(folders, capsys):
    from transformers import pipeline

    ours, theirs = map(str, folders)
    write = pipeline("text-generation", model=theirs)
    options = {"max_new_tokens": 12, "do_sample": False}
    together = [row[0]["generated_text"] for row in write(PROMPTS, batch_size=3, **options)]
    for prompt, text in zip(PROMPTS, together):
        generate.main([ours, "--prompt", prompt, "--max_new_tokens", "12", "--temperature", "0"])
        assert capsys.readouterr().out == text + "\n"
        assert write(prompt, **options)[0]["generated_text"] == text


def test_read_back_it_is_the_same_tokenizer(tokenizer, folders):
    again = read_source(folders[1]).tokenizer
    assert (again.kind, again.end_ids, again.add_bos) == (tokenizer.kind, tokenizer.end_ids, True)
    assert [again.encode(text, bos=True) for text in PROBES] == [tokenizer.encode(text, bos=True) for text in PROBES]


def test_all_ends_and_no_bos_go_along(tokenizers, tiny, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = read_tokenizer(_saved(tokenizers["bpe"], tmp_path / "bpe")).set_ends(add_bos=False, ends=[300, 2])
    model = tiny(recursion="none", norm="pre", vocab_size=316)
    save_checkpoint(tmp_path / "ours", model, tokenizer)
    write(read_source(tmp_path / "ours"), tmp_path / "theirs", "hf")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "theirs")
    assert theirs("the cat").input_ids == tokenizer.encode("the cat")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    assert loaded.generation_config.eos_token_id == loaded.config.eos_token_id == [3, 300, 2]
    assert loaded.generation_config.pad_token_id == 0
    again = read_source(tmp_path / "theirs").tokenizer
    assert (again.end_ids, again.add_bos) == ((3, 300, 2), False)


def _saved(tokenizer, folder):
    tokenizer.save(folder)
    return folder


def test_what_differs_is_found(capsys, tiny, tmp_path):
    """A tokenizer without byte fallback: U+2581 becomes three unknown tokens here, but one in transformers."""
    tokenizer = foreign(vocab_size=80, byte_fallback=False)
    data, different = to_json(tokenizer)
    assert "\u2581 mark\u2581" in different and set(different) < set(PROBES)
    assert json.loads(data)["post_processor"]["single"][0]["SpecialToken"]["id"] == "<s>"
    save_checkpoint(tmp_path / "ours", tiny(recursion="none", norm="pre", vocab_size=80), tokenizer)
    write(read_source(tmp_path / "ours"), tmp_path / "theirs", "hf")
    assert f"transformers splits some texts into other tokens, for example {different[0]!r}" in capsys.readouterr().err


def test_names_of_special_tokens_are_text_in_transformers_too(tmp_path):
    """A unigram model without byte pieces finds them whole, so the original tokenizer.json would not do."""
    from tokenizers import Tokenizer, models

    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((c, -1.0) for c in "ab</s> ")]
    tok = Tokenizer(models.Unigram(pieces, 0, False))
    tok.add_special_tokens(["<unk>", "<s>", "</s>"])
    (tmp_path / "tokenizer.json").write_text(tok.to_str())
    ours = read_tokenizer(tmp_path / "tokenizer.json")
    data, different = to_json(ours)
    theirs = Tokenizer.from_str(data.decode())
    theirs.encode_special_tokens = True
    assert different == [] or "a</s>b" not in different
    assert theirs.encode("a</s>b", add_special_tokens=False).ids == ours.encode("a</s>b") and 2 not in ours.encode(
        "a</s>b"
    )


def test_an_added_token_that_transformers_reads_differently_is_named():
    """After such a token, transformers adds the space of the beginning again."""
    tokenizer = foreign(user_defined_symbols=["<|im_start|>"])
    assert "a<|im_start|>b" in to_json(tokenizer)[1]


def test_an_end_that_is_also_the_unknown_token_has_no_text(tmp_path):
    """As in GPT-2: otherwise decoding a text with its end would add a replacement character."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tok = Tokenizer(models.BPE(letters, []))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tok.add_special_tokens(["<|endoftext|>"])
    (tmp_path / "tokenizer.json").write_text(tok.to_str())
    names = {f"{role}_token": "<|endoftext|>" for role in ("bos", "eos", "unk")}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    ours = read_tokenizer(tmp_path / "tokenizer.json")
    assert ours.unk_id == ours.eos_id == 256 and ours.id_to_bytes(256) == b""
    assert ours.decode(ours.encode("hi", bos=True, eos=True)) == "hi"


def test_words_have_no_tokenizer_json(tmp_path):
    with pytest.raises(UserError, match="type word or char"):
        save_for_transformers(foreign(model_type="char", vocab_size=60, byte_fallback=False), tmp_path, 16)
