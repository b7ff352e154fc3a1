"""Benchmark the data pipeline: tokenizing speed, batches per second, memory while streaming, time to resume.

    python benchmarks/bench_data.py                              # takes a few minutes
    python benchmarks/bench_data.py --paths data/ja_wiki         # on your own text
    python benchmarks/bench_data.py --need 40                    # compare with the batches/s of your training
    python benchmarks/bench_data.py --quick                      # tiny sizes, to check that it runs

Prints four tables and one JSON line. The text is the source code of the standard library unless --paths are given.

Tokenizing: MB (10^6 bytes) of text per second of `tokenize_corpus`, from .jsonl.gz files to the cache on disk, with 1
and 2 processes, for several files and for one. SentencePiece alone on the same text in memory is measured in the same
rounds. `ratio` is the speed over that of SentencePiece alone in as many processes.

Loader: batches per second of the training loader, from tokenized text and streamed, with 0 and 2 loading processes.
`ratio` is the speed over the need, which is the number of batches per second that training takes. By default, the need
is measured: it is the speed of forward and backward passes of a model with the default settings on this machine.

Streaming: resident memory (RSS) of a fresh process that streams the corpus once, and of one that streams ten times as
many files. `added` is the memory that streaming added after everything was loaded, at the peak and at the end. `growth`
is the change of the total memory from the small corpus to the large one.

State: the bytes that a checkpoint stores about a stream, and the seconds until a loader resumed from it gives a batch.
"""

import functools
import gzip
import io
import itertools
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from common import ROOT, interleaved, machine, median, print_json, print_table, seconds

from src.config import parse_flags, run
from src.data.corpus import find_files, read_documents, stdlib_files
from src.data.loader import create_train_loader
from src.data.shards import Shards
from src.data.stream import StreamingDataset
from src.data.token_store import ON_THE_SPOT_BYTES, ON_THE_SPOT_VOCAB, tokenize_corpus
from src.data.tokenizer_training import train_sentencepiece
from src.dataset import PackedDataset
from src.errors import UserError
from src.runtime import choose_device, peak_rss_bytes
from src.tokenizer import read_tokenizer

MIB = 1024**2
N_SHARDS, TIMES = 4, 10


@dataclass
class DataBench:
    """What to measure.

    Args:
        paths: text to measure on: files, globs or folders; if not given, this Python's standard library
        text_mb: MB of text to use; a smaller text is repeated
        vocab_size: vocabulary size of the SentencePiece model
        batch_size: windows per batch
        seq_len: tokens per window
        shuffle_buffer: number of windows in the shuffle buffer of a stream
        batches: batches that are timed per round
        repeats: number of rounds; the median is printed
        need: batches/s that training needs; if not given, it is measured with a model of the default settings
        quick: use tiny sizes, to check that the benchmark runs
        child: internal: the corpus to stream in a child process, as JSON
    """

    paths: list[str] = field(default_factory=list)
    text_mb: float = 16.0
    vocab_size: int = ON_THE_SPOT_VOCAB
    batch_size: int = 32
    seq_len: int = 256
    shuffle_buffer: int = 2048
    batches: int = 100
    repeats: int = 3
    need: float | None = None
    quick: bool = False
    child: str | None = None

    def __post_init__(self):
        if self.quick:
            self.text_mb, self.vocab_size, self.batch_size, self.seq_len = 0.3, 600, 4, 32
            self.shuffle_buffer, self.batches, self.repeats = 16, 5, 1
        if min(self.batch_size, self.seq_len, self.batches, self.repeats, self.shuffle_buffer) < 1 or self.text_mb <= 0:
            raise ValueError("batch_size, seq_len, batches, repeats, shuffle_buffer must be 1 or more, text_mb above 0")
        if self.need is not None and self.need <= 0:
            raise ValueError(f"need is {self.need}: set it above 0")


def parse_args(argv=None) -> DataBench:
    return parse_flags(__doc__, DataBench, argv=argv)[0]


def read_texts(args: DataBench) -> list[str]:
    """Returns about text_mb MB of documents; a smaller text is repeated."""
    files = find_files(args.paths) if args.paths else stdlib_files()[0]
    texts, left = [], args.text_mb * 1e6
    for text in itertools.chain.from_iterable(read_documents(files) for _ in itertools.count()):
        texts.append(text)
        left -= len(text.encode())
        if left <= 0:
            return texts


def write_shards(folder: Path, texts: list[str], n_shards: int) -> list[str]:
    """Write the texts into n_shards .jsonl.gz files of similar size.  Returns their paths."""
    folder.mkdir()
    for shard in range(n_shards):
        lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts[shard::n_shards])
        (folder / f"{shard:03d}.jsonl.gz").write_bytes(gzip.compress(lines.encode(), compresslevel=6))
    return sorted(map(str, folder.iterdir()))


# ---- tokenizing -----------------------------------------------------------------------------------------------------


def measure_tokenizing(args: DataBench, texts, tokenizer, folder: Path) -> list[dict]:
    """Returns a row per job and number of processes: MB/s, and the ratio to SentencePiece alone."""
    import datasets  # noqa: F401  (imported here, so that its import is not timed)

    one, several = (write_shards(folder / name, texts, n) for name, n in (("one", 1), ("several", N_SHARDS)))
    caches = itertools.count()

    def tokenize(files, num_proc):
        tokenize_corpus(files, tokenizer, num_proc=num_proc, cache_dir=str(folder / f"cache{next(caches)}"))

    jobs = {("SentencePiece alone", n): functools.partial(encode_alone, tokenizer, texts, n) for n in (1, 2)}
    for name, files in ((f"{N_SHARDS} files", several), ("1 file", one)):
        jobs |= {(name, n): functools.partial(tokenize, files, n) for n in (1, 2)}
    encode_alone(tokenizer, texts, 1)  # the first call is slower
    times = {job: median(taken) for job, taken in interleaved(jobs, args.repeats).items()}
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    return [
        {"job": name, "processes": n, "mb_per_s": megabytes / taken, "ratio": times["SentencePiece alone", n] / taken}
        for (name, n), taken in times.items()
    ]


def encode_alone(tokenizer, texts, n_processes) -> None:
    """Tokenize texts in memory with SentencePiece and drop the tokens: the upper limit of the speed."""
    if n_processes == 1:
        return tokenizer.encode_batch(texts)
    shares = [texts[process::n_processes] for process in range(n_processes)]
    processes = [multiprocessing.Process(target=tokenizer.encode_batch, args=(share,)) for share in shares]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


# ---- the loader -----------------------------------------------------------------------------------------------------


def measure_need(args: DataBench, vocab_size: int) -> float:
    """Returns the batches/s of forward and backward passes of a model with the default settings."""
    from src.model import TRMConfig, TRMModel

    device = choose_device()
    model = TRMModel(TRMConfig(vocab_size=vocab_size, max_seq_len=args.seq_len)).to(device)
    ids = torch.randint(0, vocab_size, (args.batch_size, args.seq_len), device=device)

    def step():
        model.zero_grad()
        model(ids, ids).loss.backward()

    step()  # the first step is slower
    return 1 / seconds(step, device)


def measure_loader(args: DataBench, sets: dict, need: float) -> list[dict]:
    """Returns a row per data set and number of loading processes: batches/s, and the ratio to the need."""
    loaders = {
        (name, workers): create_train_loader(data, args.batch_size, num_workers=workers)
        for name, data in sets.items()
        for workers in (0, 2)
    }
    times = {kind: [] for kind in loaders}
    for _ in range(args.repeats + 1):  # the first round also starts processes and fills buffers
        for kind, loader in loaders.items():
            times[kind].append(seconds(lambda loader=loader: [next(loader) for _ in range(args.batches)]))
    rows = []
    for (name, workers), taken in times.items():
        speed = args.batches / median(taken[1:])
        rows.append({"set": name, "workers": workers, "batches_per_s": speed, "ratio": speed / need})
    return rows


def measure_resume(args: DataBench, data, workers: int) -> dict:
    """Save a stream after some batches and resume it.

    Returns the bytes of its state, the seconds to save it, and the seconds until a resumed loader's first batch."""
    loader = create_train_loader(data, args.batch_size, num_workers=workers)
    for _ in range(args.batches):
        next(loader)
    file = io.BytesIO()
    start = time.perf_counter()
    torch.save(loader.state_dict(), file)
    saved = time.perf_counter()
    other = create_train_loader(data, args.batch_size, num_workers=workers)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    again = next(other)
    done = time.perf_counter()
    if not torch.equal(again["input_ids"], next(loader)["input_ids"]):
        raise UserError("the resumed stream gave another batch than the uninterrupted one: this is a bug")
    return {"workers": workers, "bytes": len(file.getvalue()), "save_s": saved - start, "resume_s": done - saved}


# ---- memory, in a fresh process -------------------------------------------------------------------------------------


def stream_here(args: DataBench) -> None:
    """Stream the corpus once, in the child process, and print resident memory (RSS) in bytes.

    It is printed for the moment before the first batch, at the peak, and as the mean over the last quarter of the
    epoch."""
    job, process = json.loads(args.child), psutil.Process()
    data = stream_of(args, job["files"], read_tokenizer(job["tokenizer"]))
    loader, seen = create_train_loader(data, args.batch_size), []
    before = process.memory_info().rss
    while loader.epoch < 1:
        next(loader)
        seen.append(process.memory_info().rss)
    last = seen[-(len(seen) // 4 + 1) :]
    print(json.dumps({"before": before, "peak": peak_rss_bytes(), "end": sum(last) / len(last), "batches": len(seen)}))


def measure_memory(args: DataBench, files, model_file: str) -> list[dict]:
    """Returns a row for one file and a row for all files: memory of a child process that streams them."""
    rows = []
    for times, corpus in ((1, files[:1]), (TIMES, files)):
        job = json.dumps({"files": corpus, "tokenizer": model_file})
        command = [sys.executable, __file__, "--child", job]
        for name in ("batch_size", "seq_len", "shuffle_buffer"):
            command += [f"--{name}", str(getattr(args, name))]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise UserError(f"the process that streams ended with code {done.returncode}: see its message above")
        facts = json.loads(done.stdout.splitlines()[-1])
        rows.append({"corpus": times, "file_bytes": sum(map(os.path.getsize, corpus)), **facts})
    for row in rows:
        row |= {f"{name}_growth_percent": 100 * (row[name] / rows[0][name] - 1) for name in ("peak", "end")}
    return rows


# ---- all of it ------------------------------------------------------------------------------------------------------


def stream_of(args: DataBench, files, tokenizer) -> StreamingDataset:
    return StreamingDataset(Shards([files]), tokenizer, args.seq_len, shuffle_buffer=args.shuffle_buffer)


def main(argv=None) -> None:
    args = parse_args(argv)
    if args.child:
        return stream_here(args)
    texts = read_texts(args)
    sample = texts[:: max(1, round(args.text_mb * 1e6 / ON_THE_SPOT_BYTES))]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = train_sentencepiece(sample, str(folder / "spm"), args.vocab_size)
        tokenizing = measure_tokenizing(args, texts, tokenizer, folder)
        print_table(["tokenizing", "processes", "MB/s", "ratio"], [list(row.values()) for row in tokenizing])

        (one,) = write_shards(folder / "shards", texts, 1)
        shards = [one] + [shutil.copy(one, folder / "shards" / f"{copy:03d}.jsonl.gz") for copy in range(1, TIMES)]
        shards = list(map(str, shards))
        store = tokenize_corpus(shards[:1], tokenizer, cache_dir=str(folder / "cache"))
        sets = {"tokenized": PackedDataset(store, args.seq_len), "streamed": stream_of(args, shards[:1], tokenizer)}
        need = args.need or measure_need(args, tokenizer.vocab_size)
        loading = measure_loader(args, sets, need)
        print(f"\nneed: {need:.2f} batches/s of {args.batch_size} x {args.seq_len} tokens")
        print_table(["loader", "workers", "batches/s", "ratio"], [list(row.values()) for row in loading])

        memory = measure_memory(args, shards, str(folder / "spm.model"))
        lines = [[f"{row['corpus']} x", row["batches"], *_mib(row)] for row in memory]
        print()
        header = ["streamed", "batches", "peak MiB", "end MiB", "added: peak", "end", "growth %: peak", "end"]
        print_table(header, lines)

        resume = [measure_resume(args, sets["streamed"], workers) for workers in (0, 2)]
        print()
        print_table(["workers", "state bytes", "save s", "resume s"], [list(row.values()) for row in resume])
    facts = {"tokenizing": tokenizing, "need": need, "loading": loading, "memory": memory, "resume": resume}
    print_json("data", {"machine": machine(), **facts})


def _mib(row) -> list:
    """Returns the six memory cells of a row: peak and end, added at peak and end, growth at peak and end."""
    sizes = [row[name] / MIB for name in ("peak", "end")]
    added = [(row[name] - row["before"]) / MIB for name in ("peak", "end")]
    return sizes + added + [f"{row[f'{name}_growth_percent']:+.1f}" for name in ("peak", "end")]


if __name__ == "__main__":
    run(main)
