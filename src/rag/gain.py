"""What retrieved code is worth to a model: bits of the same targets after several contexts, with and without it.

A target is a number of tokens of a file, from one that begins with a line break. B is the budget: the most tokens of a
context. N is half of it. The contexts are:

none          nothing
random B      a random place of another file of the repository, as many tokens as `retrieved B`
retrieved B   the chunks that are most similar to the text before the target (the query), without that text itself
oracle B      of the `oracle` best chunks and `retrieved B`, the context with the lowest loss of the target: a bound
own N, own B  the last N or B tokens of the file before the target
X + own       a context X of at most N tokens, then as much of the file's own past as fills the budget B

The file itself and its near copies are never a source of random, retrieved or oracle text. Some targets are near the
start of files, where the file's own past has fewer than N tokens: there, only other files can fill the context, so
X + own may have more tokens than `own B`.
"""

import random
import re
from math import log
from typing import NamedTuple

import numpy as np

from src.data.samples import QUERY_MARKER, prepare_code_input
from src.errors import UserError
from src.evaluation.capabilities import Material, Result
from src.evaluation.scoring import choose_stride, score_samples, windows
from src.rag.chunks import Source, chunks_of, cut_file
from src.rag.embedder import TextEmbedder
from src.rag.retriever import RAGRetriever, VectorSearch, fit_context
from src.rag.store import MemoryVectorStore

LEAST_PAST = 16  # tokens before a target: with fewer there is hardly anything to search with
LEAST_BUDGET = 4 * LEAST_PAST
TARGET_TOKENS = 64
MOST_BUDGET = 512  # of retrieval_gain: with more, few files are long enough for targets
RESAMPLES = 2000  # of the targets, for an interval


class Repository(NamedTuple):
    name: str
    version: str  # of an installed package; otherwise ""
    retriever: RAGRetriever
    ids: list[list[int]]  # tokens of each source


class TargetSettings(NamedTuple):
    """How targets and their contexts are made; sizes in tokens."""

    budget: int  # most tokens of a context
    target_tokens: int = TARGET_TOKENS
    query_tokens: int = 64  # before the target, that are compared with the chunks
    top_k: int = 4  # chunks that are put into a context, as long as they fit
    oracle: int = 0  # chunks among which the oracle chooses


class Target(NamedTuple):
    repository: str
    path: str
    is_start: bool  # near the start of its file
    past: list[int]  # at most `budget` tokens before it
    ids: list[int]
    line: str  # the next line that is not blank, stripped
    contexts: dict[str, list[int]]  # name -> tokens before the target, without BOS
    score: float  # of the best chunk; 0 if none was found
    near_copies: list[str]  # paths of the other files that are never a source for this target


# ---- targets --------------------------------------------------------------------------------------------------------


def places_of(ids: list[int], tokenizer, low: int, high: int | None, n_tokens: int) -> list[int]:
    """Returns the indices from low to below high of tokens that begin with a line break and start a whole target."""
    stop = len(ids) - n_tokens + 1 if high is None else min(high, len(ids) - n_tokens + 1)
    return [
        i
        for i in range(low, stop)
        if tokenizer.id_to_bytes(ids[i]).startswith(b"\n") and tokenizer.decode_bytes(ids[i : i + n_tokens]).strip()
    ]


def first_line(text: str) -> str:
    """Returns the first line that is not blank, without white space at both ends."""
    return text.lstrip().split("\n")[0].rstrip()


def draw_targets(
    repositories: list[Repository], tokenizer, settings: TargetSettings, n_targets: int, seed: int
) -> list[Target]:
    """Returns n_targets targets inside files, and half as many near the start of files.

    Each repository has the same number of them (up to one), in different files if possible. Raises UserError if a
    repository has no file that is long enough."""
    targets = []
    for is_start, wanted in ((False, n_targets), (True, max(1, n_targets // 2))):
        low, high = (LEAST_PAST, settings.budget // 2) if is_start else (settings.budget, None)
        for number, repository in enumerate(repositories):
            rng = random.Random(f"{seed} {repository.name} {is_start}")
            places = [places_of(ids, tokenizer, low, high, settings.target_tokens) for ids in repository.ids]
            files = [file for file, found in enumerate(places) if found]
            if not files:
                least = low + settings.target_tokens
                raise UserError(f"{repository.name}: no file has {least} tokens: choose a larger repository")
            rng.shuffle(files)
            share = wanted // len(repositories) + (number < wanted % len(repositories))
            for draw in range(share):
                file = files[draw % len(files)]
                at = rng.choice(places[file])
                # a generator of its own for random text, so that the places do not depend on top_k or query_tokens
                own = random.Random(f"{seed} {repository.name} {is_start} {draw}")
                targets.append(make_target(repository, file, at, is_start, tokenizer, settings, own))
    return targets


def make_target(repository, file, at, is_start, tokenizer, settings, rng) -> Target:
    """Returns the target at token `at` of a file, with all of its contexts."""
    ids, source = repository.ids[file], repository.retriever.sources[file]
    past, target = ids[max(0, at - settings.budget) : at], ids[at : at + settings.target_tokens]
    excluded = sorted({file, *repository.retriever.near_copies(source.text)})
    query = tokenizer.decode(past[-settings.query_tokens :])
    most = max(settings.top_k, settings.oracle)
    hits = repository.retriever.retrieve([query], most, [excluded])[0] if query.strip() else []
    contexts = contexts_of(repository, [hit.chunk.text for hit in hits], excluded, past, tokenizer, settings, rng)
    line = first_line(tokenizer.decode(ids[at : at + 4 * settings.target_tokens]))
    copies = [repository.retriever.sources[number].path for number in excluded if number != file]
    score = hits[0].score if hits else 0.0
    return Target(repository.name, source.path, is_start, past, target, line, contexts, score, copies)


# ---- contexts -------------------------------------------------------------------------------------------------------


def contexts_of(repository, texts, excluded, past, tokenizer, settings, rng) -> dict[str, list[int]]:
    """Returns the contexts of a target by name. The candidates of an oracle are named `oracle B 0`, `oracle B 1`, ...

    texts: chunks from other files, best first."""
    budget, near = settings.budget, settings.budget // 2
    found = {"none": [], f"own {near}": past[-near:], f"own {budget}": past}

    def with_past(context):
        return context + past[len(context) - budget :] if len(context) < budget else context

    for room, name, join in ((budget, "{} " + str(budget), list), (near, "{} + own", with_past)):
        is_last = join is list  # nothing of the file stands between the context and the target
        retrieved = written(tokenizer, texts[: settings.top_k], room, is_last)
        strange = random_text(repository, excluded, len(retrieved), is_last, tokenizer, rng)
        found[name.format("random")], found[name.format("retrieved")] = join(strange), join(retrieved)
        if settings.oracle:
            single = [written(tokenizer, [text], room, is_last) for text in texts[: settings.oracle]]
            for number, context in enumerate([retrieved, *single]):
                found[f"{name.format('oracle')} {number}"] = join(context)
    return found


def written(tokenizer, texts, room: int, is_last: bool) -> list[int]:
    """Returns chunks and the marker line as at most `room` tokens, in the form that generate.py --rag uses."""
    text = prepare_code_input(fit_context(tokenizer, texts, room).text, "")
    # a target begins with a line break itself
    return tokenizer.encode(text.removesuffix("\n") if is_last else text)[-room:] if text else []


def random_text(repository, excluded, n_tokens: int, is_last: bool, tokenizer, rng) -> list[int]:
    """Returns exactly n_tokens tokens: a random place of a file that is not excluded, then the marker line.

    Returns fewer if no file is long enough."""
    marker = tokenizer.encode(f"\n{QUERY_MARKER}" + "\n" * (not is_last))
    wanted = n_tokens - len(marker)
    files = [n for n, ids in enumerate(repository.ids) if n not in excluded and len(ids) >= wanted]
    if wanted < 1 or not files:
        return []
    ids = repository.ids[rng.choice(files)]
    start = rng.randrange(len(ids) - wanted + 1)
    return ids[start : start + wanted] + marker


def bits_of(model, tokenizer, targets: list[Target], batch_size: int = 16) -> list[dict[str, float]]:
    """Returns for each target {name of a context: bits of the target after it}."""
    stride, owners, found = choose_stride(model.config), [], [{} for _ in targets]

    def samples():
        for number, target in enumerate(targets):
            for name, context in target.contexts.items():
                owners.append((number, name))
                yield from windows(tokenizer.start(list(context)), [target.ids], model.config.max_seq_len, stride)

    for sample, scores in score_samples(model, samples(), batch_size):
        number, name = owners[sample]
        assert scores.logprobs.shape[-1] == len(targets[number].ids), "every context has the same targets"
        found[number][name] = -scores.logprobs[-1].double().sum().item() / log(2)
    return found


# ---- the test of eval_capabilities.py -------------------------------------------------------------------------------


def repository_of(name: str, texts: list[str], tokenizer) -> Repository:
    """Returns Python files as a repository, with an index in memory."""
    sources = [Source(f"{number}.py", text, "") for number, text in enumerate(texts)]
    chunks = chunks_of(sources, [cut_file(source.path, source.text) for source in sources])
    embedder, parts = TextEmbedder(), [chunk.text for chunk in chunks]
    embedder.fit(parts)
    store = MemoryVectorStore(embedder.dim, embedder.identity)
    store.add(embedder.embed(parts))
    retriever = RAGRetriever(sources, chunks, VectorSearch(embedder, store))
    return Repository(name, "", retriever, tokenizer.encode_batch(texts))


def retrieval_gain(model, tokenizer, material: Material) -> list[Result]:
    """Change of the bits per byte of targets by retrieved code, in three places.

    "alone": inside files, without the file's own past. "in place of older code": inside files, where retrieved code
    takes the place of the older half of this past. "near the start of files": before a past that leaves room for it.
    The chance level is the change by as much random text of the same repository. The interval is a bootstrap over the
    targets. Returns [] if the model's context or all files are too short, or if there is only one file."""
    settings = TargetSettings(min(MOST_BUDGET, model.config.max_seq_len - TARGET_TOKENS))
    if settings.budget < LEAST_BUDGET or len(material.repository) < 2:
        return []
    # the same licence at the start of every file would look like a gain
    texts = [re.sub(r"\A(\s*#.*\n)+", "", text) for text in material.repository]
    repository = repository_of("repository", texts, tokenizer)
    try:
        targets = draw_targets([repository], tokenizer, settings, material.count(48), material.seed)
    except UserError:  # all files are short
        return []
    bits, found = bits_of(model, tokenizer, targets), []
    for name, is_start, base, other in (
        ("alone", False, "none", f"{{}} {settings.budget}"),
        ("in place of older code", False, f"own {settings.budget}", "{} + own"),
        ("near the start of files", True, f"own {settings.budget}", "{} + own"),
    ):
        each = [row for row, target in zip(bits, targets) if target.is_start == is_start]
        before, after, chance = (
            np.array([row[context] for row in each])
            for context in (base, other.format("retrieved"), other.format("random"))
        )
        draws = np.random.default_rng(material.seed).integers(0, len(each), (RESAMPLES, len(each)))
        low, high = np.quantile(_change(before[draws], after[draws]), (0.025, 0.975)).tolist()
        figures = float(_change(before, after)), "change", len(each), float(_change(before, chance))
        found.append(Result("retrieval", name, *figures, "measured: random text", (low, high)))
    return found


def _change(before, after):
    return after.sum(-1) / before.sum(-1) - 1
