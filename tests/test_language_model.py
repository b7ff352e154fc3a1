"""Tests of LanguageModel: it unpacks, writes like generate.py, scores like eval_lm.py, and shows hidden states."""

import pytest
import torch
from texts import BYTE

import generate
from src.checkpoint import load_model, save_checkpoint
from src.evaluation.scoring import score_corpus
from src.exits import ExitRule
from src.language_model import LanguageModel, continue_texts
from src.tokenizer import ByteLevelTokenizer

SIZE = {"vocab_size": BYTE.vocab_size, "n_layers": 1, "max_seq_len": 32}


@pytest.fixture
def trm(tiny):
    return LanguageModel(tiny(**SIZE), BYTE)


def test_it_unpacks_and_writes_what_generate_writes(trm, tmp_path, capsys):
    save_checkpoint(tmp_path / "run", trm.model, BYTE)
    lm = load_model(tmp_path / "run")
    model, tokenizer = lm
    assert model is lm.model and tokenizer.kind == "byte"
    for prompt in ("def ", "", "京"):
        generate.main([str(tmp_path / "run"), "--prompt", prompt, "--max_new_tokens", "8", "--seed", "3"])
        assert lm.write(prompt, 8, seed=3) + "\n" == capsys.readouterr().out
    assert lm.write("a", 0) == "a"
    with pytest.raises(ValueError, match="temperature"):
        lm.write("a", temperature=-1.0)


def test_it_stops_at_eos_unless_told_otherwise(trm):
    options = {"max_new_tokens": 6, "temperature": 0}
    ids = [BYTE.bos_id, *b"ab"]
    second = trm.model.generate(torch.tensor([ids]), 2, temperature=0)[0, -1].item()
    ends = ByteLevelTokenizer()
    ends.eos_id = second
    lm = LanguageModel(trm.model, ends)
    before, after = lm.write("ab", **options), lm.write("ab", stop_at_eos=False, **options)
    assert after == trm.write("ab", stop_at_eos=False, **options)
    assert after.startswith(before) and len(before) < len(after)
    made = [written.tokens for written in continue_texts(trm.model, ends, ["ab"], 6, temperature=0)]
    assert made == [1, 1, 0]  # the second is EOS


def test_scores_are_those_of_each_text_alone(trm):
    texts = ["one text", "東京"]
    assert trm.score(texts) == [score_corpus(*trm, [text]).figures for text in texts]
    deeper = trm.score(texts[:1], rule=ExitRule(max_recursion_depth=4))
    assert (
        deeper == [score_corpus(*trm, texts[:1], rule=ExitRule(max_recursion_depth=4)).figures] != trm.score(texts[:1])
    )


@pytest.mark.parametrize("family", ["trm", "loop", "none"])
def test_inspect_shows_every_step_and_visit(tiny, family):
    lm = LanguageModel(tiny(recursion=family, **SIZE), BYTE)
    c, seen = lm.model.config, lm.inspect("abc")
    steps = {"trm": c.supervision_steps, "loop": c.deep_steps, "none": 1}[family]
    assert seen.ids.tolist() == [BYTE.bos_id, *b"abc"]
    assert seen.logits.shape == (steps, 4, BYTE.vocab_size) and (seen.halt_logits is None) == (family != "trm")
    assert seen.states.shape == (c.visits_per_step * c.train_steps, 4, c.d_model)
    every = len(seen.states) // steps  # visits per step; the last one updates y, which is read out
    torch.testing.assert_close(lm.model.head(seen.states[every - 1 :: every]), seen.logits)
    torch.testing.assert_close(seen.logits[-1], lm.model(seen.ids[None]).logits[0])
    assert not lm.model.net._forward_hooks
    longest = "a" * (c.max_seq_len - 1)  # and BOS
    assert len(lm.inspect(longest).ids) == c.max_seq_len
    with pytest.raises(ValueError, match=f"has {c.max_seq_len + 1} tokens, the context holds {c.max_seq_len}"):
        lm.inspect(longest + "a")
