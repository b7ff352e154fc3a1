"""Benchmark serve.py over real sockets: many streams at once, tracing, clients that vanish, transformers.

    python benchmarks/bench_serve.py                            # the released checkpoint, 1, 8 and 64 streams
    python benchmarks/bench_serve.py --checkpoint runs/trm --streams 1 8 --repeats 5
    python benchmarks/bench_serve.py --hold 200 --seconds 60    # also hold 200 streams for a minute
    python benchmarks/bench_serve.py --vanish 500               # also 500 clients that close their connection
    python benchmarks/bench_serve.py --peer transformers        # a plain model of 6 x 384 beside transformers' Llama
    python benchmarks/bench_serve.py --quick                    # tiny sizes, to check that it runs

Starts serve.py in a process of its own, and opens streams from this one. Each stream asks for new_tokens sampled tokens
with a seed and a prompt of its own; all streams of a round start together. Each round measures every number of streams
once; figures are medians of the rounds.

    tokens/s      new tokens of all streams per second, from the first request to the last token
    speedup       relative to one stream
    cpu ms        milliseconds of CPU time of the server per token, which other programs change little
    first p50/p95 milliseconds until a stream's first token, median and 95th percentile over all streams and rounds
    same          streams whose text is what LanguageModel.write gives for the same prompt and seed

The row `8 traced` has trace 5 in every request. hold: streams that are opened over and over for some seconds, as many
at a time; counts answers that were not complete, and gives the server's memory before and after. vanish: clients that
close the connection at a random moment; counts the rows that the server still has afterwards.

peer transformers: serves a plain model with random weights, and compares with a loop that calls transformers'
LlamaForCausalLM.generate with the same weights for one request after the other (a thread for each stream would share
the same cores). Prints tables, then one JSON line; the exit code is 1 if a text differs or an answer is lost.
"""

import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from typing import Literal

import psutil
import torch
from common import ROOT, machine, median, print_json, print_table
from generate_peers import transformers_job

from src.checkpoint import save_checkpoint
from src.config import parse_flags, run
from src.errors import UserError
from src.language_model import LanguageModel
from src.model import TRMConfig, TRMModel
from src.quantize import load_for_writing
from src.tokenizer import ByteLevelTokenizer

WORDS = ("def main(", "class Reader:", "import os\n", "for i in range(", "    return ", "try:\n", '"""Read', "x = [")
PLAIN = {"d_model": 384, "n_heads": 6, "n_layers": 6, "recursion": "none", "norm": "pre"}
TINY = {"d_model": 16, "n_heads": 2, "n_layers": 1, "recursion": "none", "norm": "pre"}
SAMPLING = {"temperature": 0.8, "top_p": 0.95}


@dataclass
class ServeBench:
    """What to measure.

    Args:
        checkpoint: checkpoint folder to serve; default: the released checkpoint
        streams: numbers of streams to open at once
        new_tokens: tokens that each stream asks for
        repeats: measured rounds, after one warm-up round
        hold: streams to hold open for some seconds; 0 skips this
        seconds: how long they are held
        vanish: clients that close their connection at a random moment; 0 skips this
        peer: a program to compare with, with the same weights
        threads: number of CPU threads of the server; torch chooses if not given
        precision: as in serve.py. Only in fp32 must every text be the same as alone: other formats round more, and a
            text that is written with others may then get another token
        quick: use a tiny model and few tokens, to check that the benchmark runs
    """

    checkpoint: str | None = None
    streams: list[int] = field(default_factory=lambda: [1, 8, 64])
    new_tokens: int = 100
    repeats: int = 3
    hold: int = 0
    seconds: float = 60.0
    vanish: int = 0
    peer: Literal["transformers"] | None = None
    threads: int | None = None
    precision: Literal["fp32", "bf16", "fp16", "int8"] = "fp32"
    quick: bool = False

    def __post_init__(self):
        if self.quick:
            self.streams, self.new_tokens, self.repeats, self.seconds = [1, 3], 6, 1, min(self.seconds, 0.5)
        if not self.streams or min(*self.streams, self.new_tokens, self.repeats) < 1:
            raise ValueError("streams, new_tokens and repeats must be 1 or more")
        if self.checkpoint is not None and (self.peer or self.quick):
            raise ValueError("peer and quick serve a model of their own: leave out checkpoint")


def parse_args(argv=None) -> ServeBench:
    return parse_flags(__doc__, ServeBench, argv=argv)[0]


# ---- the server -----------------------------------------------------------------------------------------------------


class Server:
    """serve.py in a process of its own."""

    def __init__(self, checkpoint, args):
        words = [sys.executable, "serve.py", *([str(checkpoint)] if checkpoint else []), "--port", "0"]
        words += ["--puzzle", "none", "--device", "cpu", "--precision", args.precision]
        environment = {"OMP_NUM_THREADS": str(args.threads)} if args.threads else {}
        self.process = subprocess.Popen(
            words, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=os.environ | environment
        )
        for line in self.process.stderr:
            if "Ctrl-C ends it" in line:
                self.port = int(line.split("127.0.0.1:")[1].split()[0])
                return
        raise RuntimeError("serve.py did not start")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.terminate()
        self.process.wait(60)

    def cpu_s(self) -> float:
        """Returns the CPU time that the server has used, in seconds."""
        return sum(psutil.Process(self.process.pid).cpu_times()[:2])

    def rss(self) -> float:
        """Returns the resident memory of the server in MiB."""
        return psutil.Process(self.process.pid).memory_info().rss / 2**20


def request(path: str, body=None) -> bytes:
    data = b"" if body is None else json.dumps(body).encode()
    method = "GET" if body is None else "POST"
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(data)}\r\nConnection: close\r\n\r\n"
    return head.encode() + data


async def health(port) -> dict:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request("/health"))
    answer = await reader.read()
    writer.close()
    return json.loads(answer.split(b"\r\n\r\n", 1)[1])


@dataclass
class Stream:
    """What one stream got."""

    text: str = ""
    first_s: float | None = None  # seconds until the first token
    is_complete: bool = False


async def read_stream(port: int, body: dict, vanishes_after: float | None = None) -> Stream:
    """Reads a stream to its end, or closes the connection after some seconds."""
    found, start = Stream(), time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**24)
    try:
        writer.write(request("/v1/completions", body | {"stream": True}))
        async with asyncio.timeout(vanishes_after):
            while line := await reader.readline():
                if line == b"data: [DONE]\n":
                    found.is_complete = True
                elif line.startswith(b"data: "):
                    if found.first_s is None:
                        found.first_s = time.perf_counter() - start
                    found.text += json.loads(line[6:])["choices"][0]["text"]
    except TimeoutError:
        pass
    finally:
        writer.close()
    return found


# ---- measuring ------------------------------------------------------------------------------------------------------


def body_of(args, number: int, **more) -> dict:
    prompt = WORDS[number % len(WORDS)] * (1 + number % 3)
    return {"prompt": prompt, "seed": number, "max_tokens": args.new_tokens, "ignore_eos": True} | SAMPLING | more


async def measure(args, server, lm: LanguageModel) -> list[dict]:
    """Returns a row per number of streams, and one for 8 streams with a trace."""
    cases = [(str(n), n, {}) for n in args.streams]
    traced = min(8, max(args.streams))
    cases.append((f"{traced} traced", traced, {"recursion": {"trace": 5}}))
    if str(traced) not in {name for name, _, _ in cases}:
        cases.insert(-1, (str(traced), traced, {}))
    speeds, firsts, texts, cpu, port = {}, {}, {}, {}, server.port
    for turn in range(args.repeats + 1):
        for name, n, more in cases:
            start, before = time.perf_counter(), server.cpu_s()
            found = await asyncio.gather(*(read_stream(port, body_of(args, i, **more)) for i in range(n)))
            elapsed = time.perf_counter() - start
            if not all(stream.is_complete for stream in found):
                raise UserError(
                    f"the server did not finish all of {n} streams of {args.new_tokens} tokens: ask for fewer"
                )
            if turn:  # the first round warms up
                speeds.setdefault(name, []).append(n * args.new_tokens / elapsed)
                cpu.setdefault(name, []).append(1000 * (server.cpu_s() - before) / (n * args.new_tokens))
                firsts.setdefault(name, []).extend(1000 * stream.first_s for stream in found)
            texts[name] = [stream.text for stream in found]
    rows = []
    for name, n, _ in cases:
        same = sum(text == alone(args, lm, number) for number, text in enumerate(texts[name]))
        first = sorted(firsts[name])
        row = {"streams": name, "tokens_s": median(speeds[name]), "first_p50_ms": median(first)}
        row["first_p95_ms"] = first[min(len(first) - 1, int(0.95 * len(first)))]
        rows.append(row | {"cpu_ms": median(cpu[name]), "same": same, "of": n})
    for row in rows:
        row["speedup"] = row["tokens_s"] / rows[0]["tokens_s"]
    return rows


ALONE: dict[int, str] = {}


def alone(args, lm, number: int) -> str:
    """Returns the text that stream `number` must get."""
    if number not in ALONE:
        body = body_of(args, number)
        options = {"seed": body["seed"], "stop_at_eos": False} | SAMPLING
        ALONE[number] = lm.write(body["prompt"], args.new_tokens, **options).removeprefix(body["prompt"])
    return ALONE[number]


async def hold(args, server) -> dict:
    """Holds args.hold streams open for args.seconds."""
    end, before = time.perf_counter() + args.seconds, server.rss()
    counts = {"answers": 0, "lost": 0}

    async def one(number):
        while time.perf_counter() < end:
            found = await read_stream(server.port, body_of(args, number))
            counts["answers"] += 1
            counts["lost"] += not found.is_complete
            number += args.hold

    most = before
    tasks = [asyncio.create_task(one(number)) for number in range(args.hold)]
    while not all(task.done() for task in tasks):
        await asyncio.sleep(0.2)
        most = max(most, server.rss())
    await asyncio.gather(*tasks)
    return {"streams": args.hold, **counts, "rss_before_mib": before, "rss_most_mib": most, **await health(server.port)}


async def vanish(args, port) -> dict:
    """Opens args.vanish streams, 20 at a time, that close at random moments. Returns what the server has left."""
    rng, places = random.Random(0), asyncio.Semaphore(20)

    async def one(number):
        async with places:
            await read_stream(port, body_of(args, number, max_tokens=1000), rng.random() * (0.05 if args.quick else 1))

    await asyncio.gather(*(one(number) for number in range(args.vanish)))
    for _ in range(100):
        left = await health(port)
        if not left["running"] + left["waiting"]:
            break
        await asyncio.sleep(0.1)
    return {"clients": args.vanish, "running": left["running"], "waiting": left["waiting"]}


def peer_rows(args, lm: LanguageModel, rows: list[dict]) -> list[dict]:
    """Returns a row per number of streams: our speed, and that of a loop of transformers' generate."""
    found = []
    for row in rows:
        if not row["streams"].isdigit():
            continue
        jobs = [
            transformers_job(
                lm.model, torch.tensor([lm.tokenizer.encode(body_of(args, i)["prompt"], bos=True)]), args.new_tokens
            )
            for i in range(min(int(row["streams"]), 8))
        ]
        jobs[0]()
        start = time.perf_counter()
        for job in jobs:
            job()
        theirs = len(jobs) * args.new_tokens / (time.perf_counter() - start)
        found.append({"streams": row["streams"], "ours": row["tokens_s"], "transformers": theirs})
        found[-1]["ratio"] = row["tokens_s"] / theirs
    return found


async def run_all(args, server, lm) -> dict:
    facts = {"rows": await measure(args, server, lm)}
    if args.hold:
        facts["hold"] = await hold(args, server)
    if args.vanish:
        facts["vanish"] = await vanish(args, server.port)
    return facts


def main(argv=None) -> int:
    args = parse_args(argv)
    if args.threads:  # also of the peer, which runs in this process
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = args.checkpoint
        if args.peer or args.quick:
            checkpoint, tokenizer = folder, ByteLevelTokenizer()
            torch.manual_seed(0)
            settings = TINY if args.quick else PLAIN
            save_checkpoint(folder, TRMModel(TRMConfig(tokenizer.vocab_size, max_seq_len=512, **settings)), tokenizer)
        lm = load_for_writing(checkpoint, torch.device("cpu"), args.precision)
        with Server(checkpoint, args) as server:
            facts = asyncio.run(run_all(args, server, lm))
    names = ["streams", "tokens_s", "speedup", "cpu_ms", "first_p50_ms", "first_p95_ms", "same", "of"]
    heads = ["streams", "tokens/s", "speedup", "cpu ms", "first p50 ms", "first p95 ms", "same", "of"]
    print_table(heads, [[row[name] for name in names] for row in facts["rows"]])
    if args.peer:
        facts["peer"] = peer_rows(args, lm, facts["rows"])
        print_table(list(facts["peer"][0]), [list(row.values()) for row in facts["peer"]])
    for name in ("hold", "vanish"):
        if name in facts:
            print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in facts[name].items()))
    print_json("serve", machine() | facts)
    left = facts.get("vanish", {}).get("running", 0) + facts.get("hold", {}).get("lost", 0)
    differ = args.precision == "fp32" and any(row["same"] < row["of"] for row in facts["rows"])
    return int(left > 0 or differ)


if __name__ == "__main__":
    run(main)
