"""Tests of the harness adapter: requests without lm_eval, and local tasks if lm_eval is installed."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from texts import BYTE

from src.errors import UserError
from src.evaluation.harness import Answers, read_options, run_tasks
from src.evaluation.scoring import encode_pair, score_corpus
from src.exits import ExitRule
from src.sampling import generate_ids

V = BYTE.vocab_size


@pytest.fixture(scope="module")
def answers(tiny):
    return Answers(tiny(vocab_size=V, n_layers=1, latent_steps=1), BYTE, batch_size=2)


def requests(*args):
    return [SimpleNamespace(args=arg) for arg in args]


def logprobs_after(model, text):
    """Returns the log-probabilities (V,) of the token after BOS and a text."""
    return model(torch.tensor([BYTE.encode(text, bos=True)])).logits[0, -1].log_softmax(-1)


def greedy(model, context, n, **options):
    """Returns the model's greedy continuation of a context, up to EOS."""
    ids = torch.tensor([BYTE.encode(context, bos=True)])
    new = generate_ids(model, ids, n, temperature=0, eos_id=BYTE.eos_id, **options)[0, ids.shape[1] :].tolist()
    return BYTE.decode(new[: new.index(BYTE.eos_id)] if BYTE.eos_id in new else new)


def test_loglikelihood_is_the_models_own(answers):
    asked = requests(("ab", "c"), ("", "d"), ("abc", "de"))
    found = answers.loglikelihood(asked, disable_tqdm=True)
    logprob = [logprobs_after(answers.model, text)[ord(c)].item() for text, c in (("ab", "c"), ("", "d"), ("abc", "d"))]
    last = logprobs_after(answers.model, "abcd")[ord("e")].item()
    assert [answer[0] for answer in found] == pytest.approx([logprob[0], logprob[1], logprob[2] + last], rel=1e-5)
    assert all(type(answer) is tuple and answer[1] is False for answer in found)


def test_loglikelihood_knows_what_greedy_decoding_writes(answers, tiny):
    model = tiny(vocab_size=V, n_layers=1)
    torch.nn.init.zeros_(model.head.weight)  # byte 0 is always the likeliest
    found = Answers(model, BYTE).loglikelihood(requests(("a", "\0\0"), ("a", "\0b")), disable_tqdm=True)
    assert [answer[1] for answer in found] == [True, False]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_repeated_requests_are_different_samples(answers, batch_size):
    """A task with `repeats` asks the same question several times, for a majority vote."""
    asked = requests(*[("ab", {"temperature": 1.0, "max_gen_toks": 6})] * 8)
    found = Answers(answers.model, BYTE, batch_size=batch_size).generate_until(asked, disable_tqdm=True)
    assert len(set(found)) == 8
    assert found == Answers(answers.model, BYTE, batch_size=batch_size).generate_until(asked, disable_tqdm=True)


def test_white_space_before_the_continuation_belongs_to_it(answers):
    assert encode_pair(BYTE, "a b ", "c") == (BYTE.encode("a b", bos=True), BYTE.encode(" c"))
    assert answers.loglikelihood(requests(("a ", "c")), True) == answers.loglikelihood(requests(("a", " c")), True)


def test_a_token_across_the_border_belongs_to_the_continuation(answers):
    pieces = {"ab": [1], "a": [2], "b": [3], "xa": [5, 2], "xab": [5, 1]}
    tokenizer = SimpleNamespace(start=lambda ids: [0, *ids], encode=pieces.__getitem__)
    assert encode_pair(tokenizer, "xa", "b") == ([0, 5], [1])


def test_rolling_is_every_token_from_bos_on(answers):
    text = "a text that is longer than the context"
    rolling = answers.loglikelihood_rolling(requests((text,), ("a",)), disable_tqdm=True)
    from_nothing = answers.loglikelihood(requests(("", text), ("", "a")), disable_tqdm=True)
    assert rolling == [answer[0] for answer in from_nothing]
    assert rolling[1] == pytest.approx(logprobs_after(answers.model, "")[ord("a")].item(), rel=1e-5)


def test_generate_until_is_greedy_and_keeps_the_order(answers):
    contexts = ["abc", "d", "efghi", ""]
    found = answers.generate_until(requests(*((c, {"max_gen_toks": 6}) for c in contexts)), disable_tqdm=True)
    assert found == [greedy(answers.model, context, 6) for context in contexts]
    assert len(set(found)) > 1


def test_generate_until_stops_before_the_first_stop_string(answers):
    whole = greedy(answers.model, "abc", 8)
    stop = whole[3]
    asked = requests(
        ("abc", {"max_gen_toks": 8, "until": ["never", stop]}), ("abc", {"max_gen_toks": 8, "until": stop})
    )
    expected = whole.partition(stop)[0]
    assert answers.generate_until(asked, disable_tqdm=True) == [expected, expected]
    assert len(expected) < len(whole)


def test_a_context_that_is_too_long_keeps_its_end(answers):
    long = "0123456789" * 5  # the context is 16 tokens
    (found,) = answers.generate_until(requests((long, {"max_gen_toks": 4})), disable_tqdm=True)
    ids = torch.tensor([list(long.encode())[-12:]])
    assert found == BYTE.decode(generate_ids(answers.model, ids, 4, temperature=0)[0, 12:].tolist())


def test_the_exit_rule_is_obeyed(answers):
    rule = ExitRule(max_recursion_depth=1)
    shallow = Answers(answers.model, BYTE, rule=rule)
    assert shallow.loglikelihood(requests(("a", "b")), True) != answers.loglikelihood(requests(("a", "b")), True)
    asked = requests(("abc", {"max_gen_toks": 8}))
    assert shallow.generate_until(asked, True) == [greedy(answers.model, "abc", 8, exit=rule)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ([], 256, {"temperature": 0.0})),
        ({"until": "\n", "max_gen_toks": 5, "do_sample": False, "temperature": 0.7}, (["\n"], 5, {"temperature": 0.0})),
        ({"until": ["a", ""], "do_sample": True, "top_k": 3}, (["a"], 256, {"temperature": 1.0, "top_k": 3})),
        ({"until": None, "temperature": 0.5, "max_new_tokens": 7}, ([], 7, {"temperature": 0.5})),
    ],
)
def test_options_of_a_task(options, expected):
    assert read_options(options) == expected


# ---- the harness itself ---------------------------------------------------------------------------------------------


HEAD = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
CHOICES = """
task: choices
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
ROLLING = """
task: rolling
output_type: loglikelihood_rolling
doc_to_target: "{{question}}"
metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}]
"""
WRITING = """
task: writing
output_type: generate_until
doc_to_target: "{{text}}"
generation_kwargs: {max_gen_toks: 4, until: ["never"]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
QUESTIONS = ("abc", "b")


def write_tasks(folder, answers):
    """Writes local tasks in which the model is right on the first of two rows and wrong on the second."""
    rows = []
    for i, question in enumerate(QUESTIONS):
        first, second = answers.loglikelihood(requests((question, "d"), (question, "e")), True)
        chosen = int(second[0] > first[0])
        text = greedy(answers.model, question, 4) + "x" * i
        rows.append(
            {"question": question, "choices": ["d", "e"], "answer": chosen if i == 0 else 1 - chosen, "text": text}
        )
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in (("choices", CHOICES), ("rolling", ROLLING), ("writing", WRITING)):
        (folder / f"{name}.yaml").write_text(task + HEAD.format(rows=folder / "rows.jsonl"))


@pytest.fixture
def local(monkeypatch, tmp_path, answers):
    """A folder of tasks, without network access and with its own cache."""
    pytest.importorskip("lm_eval")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_tasks(tmp_path, answers)
    return tmp_path


def test_local_tasks_run(answers, local, capsys):
    tasks = ["choices", "writ*", str(local / "rolling.yaml")]
    results, table = run_tasks(answers.model, BYTE, tasks, str(local), batch_size=2)
    figures = results["results"]
    assert figures["choices"]["acc,none"] == figures["writing"]["exact_match,none"] == 0.5
    bits = score_corpus(answers.model, BYTE, QUESTIONS).figures.bits_per_byte
    assert figures["rolling"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-6)
    assert all(name in table for name in ("choices", "rolling", "writing", "acc"))
    limited, _ = run_tasks(answers.model, BYTE, ["choices"], str(local), limit=1)
    assert limited["results"]["choices"]["acc,none"] == 1.0
    assert capsys.readouterr().out == ""  # stdout belongs to the caller
    json.dumps(results)


def test_tasks_whose_files_are_not_there(answers, local):
    with pytest.raises(UserError, match="is not a folder"):
        run_tasks(answers.model, BYTE, ["choices"], str(local / "nowhere"))
    (local / "rows.jsonl").unlink()
    with pytest.raises(UserError, match="cannot read a task's file or data"):
        run_tasks(answers.model, BYTE, ["choices"], str(local))


@pytest.mark.slow
def test_a_task_that_nobody_has(answers, local):
    with pytest.raises(UserError, match="choicse: unknown task; did you mean choices?"):
        run_tasks(answers.model, BYTE, ["choicse"], str(local))


def test_without_lm_eval_the_command_to_get_it_is_told(answers, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match="pip install lm_eval=="):
        run_tasks(answers.model, BYTE, ["choices"])
