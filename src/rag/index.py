"""Indexes of source files, kept on disk: only files whose content is new are cut and embedded again.

An index is a folder of the cache. Its name is a hash of the searched paths and of the settings. It holds the vectors
(`MemoryVectorStore`), what the embedder learned, and manifest.json with the digest and the chunks of each file.
"""

import hashlib
import json
import os
import sys
import zipfile
from pathlib import Path

import numpy as np
from filelock import FileLock

from src.data.token_store import default_cache_dir
from src.errors import UserError
from src.files.folders import replacing
from src.files.text import read_object
from src.rag.chunks import chunks_of, cut_file, read_sources
from src.rag.embedder import make_embedder
from src.rag.retriever import Bm25Search, RAGRetriever, VectorSearch
from src.rag.store import FACTS, VECTORS, MemoryVectorStore

REFIT_SHARE = 0.25  # learn the idf again once this share of the chunks was embedded with the idf of older files
MANIFEST, LEARNED = "manifest.json", "learned.npz"
EMBEDDED = 2048  # chunks embedded at once, which limits memory


def open_retriever(
    paths, method="tfidf", dim=1024, checkpoint=None, chunk_lines=40, suffixes=(), cache_dir=None, report=True
) -> RAGRetriever:
    """Returns a retriever over the text files in files and folders; see `RagConfig` for the arguments.

    Reads the files, and updates the index in cache_dir (`default_cache_dir` if None). Prints on stderr what it did.
    Raises UserError if there is no text, or if a package or the model is missing."""
    sources = read_sources(paths, suffixes, report)
    if method == "bm25":
        chunks = chunks_of(sources, [cut_file(source.path, source.text, chunk_lines) for source in sources])
        return RAGRetriever(sources, chunks, Bm25Search([chunk.text for chunk in chunks]))
    embedder = make_embedder(method, dim, checkpoint)
    where = sorted(os.path.realpath(os.path.expanduser(os.fspath(path))) for path in paths)
    key = hashlib.sha256(json.dumps([where, sorted(suffixes), chunk_lines, embedder.identity]).encode()).hexdigest()
    folder = Path(cache_dir or default_cache_dir()) / f"rag-{key[:24]}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            chunks, store = _updated(folder, sources, embedder, chunk_lines, report)
    except OSError as error:
        advice = "set another one" if cache_dir else "set the variable HF_DATASETS_CACHE to another folder"
        raise UserError(f"cannot write to cache_dir {folder.parent} ({error.strerror}): {advice}") from None
    return RAGRetriever(sources, chunks, VectorSearch(embedder, store))


def _updated(folder, sources, embedder, chunk_lines, report):
    """Returns (chunks, store) of the sources, and saves what has changed. The embedder is fitted or restored."""
    # the name's end decides how a file is cut
    digests = [_digest(f"{source.path.rpartition('.')[2]}\0{source.text}") for source in sources]
    before, stale, old = _load(folder, embedder)
    rows, row = {}, 0  # digest -> rows of the old store
    for digest, each in before:
        rows[digest] = range(row, row := row + len(each))
    known = dict(before)
    ranges = [
        known[digest] if digest in known else cut_file(source.path, source.text, chunk_lines)
        for digest, source in zip(digests, sources)
    ]
    chunks = chunks_of(sources, ranges)
    if old is not None and digests == [digest for digest, _ in before]:
        return chunks, old
    is_new = np.array([digests[chunk.file] not in known for chunk in chunks], bool)
    stale += int(is_new.sum())
    if old is not None and stale <= REFIT_SHARE * len(chunks):
        kept = [row for digest in digests for row in rows.get(digest, ())]
    else:
        is_new[:], stale, kept = True, 0, []
        embedder.fit([chunk.text for chunk in chunks])
    store = _merge(old, kept, chunks, is_new, embedder)
    _save(folder, store, embedder, digests, ranges, stale)
    if report:
        counts = f"{len(sources)} files, {len(chunks)} chunks, {int(is_new.sum())} of them embedded now"
        print(f"index of {counts}", file=sys.stderr)
    return chunks, MemoryVectorStore.load(folder, embedder.identity)


def _digest(text):
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:32]  # a name may not be UTF-8


def _merge(old, rows, chunks, is_new, embedder):
    """Returns a store of all chunks in order: those that are not new come from the rows of the old store."""
    vectors = np.empty((len(chunks), embedder.dim), np.float16)
    if rows:
        vectors[~is_new] = old.take(rows).array
    new = np.flatnonzero(is_new)
    for start in range(0, len(new), EMBEDDED):
        part = new[start : start + EMBEDDED]
        vectors[part] = embedder.embed([chunks[number].text for number in part])
    store = MemoryVectorStore(embedder.dim, embedder.identity)
    store.add(vectors)
    return store


def _load(folder, embedder):
    """Returns ([(digest, line ranges) of each file], chunks embedded since the last fit, store) of an index.

    Without an index: ([], 0, None). Raises UserError if it is broken."""
    if not (folder / MANIFEST).exists():
        return [], 0, None
    store = MemoryVectorStore.load(folder, embedder.identity)
    manifest = read_object(folder / MANIFEST)
    try:
        with np.load(folder / LEARNED, allow_pickle=False) as arrays:
            embedder.restore(dict(arrays))
        files = [(str(digest), [(int(first), int(last)) for first, last in each]) for digest, each in manifest["files"]]
        if sum(len(each) for _, each in files) != len(store):
            raise ValueError("it has another number of chunks")
        return files, int(manifest["stale"]), store
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"the index {folder} is broken ({error}): delete this folder, it is made again") from None


def _save(folder, store, embedder, digests, ranges, stale):
    names = {MANIFEST, LEARNED, VECTORS, FACTS}
    with replacing(folder, names.__contains__) as new:
        store.write(new)
        np.savez(new / LEARNED, **embedder.arrays)
        manifest = {"files": list(zip(digests, ranges)), "stale": stale}
        (new / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
