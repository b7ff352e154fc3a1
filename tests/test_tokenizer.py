"""Tokenizers: round trips, streaming, files, determinism, and what is refused."""

import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.config import UserError
from src.tokenizer import (
    ByteLevelTokenizer,
    HFTokenizer,
    StreamDecoder,
    TokenizerWrapper,
    frequent_line_breaks,
    load_tokenizer,
    train_sentencepiece,
)

CODE = 'class A:\n    def f(self, x):\n        if x:\n            return  x[10:]  # no\n\n\n    y = "a"\n\n\ttab\t1\r\n'
TEXTS = [
    CODE * 4,
    "京都は日本の都市である。\n人口は百四十万人。\n" * 8,
    "the cat sat on the mat and the dog ate the hat\n" * 8,
]
HARD = [
    "",
    " ",
    "  two leading, trailing  ",
    "\n\n\n",
    "a\tb\r\nc\x00d",
    "emoji 😀👩‍👩‍👧 and ｆｕｌｌ width ①",
    "the mark \u2581 itself \u2581\u2581",
    "<s> </s> <pad> <unk> <0x41> <|endoftext|>",
    "ﬁ e\u0301 é \u3000全角",
    CODE,
]


@pytest.fixture(scope="module")
def sp():
    return train_sentencepiece(TEXTS, vocab_size=420)


@pytest.fixture(scope="module")
def hf_file(tmp_path_factory):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=320, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    )
    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    tok.save(str(path))
    return path


@pytest.fixture(params=["sentencepiece", "byte", "hf"])
def tokenizer(request, sp, hf_file):
    return {"sentencepiece": lambda: sp, "byte": ByteLevelTokenizer, "hf": lambda: HFTokenizer(hf_file)}[
        request.param
    ]()


@pytest.mark.parametrize("text", HARD)
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


@settings(deadline=None, max_examples=80)
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_round_trip_of_any_text(text, sp):
    assert sp.decode(sp.encode(text)) == text


def test_batch_and_special_tokens(tokenizer):
    assert tokenizer.encode_batch(HARD) == [tokenizer.encode(t) for t in HARD]
    ids = tokenizer.encode("ab", bos=True, eos=True)
    assert ids == [tokenizer.bos_id, *tokenizer.encode("ab"), tokenizer.eos_id]
    assert tokenizer.decode([tokenizer.pad_id, *ids, tokenizer.eos_id]) == "ab"
    special = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}
    assert not special & {i for text in HARD for i in tokenizer.encode(text)}


def test_stream_decoder_gives_whole_characters_and_the_same_text(tokenizer):
    text = "x😀京都é\n" * 2
    ids = tokenizer.encode(text)
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push(i) for i in ids]
    assert "".join(pieces) == text and decoder.flush() == ""
    assert not any("\ufffd" in p for p in pieces)


@settings(deadline=None, max_examples=100)
@given(ids=st.lists(st.integers(0, 258), max_size=40))
def test_stream_decoder_on_broken_bytes(ids):
    tokenizer = ByteLevelTokenizer()
    decoder = StreamDecoder(tokenizer)
    assert "".join([*map(decoder.push, ids), decoder.flush()]) == tokenizer.decode(ids)


def test_byte_fallback_pieces_are_single_bytes(sp):
    ids = sp.encode("😀")
    assert [sp.id_to_bytes(i) for i in ids] == [bytes([b]) for b in "😀".encode()]
    decoder = StreamDecoder(sp)
    assert [decoder.push(i) for i in ids] == ["", "", "", "😀"]
    assert decoder.push(ids[0]) == "" and decoder.flush() == "\ufffd"


def test_line_breaks_and_indentation_are_single_tokens(sp):
    assert len(sp.encode("\n")) == 1
    assert len(sp.encode("\n        ")) == 1
    assert frequent_line_breaks(["a b"]) == ["\n"]
    assert "\n    " in frequent_line_breaks([CODE])
    assert [sp.pad_id, sp.unk_id, sp.bos_id, sp.eos_id] == [0, 1, 2, 3]


def test_digits_are_split(sp):
    assert len(sp.encode("1234")) >= 4


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


def test_vocabulary_too_small_names_what_is_needed():
    with pytest.raises(UserError, match="too small.* need 3[0-9][0-9]"):
        train_sentencepiece(TEXTS, vocab_size=50)
    with pytest.raises(UserError, match="no text"):
        train_sentencepiece([])


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "ckpt")
    for source in (tmp_path / "ckpt", next((tmp_path / "ckpt").iterdir())):
        loaded = load_tokenizer(source)
        assert (loaded.kind, loaded.fingerprint) == (tokenizer.kind, tokenizer.fingerprint)
        assert loaded.encode(CODE) == tokenizer.encode(CODE)
    assert pickle.loads(pickle.dumps(tokenizer)).encode(CODE) == tokenizer.encode(CODE)


def test_load_byte_by_name():
    assert load_tokenizer("byte").vocab_size == 259


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json", "tokenizer_config.json"])
def test_missing_and_broken_files(tmp_path, name, sp):
    with pytest.raises(UserError, match=name):
        load_tokenizer(tmp_path / name)
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    for content in (b"", b"{}", b"garbage" * 50, sp._data[:1000]):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            load_tokenizer(tmp_path)


def test_unwritable_model_prefix(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        train_sentencepiece(TEXTS, tmp_path / "file" / "m", vocab_size=400)


def test_foreign_model_without_bytes(tmp_path):
    import io

    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["hello world"] * 20), model_writer=out, vocab_size=12, minloglevel=2
    )
    tokenizer = TokenizerWrapper(out.getvalue())
    assert tokenizer.decode(tokenizer.encode("hello world")).strip() == "hello world"
    assert tokenizer.decode(tokenizer.encode("q\u2581q"))
