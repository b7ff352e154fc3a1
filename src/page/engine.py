"""The engine: one thread that writes all texts, with a queue in front (continuous batching).

    engine = Engine(model, tokenizer, limits, post)
    engine.start()
    engine.submit([Text(...), Text(...)])     # raises Busy if the queue is full
    engine.cancel(texts)                      # their rows are free before the next token
    engine.close(5.0)                         # texts may go on for 5 seconds, then all end

The thread calls post([(text, piece), ...]) after each turn. A turn takes in waiting texts, encodes a bounded number of
prompt tokens, and gives one token to every running text, so that a long prompt delays the others only a little.
"""

import contextlib
import sys
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from src.errors import one_line
from src.exits import max_depth
from src.model_config import ExitRule
from src.page.batch import Chosen, Row, RunningBatch, Start, capacity_of
from src.page.errors import Busy
from src.page.threads import Threads
from src.page.writing import Piece, Token, Writer, read_tokens, score_prompt
from src.sampling import tokens_kept

IDLE_S = 0.5  # the thread looks at the time at least this often


class Limits(NamedTuple):
    """Bounds of the engine, as in ServeConfig."""

    rows: int = 64
    queue: int = 256
    prefill_tokens: int = 256
    seconds: float = 600.0
    cache_rows: float = float("inf")  # rows of full length and of the trained depth for which the caches have room


@dataclass(eq=False)
class Text(Row):
    """A text to write, and how.  `ids` are those of the prompt; they grow."""

    writer: Writer | None = None
    rule: ExitRule = ExitRule()
    logprobs: int | None = None  # number of likeliest tokens beside each token's log-probability; None for neither
    trace: int | None = None  # number of likeliest tokens at each recursion step; None for no trace
    wants_p: bool = False  # whether the probability of each token is wanted
    tag: Any = None  # the caller's own
    born: float = field(default_factory=time.monotonic)
    is_over: bool = False
    made: int = 0  # new tokens
    steps: int = 0  # their recursion steps

    def read_prompt(self, first: int, logits: Tensor):
        tokens = self.writer.prompt_tokens[first + 1 : first + 1 + len(logits)]
        score_prompt(tokens, logits, self.logprobs or 0)


class Engine:
    def __init__(self, model, tokenizer, limits: Limits, post: Callable[[list], None]):
        self.model, self.tokenizer, self.limits, self.post = model, tokenizer, limits, post
        self.waiting: deque[Text] = deque()
        self.starts: deque[Start] = deque()
        self.batches: dict[ExitRule, RunningBatch] = {}
        self.counts: Counter = Counter()  # see src/page/figures.py
        self.again: deque[Text] = deque()  # texts that have outgrown the context
        self.threads = Threads()
        self.n_rows = 0  # texts that are being written or encoded
        self.deadline: float | None = None  # when the engine closes: then all texts end
        self.seconds_per_text = 1.0  # a running mean
        self._changed = threading.Condition()
        self._out: list[tuple[Text, Piece]] = []
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self):
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, texts: list[Text]):
        """Queues texts, all or none. Raises Busy if the queue has no room for them, or if the engine closes."""
        with self._changed:
            free = max(0, self.limits.rows - self.n_rows)
            if self.deadline is not None or len(self.waiting) + len(texts) > self.limits.queue + free:
                raise Busy
            self.waiting.extend(texts)
            self._changed.notify()

    def retry_after(self) -> int:
        """Returns after how many seconds a client may try again."""
        return round(min(60, max(1, len(self.waiting) / self.limits.rows * self.seconds_per_text)))

    def cancel(self, texts: list[Text]):
        """Drops texts: those that wait at once, those that are written before their next token."""
        with self._changed:
            for text in texts:
                if not text.is_over:
                    text.is_over = True
                    self.counts["cancelled"] += 1
            self.waiting = deque(text for text in self.waiting if not text.is_over)
            self._changed.notify()

    def close(self, seconds: float):
        """Takes no more texts, ends those that still run after so many seconds, and then ends the thread."""
        with self._changed:
            self.deadline = time.monotonic() + seconds
            self._changed.notify()

    def join(self, seconds: float):
        self._thread.join(seconds)

    # ---- the thread ----

    def _run(self):
        try:
            while self._wait():
                self.turn()
        except Exception as error:  # a mistake of this file: nobody may wait for ever
            with self._changed:
                self.deadline = time.monotonic()
                for text in (*self.waiting, *self._running()):
                    self._end(text, Piece(finish="error", reason=f"the engine failed: {one_line(error)}"))
                self.waiting.clear()
                self.n_rows = 0
            self.post(self._out)
            _print_traceback()
        finally:
            self.threads.restore()

    def _wait(self) -> bool:
        """Waits until there is a text. Returns False if the engine is closed and all texts have ended."""
        with self._changed:
            while not (self.waiting or self.starts or self.again or self.batches):
                if self.deadline is not None:
                    return False
                self._changed.wait(IDLE_S)
        return True

    @torch.inference_mode()
    def turn(self):
        """Ends and takes in texts, encodes some prompt tokens, and gives one token to every running text."""
        self._end_late()
        self._drop_cancelled()
        self._take_in()
        self._encode()
        for rule, batch in list(self.batches.items()):
            if batch.rows:
                self._guard(batch.rows, lambda batch=batch: self._write(batch))
            else:
                del self.batches[rule]
        self.n_rows = sum(1 for _ in self._running())
        if self._out:
            out, self._out = self._out, []
            self.post(out)

    def _guard(self, texts, work):
        """Runs work(). If it fails, its texts end with an error, and the others go on."""
        texts = list(texts)
        try:
            work()
        except Exception as error:  # out of memory, a broken graph: this must not end the thread
            _print_traceback()
            # the cache of a batch with these texts may be half written, so its other texts end as well
            broken = [rule for rule, batch in self.batches.items() if any(text in batch.rows for text in texts)]
            for text in (*texts, *(row for rule in broken for row in self.batches[rule].rows)):
                self._end(text, Piece(finish="error", reason=f"the model failed: {one_line(error)}"))
            for rule in broken:
                del self.batches[rule]

    def _end(self, text: Text, piece: Piece):
        """Ends a text with its last piece, unless it is over. A client may cancel it at any time."""
        with self._changed:
            if text.is_over:
                return
            text.is_over = True
        self.counts[f"ended_{piece.reason if piece.finish == 'length' else piece.finish}"] += 1
        self.seconds_per_text += 0.1 * (time.monotonic() - text.born - self.seconds_per_text)
        self._out.append((text, piece))

    def _running(self):
        for start in self.starts:
            yield from start.rows
        yield from self.again
        for batch in self.batches.values():
            yield from batch.rows

    def _end_late(self):
        """Ends texts that have taken too long, and all texts once the engine must close."""
        now = time.monotonic()
        closes = self.deadline is not None and now >= self.deadline
        with self._changed:
            for text in (*self.waiting, *self._running()):
                if closes or now - text.born > self.limits.seconds:
                    self._end(text, text.writer.end("length", "shutdown" if closes else "seconds"))
            self.waiting = deque(text for text in self.waiting if not text.is_over)

    def _drop_cancelled(self):
        for batch in self.batches.values():
            for text in [text for text in batch.rows if text.is_over]:
                batch.leave(text)
        self.again = deque(text for text in self.again if not text.is_over)
        self.starts = deque(start for start in self.starts if not all(text.is_over for text in start.rows))

    def _take_in(self):
        """Makes Starts of waiting texts while there is room. Short prompts with equal rules share one."""
        texts, rows = list(self.again), Counter(text.rule for text in self._running())
        self.again.clear()
        with self._changed:
            while self.waiting and self._has_room(rows + Counter([self.waiting[0].rule])):
                texts.append(self.waiting.popleft())
                rows[texts[-1].rule] += 1
            self.n_rows = rows.total()  # at once: `submit` may come before the texts are in a Start
        alike: dict[ExitRule, list[Text]] = {}
        for text in texts:
            group = alike.setdefault(text.rule, [])
            longest = max(len(each.ids) for each in (*group, text))
            if group and longest * (len(group) + 1) > self.limits.prefill_tokens:
                self._begin(group)
                group.clear()
            group.append(text)
        for group in alike.values():
            self._begin(group)

    def _has_room(self, rows: Counter) -> bool:
        return rows.total() <= self.limits.rows and self.cost(rows) <= self.limits.cache_rows

    def cost(self, rows: dict[ExitRule, int]) -> float:
        """Returns how much room the caches of so many texts under each rule take, with their spare rows.

        The unit is a row of the trained depth; a deeper rule takes more of them. See limits.cache_rows."""
        config, total = self.model.config, 0.0
        for rule, count in rows.items():
            batch = self.batches.get(rule)  # once: requests ask too, while the engine's thread removes batches
            held = 0 if batch is None else batch.capacity
            capacity = min(capacity_of(count, held), max(count, self.limits.rows))
            total += capacity * max(1.0, max_depth(config, rule) / max_depth(config))
        return total

    def _begin(self, group):
        texts = [text for text in group if not text.is_over]
        if texts:
            self._guard(texts, lambda: self.starts.append(Start(self.model, texts[0].rule, texts)))

    def _encode(self):
        """Encodes waiting prompts: about limits.prefill_tokens tokens."""
        budget = self.limits.prefill_tokens
        if self.starts:
            self.threads.use_all()
        while self.starts and budget > 0:
            start = self.starts[0]
            width = min(start.left, budget)
            budget -= width * len(start.rows)
            self._guard(start.rows, lambda start=start, width=width: self._advance(start, width))
            if all(text.is_over for text in start.rows) or not start.left:
                self.starts.popleft()

    def _advance(self, start, width):
        chosen = start.encode(width)
        if chosen is None:
            return
        # a text that has outgrown the context is encoded again, but has no new prompt
        self.counts["prompt_tokens"] += sum(len(text.ids) for text in start.rows if not text.made)
        self._take(start.rows, chosen)
        for number, text in enumerate(start.rows):
            if not text.is_over and not self._has_outgrown(text):
                batch = self._batch(start.rule)
                # if this fails, the cache of the batch may be half changed
                self._guard([*batch.rows, text], lambda batch=batch, number=number: batch.join(start, number))

    def _batch(self, rule: ExitRule) -> RunningBatch:
        if rule not in self.batches:
            self.batches[rule] = RunningBatch(self.model, rule, self.limits.rows)
        return self.batches[rule]

    def _write(self, batch):
        rows = list(batch.rows)
        self._take(rows, self.threads.run(len(rows), batch.step))
        for text in rows:
            if self._has_outgrown(text) or text.is_over:
                batch.leave(text)

    def _has_outgrown(self, text) -> bool:
        """Whether a text has more tokens than the context: then it is encoded again, as in `sampling.generate`."""
        context = self.model.config.max_seq_len
        if text.is_over or len(text.ids) <= context:
            return False
        text.ids = text.ids[-tokens_kept(context) :]
        text.scores_prompt = False
        self.again.append(text)
        return True

    def _take(self, texts, chosen: Chosen):
        """Gives each text its new token."""
        wanted = [
            (number, text.logprobs, text.trace)
            for number, text in enumerate(texts)
            if text.wants_p and not text.is_over
        ]
        read = read_tokens(chosen, wanted, self.tokenizer)
        self.counts["model_calls"] += 1
        for number, (text, index, depth) in enumerate(zip(texts, chosen.tokens, chosen.depths)):
            if text.is_over:
                continue
            if text.writer.left <= 0:  # the prompt was only to be scored
                self._end(text, text.writer.end("length", "max_tokens"))
                continue
            text.ids.append(index)
            text.made, text.steps = text.made + 1, text.steps + depth
            self.counts["new_tokens"] += 1
            self.counts["recursion_steps"] += depth
            piece = text.writer.take(read.get(number) or Token(index, depth))
            if piece.finish:
                self._end(text, piece)
            else:
                self._out.append((text, piece))


def _print_traceback():
    """Prints the traceback of the current exception, unless stderr is a pipe that nobody reads any more."""
    with contextlib.suppress(OSError, ValueError):
        traceback.print_exc(file=sys.stderr)
