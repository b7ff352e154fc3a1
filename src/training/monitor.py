"""The log of a run (metrics.jsonl, TensorBoard, Weights & Biases), and a monitor of the machine it runs on."""

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
from src.training.curves import METRICS_FILE, plot_learning_curve, read_series, read_settings, scan_metrics
from src.training.train_config import MonitoringConfig

warn = logging.getLogger(__name__).warning

REPEAT_S = 60.0  # seconds before the same kind of warning may be repeated
LONGEST_REPEAT_S = 3600.0  # each warning doubles that time, up to this: a week of high load should not fill the screen
DRAWING_SHARE = 0.01  # largest share of the run's time that may be spent on drawing its learning curve
MEDIAN_OF, JUDGED_AFTER = 50, 10  # batches in the median; batches before any is judged, as the first are always slow
SLOW_FROM_S = 1.0  # seconds; shorter batches are never reported, however short the others are
SAMPLES_FILE = "samples.txt"
SYSTEM_FIGURES = {"cpu_percent", "memory_percent", "rss_gib", "gpu_memory_percent", "gpu_memory_gib", "batch_s"}


class TRMTrainingLogger(contextlib.AbstractContextManager):
    """Writes metrics.jsonl, TensorBoard events and a Weights & Biases run. Only the main process should have one.

    Each call of `log` writes one line of metrics.jsonl, a JSON object with "step", "time" (UTC, ISO 8601), the figures
    passed to `log`, and those of the monitor. A figure that is not finite is written as null. There are two kinds of
    lines:

    - Training lines have epoch, tokens, loss, ce_loss and act_loss (nats per token), bits_per_byte, recursion_depth
      (mean visits per token), grad_norm, skipped, lr, tokens_per_s and elapsed_s.
    - Evaluation lines have figures whose names start with valid_. The last evaluation uses all validation text, and its
      names start with final_valid_.

    A run on puzzles has exact_accuracy and steps_per_puzzle in place of bits_per_byte, and its evaluations have the
    figures of `puzzle_eval.figures_of`. Lines are written immediately, so a kill loses at most the line that it
    interrupts.

    resume_step=n continues a log: what was logged after step n is removed first, so that each step appears once. Raises
    UserError if the folder cannot be made. Any other problem with a log loses lines and prints a warning, but does not
    stop the run."""

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
        """Write one line.  Figures are numbers or 0-dimensional tensors; a figure that is None is left out."""
        figures = {name: _number(value) for name, value in figures.items() if value is not None}
        if self._monitor is not None and step != self._last_step:  # once per step, even if it has two lines
            figures |= self._monitor.figures
        self._last_step, now = step, time.time()
        for output in self._outputs:
            output.log(int(step), now, figures)

    def lacks(self, step: int, figure: str) -> bool:
        """Returns whether metrics.jsonl has no such figure of this step."""
        with _spared():
            return step not in read_series(self.folder, figure)[figure][:, 0]
        return False

    def sample(self, text: str) -> None:
        """Append a text to samples.txt.  It must start with `step N: `, so that a resume can remove later texts."""
        try:
            with open(self.folder / SAMPLES_FILE, "a", encoding="utf-8") as file:
                file.write(f"=== {text}\n")
        except OSError as error:
            warn("%s: %s: a sample text is lost; the run continues", self.folder / SAMPLES_FILE, error.strerror)

    def draw(self, title: str = "", force: bool = False) -> None:
        """Draw learning_curve.png, unless drawing would take over 1 % of the run's time: a long log is slow to read."""
        if not force and time.monotonic() - self._drawn < self._cost / DRAWING_SHARE:
            return
        import matplotlib.figure  # noqa: F401  slow the first time, so it is not part of the measured time

        start = time.monotonic()
        try:
            plot_learning_curve(self.folder, title)
        except Exception as error:  # a picture that fails must not stop the run
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
    """Within this context, an error is only a warning: the run continues without the file of the log."""
    try:
        yield
    except (UserError, OSError) as error:
        warn("%s: the run continues without this log", error)


def _number(value):
    value = value.item() if hasattr(value, "item") else value
    return value if isinstance(value, (int, float)) else float(value)


def _tag(name) -> str:
    """Returns a figure's name in TensorBoard and Weights & Biases, such as train/loss, valid/loss or system/rss_gib."""
    if name in SYSTEM_FIGURES:
        return f"system/{name}"
    for start, section in (("final_valid_", "final"), ("valid_", "valid")):
        if name.startswith(start):
            return f"{section}/{name.removeprefix(start)}"
    return f"train/{name}"


class _Appended:
    """An unbuffered file to which whole records are added. What was written of an incomplete record is removed."""

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
                warn("%s: %s: its lines are lost until there is room; the run continues", self._path, error.strerror)
            self._warned = True

    def close(self) -> None:
        self._file.close()


class _Lines(_Appended):
    """Writes metrics.jsonl."""

    def __init__(self, folder: Path, resume_step: int | None):
        path, end = folder / METRICS_FILE, 0
        if path.exists():
            for record, offset in scan_metrics(folder):
                if resume_step is not None and record["step"] > resume_step:
                    break
                end = offset
            os.truncate(path, end)  # also removes a last line that was cut off by a kill
        super().__init__(path)

    def log(self, step, now, figures) -> None:
        when = datetime.fromtimestamp(now, UTC).isoformat(timespec="milliseconds")
        record = {"step": step, "time": when}
        record |= {name: value if math.isfinite(value) else None for name, value in figures.items()}
        self.append(json.dumps(record).encode() + b"\n")


class _Events(_Appended):
    """Writes TensorBoard events, one per line of the log, with TensorBoard's own record writer.

    SummaryWriter is not used for three reasons. Its thread buffers events for two minutes, which a kill loses. That
    thread dies if the disk is full. And after a resume with purge_step, TensorBoard's default reader still shows the
    events that were logged after the checkpoint."""

    def __init__(self, folder: Path, resume_step: int | None):
        from google.protobuf.message import DecodeError
        from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary, self._writer = Event, Summary, RecordWriter
        for path in folder.glob("events.out.tfevents.*") if resume_step is not None else ():
            end = 0
            with contextlib.suppress(DecodeError):  # a broken record and all that follows it are removed
                for record in RawEventFileLoader(str(path)).Load():  # yields only complete records
                    if Event.FromString(record).step > resume_step:
                        break
                    end += len(record) + 16  # 16 bytes: the record's length and two checksums
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
    """Remove the sample texts of steps after resume_step."""
    if path.exists():
        parts = re.split(rb"(?m)^(?==== step \d+: )", path.read_bytes())  # bytes: any encoding is kept
        steps = [int(match[1]) if (match := re.match(rb"=== step (\d{1,18}):", part)) else 0 for part in parts]
        path.write_bytes(b"".join(part for part, step in zip(parts, steps) if step <= resume_step))


class _Wandb:
    """Writes to Weights & Biases.  A resumed run continues under its id; W&B ignores the steps that it already has."""

    def __init__(self, folder: Path, project: str):
        try:
            import wandb
        except ImportError:
            problem = f"monitoring.wandb_project is {project}, but wandb is missing"
            raise UserError(f"{problem}: pip install wandb, or leave the setting out") from None
        before = next(folder.glob("wandb/*/run-*.wandb"), None)
        identity = {"id": before.stem.removeprefix("run-"), "resume": "allow"} if before else {}
        options = {"project": project, "name": folder.name, "dir": str(folder), "config": read_settings(folder)}
        try:
            self._run = wandb.init(**options, **identity)
        except wandb.errors.Error as error:
            advice = "run `wandb login`, or set WANDB_MODE=offline, or leave monitoring.wandb_project out"
            raise UserError(f"Weights & Biases: {error}: {advice}") from None

    def log(self, step, now, figures) -> None:
        self._run.log({_tag(name): value for name, value in figures.items()}, step=step)

    def close(self) -> None:
        self._run.finish()


class ResourceMonitor(contextlib.AbstractContextManager):
    """Measures the machine in a background thread, and warns through `logging` above the thresholds of its config.

    `figures` holds the last sample: cpu_percent (of all cores), memory_percent (of the machine), rss_gib (this
    process), gpu_memory_gib and gpu_memory_percent (held by this process; CUDA only), batch_s (median of the last 50
    batches). The same kind of warning comes at most once a minute; each time it comes, this interval doubles, up to an
    hour.

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
        self._silence = {}  # kind of warning: (time from which it may come again, seconds of silence after that)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="ResourceMonitor", daemon=True)
        self._thread.start()

    def _watch(self):
        psutil.cpu_percent()  # reports the use since the previous call in this thread; this first call only starts it
        while not self._stop.wait(self._every):
            self.sample()

    @contextlib.contextmanager
    def batch(self):
        """Measure the time of a batch.  If the batch hangs, the warning appears while it is still running."""
        self._began = began = time.perf_counter()
        try:
            yield
        finally:
            seconds, self._began = time.perf_counter() - began, None
            if len(self._times) >= JUDGED_AFTER:
                self._slowest = max(self._slowest, seconds)
            self._times.append(seconds)

    def sample(self) -> None:
        """Take one sample, and warn if it is above a threshold."""
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
                self._warn(kind, f"{what} is {value:.0f} %{own}, above {name} {getattr(self.config, name):g}")

    def _judge_batch(self, median):
        slowest, self._slowest, began = self._slowest, 0.0, self._began
        if began is not None:
            slowest = max(slowest, time.perf_counter() - began)
        if slowest > max(SLOW_FROM_S, self.config.slow_batch_threshold * median):
            finding = f"a batch took {slowest:.2f} s, {slowest / median:.1f} times the median of {median:.2f} s"
            self._warn("slow_batch", f"{finding}, above slow_batch_threshold {self.config.slow_batch_threshold:g}")

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
