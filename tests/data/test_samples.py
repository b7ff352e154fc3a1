"""Rows of a single text: padding, truncation, special tokens, and the text of a prompt with retrieved code."""

import pytest

from src.data.samples import QUERY_MARKER, pad_sequence, prepare_code_input, tokenize_and_pad
from src.tokenizer import ByteLevelTokenizer, read_tokenizer

BYTES = ByteLevelTokenizer()
PAD, BOS, EOS = BYTES.pad_id, BYTES.bos_id, BYTES.eos_id


@pytest.mark.parametrize(
    ("options", "ids", "mask"),
    [
        ({}, [1, 2, 3, 0, 0], [1, 1, 1, 0, 0]),
        ({"pad_id": 9}, [1, 2, 3, 9, 9], [1, 1, 1, 0, 0]),
        ({"pad": "left"}, [0, 0, 1, 2, 3], [0, 0, 1, 1, 1]),
        ({"max_len": 3}, [1, 2, 3], [1, 1, 1]),
        ({"max_len": 2}, [1, 2], [1, 1]),
        ({"max_len": 2, "truncate": "left"}, [2, 3], [1, 1]),
        ({"max_len": 2, "truncate": "left", "pad": "left"}, [2, 3], [1, 1]),
    ],
    ids=["right", "pad_id", "left", "exact", "cut right", "cut left", "cut and pad left"],
)
def test_pad_sequence(options, ids, mask):
    got = pad_sequence([1, 2, 3], **({"max_len": 5} | options))
    assert [part.tolist() for part in got] == [ids, mask]
    assert all(part.dtype.is_signed and not part.is_floating_point() for part in got)


def test_pad_sequence_of_nothing_is_padding():
    ids, mask = pad_sequence([], 2, pad_id=7)
    assert ids.tolist() == [7, 7] and mask.tolist() == [0, 0]


@pytest.mark.parametrize("wrong", [{"pad": "top"}, {"truncate": "middle"}, {"max_len": 0}], ids=str)
def test_pad_sequence_refuses(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        pad_sequence([1], **({"max_len": 2} | wrong))


@pytest.mark.parametrize(
    ("options", "ids"),
    [
        ({}, [BOS, 97, 98, 99, PAD, PAD]),
        ({"bos": False}, [97, 98, 99, PAD, PAD, PAD]),
        ({"eos": True}, [BOS, 97, 98, 99, EOS, PAD]),
        ({"pad": "left"}, [PAD, PAD, BOS, 97, 98, 99]),
        ({"max_seq_len": 3}, [BOS, 98, 99]),
        ({"max_seq_len": 3, "truncate": "right"}, [BOS, 97, 98]),
        ({"max_seq_len": 3, "eos": True}, [BOS, 99, EOS]),
        ({"max_seq_len": 3, "eos": True, "truncate": "right"}, [BOS, 97, EOS]),
        ({"max_seq_len": 2, "eos": True}, [BOS, EOS]),
        ({"max_seq_len": 1, "bos": False}, [99]),
    ],
    ids=["plain", "no bos", "eos", "left", "cut left", "cut right", "cut left, eos", "cut right, eos", "ends", "one"],
)
def test_tokenize_and_pad(options, ids):
    got, mask = tokenize_and_pad(BYTES, "abc", **({"max_seq_len": 6} | options))
    assert got.tolist() == ids and mask.tolist() == [int(i != PAD) for i in ids]


def test_a_tokenizer_without_bos_gets_none():
    without = ByteLevelTokenizer().set_ends(add_bos=False)
    assert tokenize_and_pad(without, "abc", 4)[0].tolist() == [97, 98, 99, PAD]
    assert tokenize_and_pad(without, "", 2)[0].tolist() == [BOS, PAD]  # a row never starts empty


def test_a_row_too_short_for_its_ends_is_refused():
    with pytest.raises(ValueError, match="max_seq_len is 1"):
        tokenize_and_pad(BYTES, "abc", 1, eos=True)


def test_the_released_tokenizer_gives_the_ids_of_generation():
    tokenizer = read_tokenizer("checkpoints/python")
    text = prepare_code_input("def f():\n    return 1\n", "def g(")
    ids, mask = tokenize_and_pad(tokenizer, text, 64, pad="left")
    assert ids[mask == 1].tolist() == tokenizer.encode(text, bos=True)


def test_prepare_code_input():
    assert prepare_code_input("a = 1", "b =") == f"a = 1\n{QUERY_MARKER}\nb ="
    assert prepare_code_input("a = 1\n", "b =", "# now") == "a = 1\n# now\nb ="
    assert prepare_code_input("a = 1", "b =", "") == "a = 1\nb ="
    assert prepare_code_input("", "b =") == "b ="
