"""Training SentencePiece and tokenizer.json: reproducible files, held-back text, and invalid settings."""

import gzip
import json

import pytest
from texts import write_records

import train_spm
import train_tokenizer as script
from src.data.tokenizer_training import (
    _drawn,
    _drawn_lines,
    before_tail,
    frequent_line_breaks,
    train_sentencepiece,
    train_tokenizer,
)
from src.errors import UserError
from src.tokenizer import HFTokenizer, read_tokenizer

CODE = 'class A:\n    def f(self, x):\n        if x:\n            return  x[10:]  # no\n\n\n    y = "a"\n\n\ttab\t1\r\n'
TEXTS = [
    CODE * 4,
    "京都は日本の都市である。\n人口は百四十万人。\n" * 8,
    "the cat sat on the mat and the dog ate the hat\n" * 8,
]
KINDS = ("bpe", "unigram")


@pytest.fixture(scope="module")
def sp():
    return train_sentencepiece(TEXTS, vocab_size=420)


@pytest.fixture
def corpus(tmp_path):
    """A folder with the texts in files of two types."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.txt").write_text(TEXTS[0])
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS[1:])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    return folder


@pytest.fixture
def records(tmp_path):
    """A file of records whose answers have several digits."""
    words = "apples pears plums figs nuts melons grapes dates limes berries olives lemons".split()
    rows = [{"q": f"Tom has {n} {words[n % 12]}. How many did Ann buy?", "a": 2024} for n in range(100, 160)]
    return write_records(tmp_path / "records.jsonl", rows)


@pytest.mark.parametrize("kind", ["spm", *KINDS])
def test_scripts_read_records_and_split_digits_if_asked(records, tmp_path, kind):
    make = train_spm.main if kind == "spm" else script.main
    flags = ["--input", records, "--records", "--question_field", "q", "--answer_field", "a", "--vocab_size", "310"]
    if kind != "spm":
        flags += ["--model_type", kind]
    suffix, sizes = ".model" if kind == "spm" else ".json", {}
    for split in ("true", "false"):
        make([*flags, "--model_prefix", str(tmp_path / split), "--split_digits", split])
        tokenizer = read_tokenizer(tmp_path / f"{split}{suffix}")
        sizes[split] = len(tokenizer.encode("2024"))
    assert sizes["true"] == 4 > sizes["false"]
    with pytest.raises(UserError, match="question_field needs records true"):
        make(["--input", records, "--question_field", "q"])
    with pytest.raises(UserError, match="text_field is for plain text"):
        make([*flags, "--text_field", "q"])
    with pytest.raises(UserError, match="has the fields question and answer, .*available fields: q, a"):
        make(["--input", records, "--records", "--model_prefix", str(tmp_path / "x")])


@pytest.mark.parametrize(("make", "name"), [(script.main, "t.json"), (train_spm.main, "t.vocab")])
def test_a_file_that_is_read_is_not_overwritten(tmp_path, make, name):
    path = tmp_path / name
    rows = json.dumps([{"question": f"{n} and {n}", "answer": str(2 * n)} for n in range(300)])
    path.write_text(rows)
    link = tmp_path / "link.json"
    link.symlink_to(path)
    words = ["--input", str(link), "--records", "--vocab_size", "300", "--model_prefix", str(tmp_path / "t")]
    with pytest.raises(UserError, match=f"{name} is also read"):
        make(words)
    assert path.read_text() == rows


# --- SentencePiece ----------------------------------------------------------------------------------------------------


def test_line_breaks_and_indentation_are_single_tokens(sp):
    assert len(sp.encode("\n")) == 1
    assert len(sp.encode("\n        ")) == 1
    assert frequent_line_breaks(["a b"]) == ["\n"]
    assert "\n    " in frequent_line_breaks([CODE])
    assert [sp.pad_id, sp.unk_id, sp.bos_id, sp.eos_id] == [0, 1, 2, 3]


def test_digits_are_split(sp):
    assert len(sp.encode("1234")) >= 4
    texts = [f"the year 2024 and {word}\n" for word in ("1999", "2024", "cats")] * 30
    joined = train_sentencepiece(texts, vocab_size=300, split_digits=False)
    assert len(joined.encode("2024")) < 4


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_training_repeats_byte_for_byte(tmp_path, model_type):
    a = train_sentencepiece(TEXTS, tmp_path / "a", vocab_size=320, model_type=model_type)
    b = train_sentencepiece(iter(TEXTS), tmp_path / "deep" / "b", vocab_size=320, model_type=model_type)
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "deep" / "b.model").read_bytes()
    lines = (tmp_path / "a.vocab").read_text().splitlines()
    assert len(lines) == a.vocab_size == 320 and all(line.count("\t") == 1 for line in lines)
    assert a.fingerprint == b.fingerprint and len(a.fingerprint) == 64


def test_training_from_a_file(tmp_path, sp):
    path = tmp_path / "t.txt"
    path.write_bytes("".join(f"{t}\n<|endoftext|>\n" for t in TEXTS).encode())
    assert train_sentencepiece(path, vocab_size=420).fingerprint == sp.fingerprint


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_vocabulary_too_large_names_the_largest(model_type):
    with pytest.raises(UserError, match="largest possible is") as error:
        train_sentencepiece(TEXTS, vocab_size=50_000, model_type=model_type)
    largest = int(str(error.value).split()[-1])
    assert train_sentencepiece(TEXTS, vocab_size=largest, model_type=model_type).vocab_size == largest


def test_a_piece_for_each_character():
    text = "to be,\n    or not 22\n"
    tok = train_sentencepiece([text], vocab_size=500, model_type="char", byte_fallback=False, character_coverage=1.0)
    assert (
        tok.vocab_size == 4 + len(set(text))
        and len(tok.encode(text)) == len(text)
        and tok.decode(tok.encode(text)) == text
    )
    assert tok.lost_bytes("to z", tok.encode("to z")) == 1  # there is no z, and no byte to write it with
    with_bytes = train_sentencepiece([text], vocab_size=500, model_type="char")
    assert with_bytes.vocab_size == 256 + 4 + len(set(text)) and with_bytes.decode(with_bytes.encode("zü")) == "zü"


def test_vocabulary_too_small_names_what_is_needed():
    with pytest.raises(UserError, match="too small.* need 3[0-9][0-9]"):
        train_sentencepiece(TEXTS, vocab_size=50)
    with pytest.raises(UserError, match="no text"):
        train_sentencepiece([])


def test_unwritable_model_prefix(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        train_sentencepiece(TEXTS, tmp_path / "file" / "m", vocab_size=400)


# --- tokenizer.json ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_json_repeats_byte_for_byte(kind, corpus, tmp_path, capsys):
    a = train_tokenizer(corpus, 320, tmp_path / "deep" / "a.json", model_type=kind)
    assert "wrote" in (err := capsys.readouterr().err) and "320 tokens" in err and "bytes per token" in err
    b = train_tokenizer([str(corpus / "a.txt"), str(corpus / "b.jsonl.gz")], 320, tmp_path, model_type=kind)
    assert (tmp_path / "deep" / "a.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    assert a.vocab_size == b.vocab_size == 320 and a.encode(CODE) == b.encode(CODE)
    assert [a.pad_id, a.unk_id, a.bos_id, a.eos_id] == [0, 1, 2, 3]
    assert read_tokenizer(tmp_path).fingerprint == read_tokenizer(tmp_path / "deep" / "a.json").fingerprint


def test_unigram_gives_the_ids_of_the_sentencepiece_model_it_comes_from(corpus, tmp_path):
    unigram = train_tokenizer(corpus, 320, tmp_path, model_type="unigram")
    n = int(0.01 * sum(len(text.encode()) for text in TEXTS))  # held back
    assert n < 48, "the last line alone is held back"
    sp = train_sentencepiece([*TEXTS[:2], TEXTS[2][:-47]], vocab_size=320, model_type="unigram")
    for text in [*TEXTS, "a new hat, 京都の猫 😀\n    if"]:
        assert unigram.encode(text) == sp.encode(text)


@pytest.mark.slow  # the import of transformers
def test_transformers_reads_the_folder(corpus, tmp_path):
    transformers = pytest.importorskip("transformers")
    for kind in KINDS:
        own = train_tokenizer(corpus, 320, tmp_path / f"{kind}.json", model_type=kind)
        own.save(tmp_path / kind)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / kind)
        assert theirs(CODE)["input_ids"] == own.encode(CODE, bos=True)
        assert [theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id] == [0, 2, 3]


def test_bpe_compresses_words_and_splits_digits(corpus, tmp_path):
    bpe = train_tokenizer(corpus, 320, tmp_path)
    assert len(bpe.encode(" the cat")) <= 4 and len(bpe.encode("1234")) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_size_that_does_not_fit_names_the_one_that_does(kind, corpus, tmp_path):
    with pytest.raises(
        UserError, match="vocab_size 50000 is too large for this text: the largest possible is"
    ) as error:
        train_tokenizer(corpus, 50_000, tmp_path, model_type=kind)
    largest = int(str(error.value).split()[-1])
    assert train_tokenizer(corpus, largest, tmp_path, model_type=kind).vocab_size == largest
    with pytest.raises(UserError, match="vocab_size 100 is too small.* need [23][0-9][0-9]"):
        train_tokenizer(corpus, 100, tmp_path, model_type=kind)


def test_a_sample_is_drawn_from_everywhere_and_in_order():
    texts = [f"{i:03d}é\n" for i in range(1000)]  # 6 bytes each
    some = _drawn(iter(texts), 600, seed=1)
    given = [text.strip() for text in texts]
    lines = _drawn_lines(given, 5, seed=1)
    assert len(lines) == 5 and set(lines) < set(given)
    assert lines == _drawn_lines(given, 5, seed=1) != _drawn_lines(given, 5, seed=2)
    assert _drawn_lines(["a\nb", "c"], 9, seed=1) == ["a", "b", "c"]
    assert len(some) == 100 and some == sorted(some) and min(some) < "100" and max(some) > "900"
    assert some == _drawn(iter(texts), 600, seed=1) != _drawn(iter(texts), 600, seed=2)
    assert _drawn(iter(texts), 6000, seed=1) == texts and _drawn(iter(["long" * 9]), 1, seed=1) == ["long" * 9]


def test_the_tail_is_not_trained_on():
    pieces = [("abc", False), ("de\nf", True), ("é", True), ("x", True)]
    for n_bytes, train, rest in [
        (7, ["abc", "de\nf"], ["é", "x"]),
        (6, ["abc", "de\n"], ["f", "é", "x"]),
        (8, ["abc", "de\nf"], ["é", "x"]),
        (10, ["abc", "de\nf", "é", "x"], []),
    ]:
        tail = []
        assert list(before_tail(iter(pieces), n_bytes, tail)) == train
        assert tail == rest


# --- the script -------------------------------------------------------------------------------------------------------


def test_the_script_writes_a_file_that_loads(corpus, tmp_path, capsys):
    script.main(["--input", str(corpus), "--model_prefix", str(tmp_path / "t"), "--vocab_size", "300"])
    captured = capsys.readouterr()
    assert captured.out == "" and f"wrote {tmp_path / 't.json'}: 300 tokens" in captured.err
    loaded = read_tokenizer(tmp_path / "t.json")
    assert isinstance(loaded, HFTokenizer) and loaded.vocab_size == 300 and loaded.decode(loaded.encode(CODE)) == CODE


def test_the_script_refuses(corpus, tmp_path, capsys):
    no_folder = str(corpus / "a.txt" / "m")
    for args, message in [
        ([], "--input is missing"),
        (["--input", str(tmp_path / "no.txt")], "no.txt does not exist"),
        (["--input", str(corpus)], "vocab_size 16000 is too large for this text: the largest possible is"),
        (["--input", str(corpus), "--character_coverage", "2"], "character_coverage is 2.0: set it from 0.9 to 1.0"),
        (["--input", str(corpus), "--vocab_size", "-1"], "vocab_size is -1: set it to 1 or more"),
        (
            ["--input", str(corpus), "--vocab_size", "9000000000000000000"],
            "vocab_size is 9.*: set it to at most 16777216",
        ),
        (["--input", str(corpus), "--max_bytes", "0"], "max_bytes is 0: set it to 1 or more"),
        (["--input", str(corpus), "--model_prefix", f"{corpus}/"], "which has no file name"),
        (["--input", str(corpus / "b.jsonl.gz"), "--text_field", "x"], "available fields: text"),
        (["--input", str(corpus), "--vocab_size", "300", "--model_prefix", no_folder], "cannot write"),
    ]:
        with pytest.raises(UserError, match=message):
            script.main(args)
    with pytest.raises(SystemExit, match="2"):
        script.main(["--input", str(corpus), "--model_type", "words"])
    assert "--model_type words: expected one of ['bpe', 'unigram']" in capsys.readouterr().err
