"""experiments/retrieval.py on repositories made for it, with a model that copies: what it should find is known."""

import json
import random
from types import SimpleNamespace

import pytest
import torch

from experiments import retrieval
from src.checkpoint import save_checkpoint
from src.errors import UserError
from src.model import TRMConfig, TRMModel
from src.rag import gain
from src.rag.index import open_retriever
from src.tokenizer import ByteLevelTokenizer

TOKENIZER = ByteLevelTokenizer()
TARGET, BUDGET = 40, 240


class Copier(torch.nn.Module):
    """Predicts the byte that followed the last 6 bytes where they occurred before; all bytes alike if they did not."""

    def __init__(self, max_seq_len=BUDGET + TARGET):
        super().__init__()
        self.embed = torch.nn.Embedding(TOKENIZER.vocab_size, 1)
        self.config = SimpleNamespace(max_seq_len=max_seq_len, causal=True, pad_token_id=0)

    def new_cache(self, *sizes, **options):
        return []

    def forward(self, ids, attention_mask=None, cache=None, **options):
        if cache is not None:
            cache.append(ids)
            new, ids = ids.shape[1], torch.cat(cache, 1)
        logits = torch.zeros(*ids.shape, TOKENIZER.vocab_size)
        for row, each in zip(logits, ids.tolist()):
            seen = {}
            for at in range(6, len(each) + 1):
                key = tuple(each[at - 6 : at])
                if key in seen:
                    row[at - 1, seen[key]] = 12.0
                if at < len(each):
                    seen[key] = each[at]
        if cache is not None:
            logits = logits[:, -new:]
        return SimpleNamespace(
            logits=logits, carry=SimpleNamespace(steps=torch.ones(logits.shape[:2], dtype=torch.long))
        )


def word(rng):
    return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=7))


def noise(rng, n):
    """Lines whose words occur nowhere else."""
    return "".join(f"{word(rng)} = {word(rng)}\n" for _ in range(n))


def shared(n):
    """A function that a module and a helper both have."""
    name, first, second, third, fourth = (word(rng) for rng in [random.Random(f"shared {n}")] for _ in range(5))
    return f"def {name}({first}):\n    {second} = {third}\n    return {fourth}\n"


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """Modules of lines that occur once, each with a function that a helper has too; a vendored copy of module_0."""
    folder, rng = tmp_path_factory.mktemp("repository"), random.Random(0)
    for n in range(4):
        (folder / f"module_{n}.py").write_text(noise(rng, 30) + shared(n) + noise(rng, 10))
        (folder / f"helper_{n}.py").write_text(shared(n) + noise(rng, 20))
    (folder / "vendored.py").write_text((folder / "module_0.py").read_text().replace("return", "yield"))
    retriever = open_retriever([folder], cache_dir=folder / ".cache", report=False, chunk_lines=10)
    ids = TOKENIZER.encode_batch([source.text for source in retriever.sources])
    return gain.Repository("made", "1.0", retriever, ids)


SETTINGS = gain.TargetSettings(BUDGET, TARGET, query_tokens=80, oracle=2)


def target_at(repository, n):
    """The target after the first line of the shared function of module n, with its contexts."""
    paths = [source.path for source in repository.retriever.sources]
    file = paths.index(f"module_{n}.py")
    at = repository.retriever.sources[file].text.index("\n    ")
    return gain.make_target(repository, file, at, False, TOKENIZER, SETTINGS, random.Random(n))


def test_a_model_that_copies_finds_the_target_in_retrieved_code(repository):
    targets = [target_at(repository, n) for n in range(1, 4)]
    results = retrieval.results_of(Copier(), TOKENIZER, targets, retrieval.RetrievalConfig(line_tokens=30))
    for target, each in zip(targets, results):
        assert " = " in target.line and target.score > 0.1
        for name in ("retrieved 240", "oracle 240", "retrieved + own", "oracle + own"):
            assert each[name].shared_lines[0] >= 1 and each[name].shared_tokens == 1
        assert each["retrieved + own"].bits < 0.7 * each["own 240"].bits
        assert each["retrieved + own"].is_exact and each["retrieved + own"].similarity == 1
        assert each["random + own"].bits == pytest.approx(each["own 120"].bits, rel=0.2)  # no help by chance
        assert not each["none"].is_exact and each["none"].bits == pytest.approx(TARGET * 8.03, rel=0.02)
        assert each["oracle 240"].bits <= each["retrieved 240"].bits
        assert each["oracle + own"].bits <= each["retrieved + own"].bits


def test_contexts_are_within_the_budget_and_hold_neither_the_file_nor_a_copy(repository):
    for seed in range(3):
        targets = gain.draw_targets([repository], TOKENIZER, SETTINGS, 4, seed)
        assert [target.is_start for target in targets] == [False] * 4 + [True] * 2
        for target in targets:
            assert len(target.ids) == TARGET and target.ids[0] == ord("\n") + TOKENIZER.encode("\0")[0]
            texts = {s.path: s.text for s in repository.retriever.sources}
            whole = TOKENIZER.decode(target.past + target.ids)
            assert whole in texts[target.path]
            assert len(target.past) == BUDGET or (target.is_start and len(target.past) < BUDGET // 2)
            lengths = {name: len(context) for name, context in target.contexts.items()}
            assert max(lengths.values()) <= BUDGET and lengths["none"] == 0
            assert (
                lengths["random 240"] == lengths["retrieved 240"]
                and lengths["random + own"] == lengths["retrieved + own"]
            )
            if not target.is_start:
                assert {lengths[n] for n in ("own 240", "random + own", "retrieved + own")} == {BUDGET}
            hidden = {target.path, *target.near_copies}
            own = {line for path in hidden for line in texts[path].splitlines() if " = " in line and line[0] != " "}
            for name, context in target.contexts.items():
                if "+" not in name and not name.startswith("own"):
                    assert not own & set(TOKENIZER.decode(context).splitlines()), (name, target.path)
            is_copied = target.path in ("module_0.py", "vendored.py")
            assert bool(target.near_copies) == is_copied


def test_every_context_is_followed_by_the_same_bytes(repository, monkeypatch):
    seen, score = [], gain.score_samples

    def record(model, samples, *options):
        samples = list(samples)
        seen.extend(bytes(TOKENIZER.decode_bytes(s.target_ids[s.target_ids >= 0].tolist())) for s in samples)
        return score(model, samples, *options)

    monkeypatch.setattr(gain, "score_samples", record)
    targets = [target_at(repository, n) for n in (1, 2)]
    bits = gain.bits_of(Copier(), TOKENIZER, targets)
    wanted = [TOKENIZER.decode_bytes(t.ids) for t in targets for _ in t.contexts]
    assert seen == wanted and [each.keys() for each in bits] == [t.contexts.keys() for t in targets]


def test_the_query_and_the_contexts_do_not_depend_on_the_target(repository):
    """The file is changed from the target on: the contexts stay the same."""
    before = target_at(repository, 2)
    file = [source.path for source in repository.retriever.sources].index("module_2.py")
    at = repository.retriever.sources[file].text.index("\n    ")
    ids = list(repository.ids)
    ids[file] = ids[file][:at] + TOKENIZER.encode("\n    return print(0)" * 5)
    other = repository._replace(ids=ids)
    after = gain.make_target(other, file, at, False, TOKENIZER, SETTINGS, random.Random(2))
    assert after.ids != before.ids and after.contexts == before.contexts and after.score == before.score


def test_figures_by_hand():
    def result(bits, exact=False):
        return retrieval.Result(bits, 3, exact, 0.5, 0.25, (1, 2))

    def target(repository, score):
        return gain.Target(repository, "x.py", False, [], [], "", {}, score, [])

    def seed(*bits):
        results = [{"own 9": result(a), "retrieved + own": result(b, True)} for a, b in bits]
        return retrieval.Seed([target("a", 0.9), target("b", 0.1)], [2, 3], results)

    seeds = [seed((10, 5), (10, 20)), seed((20, 10), (10, 15))]
    figures = retrieval.figures_of(seeds, 9)
    assert figures["own 9"]["bits_per_byte"] == [4.0, 6.0] and figures["own 9"]["minus_own"] == [0, 0]
    assert figures["retrieved + own"]["minus_own"] == [1.0, -1.0] and figures["retrieved + own"]["exact"] == 1
    assert figures["own 9"]["shared_lines"] == 0.5
    rows = {row["threshold"]: row for row in retrieval.thresholds_of(seeds, 9)}
    assert rows[0.0]["bits_per_byte"] == [5.0, 5.0] and rows[0.0]["share"] == 1
    assert rows[0.5]["bits_per_byte"] == [3.0, 4.0] and rows[0.5]["share"] == 0.5
    assert rows[0.95]["bits_per_byte"] == [4.0, 6.0] and rows[0.95]["share"] == 0
    # repository a takes the threshold that is best on b (above 0.1, never by more), and b the one that is best on a (0)
    assert retrieval.best_elsewhere(seeds, 9) == [(5 + 20) / 5, (10 + 15) / 5]


def test_the_script_writes_what_it_prints(repository, tmp_path, capsys):
    torch.manual_seed(0)
    sizes = {"vocab_size": TOKENIZER.vocab_size, "d_model": 16, "n_heads": 2, "max_seq_len": 256}
    save_checkpoint(tmp_path / "model", TRMModel(TRMConfig(**sizes)), TOKENIZER)
    folder = repository.retriever.sources[0].real_path.rpartition("/")[0]
    words = f"{tmp_path}/model --packages {folder} --n_targets 2 --seeds 0 1 --target_tokens 8 --oracle 1".split()
    words += f"--line_tokens 4 --device cpu --output {tmp_path / 'out' / 'r.json'}".split()
    retrieval.main(words)
    out, facts = capsys.readouterr().out, json.loads((tmp_path / "out" / "r.json").read_text())
    assert facts["inside"]["targets"] == [2, 2] and facts["start"]["targets"] == [1, 1]
    for key in ("inside", "start"):
        for name, row in facts[key]["contexts"].items():
            assert f"| {name} | {row['tokens']:.0f} | {sum(row['bits_per_byte']) / 2:.3f} +- " in out
    assert "near copies of a target's file were left out" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--packages", "no_such_package"], "no_such_package: it is neither a folder"),
        (["--target_tokens", "250"], "lower target_tokens"),
        (["--budget", "400"], "budget is 400 in a context of 256 tokens: set it from 64 to 192"),
        (["--n_targets", "0"], "n_targets is 0"),
    ],
)
def test_mistakes_are_user_errors(words, said, tmp_path):
    with pytest.raises(UserError, match=said):
        retrieval.main([*words, "--output", str(tmp_path / "x.json")])
