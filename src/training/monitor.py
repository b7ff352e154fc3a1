"""The eyes of a run: its log (metrics.jsonl, TensorBoard, Weights & Biases), and a watch on the machine it runs on."""

import contextlib
import io
import json
import logging
import math
import os
import re
import statistics
import threading
import time
from collections import deque
from datetime import UTC, datetime
from pathlib import Path

import psutil
import torch

from src.errors import UserError
from src.runtime import GIB
from src.training.curves import METRICS_FILE, plot_learning_curve, read_settings, scan_metrics
from src.training.train_config import MonitoringConfig

warn = logging.getLogger(__name__).warning

REPEAT_S = 60.0  # seconds until the same kind of warning may come again
LONGEST_REPEAT_S = 3600.0  # what that time doubles up to, so that a week of high load does not fill the screen
DRAWING_SHARE = 0.01  # of a run's time, at most, goes into drawing its learning curve
MEDIAN_OF, JUDGED_AFTER = 50, 10  # batches; the first ones are slow by nature (compilation, caches)
SLOW_FROM_S = 1.0  # seconds; of a shorter batch nobody needs to hear, however short the others are
SAMPLES_FILE = "samples.txt"
SYSTEM_FIGURES = {"cpu_percent", "memory_percent", "rss_gib", "gpu_memory_percent", "gpu_memory_gib", "batch_s"}


class TRMTrainingLogger(contextlib.AbstractContextManager):
    """A run's metrics.jsonl, TensorBoard events and Weights & Biases record; for the main process alone.

    A line of metrics.jsonl is {"step", "time" (UTC, ISO 8601), the figures given to `log`, the monitor's}; a value that
    is not finite becomes null. Training: epoch, tokens, loss, ce_loss, act_loss (nats per token), bits_per_byte,
    recursion_depth (mean visits per token), grad_norm, lr, tokens_per_s, elapsed_s. Evaluations: valid_*; the last one,
    on all text: final_valid_*. Each line is written at once, so that a kill loses at most the one it interrupts.

    A run's log is continued: resume_step=n first cuts what was logged after step n, so that each step is there once.
    UserError where there can be no folder; what else is wrong with a log costs lines and a warning, not the run."""

    def __init__(
        self,
        folder: str | Path,
        resume_step: int | None = None,
        config: MonitoringConfig | None = None,
        monitor: "ResourceMonitor | None" = None,
    ):
        self.folder, config, self._monitor = Path(folder), config or MonitoringConfig(), monitor
        self._last_step, self._drawn, self._cost = None, -math.inf, 0.0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write the log in {folder}: {error.strerror}; choose another save_dir") from None
        self._outputs = []
        for output in (_Lines, _Events) if config.tensorboard else (_Lines,):
            with _spared():
                self._outputs.append(output(self.folder, resume_step))
        if resume_step is not None:
            with _spared():
                _cut_samples(self.folder / SAMPLES_FILE, resume_step)
        if config.wandb_project:
            self._outputs.append(_Wandb(self.folder, config.wandb_project))

    def log(self, step: int, **figures) -> None:
        """Write one line. Figures are numbers (or 0-dim tensors); None is left out."""
        figures = {name: _number(value) for name, value in figures.items() if value is not None}
        if self._monitor is not None and step != self._last_step:  # once per step, though it is evaluated as well
            figures |= self._monitor.figures
        self._last_step, now = step, time.time()
        for output in self._outputs:
            output.log(int(step), now, figures)

    def sample(self, text: str) -> None:
        """Add a text, whose first line is `step N: ...`, to samples.txt."""
        try:
            with open(self.folder / SAMPLES_FILE, "a", encoding="utf-8") as file:
                file.write(f"=== {text}\n")
        except OSError as error:
            warn("%s: %s: a sample is lost; the run goes on", self.folder / SAMPLES_FILE, error.strerror)

    def draw(self, title: str = "", force: bool = False) -> None:
        """Draw learning_curve.png, unless (a long log takes long to read) that came to over 1 % of the run's time."""
        if not force and time.monotonic() - self._drawn < self._cost / DRAWING_SHARE:
            return
        import matplotlib.figure  # noqa: F401  slow once, which is no measure of the drawing

        start = time.monotonic()
        try:
            plot_learning_curve(self.folder, title)
        except Exception as error:  # whatever a picture fails of, it is not worth the run
            warn("the learning curve was not drawn: %s", error)
        self._drawn = time.monotonic()
        self._cost = self._drawn - start

    def close(self) -> None:
        for output in self._outputs:
            output.close()

    def __exit__(self, *exc):
        self.close()


@contextlib.contextmanager
def _spared():
    """Around the opening of one file of the log: what is wrong with it is told, and the run goes on without."""
    try:
        yield
    except (UserError, OSError) as error:
        warn("%s: the run goes on without this log", error)


def _number(value):
    value = value.item() if hasattr(value, "item") else value
    return value if isinstance(value, (int, float)) else float(value)


def _tag(name) -> str:
    """Where a figure stands in TensorBoard and Weights & Biases: train/loss, valid/loss, final/loss, system/rss_gib."""
    if name in SYSTEM_FIGURES:
        return f"system/{name}"
    for start, section in (("final_valid_", "final"), ("valid_", "valid")):
        if name.startswith(start):
            return f"{section}/{name.removeprefix(start)}"
    return f"train/{name}"


class _Appended:
    """A file that grows by whole records: unbuffered, and cut back where only a part of one could be written."""

    def __init__(self, path: Path):
        self._path, self._file, self._warned = path, path.open("ab", buffering=0), False

    def append(self, record: bytes) -> None:
        end = self._file.seek(0, os.SEEK_END)
        try:
            while record:
                record = record[self._file.write(record) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(end)
            if not self._warned:
                warn("%s: %s: its lines are lost until there is room; the run goes on", self._path, error.strerror)
            self._warned = True

    def close(self) -> None:
        self._file.close()


class _Lines(_Appended):
    """metrics.jsonl."""

    def __init__(self, folder: Path, resume_step: int | None):
        path, end = folder / METRICS_FILE, 0
        if path.exists():
            for record, offset in scan_metrics(folder):
                if resume_step is not None and record["step"] > resume_step:
                    break
                end = offset
            os.truncate(path, end)  # a line that a kill left half goes too
        super().__init__(path)

    def log(self, step, now, figures) -> None:
        when = datetime.fromtimestamp(now, UTC).isoformat(timespec="milliseconds")
        record = {"step": step, "time": when}
        record |= {name: value if math.isfinite(value) else None for name, value in figures.items()}
        self.append(json.dumps(record).encode() + b"\n")


class _Events(_Appended):
    """TensorBoard events, one per line of the log, by TensorBoard's own record writer.

    Not by SummaryWriter: its thread holds events back for two minutes, which a kill loses, and ends where the disk is
    full; and its purge_step leaves what was logged after the checkpoint in TensorBoard's default reader."""

    def __init__(self, folder: Path, resume_step: int | None):
        from google.protobuf.message import DecodeError
        from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary, self._writer = Event, Summary, RecordWriter
        for path in folder.glob("events.out.tfevents.*") if resume_step is not None else ():
            end = 0
            with contextlib.suppress(DecodeError):  # a record that is no event, and what follows it, goes as well
                for record in RawEventFileLoader(str(path)).Load():  # whole ones alone
                    if Event.FromString(record).step > resume_step:
                        break
                    end += len(record) + 16  # its length and two checksums
            os.truncate(path, end)
        super().__init__(folder / f"events.out.tfevents.{time.time():.6f}")
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def log(self, step, now, figures) -> None:
        values = [self._summary.Value(tag=_tag(name), simple_value=value) for name, value in figures.items()]
        self._write(self._event(wall_time=now, step=step, summary=self._summary(value=values)))

    def _write(self, event):
        buffer = io.BytesIO()
        self._writer(buffer).write(event.SerializeToString())
        self.append(buffer.getvalue())


def _cut_samples(path: Path, resume_step: int) -> None:
    """Drop the samples of steps after resume_step."""
    if path.exists():
        parts = re.split(rb"(?m)^(?==== step \d+: )", path.read_bytes())  # bytes: whatever they are, they stay
        steps = [int(match[1]) if (match := re.match(rb"=== step (\d{1,18}):", part)) else 0 for part in parts]
        path.write_bytes(b"".join(part for part, step in zip(parts, steps) if step <= resume_step))


class _Wandb:
    """Weights & Biases: a resumed run goes on under its id, and the steps that it has already are dropped there."""

    def __init__(self, folder: Path, project: str):
        try:
            import wandb
        except ImportError:
            told = f"monitoring.wandb_project is {project}, but wandb is missing"
            raise UserError(f"{told}: pip install wandb, or leave it out") from None
        before = next(folder.glob("wandb/*/run-*.wandb"), None)
        identity = {"id": before.stem.removeprefix("run-"), "resume": "allow"} if before else {}
        options = {"project": project, "name": folder.name, "dir": str(folder), "config": read_settings(folder)}
        try:
            self._run = wandb.init(**options, **identity)
        except wandb.errors.Error as error:
            advice = "`wandb login` first, or set WANDB_MODE=offline, or leave monitoring.wandb_project out"
            raise UserError(f"Weights & Biases: {error}: {advice}") from None

    def log(self, step, now, figures) -> None:
        self._run.log({_tag(name): value for name, value in figures.items()}, step=step)

    def close(self) -> None:
        self._run.finish()


class ResourceMonitor(contextlib.AbstractContextManager):
    """Samples the machine in a background thread, and warns through `logging` past the thresholds of its config.

    `figures` has the last sample: cpu_percent (of all cores), memory_percent (of the machine), rss_gib (this process),
    gpu_memory_gib and gpu_memory_percent (held by this process; CUDA alone), batch_s (median of the last 50 batches).
    A kind of warning comes at most once a minute, and the longer it lasts the more seldom, down to once an hour.

        with ResourceMonitor(config, device) as monitor:
            for batch in batches:
                with monitor.batch():
                    train_step(batch)
    """

    def __init__(self, config: MonitoringConfig | None = None, device: torch.device | None = None, every: float = 2.0):
        """every: seconds between samples, each of which takes less than a millisecond."""
        self.config, self._every = config or MonitoringConfig(), every
        self._cuda = device if device is not None and device.type == "cuda" else None
        self.figures: dict[str, float] = {}
        self._process, self._times, self._slowest, self._began = psutil.Process(), deque(maxlen=MEDIAN_OF), 0.0, None
        self._silence = {}  # kind of warning: (when it may come again, seconds of silence then)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="ResourceMonitor", daemon=True)
        self._thread.start()

    def _watch(self):
        psutil.cpu_percent()  # it tells the use since its last call in the same thread
        while not self._stop.wait(self._every):
            self.sample()

    @contextlib.contextmanager
    def batch(self):
        """Around a batch: its time is measured; one that hangs is warned of before it is done."""
        self._began = began = time.perf_counter()
        try:
            yield
        finally:
            seconds, self._began = time.perf_counter() - began, None
            if len(self._times) >= JUDGED_AFTER:
                self._slowest = max(self._slowest, seconds)
            self._times.append(seconds)

    def sample(self) -> None:
        """Take one sample, and warn where it is past a threshold."""
        memory, rss = psutil.virtual_memory().percent, self._process.memory_info().rss / GIB
        figures = {"cpu_percent": psutil.cpu_percent(), "memory_percent": memory, "rss_gib": round(rss, 3)}
        if self._cuda is not None:
            held = torch.cuda.memory_reserved(self._cuda)
            figures["gpu_memory_gib"] = round(held / GIB, 3)
            total = torch.cuda.get_device_properties(self._cuda).total_memory
            figures["gpu_memory_percent"] = round(100 * held / total, 1)
        times = list(self._times)
        if times:
            figures["batch_s"] = statistics.median(times)
        self.figures = figures
        self._judge(figures)
        if len(times) >= JUDGED_AFTER:
            self._judge_batch(figures["batch_s"])

    def _judge(self, figures):
        for kind, what in (("cpu", "CPU use"), ("memory", "memory in use"), ("gpu_memory", "GPU memory held")):
            value, name = figures.get(f"{kind}_percent", 0.0), f"{kind}_warning_threshold"
            if value > getattr(self.config, name):
                held = {"memory": "rss_gib", "gpu_memory": "gpu_memory_gib"}.get(kind)
                own = f" (this process: {figures[held]:.1f} GiB)" if held else ""
                self._warn(kind, f"{what} is {value:.0f} %{own}, past {name} {getattr(self.config, name):g}")

    def _judge_batch(self, median):
        slowest, self._slowest, began = self._slowest, 0.0, self._began
        if began is not None:
            slowest = max(slowest, time.perf_counter() - began)
        if slowest > max(SLOW_FROM_S, self.config.slow_batch_threshold * median):
            told = f"a batch took {slowest:.2f} s, {slowest / median:.1f} times the median of {median:.2f} s"
            self._warn("slow_batch", f"{told}, past slow_batch_threshold {self.config.slow_batch_threshold:g}")

    def _warn(self, kind, sentence):
        now = time.monotonic()
        due, silence = self._silence.get(kind, (now, REPEAT_S))
        if now >= due:
            warn(sentence)
            self._silence[kind] = now + silence, min(2 * silence, LONGEST_REPEAT_S)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def __exit__(self, *exc):
        self.close()
