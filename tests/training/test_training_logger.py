"""TRMTrainingLogger: the content of a log after kills, resumes and a full disk."""

import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from trainers import read_metrics

from src.errors import UserError
from src.training import monitor
from src.training.curves import METRICS_FILE
from src.training.monitor import MonitoringConfig, ResourceMonitor, TRMTrainingLogger

ROOT = Path(__file__).resolve().parents[2]
LINES_ALONE = MonitoringConfig(tensorboard=False)


def logger(folder, resume_step=None, config=LINES_ALONE, **options):
    return TRMTrainingLogger(folder, resume_step, config, **options)


def scalars(folder):
    """{tag: [(step, value)]}, as TensorBoard reads the event files."""
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def raw_scalars(folder):
    """How often each (tag, step) is in the event files; a reader may hide duplicates."""
    events = [event for path in sorted(folder.glob("events*")) for event in EventFileLoader(str(path)).Load()]
    return Counter((value.tag, event.step) for event in events for value in event.summary.value)


class TestLines:
    def test_a_line_has_its_figures_and_a_time_stamp(self, tmp_path):
        before = datetime.now(UTC)
        with logger(tmp_path) as log:
            log.log(7, epoch=0.5, tokens=4096, loss=torch.tensor(2.5), lr=1e-3, grad_norm=torch.tensor(1.5))
            (record,) = read_metrics(tmp_path)  # readable immediately, while the run continues
        when = datetime.fromisoformat(record.pop("time"))
        assert when.utcoffset().total_seconds() == 0
        assert abs((when - before).total_seconds()) < 5
        assert record == {"step": 7, "epoch": 0.5, "tokens": 4096, "loss": 2.5, "lr": 1e-3, "grad_norm": 1.5}

    def test_absent_figures_are_left_out_and_those_not_finite_are_null(self, tmp_path):
        with logger(tmp_path) as log:
            log.log(1, valid_loss=float("nan"), grad_norm=torch.tensor(float("inf")), absent=None)
        (record,) = read_metrics(tmp_path)
        assert record["valid_loss"] is None and record["grad_norm"] is None and "absent" not in record

    def test_every_line_is_on_disk_when_the_process_is_killed(self, tmp_path):
        """The log of a process that kills itself without closing its files."""
        code = (
            "import os, signal, sys; from src.training.monitor import TRMTrainingLogger\n"
            "log = TRMTrainingLogger(sys.argv[1])\n"
            "for step in range(1, 6): log.log(step, loss=float(step))\n"
            "os.kill(os.getpid(), signal.SIGKILL)"
        )
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, timeout=60)
        assert done.returncode == -signal.SIGKILL
        assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
        assert scalars(tmp_path) == {"train/loss": [(step, float(step)) for step in range(1, 6)]}


class TestResume:
    def test_later_lines_are_cut(self, tmp_path):
        with logger(tmp_path) as log:
            for step in range(1, 6):
                log.log(step, loss=float(step))
                log.log(step, valid_loss=float(step))
        with logger(tmp_path, resume_step=3) as log:
            log.log(4, loss=40.0)
        assert [(r["step"], r.get("loss"), r.get("valid_loss")) for r in read_metrics(tmp_path)] == [
            *((1, 1.0, None), (1, None, 1.0), (2, 2.0, None), (2, None, 2.0), (3, 3.0, None), (3, None, 3.0)),
            (4, 40.0, None),
        ]

    @pytest.mark.parametrize(
        "half", [b'{"step": 3, "lo', b'{"step": 3, "loss": 3.0}', b"\0" * 40, "京".encode()[:2]], ids=str
    )
    @pytest.mark.parametrize("resume_step", [None, 2])
    def test_a_half_line_is_cut_and_never_joined_to_the_next(self, tmp_path, half, resume_step):
        with logger(tmp_path) as log:
            log.log(1, loss=1.0)
            log.log(2, loss=2.0)
        with (tmp_path / METRICS_FILE).open("ab") as file:
            file.write(half)
        assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2]
        with logger(tmp_path, resume_step) as log:
            log.log(3, loss=0.5)
        assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 0.5)]

    def test_a_start_afresh_leaves_nothing_of_a_run_without_checkpoint(self, tmp_path):
        with logger(tmp_path, config=MonitoringConfig()) as log:
            log.log(1, loss=1.0)
        with logger(tmp_path, resume_step=0, config=MonitoringConfig()):
            pass
        assert read_metrics(tmp_path) == [] and scalars(tmp_path) == {}

    @pytest.mark.parametrize("line", ["oops", '{"step": 2, "lr": "x"}', '{"step": "2"}'])
    def test_a_strange_line_in_the_middle_is_named_and_stays(self, tmp_path, capsys, line):
        text = f'{{"step": 1}}\n{line}\n{{"step": 3}}\n'
        (tmp_path / METRICS_FILE).write_text(text + '{"step": 4}\n')
        with logger(tmp_path, resume_step=3) as log:
            log.log(4, loss=1.0)
        assert (tmp_path / METRICS_FILE).read_text().startswith(text)
        assert [record["step"] for record in read_metrics(tmp_path)] == [1, 3, 4]
        assert capsys.readouterr().err.count("metrics.jsonl, line 2") == 1


class TestNotWorthARun:
    """A problem with one file of the log is reported, and the other files are still written."""

    @pytest.mark.parametrize("name", [METRICS_FILE, "samples.txt", "events.out.tfevents.1"])
    def test_a_folder_in_its_place(self, tmp_path, name, caplog):
        (tmp_path / name).mkdir()
        with logger(tmp_path, resume_step=1, config=MonitoringConfig()) as log:
            log.log(2, loss=1.0)
            log.sample("step 2: a text")
            log.draw(force=True)
        assert name in caplog.text and "the run continues" in caplog.text
        if name == METRICS_FILE:
            assert scalars(tmp_path)["train/loss"] == [(2, 1.0)]
        else:
            assert [record["step"] for record in read_metrics(tmp_path)] == [2]

    def test_bytes_that_are_no_text_stay_among_the_samples(self, tmp_path):
        path = tmp_path / "samples.txt"
        path.write_bytes(b"=== step 1: \xff\n=== step 2: late\n=== step " + b"9" * 5000 + b": far\n")
        with logger(tmp_path, resume_step=1) as log:
            log.sample("step 2: again")
        kept = b"=== step 1: \xff\n=== step " + b"9" * 5000 + b": far\n=== step 2: again\n"
        assert path.read_bytes() == kept

    def test_a_picture_that_fails(self, tmp_path, monkeypatch, caplog):
        def fail(*args):
            raise OverflowError("cannot convert float infinity to integer")

        monkeypatch.setattr("src.training.monitor.plot_learning_curve", fail)
        with logger(tmp_path) as log:
            log.draw(force=True)
        assert "the learning curve was not drawn: cannot convert" in caplog.text


class TestTensorBoard:
    def test_figures_have_their_section(self, tmp_path):
        with logger(tmp_path, config=MonitoringConfig()) as log:
            log.log(10, loss=2.0, lr=0.5)
            log.log(20, loss=1.0)
            log.log(20, valid_loss=1.5)
            log.log(20, final_valid_loss=1.25)
        assert scalars(tmp_path) == {
            "train/loss": [(10, 2.0), (20, 1.0)],
            "train/lr": [(10, 0.5)],
            "valid/loss": [(20, 1.5)],
            "final/loss": [(20, 1.25)],
        }

    def test_a_resumed_run_has_each_step_once_in_the_files_themselves(self, tmp_path):
        """Two kills, each some steps after the last checkpoint; the first one cuts a record in the middle."""
        with logger(tmp_path, config=MonitoringConfig()) as log:
            for step in range(1, 11):
                log.log(step, loss=float(step))
            log.log(10, valid_loss=10.0)  # no later line replaces it
        events = next(tmp_path.glob("events*"))
        events.write_bytes(events.read_bytes() + b"\x30\0\0\0\0\0\0\0abc")
        with logger(tmp_path, resume_step=6, config=MonitoringConfig()) as log:
            for step in range(7, 10):
                log.log(step, loss=-float(step))
        with logger(tmp_path, resume_step=8, config=MonitoringConfig()) as log:
            log.log(9, loss=90.0)
        expected = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 5.0), (6, 6.0), (7, -7.0), (8, -8.0), (9, 90.0)]
        assert scalars(tmp_path) == {"train/loss": expected}
        assert raw_scalars(tmp_path) == {("train/loss", step): 1 for step in range(1, 10)}

    def test_it_continues_the_events_of_a_summary_writer(self, tmp_path):
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(tmp_path)) as writer:
            for step in (1, 2, 3):
                writer.add_scalar("train/loss", float(step), step)
        with logger(tmp_path, resume_step=2, config=MonitoringConfig()) as log:
            log.log(3, loss=30.0)
        assert sorted(scalars(tmp_path)["train/loss"]) == [(1, 1.0), (2, 2.0), (3, 30.0)]

    def test_none_without(self, tmp_path):
        with logger(tmp_path) as log:
            log.log(1, loss=1.0)
        assert [path.name for path in tmp_path.iterdir()] == [METRICS_FILE]


@pytest.fixture
def file_limit():
    """file_limit(n): no file of this process can grow beyond n bytes; file_limit(None) removes the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft if size is None else size, hard))

    yield limit
    limit(None)


class TestFullDisk:
    def test_lines_are_lost_whole_and_told_once(self, tmp_path, file_limit, caplog):
        with logger(tmp_path, config=MonitoringConfig()) as log:
            log.log(1, loss=1.0)
            size = (tmp_path / METRICS_FILE).stat().st_size
            file_limit(size + size // 2)  # room for half of the next line
            for step in (2, 3):
                log.log(step, loss=2.0)
            assert (tmp_path / METRICS_FILE).stat().st_size == size
            file_limit(None)
            log.log(4, loss=4.0)
        assert [r["step"] for r in read_metrics(tmp_path)] == [1, 4]
        assert scalars(tmp_path)["train/loss"][0] == (1, 1.0) and scalars(tmp_path)["train/loss"][-1] == (4, 4.0)
        lines = [r.getMessage() for r in caplog.records if METRICS_FILE in r.getMessage()]
        assert len(lines) == 1 and "File too large" in lines[0] and "the run continues" in lines[0]

    def test_a_log_that_cannot_begin_is_the_users_mistake(self, tmp_path):
        (tmp_path / "run").write_text("")
        with pytest.raises(UserError, match="cannot write the log in .*run: File exists"):
            logger(tmp_path / "run")

    def test_no_picture_is_a_warning(self, tmp_path, file_limit, caplog):
        with logger(tmp_path) as log:
            log.log(1, loss=1.0)
            file_limit(1000)
            log.draw("a run")
            file_limit(None)
        assert "the learning curve was not drawn" in caplog.text and not (tmp_path / "learning_curve.png").exists()


class TestDrawing:
    @pytest.fixture
    def drawings(self, monkeypatch):
        """The titles of the pictures drawn so far; drawing one takes 20 ms."""
        drawn = []

        def draw(folder, title):
            time.sleep(0.02)
            drawn.append(title)

        monkeypatch.setattr(monitor, "plot_learning_curve", draw)
        return drawn

    def test_its_cost_is_a_small_part_of_the_run(self, tmp_path, drawings):
        with logger(tmp_path) as log:
            for number in range(5):
                log.draw(str(number))
            assert drawings == ["0"]
            log.draw("the last", force=True)
            assert drawings == ["0", "the last"]

    def test_it_is_drawn_again_when_that_is_cheap(self, tmp_path, drawings, monkeypatch):
        monkeypatch.setattr(monitor, "DRAWING_SHARE", 0.5)
        with logger(tmp_path) as log:
            log.draw("0")
            time.sleep(0.05)
            log.draw("1")
        assert drawings == ["0", "1"]


class TestWandb:
    def test_missing_is_one_line_with_a_hint(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
        with pytest.raises(UserError, match=r"wandb_project is trm, but wandb is missing: pip install wandb") as caught:
            logger(tmp_path, config=MonitoringConfig(wandb_project="trm"))
        assert "\n" not in str(caught.value)

    @pytest.mark.slow
    def test_offline_writes_its_record_and_a_resume_keeps_its_id(self, tmp_path, monkeypatch):
        wandb = pytest.importorskip("wandb")
        monkeypatch.setenv("WANDB_MODE", "offline")
        config = MonitoringConfig(tensorboard=False, wandb_project="trm")
        ids = []
        for resume_step in (None, 1):
            with logger(tmp_path, resume_step, config) as log:
                log.log(1 + (resume_step or 0), loss=1.0)
                ids.append(wandb.run.id)
        assert ids[0] == ids[1]
        files = list(tmp_path.glob(f"wandb/offline-run-*/run-{ids[0]}.wandb"))
        assert files and all(path.stat().st_size > 0 for path in files)


@pytest.fixture
def watched():
    """A monitor that has already taken one sample."""
    with ResourceMonitor(every=3600) as watched:
        watched.sample()
        yield watched


def test_the_machines_figures_are_logged_once_per_step(tmp_path, watched):
    with logger(tmp_path, config=MonitoringConfig(), monitor=watched) as log:
        log.log(1, loss=1.0)
        log.log(1, valid_loss=1.5)
        log.log(2, loss=0.5)
    lines = read_metrics(tmp_path)
    assert [line.get("rss_gib") for line in lines] == [watched.figures["rss_gib"], None, watched.figures["rss_gib"]]
    assert [step for step, _ in scalars(tmp_path)["system/rss_gib"]] == [1, 2]


def test_a_line_costs_little(tmp_path, watched):
    """The cost is far below 3 % of a step of 100 ms, the limit for all logging."""
    figures = {name: 1.5 for name in "epoch tokens loss ce_loss act_loss bits_per_byte lr grad_norm".split()}
    with logger(tmp_path, config=MonitoringConfig(), monitor=watched) as log:
        times = []
        for step in range(200):
            start = time.perf_counter()
            log.log(step, **figures)
            times.append(time.perf_counter() - start)
    assert sorted(times)[100] < 1e-3
    assert len(read_metrics(tmp_path)) == 200
