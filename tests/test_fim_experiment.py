"""experiments/fim.py: lines, prompts, metrics by hand, a model that copies, and a whole run on a tiny model."""

import json

import pytest
import torch
from texts import write

from experiments import fim
from src.checkpoint import save_checkpoint
from src.errors import UserError
from src.model import TRMConfig, TRMModel
from src.tokenizer import ByteLevelTokenizer

BYTE = ByteLevelTokenizer({"fill_in_the_middle": True})
TEXT = "".join(f"def name_{n}(x):\n    return x * {n} + {n * n}\n\n\n" for n in range(30))
LINES = fim.draw_lines([TEXT, TEXT.upper()], BYTE, 40, 0, 99)


def test_lines_are_drawn_by_the_seed_and_come_with_their_text():
    assert fim.draw_lines([TEXT, TEXT.upper()], BYTE, 40, 0, 99) == LINES
    assert fim.draw_lines([TEXT, TEXT.upper()], BYTE, 40, 1, 99) != LINES
    assert len(set(LINES)) == 40
    for line in LINES:
        assert line.before + line.text + line.after in (TEXT, TEXT.upper())
        assert line.before.rstrip(" ").endswith("\n") and line.after.startswith("\n")
        assert len(line.text) >= 10 and line.text[0] != " "
    short = fim.draw_lines([TEXT], BYTE, 10, 0, 15)
    assert all(line.text.startswith("def") for line in short)
    with pytest.raises(UserError, match="only 0 usable lines: set a smaller --lines"):
        fim.draw_lines([TEXT], BYTE, 10, 0, 2)


def test_prompts_have_equal_budgets():
    line, other = max(LINES, key=lambda line: min(len(line.before), len(line.after))), LINES[0]
    ids = {arm: fim.prompt_ids(BYTE, line, other, arm, 64) for arm in fim.ARMS}
    prefix, suffix, middle = BYTE.fim[:3]
    before, after = (list(text.encode()) for text in (line.before[-32:], line.after[:32]))
    assert ids["both"] == [BYTE.bos_id, prefix, *before, suffix, *after, middle]
    assert ids["wrong"] == [BYTE.bos_id, prefix, *before, suffix, *other.after[:32].encode(), middle]
    assert ids["left"] == before and ids["left_long"] == list(line.before[-64:].encode())
    first = fim.Line("x", "a = 1\n", "\nb")
    assert fim.prompt_ids(BYTE, first, other, "left", 64) == [BYTE.bos_id, *b"a = 1\n"]


def test_edit_similarity():
    cases = {("", ""): 1, ("abc", "abc"): 1, ("abc", ""): 0, ("kitten", "sitting"): 1 - 3 / 7, ("ab", "ba"): 0}
    for (a, b), value in cases.items():
        assert fim.edit_similarity(a, b) == fim.edit_similarity(b, a) == pytest.approx(value)


class Speaker:
    """In place of a model: writes the text that `answer` gives for the ids of a row, then EOS or more text."""

    def __init__(self, answer):
        self.answer, self.config = answer, TRMConfig(vocab_size=262, max_seq_len=128)
        self.embed = torch.nn.Embedding(1, 1)

    def write(self, model, ids, n, temperature, eos_id, attention_mask):
        rows = [self.answer(row[real].tolist()).encode() for row, real in zip(ids, attention_mask.bool())]
        for at in range(n):
            yield torch.tensor([row[at] if at < len(row) else BYTE.eos_id for row in rows])


def test_a_model_that_knows_the_answer_by_its_suffix(monkeypatch):
    """It knows each line from the 20 characters after it, and ends there; without them, it writes another line."""
    known = {line.after[:20].encode(): line.text for line in LINES}

    def answer(ids):
        if BYTE.fim.suffix not in ids:
            return "def \nmore"
        after = bytes(ids[ids.index(BYTE.fim.suffix) + 1 : -1])[:20]
        return known[after]

    model = Speaker(answer)
    monkeypatch.setattr(fim, "generate", model.write)
    lines = [line for line in LINES if len(line.after) >= 20]
    found = fim.figures(fim.measure(model, BYTE, lines, fim.InfillConfig(batch_size=7)), lines)
    arms, n = found["arms"], len(lines)
    assert arms["both"] == {"exact": 1, "edit": 1, "new": 1, "ends": 1}
    assert arms["left"] == arms["left_long"] and arms["left"]["exact"] == 0 < arms["left"]["edit"] < 0.5
    assert arms["wrong"]["exact"] < 0.2 and arms["left"]["ends"] is None
    assert found["only_one_is_exact"]["left"] == {"both": n, "left": 0}
    assert 0 < found["n_new"] <= n


def test_a_whole_run(tmp_path, capsys):
    torch.manual_seed(0)
    size = {"d_model": 16, "n_heads": 2, "n_layers": 1, "max_seq_len": 96, "recursion": "none"}
    config = TRMConfig(vocab_size=262, pad_token_id=256, **size)
    save_checkpoint(tmp_path / "run", TRMModel(config), BYTE)
    path = write(tmp_path / "t.jsonl", [TEXT])
    words = [str(tmp_path / "run"), "--paths", path, "--lines", "4", "--output", str(tmp_path / "out.jsonl")]
    fim.main(words)
    *table, last = capsys.readouterr().out.splitlines()
    record = json.loads(last)
    assert record["lines"] == 4 and list(record["arms"]) == [line.split()[0] for line in table[1:5]]
    assert all(0 <= row["exact"] <= row["edit"] <= 1 for row in record["arms"].values())
    assert json.loads((tmp_path / "out.jsonl").read_text()) == record
    fim.main(words)
    assert capsys.readouterr().out.splitlines()[-1] == last
    with pytest.raises(UserError, match="the context of 96 tokens is too short"):
        fim.main([*words, "--max_new_tokens", "70"])
    save_checkpoint(tmp_path / "plain", TRMModel(TRMConfig(vocab_size=259)), ByteLevelTokenizer())
    with pytest.raises(UserError, match="no sentinels of fill-in-the-middle: train it with --fim_rate"):
        fim.main([str(tmp_path / "plain"), *words[1:]])
