"""The sentinels of fill-in-the-middle in every kind of tokenizer: ids, files, and texts that contain their names."""

import pickle

import pytest
from tokenizers import AddedToken, Tokenizer

from src.data.tokenizer_json import FIM_NAMES, JSON_FILE
from src.data.tokenizer_training import train_sentencepiece, train_tokenizer
from src.interop.hf_tokenizer import save_for_transformers, to_hf
from src.tokenizer import ByteLevelTokenizer, HFTokenizer, read_tokenizer

CODE = "def f(x):\n    return  x[10:]  # no\n\n\n\ttab\r\n"
TEXTS = [CODE * 4, "京都は日本の都市である。\n" * 8, "the cat sat on\n" * 8]


@pytest.fixture(scope="module")
def with_sentinels(tmp_path_factory):
    """A tokenizer of each kind with the sentinels of fill-in-the-middle."""
    folder = tmp_path_factory.mktemp("fim")
    (folder / "t.txt").write_text("".join(TEXTS))
    bpe, unigram = (
        train_tokenizer(folder / "t.txt", 304, folder / f"{kind}.json", model_type=kind, fim=True)
        for kind in ("bpe", "unigram")
    )
    sentencepiece = train_sentencepiece(TEXTS, vocab_size=304, fim=True)
    return [bpe, unigram, sentencepiece, ByteLevelTokenizer({"fill_in_the_middle": True})]


def test_sentinels(with_sentinels, tmp_path):
    plain = train_sentencepiece(TEXTS, vocab_size=304)
    assert plain.fim is ByteLevelTokenizer().fim is None and ByteLevelTokenizer().vocab_size == 259
    for number, tok in enumerate(with_sentinels):
        is_byte = tok.kind == "byte"
        assert tok.fim == ((259, 260, 261, None) if is_byte else (4, 5, 6, None))
        assert tok.vocab_size == (262 if is_byte else 304)
        assert tok.decode_bytes(tok.fim.ids) == b""
        prefix, suffix, middle = tok.fim.ids
        ids = [tok.bos_id, prefix, *tok.encode("def f(x"), suffix, *tok.encode("):\n"), middle]
        assert tok.infill("def f(x", "):\n") == ids
        tok.save(tmp_path / str(number))
        for again in (read_tokenizer(tmp_path / str(number)), pickle.loads(pickle.dumps(tok))):
            assert again.fim == tok.fim and again.fingerprint == tok.fingerprint
            assert again.vocab_size == tok.vocab_size and again.encode(CODE) == tok.encode(CODE)


def test_the_order_is_kept(with_sentinels, tmp_path):
    for number, tok in enumerate(with_sentinels):
        other = pickle.loads(pickle.dumps(tok))
        other.suffix_first = True
        prefix, suffix, middle = tok.fim.ids
        ids = [tok.bos_id, prefix, suffix, *tok.encode("):\n"), middle, *tok.encode("def f(x")]
        assert other.infill("def f(x", "):\n") == ids != tok.infill("def f(x", "):\n")
        other.save(tmp_path / str(number))
        save_for_transformers(other, tmp_path / f"hf{number}", 64)
        folders = [read_tokenizer(tmp_path / name) for name in (str(number), f"hf{number}")]
        assert folders[0].fingerprint == tok.fingerprint
        for again in (*folders, to_hf(other), pickle.loads(pickle.dumps(other))):
            assert again.suffix_first and again.infill("def f(x", "):\n") == ids


def test_a_folder_for_transformers_keeps_them(with_sentinels, tmp_path):
    for number, tok in enumerate(with_sentinels):
        assert to_hf(tok).fim == tok.fim
        assert save_for_transformers(tok, tmp_path / str(number), 64) == []
        again = read_tokenizer(tmp_path / str(number))
        assert again.kind == tok.kind and again.fim == tok.fim and again.vocab_size == tok.vocab_size


def other_models():
    """Tokenizers with the sentinels of each known model. They are special tokens in some files and not in others."""
    plain = to_hf(ByteLevelTokenizer()).files[JSON_FILE].decode()
    for names in FIM_NAMES:
        for special in (True, False):
            tok = Tokenizer.from_str(plain)
            tok.add_tokens([AddedToken(name, special=special, normalized=False) for name in names])
            yield HFTokenizer(tok.to_str().encode(), {}), names


def test_the_sentinels_of_other_models_are_known():
    for tok, names in other_models():
        assert tok.fim.ids == tuple(range(259, 259 + len(names)))
        assert tok.decode_bytes(tok.fim.ids) == b"" and (tok.fim.end is None) == (len(names) == 3)
    tok = Tokenizer.from_str(to_hf(ByteLevelTokenizer()).files[JSON_FILE].decode())
    tok.add_special_tokens(list(FIM_NAMES[0][:2]))
    assert HFTokenizer(tok.to_str().encode(), {}).fim is None  # one of the three is missing


def test_the_names_of_sentinels_in_a_text_stay_text(with_sentinels):
    for tok in (*with_sentinels, *(tok for tok, _ in other_models())):
        for names in FIM_NAMES:
            for text in (*names, "".join(names), f"a {names[0]}b{names[1]} c\n{names[2]}"):
                ids = tok.encode(text)
                assert not {*ids} & {*tok.fim.ids} and tok.decode(ids) == text
                prompt = tok.infill(text, text)
                assert all(prompt.count(index) == 1 for index in tok.fim[:3])
