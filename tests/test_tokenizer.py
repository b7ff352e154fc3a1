"""Tokenizers: round trips, streaming, files, special tokens, and invalid files."""

import io
import itertools
import json
import pickle
import struct
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import usual_spm, write_records

from src.data.loader import create_train_loader
from src.data.record_rows import RecordDataset
from src.data.records import RecordFields, answer_of, prompt_of
from src.data.samples import collate_batch
from src.data.shards import Shards
from src.data.stream import StreamingDataset
from src.data.tokenizer_training import train_sentencepiece, train_tokenizer
from src.errors import UserError
from src.losses import IGNORE
from src.tokenizer import (
    ByteLevelTokenizer,
    HFTokenizer,
    StreamDecoder,
    TokenizerWrapper,
    read_llama2c_tokenizer,
    read_tokenizer,
)

TRAINED_SIZE = 320
TOK512 = Path(__file__).parents[2] / "shared" / "data" / "stories260K" / "tok512.bin"

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


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tokenizer.json of each type that train_tokenizer makes."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "t.txt").write_text("".join(TEXTS))
    kinds = ("bpe", "unigram")
    return {k: train_tokenizer(folder / "t.txt", TRAINED_SIZE, folder / f"{k}.json", model_type=k) for k in kinds}


@pytest.fixture(scope="module")
def llama_model():
    """A SentencePiece model with Llama's settings: a space before every text; <unk>, <s>, </s> and bytes come first."""
    out, options = io.BytesIO(), {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in TEXTS for line in text.split("\n") if line),
        model_writer=out,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        minloglevel=2,
        **options,
    )
    return out.getvalue()


@pytest.fixture(scope="module")
def llama2c_file(llama_model, tmp_path_factory):
    """The llama_model in llama2.c's format."""
    model = sentencepiece.SentencePieceProcessor(model_proto=llama_model)
    names = [model.id_to_piece(i).replace("\u2581", " ") for i in range(400)]
    names[1:3] = ["\n<s>\n", "\n</s>\n"]
    parts = [struct.pack("<fi", model.get_score(i), len(n.encode())) + n.encode() for i, n in enumerate(names)]
    path = tmp_path_factory.mktemp("llama2c") / "tok400.bin"
    path.write_bytes(struct.pack("<i", max(len(n.encode()) for n in names)) + b"".join(parts))
    return path


@pytest.fixture(scope="module")
def llama2c(llama2c_file):
    return read_llama2c_tokenizer(llama2c_file)


@pytest.fixture(params=["sentencepiece", "byte", "hf", "bpe", "unigram", "llama2c"])
def tokenizer(request, sp, hf_file, trained, llama2c):
    kinds = {"sentencepiece": sp, "byte": ByteLevelTokenizer(), "hf": HFTokenizer(hf_file), "llama2c": llama2c}
    return (kinds | trained)[request.param]


@pytest.mark.parametrize("text", HARD)
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == (tokenizer.prefix * bool(text) + text).encode()
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_a_text_inside_another_gets_no_space(llama2c):
    assert llama2c.prefix == " "
    for text in HARD:
        assert llama2c.decode_bytes(llama2c.encode_inside([text])[0]) == text.encode()
    assert (
        llama2c.encode_inside(["京都", "the cat"])[0]
        == llama2c.encode("a京都")[-len(llama2c.encode_inside(["京都"])[0]) :]
    )


@settings(deadline=None, max_examples=60)
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_round_trip_of_any_text(text, sp, trained, llama2c):
    for tokenizer in (sp, *trained.values(), llama2c):
        assert tokenizer.decode(tokenizer.encode(text)) == text


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
    decoder = StreamDecoder(tokenizer, starts_text=True)
    pieces = [decoder.push(i) for i in [tokenizer.bos_id, *ids]]
    assert "".join(pieces) == text and decoder.flush() == ""
    assert not any("\ufffd" in p for p in pieces)


def test_a_space_before_every_text_is_the_tokenizers_own(llama2c, hf_file):
    ids = llama2c.encode("the cat")
    assert llama2c.prefix == " " and llama2c.decode_bytes(ids) == b" the cat" and llama2c.encode("") == []
    goes_on = StreamDecoder(llama2c)
    assert "".join(map(goes_on.push, ids)) == " the cat"
    twice = StreamDecoder(llama2c, starts_text=True)
    assert "".join(map(twice.push, ids + ids)) == "the cat the cat"
    assert HFTokenizer(hf_file).prefix == ByteLevelTokenizer.prefix == ""


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


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "ckpt")
    for source in (tmp_path / "ckpt", max((tmp_path / "ckpt").iterdir(), key=lambda p: p.stat().st_size)):
        loaded = read_tokenizer(source)
        assert (loaded.kind, loaded.fingerprint) == (tokenizer.kind, tokenizer.fingerprint)
        assert loaded.encode(CODE) == tokenizer.encode(CODE)
    assert pickle.loads(pickle.dumps(tokenizer)).encode(CODE) == tokenizer.encode(CODE)


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json", "tokenizer_config.json"])
def test_missing_and_broken_files(tmp_path, name, sp):
    with pytest.raises(UserError, match=name):
        read_tokenizer(tmp_path / name)
    with pytest.raises(UserError, match="contains no tokenizer"):
        read_tokenizer(tmp_path)
    for content in (b"", b"{}", b"garbage" * 50, sp.files["tokenizer.model"][:1000]):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            read_tokenizer(tmp_path)


def test_foreign_model_without_bytes():
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["hello world"] * 20), model_writer=out, vocab_size=12, minloglevel=2
    )
    tokenizer = TokenizerWrapper(out.getvalue())
    assert tokenizer.decode(tokenizer.encode("hello world")).strip() == "hello world"
    assert tokenizer.decode(tokenizer.encode("q\u2581q"))


def check_records(tokenizer, folder, answers=("34 hats", "a")):
    """The tokens of a record's prompt are those of generation, and its answer is decoded with exactly one space."""
    path = write_records(folder / "a.jsonl", [{"question": "the cat\nis 12?", "answer": answer} for answer in answers])
    rows = RecordDataset(path, tokenizer, 100, cache_dir=str(folder / "cache"))
    prompt = tokenizer.encode(prompt_of("the cat\nis 12?"), bos=True)
    for (inputs, targets, _), answer in zip(rows, map(answer_of, answers), strict=True):
        learned = targets[targets != IGNORE].tolist()
        assert inputs.tolist() == prompt + learned[:-1] and learned[-1] == tokenizer.eos_id
        assert tokenizer.decode_bytes(learned) == answer.encode()
        decoder = StreamDecoder(tokenizer)
        assert "".join(map(decoder.push, learned[:-1])) + decoder.flush() == answer
    assert rows.prompt(0) == tokenizer.decode(prompt)
    shards = Shards([[path]], RecordFields())
    stream = StreamingDataset(shards, tokenizer, 100, shuffle_buffer=1)
    batch = next(create_train_loader(stream, 2, pad_id=tokenizer.pad_id))
    assert batch["target_ids"].tolist() == collate_batch(list(rows))["target_ids"].tolist()
    assert stream.bytes_per_token == rows.bytes_per_token or rows.store.n_lost


def test_records_with_every_kind_of_tokenizer(tokenizer, tmp_path):
    check_records(tokenizer, tmp_path)
    assert RecordDataset(tmp_path / "a.jsonl", tokenizer, 100, cache_dir=str(tmp_path / "cache")).store.n_lost == 0


def test_records_with_a_space_before_every_text(llama_model, tmp_path):
    (tmp_path / "hf").mkdir()
    usual = usual_spm(tmp_path)  # which knows no digits
    check_records(usual, tmp_path, ("the hats", "a"))
    hf = HFTokenizer(llama_json(llama_model), {})
    check_records(hf, tmp_path / "hf")
    assert hf.prefix == usual.prefix == " "


# --- tokenizer.json of other programs ---------------------------------------------------------------------------------


def hf_json(model, special=(), **parts):
    """A tokenizer.json (bytes) with a model of the `tokenizers` library and other parts, such as a decoder."""
    from tokenizers import Tokenizer

    tok = Tokenizer(model)
    for name, part in parts.items():
        setattr(tok, name, part)
    tok.add_special_tokens(list(special))
    return tok.to_str().encode()


TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<missing>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {},
}


def byte_level(special, **parts):
    """A byte-level BPE without merges; the special tokens come after the 256 bytes."""
    from tokenizers import decoders, models, pre_tokenizers

    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocab = {c: i for i, c in enumerate(sorted(words.alphabet()))}
    return hf_json(models.BPE(vocab, []), special, pre_tokenizer=words, decoder=decoders.ByteLevel(), **parts)


def llama_json(model_file):
    """The tokenizer.json of a SentencePiece BPE, as in Hugging Face's Llama folders."""
    from tokenizers import decoders, models, normalizers, processors

    model = sentencepiece.SentencePieceProcessor(model_proto=model_file)
    vocab = {model.id_to_piece(i): i for i in range(model.get_piece_size())}
    pairs = [(p[:k], p[k:]) for p in vocab for k in range(1, len(p)) if p[:k] in vocab and p[k:] in vocab]
    merges = sorted(pairs, key=lambda pair: vocab["".join(pair)])
    ends = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return hf_json(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True),
        ["<unk>", "<s>", "</s>"],
        normalizer=normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]),
        decoder=decoders.Sequence(ends),
        post_processor=processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)]),
    )


def test_a_llama_folder_and_its_sentencepiece_model_give_the_same_ids(llama_model):
    sp, hf = TokenizerWrapper(llama_model), HFTokenizer(llama_json(llama_model), {})
    assert hf.prefix == " " and (hf.bos_id, hf.eos_id, hf.unk_id) == (1, 2, 0)
    for text in [*TEXTS, *HARD]:
        if "\u2581" not in text:  # in this file, U+2581 means a space
            assert hf.encode(text) == sp.encode(text) and hf.decode(hf.encode(text)) == text


def test_special_tokens_by_the_file_beside_then_post_processor_then_name(tmp_path):
    from tokenizers.processors import TemplateProcessing

    names = ["</s>", "<|im_start|>", "<|im_end|>", "[PAD]"]  # 256, 257, 258, 259
    around = TemplateProcessing(single="<|im_start|> $A <|im_end|>", special_tokens=list(zip(names[1:3], (257, 258))))
    path = tmp_path / "tokenizer.json"
    path.write_bytes(byte_level(names))
    found = HFTokenizer(path)
    assert (found.bos_id, found.eos_id, found.pad_id, found.unk_id) == (256, 256, 259, 256)
    path.write_bytes(byte_level(names, post_processor=around))
    found = HFTokenizer(path)
    assert (found.bos_id, found.eos_id, found.pad_id) == (257, 258, 259)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": null, "eos_token": {"content": "</s>"}, "x": 1}')
    found = HFTokenizer(path)
    assert (found.bos_id, found.eos_id, found.vocab_size) == (257, 256, 260)
    found.save(tmp_path / "saved")
    again = read_tokenizer(tmp_path / "saved")
    assert (again.bos_id, again.eos_id, again.fingerprint) == (257, 256, found.fingerprint)
    assert again.decode([257, *again.encode("é<|im_end|>"), 258, 259, 256]) == "é<|im_end|>"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t["model"]["vocab"].update({"z": 2**32 - 1}), "has 257 tokens, but an id 4294967295"),
        (lambda t: t.update(post_processor=TEMPLATE), "its post_processor adds <missing>"),
        (lambda t: t["model"].update(unk_token=["x"]), "not a valid tokenizer.json"),
    ],
)
def test_tokenizer_json_that_breaks_the_library(tmp_path, capfd, change, said):
    """Too large an id is an error before a table of all ids is made. A Rust panic prints nothing."""
    settings = json.loads(byte_level(["</s>"]))
    change(settings)
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=f"tokenizer.json.* {said}|{said}"):
        HFTokenizer(tmp_path / "tokenizer.json")
    assert capfd.readouterr().err == ""


def test_a_piece_that_is_no_utf8(tmp_path, sp):
    data = sp.files["tokenizer.model"]
    piece = sp._sp.id_to_piece(sp.vocab_size - 1).encode()
    (tmp_path / "m.model").write_bytes(
        data.replace(b"\n" + bytes([len(piece)]) + piece, b"\n" + bytes([len(piece)]) + b"\xff" * len(piece))
    )
    with pytest.raises(UserError, match="m.model is not a valid SentencePiece model"):
        read_tokenizer(tmp_path / "m.model")


def test_what_tokenizer_json_needs(tmp_path):
    from tokenizers import models, pre_tokenizers

    path, beside = tmp_path / "tokenizer.json", tmp_path / "tokenizer_config.json"
    path.write_bytes(byte_level(["<end>"]))
    with pytest.raises(UserError, match="no known EOS token: set eos_token in a tokenizer_config.json"):
        HFTokenizer(path)
    beside.write_text('{"eos_token": "<end>"}')
    assert HFTokenizer(path).eos_id == 256
    for content, message in [
        ('{"eos_token": "<fin>"}', "names <fin> as eos_token"),
        ("[1]", "not a JSON object"),
        ("{", "broken"),
    ]:
        beside.write_text(content)
        with pytest.raises(UserError, match=message):
            HFTokenizer(path)
    words = models.WordLevel({"</s>": 0, "a": 1}, unk_token="</s>")
    with pytest.raises(UserError, match="loses the spaces"):
        HFTokenizer(hf_json(words, pre_tokenizer=pre_tokenizers.WhitespaceSplit()), {})


def test_no_model_makes_special_tokens_of_text():
    from tokenizers import decoders, models, normalizers

    # unigram finds the names of its special tokens in text, as it does other pieces
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((c, -2.0) for c in "\u2581</>cnksu")]
    space = normalizers.Replace(" ", "\u2581")
    model = models.Unigram(pieces, unk_id=0)
    text = hf_json(model, ["<unk>", "</s>"], normalizer=space, decoder=decoders.Replace("\u2581", " "))
    tokenizer = HFTokenizer(text, {})
    assert tokenizer.decode(tokenizer.encode("cut </s> <unk></s>")) == "cut </s> <unk></s>".replace("t", "\ufffd")
    assert tokenizer.eos_id not in tokenizer.encode("</s></s>")
    # here EOS is an added token that is not marked as special
    plain = byte_level(["<end>"]).replace(b'"special":true', b'"special":false')
    assert 256 not in HFTokenizer(plain, {"eos_token": "<end>"}).encode("the <end>")


# --- llama2.c ---------------------------------------------------------------------------------------------------------


def encoded_by_run_c(path, text):
    """Encodes as run.c of llama2.c does: a space, then characters or bytes + 3; merges the best pair repeatedly."""
    data, at, vocab, scores = path.read_bytes(), 4, {}, []
    while at < len(data):
        score, size = struct.unpack_from("<fi", data, at)
        vocab[data[at + 8 : at + 8 + size]] = len(scores)
        scores.append(score)
        at += 8 + size
    names = list(vocab)
    ids = [vocab[b" "]] if text else []
    for c in text:
        ids += [vocab[c.encode()]] if c.encode() in vocab else [b + 3 for b in c.encode()]
    while True:
        pairs = [vocab.get(names[a] + names[b]) for a, b in itertools.pairwise(ids)]
        if not any(pairs):
            return ids
        at = max((i for i, p in enumerate(pairs) if p), key=lambda i: (scores[pairs[i]], -i))
        ids[at : at + 2] = [pairs[at]]


def test_llama2c_file_gives_the_ids_of_run_c(llama2c, llama2c_file):
    special = [llama2c.unk_id, llama2c.bos_id, llama2c.eos_id, llama2c.pad_id]
    assert llama2c.vocab_size == 400 and special == [0, 1, 2, 2]
    for text in [*HARD, *(lines[:60] for lines in TEXTS)]:
        assert llama2c.encode(text) == encoded_by_run_c(llama2c_file, text)


@settings(deadline=None, max_examples=100)
@given(text=st.text(alphabet="abcdehinostw .,\n\té€日<>sx0123/\u2581", max_size=30))
def test_llama2c_file_gives_the_ids_of_run_c_for_any_text(text, llama2c, llama2c_file):
    assert llama2c.encode(text) == encoded_by_run_c(llama2c_file, text)


def test_broken_llama2c_files(tmp_path, llama2c_file):
    whole, path = llama2c_file.read_bytes(), tmp_path / "tok.bin"
    for content in (b"", whole[:4], whole[:-1], whole[:2000], whole + b"\0", b"\0" * 64, whole[4:]):
        path.write_bytes(content)
        with pytest.raises(UserError, match="tok.bin is not a valid llama2.c tokenizer file"):
            read_tokenizer(path)
    with pytest.raises(UserError, match="nowhere.bin: no such file"):
        read_tokenizer(tmp_path / "nowhere.bin")


@pytest.mark.skipif(not TOK512.exists(), reason="../shared/data/stories260K is not here")
def test_tok512():
    tokenizer, text = read_tokenizer(TOK512), "Once upon a time, there was a little girl named Lily.\n"
    assert tokenizer.vocab_size == 512 and tokenizer.encode("Once upon a time", bos=True)[:2] == [1, 403]
    assert tokenizer.encode(text) == encoded_by_run_c(TOK512, text) and tokenizer.decode(tokenizer.encode(text)) == text


def test_what_a_tokenizer_loses(sp, hf_file, tmp_path):
    for tokenizer in (sp, ByteLevelTokenizer(), HFTokenizer(hf_file)):
        assert [tokenizer.lost_bytes(text, tokenizer.encode(text)) for text in HARD] == [0] * len(HARD)
    usual = usual_spm(tmp_path)

    def lost(text):
        return usual.lost_bytes(text, usual.encode(text))

    assert lost("the cat sat") == 0
    assert lost("京都") == 6 and lost("a 京") == 3  # unknown characters
    assert lost("ｆull") == 3 and lost("a\n") == 1  # changed by NFKC; final white space is dropped
