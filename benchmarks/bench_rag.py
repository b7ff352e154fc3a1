"""Benchmark the retrieval of code: an index of a million lines of Python is built, opened, refreshed and searched.

    python benchmarks/bench_rag.py                               # the sources of the installed packages
    python benchmarks/bench_rag.py --paths ~/project --lines 200000 --methods tfidf
    python benchmarks/bench_rag.py --quick                       # a few files, to check that it runs

Files are drawn from `paths` until they have `lines` lines, and copied to a temporary folder. Each step runs in a
process of its own: `build` makes the index, `open` opens it with all files unchanged, and `refresh` opens it after one
file has changed. Prints two tables, then one JSON line.

Steps: `seconds` is wall time, `CPU s` the time that the process computed, which says more if the machine is shared;
imports are left out. The columns from read to write say where the wall time went. `peak` is the peak resident memory
(RSS), and `added` how much of it came after the imports.

Search: one query at a time, `query_lines` lines that are drawn from the files. Ours and a peer search in turns. The
peer of tfidf is numpy alone: the product of the query with a matrix in float32, which is bound by the speed of memory,
and its largest number. The peer of bm25 is bm25s with its own tokenizer, over the same chunks; its `index s` is the
time of tokenizing and indexing them. If scikit-learn is installed, the `index s` of tfidf's peer is that of its
HashingVectorizer and TfidfTransformer, with the same terms and components. Ours is the column embed of the build.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
from common import ROOT, interleaved, machine, median, print_json, print_table, seconds

from src.config import parse_flags, run
from src.data.corpus import find_files
from src.errors import UserError
from src.rag import index
from src.rag.embedder import TextEmbedder, terms_of
from src.runtime import peak_rss_bytes

MIB = 1024**2
STEPS = ("build", "open", "refresh")
# parts of a step -> functions that do them
PARTS = {
    "read": [(index, "read_sources")],
    "cut": [(index, "cut_file")],
    "embed": [(TextEmbedder, "fit"), (TextEmbedder, "embed"), (index, "Bm25Search")],
    "write": [(index, "_save")],
}


@dataclass
class RagBench:
    """What to measure.

    Args:
        paths: Python files, globs or folders, or site-packages: the installed packages of this interpreter
        lines: number of lines of the index; whole files are taken until they have as many
        methods: how code is compared: tfidf, bm25
        searches: number of searches
        query_lines: lines of a query
        seed: seed of the files and of the queries
        quick: index a thousand lines and search three times, to check that the benchmark runs
        child: internal: the one step to do in a child process, as JSON
    """

    paths: list[str] = field(default_factory=lambda: ["site-packages"])
    lines: int = 1_000_000
    methods: list[Literal["tfidf", "bm25"]] = field(default_factory=lambda: ["tfidf", "bm25"])
    searches: int = 100
    query_lines: int = 8
    seed: int = 0
    quick: bool = False
    child: str | None = None

    def __post_init__(self):
        if self.quick:
            self.lines, self.searches = 1000, 3
        if min(self.lines, self.searches, self.query_lines) < 1 or not (self.paths and self.methods):
            raise ValueError("lines, searches and query_lines must be 1 or more; paths and methods need one entry")


# ---- in the child process -------------------------------------------------------------------------------------------


def stopwatch(owner, name, times: dict, part: str):
    """Replaces a function by one that adds its wall time to times[part]."""
    work = getattr(owner, name)

    def timed(*args, **kwargs):
        start = time.perf_counter()
        try:
            return work(*args, **kwargs)
        finally:
            times[part] += time.perf_counter() - start

    setattr(owner, name, timed)


def opened(folder: str, cache_dir: str, method: str):
    """Opens an index.  Returns (its retriever, its figures)."""
    times = dict.fromkeys(PARTS, 0.0)
    for part, functions in PARTS.items():
        for function in functions:
            stopwatch(*function, times, part)
    before, cpu, start = psutil.Process().memory_info().rss, time.process_time(), time.perf_counter()
    retriever = index.open_retriever([folder], method, suffixes=[".py"], cache_dir=cache_dir)
    facts = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu, "parts": times}
    peak = peak_rss_bytes()
    return retriever, facts | {"peak": peak, "added": peak - before, "chunks": len(retriever.chunks)}


def queries_of(retriever, args: RagBench) -> list[str]:
    """Returns consecutive lines of files, drawn by seed."""
    rng, found = random.Random(args.seed), []
    while len(found) < args.searches:
        lines = rng.choice(retriever.sources).text.split("\n")
        start = rng.randrange(max(1, len(lines) - args.query_lines))
        query = "\n".join(lines[start : start + args.query_lines])
        found += [query] * bool(terms_of(query))
    return found


def numpy_peer(retriever, queries):
    """Returns (a search in float32 that is given one query vector after another, seconds to embed or None)."""
    embedder = TextEmbedder()
    matrix, vectors = retriever._search.store.array.astype(np.float32), iter(embedder.embed(queries))
    return lambda: int((matrix @ next(vectors)).argmax()), sklearn_seconds([c.text for c in retriever.chunks])


def sklearn_seconds(texts) -> float | None:
    """Returns the time in which scikit-learn makes hashed TF-IDF vectors of texts, None if it is not installed."""
    try:
        from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
    except ImportError:
        return None
    hashing = HashingVectorizer(analyzer=terms_of, n_features=TextEmbedder().dim, norm=None)
    return seconds(lambda: TfidfTransformer().fit_transform(hashing.transform(texts)))


def bm25s_peer(retriever, queries):
    """Returns (a search by bm25s alone, the seconds in which it tokenized and indexed the chunks)."""
    import bm25s

    peer, each, quiet = bm25s.BM25(method="lucene"), iter(queries), {"show_progress": False}
    texts = [chunk.text for chunk in retriever.chunks]
    taken = seconds(lambda: peer.index(bm25s.tokenize(texts, **quiet), **quiet))
    return lambda: peer.retrieve(bm25s.tokenize([next(each)], **quiet), k=1, **quiet), taken


def searched(retriever, method: str, args: RagBench) -> dict:
    """Returns the times of single searches by us and by the peer, in turns."""
    queries = queries_of(retriever, args)
    retriever.retrieve(queries[:1])  # reads the index from disk
    peer, taken = (numpy_peer if method == "tfidf" else bm25s_peer)(retriever, queries)
    each = iter(queries)
    times = interleaved({"ours": lambda: retriever.retrieve([next(each)]), "peer": peer}, len(queries))
    facts = {name: {"median": median(all), "p95": float(np.quantile(all, 0.95))} for name, all in times.items()}
    return facts | {"peer_index_seconds": taken}


def step_here(args: RagBench) -> None:
    job = json.loads(args.child)
    retriever, facts = opened(job["folder"], job["cache_dir"], job["method"])
    search = searched(retriever, job["method"], args) if job["step"] == "open" else None
    print(json.dumps(facts | {"search": search}))


# ---- in the parent process ------------------------------------------------------------------------------------------


def copy_files(args: RagBench, folder: Path) -> dict:
    """Copies drawn files to a folder until they have enough lines.  Returns the numbers of files, lines and bytes."""
    files = find_files(args.paths, (".py",))
    random.Random(args.seed).shuffle(files)
    facts = {"files": 0, "lines": 0, "bytes": 0}
    for number, file in enumerate(files):
        data = Path(file).read_bytes()
        part = folder / f"{number // 100}"
        part.mkdir(exist_ok=True)
        (part / f"{number}_{Path(file).name}").write_bytes(data)
        for name, more in (("files", 1), ("lines", data.count(b"\n")), ("bytes", len(data))):
            facts[name] += more
        if facts["lines"] >= args.lines:
            break
    return facts


def in_fresh_process(args: RagBench, job: dict) -> dict:
    """Does one step in a child process and returns its figures; its messages go to stderr."""
    command = [sys.executable, __file__, "--child", json.dumps(job)]
    command += [
        word for name in ("searches", "query_lines", "seed") for word in (f"--{name}", str(getattr(args, name)))
    ]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"the process for {job} ended with code {done.returncode}: see its message above")
    return json.loads(done.stdout.splitlines()[-1])


def measure(method: str, args: RagBench, folder: Path, cache_dir: Path) -> dict:
    """Returns the figures of each step with one method, and the size of the index on disk in bytes."""
    job = {"method": method, "folder": str(folder), "cache_dir": str(cache_dir)}
    changed, found = max(folder.glob("*/*.py"), key=lambda path: path.stat().st_size), {}
    for step in STEPS:
        if step == "refresh":
            changed.write_bytes(changed.read_bytes() + b"\n\ndef a_new_function(argument):\n    return argument\n")
        found[step] = in_fresh_process(args, job | {"step": step})
    found["disk"] = sum(path.stat().st_size for path in cache_dir.rglob("*") if path.is_file())
    return found


def print_tables(results: dict) -> None:
    rows = [
        [f"{method}, {step}", facts["seconds"], facts["cpu_seconds"], *facts["parts"].values(), *memory]
        for method, found in results.items()
        for step, facts in ((step, found[step]) for step in STEPS)
        for memory in [[facts["peak"] / MIB, facts["added"] / MIB, found["disk"] / MIB]]
    ]
    print_table(["", "seconds", "CPU s", *PARTS, "peak MiB", "added MiB", "disk MiB"], rows)
    rows = []
    for method, found in results.items():
        search = found["open"]["search"]
        for who, taken in (("ours", found["build"]["parts"]["embed"]), ("peer", search["peer_index_seconds"])):
            times = [1000 * search[who][name] for name in ("median", "p95")]
            rows.append([f"{method}, {who}", *times, "-" if taken is None else taken])
    print()
    print_table(["search", "median ms", "95 % below ms", "index s"], rows)


def main(argv=None) -> None:
    args = parse_flags(__doc__, RagBench, argv=argv)[0]
    if args.child:
        return step_here(args)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        source.mkdir()
        text = copy_files(args, source)
        results = {method: measure(method, args, source, Path(folder) / method) for method in args.methods}
    print(f"{text['files']} files, {text['lines']:,} lines, {text['bytes'] / 1e6:.1f} MB", end=", ")
    print(f"{results[args.methods[0]]['build']['chunks']:,} chunks\n")
    print_tables(results)
    print_json("rag", {"machine": machine(), "text": text, "methods": results})


if __name__ == "__main__":
    run(main)
